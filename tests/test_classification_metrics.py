"""Metrics against cases counted by hand, and the membership inference attack against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor, nn

from salun.attacks import ATTACKS, requested
from salun.classification.attacks.mia import called_non_member, features, fitted_attack
from salun.classification.data import ImageData
from salun.classification.metrics import confusion, evaluate_classifier, gap_to_retrain
from salun.classification.predictions import Predicted
from salun.classification.splits import Split
from salun.classification.task import Task
from salun.classification.unlearn_options import UnlearnOptions
from salun.errors import DataError, TrainingError

P = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
Y = np.array([0, 1, 0, 2])


def test_features_match_song_and_mittal() -> None:
    found = features(Predicted(P, Y))
    assert found["confidence"].ravel().tolist() == [0.7, 0.2, 1.0, 0.0]
    assert found["correctness"].ravel().tolist() == [1, 0, 1, 0]
    assert np.array_equal(found["probability"], P)
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert found["entropy"].ravel() == pytest.approx([entropy, entropy, 0, 0])
    right = -0.3 * math.log(0.7) - 0.2 * math.log(0.8) - 0.1 * math.log(0.9)
    wrong = -0.8 * math.log(0.2) - 0.7 * math.log(0.3) - 0.1 * math.log(0.9)
    modified = found["modified_entropy"].ravel()
    assert modified[:3] == pytest.approx([right, wrong, 0])
    assert modified[3] > 100  # sure and wrong: without bound, where the plain entropy is 0


def test_mia_is_an_rbf_svc_with_c_3_and_gamma_auto() -> None:
    random = np.random.default_rng(0)
    members, others, forgotten = (
        random.normal(1, 1, (60, 2)),
        random.normal(-1, 1, (50, 2)),
        random.normal(0, 1, (40, 2)),
    )
    svc = SVC(C=3, gamma="auto", kernel="rbf").fit(np.r_[members, others], [1] * 60 + [0] * 50)
    found = called_non_member(members, others, forgotten)
    assert np.array_equal(found, svc.predict(forgotten) == 0)
    assert 0 < found.sum() < 40


def test_mias_attack_on_features_that_repeat_decides_as_one_on_all_rows() -> None:
    random = np.random.default_rng(0)
    members, others = ((random.random((n, 1)) < p).astype(float) for n, p in ((900, 0.9), (800, 0.6)))
    svc = SVC(C=3, gamma="auto", kernel="rbf").fit(np.r_[members, others], [1] * 900 + [0] * 800)
    attack, points = fitted_attack(members, others), np.array([[0.0], [1.0]])
    assert len(attack.support_) <= 4 < len(svc.support_)
    np.testing.assert_allclose(attack.decision_function(points), svc.decision_function(points), atol=1e-3)
    assert attack.predict(points).tolist() == svc.predict(points).tolist() == [0, 1]


class Recites(nn.Module):
    """Answers what each picture's first pixel says, as surely as the second says."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(1)[:, 0].round().long(), x.flatten(1)[:, 1]
        return nn.functional.one_hot(first, 3) * second[:, None]


def recited(answers: list[int], sureness: list[int], labels: list[int], split: Split) -> Task:
    images = torch.tensor([[a, s] for a, s in zip(answers, sureness, strict=True)], dtype=torch.uint8).view(-1, 1, 1, 2)
    preset = {"mean": [0.0], "std": [1 / 255], "augment": "none"}  # so that pixels come through as they are
    data = ImageData("recited", images, torch.tensor(labels), ("a", "b", "c"), preset=preset)
    return Task(Recites(), data, split, UnlearnOptions(), Recites)


def split_of(forget: range, retain: range, test: range) -> Split:
    rows = [torch.tensor(list(part), dtype=torch.int64) for part in (forget, retain, test)]
    return Split(torch.cat(rows[:2]), rows[0][:0], rows[2], rows[0], rows[1], "x")


def test_accuracies_are_counted_on_their_rows() -> None:
    labels = [0, 1, 2, 0] + [0, 1, 2, 0, 1, 2] + [0, 1, 2, 0, 1]
    answers = [0, 2, 1, 1] + [0, 1, 2, 0, 1, 0] + [0, 1, 2, 1, 0]
    task = recited(answers, [9] * 15, labels, split_of(range(4), range(4, 10), range(10, 15)))
    found = evaluate_classifier(task)
    assert (found["UA"]["value"], found["UA"]["n"]) == (75, 4)
    assert (found["RA"]["value"], found["RA"]["n"]) == (pytest.approx(100 * 5 / 6), 6)
    assert (found["TA"]["value"], found["TA"]["n"]) == (60, 5)
    assert found["UA"]["low"] < 75 < found["UA"]["high"]
    assert found["confusion"]["forget"] == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]


def test_test_accuracy_excludes_a_forgotten_class() -> None:
    labels = [2, 2] + [0, 1, 0, 1] + [2, 2, 0, 1]
    answers = [0, 0] + [0, 1, 0, 1] + [0, 0, 0, 1]
    found = evaluate_classifier(recited(answers, [9] * 10, labels, split_of(range(2), range(2, 6), range(6, 10))))
    assert (found["TA"]["value"], found["TA"]["n"]) == (100, 2)


def test_mia_learns_members_from_retain_rows() -> None:
    """Members are sure (and right), test rows are not; of four forget rows one is as unsure as the test."""
    sureness = [9, 9, 9, 0] + [9] * 36 + [0] * 6
    labels = [0] * len(sureness)
    split = split_of(range(4), range(4, 40), range(40, 46))
    found = evaluate_classifier(recited([0] * len(sureness), sureness, labels, split))
    assert found["MIA"]["value"] == 25
    assert found["MIA"] == found["mia_features"]["confidence"]
    assert set(found["mia_features"]) == {
        "confidence", "entropy", "modified_entropy", "correctness", "probability",
    }  # fmt: skip
    assert found["mia_features"]["entropy"]["value"] == 25
    assert found["mia_features"]["correctness"]["value"] in (0, 100)  # all are right: it can tell nobody apart


@pytest.mark.parametrize("stored", [[0] * 40 + [1] * 40, [0, 1] * 40])
def test_mia_draws_members_of_every_class(
    stored: list[int],
) -> None:
    """The model is surer of members (0.999 of class 0, 0.58 of class 1) than of test rows (0.33), and so of the forget
    set: all of it are members. Knowing members of class 0 alone, the attack would take class 1 for no members.
    """
    labels = [0, 1] * 10 + stored + [0, 1] * 20
    sureness = [(9, 1)[y] for y in labels[:100]] + [0] * 40
    found = evaluate_classifier(recited(labels, sureness, labels, split_of(range(20), range(20, 100), range(100, 140))))
    assert found["MIA"]["value"] == 0


def test_members_are_drawn_by_the_seed() -> None:
    predicted = Predicted(np.eye(3)[np.arange(300) // 100], np.arange(300) // 100)
    one, two, other = (predicted.drawn(60, seed) for seed in (0, 0, 1))
    assert np.array_equal(one.y, two.y) and not np.array_equal(one.y, other.y)
    assert np.bincount(one.y).min() >= 10  # 20 of each class expected; 3.3 deviations below
    assert np.array_equal(one.p.argmax(1), one.y)  # rows stay whole
    assert len(predicted.drawn(1000, 0).y) == 300


def test_gaps_are_absolute_and_averaged_over_four() -> None:
    def metrics(*values: float) -> dict[str, dict[str, float]]:
        return {name: {"value": v} for name, v in zip(("UA", "RA", "TA", "MIA"), values, strict=True)}

    found = gap_to_retrain(metrics(10, 90, 80, 30), metrics(20, 100, 90, 10))
    assert found["gap"] == {"UA": 10, "RA": 10, "TA": 10, "MIA": 20}
    assert found["gap_mean"] == 12.5
    assert found["ToW"] == pytest.approx(0.9**3)
    same = gap_to_retrain(metrics(1, 2, 3, 4), metrics(1, 2, 3, 4))
    assert (same["gap_mean"], same["ToW"]) == (0, 1)


def test_requested_attacks_are_those_the_options_ask_for() -> None:
    assert requested(UnlearnOptions()) == ["mia"]
    options = UnlearnOptions(relearn=5, train_lr=0.1)
    assert requested(options) == ["mia", "relearning"]
    for attack in ATTACKS["classification"].values():
        assert isinstance(attack.settings_of(options), attack.options)


def test_a_confusion_counts_true_by_predicted() -> None:
    assert confusion(Predicted(P, Y)) == [[2, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_an_empty_forget_set_is_an_error() -> None:
    task = recited([0] * 4, [1] * 4, [0] * 4, split_of(range(0), range(2), range(2, 4)))
    with pytest.raises(DataError, match="forget set is empty"):
        evaluate_classifier(task)


def test_predictions_that_are_not_finite_are_an_error() -> None:
    class Apart(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 3), float("nan"))

    task = recited([0] * 4, [1] * 4, [0] * 4, split_of(range(1), range(1, 2), range(2, 4)))
    task.model = Apart()
    with pytest.raises(TrainingError, match="diverged"):
        evaluate_classifier(task)
