"""Membership inference: does an attack classify the forget set as images that were never trained on?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from salun.classification.options import TaskOptions
from salun.classification.predictions import Predicted, SplitPredictions
from salun.errors import DataError
from salun.evaluation.estimate import Estimate
from salun.extras import install_command

if TYPE_CHECKING:
    from sklearn.svm import SVC

FEATURES = ("confidence", "entropy", "modified_entropy", "correctness", "probability")


@dataclass(frozen=True)
class MiaOptions:
    """seed: of the draw of members. feature: the one of `FEATURES` that the reported attack uses."""

    seed: int
    feature: str = "confidence"


def settings(options: TaskOptions) -> MiaOptions:
    """The options of the attack, which belongs to every run."""
    return MiaOptions(options.seed)


def features(predicted: Predicted) -> dict[str, np.ndarray]:
    """The features of predictions that an attack can use, each (n, d).

    confidence: p_y. entropy: −Σ p log p. modified_entropy: −(1 − p_y) log p_y − Σ_{i≠y} p_i log(1 − p_i) (Song & Mittal
    2021), 0 for a certain and correct prediction and infinite for a certain and wrong one. correctness: 1 or 0.
    probability: all of p.
    """
    p, rows = predicted.p, np.arange(len(predicted.p))
    p_y = p[rows, predicted.y]
    log, log_not = np.log(p.clip(1e-30)), np.log((1 - p).clip(1e-30))
    others = p * log_not
    others[rows, predicted.y] = 0
    values = {
        "confidence": p_y,
        "entropy": -(p * log).sum(1),
        "modified_entropy": -(1 - p_y) * log[rows, predicted.y] - others.sum(1),
        "correctness": predicted.correct.astype(np.float64),
        "probability": p,
    }
    return {name: value.reshape(len(p), -1) for name, value in values.items()}


def called_non_member(members: np.ndarray, others: np.ndarray, forgotten: np.ndarray) -> np.ndarray:
    """Whether an SVC (RBF, C = 3, gamma auto), fitted to members and others, calls each forgotten row a non-member.

    Args:
        members, others, forgotten: Features (n, d) of rows that the model was trained on, of rows that it was not, and
            of D_f.

    Raises:
        DataError: scikit-learn is not installed.
    """
    non_members: np.ndarray = fitted_attack(members, others).predict(forgotten) == 0
    return non_members


def fitted_attack(members: np.ndarray, others: np.ndarray) -> SVC:
    """The SVC of `called_non_member`. Features that repeat, as correctness, which has two values, are fitted once and
    weighted by their count: the same problem, with a few points in place of thousands.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise DataError("the MIA needs scikit-learn", advice=install_command("classification")) from error
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    x, y = np.concatenate([members, others]), np.r_[np.ones(len(members)), np.zeros(len(others))]
    unique, counts = np.unique(np.column_stack([x, y]), axis=0, return_counts=True)
    if 2 * len(unique) <= len(x):
        return attack.fit(unique[:, :-1], unique[:, -1], sample_weight=counts)
    return attack.fit(x, y)


def infer_membership(target: SplitPredictions, options: MiaOptions) -> dict[str, Any]:
    """The percentage of D_f called non-member by an attack on one feature, and on each of the others.

    The attack is fitted to the test rows and as many rows of D_r (all, if there are fewer), drawn by the seed. The
    authors take the first rows of D_r, which are of few classes if a data set is stored class by class.

    Returns:
        {"MIA": the reported attack's value, "mia_features": feature → value}, as JSON.
    """
    members = target.retain.drawn(len(target.test.y), options.seed)
    member, other, forgotten = features(members), features(target.test), features(target.forget)
    values = {
        name: Estimate.percentage(called_non_member(member[name], other[name], forgotten[name])).as_json()
        for name in FEATURES
    }
    return {"MIA": values[options.feature], "mia_features": values}
