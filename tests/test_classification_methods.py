"""Each method does what its paper says, on problems small enough to know the answer."""

from __future__ import annotations

import importlib
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salun.classification.attacks.relearning import relearn, settings
from salun.classification.curvature import absolute_gradients, gradient_sum, inverse_fisher_product, squared_gradients
from salun.classification.data import ImageData
from salun.classification.masks import find_mask
from salun.classification.methods.boundary import nearest_labels
from salun.classification.methods.delete import without_own_class
from salun.classification.methods.relabeling import draw_labels, relabeled
from salun.classification.methods.unsir import error_maximizing_noise
from salun.classification.predictions import SplitPredictions
from salun.classification.splits import Split
from salun.classification.task import Batch, Task, batches_of, minimize, retain_batches
from salun.classification.unlearn_options import UnlearnOptions
from salun.errors import ConfigError, TrainingError
from salun.masking.mask import Mask
from salun.methods import METHODS as REGISTRY
from salun.methods import Method

METHODS = REGISTRY["classification"]
ROOT = Path(__file__).resolve().parents[1]
TRAINS = [name for name, method in METHODS.items() if method.trains]


def run(name: str, task: Task) -> None:
    METHODS[name].call(task, task.options)


def problem(method: str = "salun", normalised: bool = False, train: bool = True, **options: object) -> Task:
    """90 images of 1×4×4 in three classes that overlap, rows 0 to 11 to be forgotten (all 20 of class a by methods of
    whole classes), and a model that knows them.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    centres = torch.randint(90, 166, (3, 1, 4, 4), generator=generator)
    images = (centres[labels] + torch.randint(-90, 90, (90, 1, 4, 4), generator=generator)).clamp(0, 255)
    preset = {"mean": [0.5], "std": [0.25], "augment": "none"}
    data = ImageData("three", images.to(torch.uint8), labels, ("a", "b", "c"), preset=preset)
    rows = torch.arange(90)
    forgotten = labels[:60] == 0 if METHODS[method].whole_classes else rows[:60] < 12
    split = Split(rows[:60], rows[60:65], rows[65:], rows[:60][forgotten], rows[:60][~forgotten], data.digest, "rows")

    def fresh() -> nn.Module:
        torch.manual_seed(1)
        norm = [nn.BatchNorm1d(24)] if normalised else []
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), *norm, nn.ReLU(), nn.Linear(24, 3))

    settings = {"epochs": 5, "lr": 0.05, "batch_size": 16, "train_epochs": 20, "train_lr": 0.1, "train_batch_size": 16}
    task = Task(fresh(), data, split, UnlearnOptions(method=method, **{**settings, **options}), fresh)  # type: ignore[arg-type]
    if train:
        learnt = replace(task, split=split.without_forget_set())
        run("retrain", learnt)
        task.model = learnt.model
    if METHODS[method].takes_mask:
        task.options = replace(task.options, mask=task.options.mask or METHODS[method].mask)
    if METHODS[method].trains:
        task.mask, _ = find_mask(task)
    task.history.clear()
    return task


def loss_on(task: Task, rows: Tensor, model: nn.Module | None = None) -> float:
    (model or task.model).eval()
    with torch.no_grad():
        return float(F.cross_entropy(task.logits(task.data.images_of(rows), model), task.labels(rows)))


def weights(task: Task) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in task.parameters.items()}


# -- every method --------------------------------------------------------------------------------------------------


def test_the_registry_is_filled_without_torch() -> None:
    program = "import sys, salun.methods, salun.classification.unlearn_options; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("method", [m for methods in REGISTRY.values() for m in methods.values()], ids=lambda m: m.name)
def test_what_the_registry_names_exists(method: Method) -> None:
    kinds = {"classification": UnlearnOptions}
    for path in filter(None, (method.run, method.resolve)):
        module, _, name = path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    if method.task in kinds:
        options = kinds[method.task](method=method.name)
        assert method.options_of(options) == method.options()
        assert method.tunes is None or hasattr(options, method.tunes)
        assert all(hasattr(options, name) for name in method.defaults)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_moves_weights_and_gives_the_same_bits_for_the_same_seed(name: str) -> None:
    first, second = problem(name, ssd_alpha=1.5, lfssd_alpha=1.5), problem(name, ssd_alpha=1.5, lfssd_alpha=1.5)
    before = weights(first)
    for task in (first, second):
        run(name, task)
    after = weights(first)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(after[k], v) for k, v in weights(second).items())
    assert all(torch.isfinite(v).all() for v in after.values())
    assert not first.model.training


@pytest.mark.parametrize("mode", ["saliency", "saliency-ratio", "saliency-by-layer", "shuffled", "random"])
@pytest.mark.parametrize("name", [n for n in TRAINS if n != "salun-soft"])
def test_weights_outside_the_mask_stay_bit_identical(name: str, mode: str) -> None:
    task = problem(name, mask=mode, density=0.3)
    before = weights(task)
    run(name, task)
    assert task.mask is not None
    for key, value in weights(task).items():
        inside = task.mask.dense(key)
        assert torch.equal(value[~inside], before[key][~inside]), key
    assert task.mask.selected == int(0.3 * task.mask.total)


@pytest.mark.parametrize("name", [n for n in TRAINS if n not in ("ga", "be", "bs", "jit")])
def test_methods_that_train_leave_the_model_fit_for_the_rest(name: str) -> None:
    task = problem(name, lr=0.02)
    run(name, task)
    rows = task.split.retain
    with torch.no_grad():
        right = task.logits(task.data.images_of(rows)).argmax(1) == task.labels(rows)
    assert right.float().mean() > 0.95


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize("kind", ["frozen", "updated"])
def test_batchnorm_statistics_move_only_where_asked(name: str, kind: str) -> None:
    task = problem(name, normalised=True, batchnorm=kind, lr=0.001)
    before = {k: v.clone() for k, v in task.model.named_buffers()}
    run(name, task)
    moved = any(not torch.equal(before[k], v) for k, v in task.model.named_buffers())
    assert moved == (kind == "updated")


@pytest.mark.parametrize("name", ["ga", "salun", "be", "bs", "scrub"])
def test_one_row_can_be_forgotten_with_batchnorm_updated(name: str) -> None:
    """A batch of one picture has no variance to measure: the statistics that BatchNorm knows serve it."""
    task = problem(name, normalised=True, batchnorm="updated", lr=0.001)
    task.split = replace(task.split, forget=task.split.forget[:1], retain=task.split.train[1:])
    before = weights(task)
    run(name, task)
    assert any(not torch.equal(value, before[key]) for key, value in weights(task).items())


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    task = problem("ga", lr=10.0, epochs=300)
    with pytest.raises(TrainingError, match=r"the loss is nan|not finite"):
        run("ga", task)


def test_unlearning_takes_other_batches_than_the_original_did() -> None:
    """The stage is part of what random numbers depend on, so that batches of a seed do not come twice."""
    seen: dict[str, list[list[int]]] = {}
    for stage in ("training", "unlearning"):
        task = problem("ft")

        def loss(x: Tensor, batch: Batch, epoch: int, into: str = stage, of: Task = task) -> Tensor:
            seen.setdefault(into, []).append(batch.rows.tolist())
            return F.cross_entropy(of.logits(x), batch.labels)

        minimize(task, retain_batches(task), loss, epochs=1, stage=stage)
    each = [sorted(row for batch in batches for row in batch) for batches in seen.values()]
    assert each[0] == each[1]
    assert seen["training"] != seen["unlearning"]


def test_a_last_single_row_joins_the_batch_before_it() -> None:
    rows, labels = torch.arange(10, 19), torch.arange(9)
    found = list(batches_of(rows, labels, 4, "retain", torch.Generator().manual_seed(0)))
    assert [len(b.rows) for b in found] == [4, 5]
    assert torch.equal(torch.cat([b.rows for b in found]).sort().values, rows)
    assert all(torch.equal(b.rows - 10, b.labels) for b in found)  # each row with its own label


# -- Retrain, FT, GA, ℓ1-sparse ------------------------------------------------------------------------------------


def test_retrain_never_sees_the_forget_set() -> None:
    """With other pictures in the forget rows it gives the very same bits, whatever model it is started from."""
    one, two = problem("retrain"), problem("retrain", train=False)
    images = two.data.images.clone()
    images[two.split.forget] = 0
    two.data = replace(two.data, images=images)
    for task in (one, two):
        run("retrain", task)
    assert all(torch.equal(v, weights(two)[k]) for k, v in weights(one).items())


def test_fine_tuning_sees_the_retain_set_alone() -> None:
    task = problem("ft")
    seen = torch.cat([b.rows for b in retain_batches(task)(0, torch.Generator().manual_seed(0))])
    assert torch.equal(seen.sort().values, task.split.retain)
    before = loss_on(task, task.split.retain)
    run("ft", task)
    assert loss_on(task, task.split.retain) < before


def test_gradient_ascent_raises_the_forget_loss() -> None:
    task = problem("ga", lr=0.3)
    before = loss_on(task, task.split.forget)
    run("ga", task)
    assert loss_on(task, task.split.forget) > 2 * before


def test_one_step_of_gradient_ascent_is_up_the_gradient() -> None:
    task = problem("ga", epochs=1, lr=0.5, batch_size=12, momentum=0.0, weight_decay=0.0)
    before, gradient = weights(task), gradient_sum(task, task.split.forget)
    run("ga", task)
    for name, value in weights(task).items():
        torch.testing.assert_close(value, before[name] + 0.5 * gradient[name] / 12)


def test_one_step_of_neggrad_plus_is_down_the_retain_sets_gradient_and_up_the_forget_sets() -> None:
    """θ ← θ − η∇(β·CE(D_r) − (1 − β)·CE(D_f)), for a batch of either; the two ends are FT's and GA's step."""
    for beta in (0.7, 0.0, 1.0):
        options = {"epochs": 1, "lr": 0.5, "batch_size": 48, "momentum": 0.0, "weight_decay": 0.0}
        task = problem("neggrad-plus", neggrad_beta=beta, **options)
        before = weights(task)
        of_forget, of_retain = (gradient_sum(task, rows) for rows in (task.split.forget, task.split.retain))
        run("neggrad-plus", task)
        for name, value in weights(task).items():
            step = beta * of_retain[name] / 48 - (1 - beta) * of_forget[name] / 12
            torch.testing.assert_close(value, before[name] - 0.5 * step)


def test_an_epoch_of_neggrad_plus_has_all_of_the_retain_set_once_and_the_forget_set_as_often_as_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[Batch]] = []
    monkeypatch.setattr(
        "salun.classification.task.minimize",
        lambda task, batches, loss: seen.append(list(batches(0, torch.Generator().manual_seed(0)))),
    )
    task = problem("neggrad-plus", batch_size=10, train=False)
    run("neggrad-plus", task)
    rows = torch.cat([batch.rows for batch in seen[0]])
    of_forget = torch.isin(rows, task.split.forget)
    assert sorted(rows[~of_forget].tolist()) == task.split.retain.tolist()
    assert {*rows[of_forget].tolist()} == {*task.split.forget.tolist()}
    assert all(torch.equal(task.labels(batch.rows), batch.labels) for batch in seen[0])


def test_l1_sparse_makes_weights_small_with_a_penalty_that_ends() -> None:
    norms = []
    for gamma in (0.0, 0.01):
        task = problem("l1-sparse", gamma=gamma, epochs=10, weight_decay=0.0)
        run("l1-sparse", task)
        norms.append(sum(float(w.abs().sum()) for w in weights(task).values()))
    assert norms[1] < 0.9 * norms[0]


# -- RL, SalUn -----------------------------------------------------------------------------------------------------


def test_the_random_labels_are_every_class_but_the_own() -> None:
    own = torch.arange(5).repeat(400)
    drawn = draw_labels(own, 5, "other", torch.Generator().manual_seed(0))
    assert not (drawn == own).any()
    counts = torch.bincount((drawn - own) % 5, minlength=5)
    assert counts[0] == 0
    assert counts[1:].min() > 425  # of 500 expected each; five deviations below
    anything = draw_labels(own, 5, "any", torch.Generator().manual_seed(0))
    assert 0.15 < float((anything == own).float().mean()) < 0.25


def test_labels_are_drawn_afresh_each_epoch_and_retain_rows_keep_theirs() -> None:
    task = problem("rl", order="forget-first")
    drawn = []
    for epoch in range(2):
        batches = list(
            relabeled(task, METHODS["rl"].options_of(task.options))(epoch, torch.Generator().manual_seed(epoch))
        )
        parts = [b.part for b in batches]
        assert parts == sorted(parts)  # the forget set first
        by_row = {int(r): int(y) for b in batches for r, y in zip(b.rows, b.labels, strict=True)}
        assert sorted(by_row) == task.split.train.tolist()
        assert all(by_row[r] == int(task.data.labels[r]) for r in task.split.retain.tolist())
        assert all(by_row[r] != int(task.data.labels[r]) for r in task.split.forget.tolist())
        drawn.append([by_row[r] for r in task.split.forget.tolist()])
    assert drawn[0] != drawn[1]


def test_mixed_order_puts_both_sets_into_one_batch() -> None:
    task = problem("rl", order="mixed")
    batches = list(relabeled(task, METHODS["rl"].options_of(task.options))(0, torch.Generator().manual_seed(0)))
    assert {b.part for b in batches} == {"both"}
    assert any(bool((b.rows < 12).any() and (b.rows >= 12).any()) for b in batches)


def test_salun_is_random_labels_under_the_saliency_mask() -> None:
    """Full density gives RL's bits, and the mask holds the largest |∇CE(D_f)|."""
    salun, plain = problem("salun", density=1.0), problem("rl")
    for task, name in ((salun, "salun"), (plain, "rl")):
        run(name, task)
    assert all(torch.equal(v, weights(plain)[k]) for k, v in weights(salun).items())
    masked = problem("salun", density=0.25)
    assert masked.mask is not None
    scores = {name: g.abs() for name, g in gradient_sum(masked, masked.split.forget).items()}
    assert masked.mask == Mask.from_scores(scores, 0.25)


def test_salun_raises_the_forget_loss_more_than_the_retain_loss() -> None:
    task = problem("salun", lr=0.02)
    before = loss_on(task, task.split.forget), loss_on(task, task.split.retain)
    run("salun", task)
    after = loss_on(task, task.split.forget), loss_on(task, task.split.retain)
    assert after[0] - before[0] > 2 * (after[1] - before[1]) > 0


def test_salun_soft_moves_less_than_random_labels() -> None:
    soft, plain = problem("salun-soft", density=0.1), problem("rl")
    before = weights(soft)
    for task, name in ((soft, "salun-soft"), (plain, "rl")):
        run(name, task)
    moved = [sum(float((v - before[k]).abs().sum()) for k, v in weights(t).items()) for t in (soft, plain)]
    assert moved[0] < moved[1]


# -- boundary ------------------------------------------------------------------------------------------------------


def linear(rows: list[list[float]], inputs: int = 16) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, len(rows)))
    head = model[1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([r[0] for r in rows]))
    return model


def test_the_nearest_class_is_the_runner_up_and_never_the_own() -> None:
    """A model that always answers 0, then 2, then 1: class 0 goes next to 2, the others to 0."""
    task = problem("bs", train=False)
    task.model = linear([[3.0], [1.0], [2.0]])
    own = task.labels(task.split.forget)
    assert nearest_labels(task, 0.1).tolist() == [2 if y == 0 else 0 for y in own.tolist()]


def brightness(bounds: list[float]) -> nn.Module:
    """A model of the first pixel x (1 is white): class k is likeliest from bounds[k − 1] on, the slopes rising."""
    slopes = torch.tensor([0.0, 10.0, 20.0])
    biases = torch.tensor([0.0, -10 * bounds[0], -10 * (bounds[0] + bounds[1])])
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    head = model[1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:, 0] = slopes * 0.25  # of normalised pixels (x − 0.5) / 0.25
        head.bias.copy_(slopes * 0.5 + biases)
    return model


def at(value: int, label: int) -> Task:
    """The problem with every picture of one grey and one label."""
    task = problem("bs", train=False)
    images, labels = torch.full_like(task.data.images, value), torch.full_like(task.data.labels, label)
    task.data = replace(task.data, images=images, labels=labels)
    task.model = brightness([0.5, 0.7])
    return task


@pytest.mark.parametrize(("epsilon", "nearest"), [(0.02, 1), (0.25, 2)])
def test_the_nearest_class_is_looked_for_across_the_boundary_as_far_as_epsilon(epsilon: float, nearest: int) -> None:
    """From 0.49, of class 0, a step of 0.02 leads to class 1, from 0.5 on, one of 0.25 to class 2, from 0.7 on."""
    task = at(125, label=0)
    assert set(nearest_labels(task, epsilon).tolist()) == {nearest}


def test_the_step_across_the_boundary_ends_at_white() -> None:
    """From 0.9 of class 0 a step of 0.5 would lead to 1.4, where class 2 begins at 1.2; held at white it is class 1."""
    task = at(230, label=0)
    task.model = brightness([0.95, 1.2])
    assert set(nearest_labels(task, 0.5).tolist()) == {1}


def test_boundary_shrink_moves_the_forget_set_next_door() -> None:
    task = problem("bs", epochs=20)
    wanted = nearest_labels(task, 0.1)
    run("bs", task)
    with torch.no_grad():
        found = task.logits(task.data.images_of(task.split.forget)).argmax(1)
    assert (found == wanted).float().mean() > 0.9


def test_boundary_expanding_prunes_the_extra_class_and_keeps_the_shape() -> None:
    task = problem("be", lr=0.01)
    shapes, before = {k: v.shape for k, v in weights(task).items()}, loss_on(task, task.split.forget)
    run("be", task)
    assert {k: v.shape for k, v in weights(task).items()} == shapes
    assert loss_on(task, task.split.forget) > before
    assert task.history[-1]["forget"] < task.history[0]["forget"]  # the extra class took them


# -- Fisher and influence ------------------------------------------------------------------------------------------


def test_the_fisher_information_is_the_closed_form_of_a_linear_model() -> None:
    """For softmax regression ∂ log p(y)/∂W = (e_y − p) xᵀ, and so its expected square is (p − p²)_k x_j²."""
    task = problem("ff")
    torch.manual_seed(2)
    task.model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    rows = task.split.retain
    x = task.data.images_of(rows).flatten(1)
    p = task.model(x).softmax(1).detach()
    found = squared_gradients(task, rows, "model")
    torch.testing.assert_close(found["1.weight"], ((p - p**2)[:, :, None] * x[:, None] ** 2).mean(0))
    torch.testing.assert_close(found["1.bias"], (p - p**2).mean(0))
    error = F.one_hot(task.labels(rows), 3) - p
    own = squared_gradients(task, rows, "labels")
    torch.testing.assert_close(own["1.weight"], (error[:, :, None] * x[:, None]).square().mean(0))


def test_fisher_forgetting_adds_noise_of_the_fourth_root() -> None:
    task = problem("ff", noise=0.01, ff_damping=1e-3)
    before, fisher = weights(task), squared_gradients(task, task.split.retain, "model")
    run("ff", task)
    drawn = torch.cat(
        [((v - before[k]) * (fisher[k] + 1e-3) ** 0.25 / 0.01).flatten() for k, v in weights(task).items()]
    )
    assert abs(float(drawn.mean())) < 4 / len(drawn) ** 0.5
    assert float(drawn.std()) == pytest.approx(1, abs=4 / (2 * len(drawn)) ** 0.5)


def test_fisher_forgettings_own_damping_does_not_drown_the_fisher_information() -> None:
    """By default nine weights in ten have more information than damping, so that their noise follows it; with IU's
    damping, which it had before, fewer than one in four has.
    """
    task = problem("ff")
    fisher = torch.cat([f.flatten() for f in squared_gradients(task, task.split.retain, "model").values()])
    used = fisher[fisher > 0]  # of a unit that is off for every picture there is none
    assert (used > task.options.ff_damping).float().mean() > 0.9
    assert (used > task.options.damping).float().mean() < 0.25


def test_the_inverse_is_the_one_that_woodfishers_recursion_gives() -> None:
    """F⁻¹_{j+1} = F⁻¹_j − F⁻¹_j g gᵀ F⁻¹_j / (m + gᵀ F⁻¹_j g) from F⁻¹_0 = I/λ (Singh & Alistarh 2020)."""
    torch.manual_seed(0)
    gradients, v = torch.randn(7, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    inverse = torch.eye(12, dtype=torch.float64) / 0.05
    for g in gradients:
        inverse = inverse - torch.outer(inverse @ g, inverse @ g) / (7 + g @ inverse @ g)
    torch.testing.assert_close(inverse_fisher_product(gradients, v, 0.05), inverse @ v)


def test_influence_unlearning_takes_the_step_of_the_formula() -> None:
    task = problem("iu", damping=0.1, gradients=1000)
    before, n, r = weights(task), 60, 48
    sums = [gradient_sum(task, rows) for rows in (task.split.forget, task.split.retain)]
    v = torch.cat([(sums[0][k] / n + (1 / n - 1 / r) * sums[1][k]).flatten() for k in before]).double()
    rows = []
    for row in task.split.retain:
        rows.append(torch.cat([g.flatten() for g in gradient_sum(task, row.view(1)).values()]).double())
    hessian = sum(torch.outer(g, g) for g in rows) / r + 0.1 * torch.eye(len(v), dtype=torch.float64)
    run("iu", task)
    moved = torch.cat([(value - before[k]).flatten() for k, value in weights(task).items()])
    torch.testing.assert_close(moved, torch.linalg.solve(hessian, v).float(), rtol=1e-3, atol=1e-5)


MEMORY = """
import sys
import torch
sys.path.insert(0, {root!r})
from tests import test_classification_methods as t
from salun.classification import curvature
from salun.compute.environment import peak_memory
curvature._ENTRIES = 1 << 20  # gradients come in small parts
task = t.problem("iu", train=False, gradients=48)
task.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 100_000), torch.nn.Linear(100_000, 3))
before = peak_memory()["cpu_bytes"]
t.run("iu", task)
print((peak_memory()["cpu_bytes"] - before) / (48 * 2_000_003 * 4))
"""


@pytest.mark.slow
def test_influence_unlearning_holds_its_gradients_once() -> None:
    """48 gradients of 2,000,003 weights are 384 MB; beside them some of the size of the weights. Twice would be 768."""
    root = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(root=root)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.6


def test_influence_unlearning_raises_the_forget_loss() -> None:
    task = problem("iu")
    before = loss_on(task, task.split.forget)
    run("iu", task)
    assert loss_on(task, task.split.forget) > before


def test_ssd_dampens_what_the_forget_set_needs_most() -> None:
    task = problem("ssd", ssd_alpha=1.2, ssd_lambda=0.5)
    of_forget = squared_gradients(task, task.split.forget, "labels")
    of_all = squared_gradients(task, task.split.train, "labels")
    before = weights(task)
    run("ssd", task)
    chosen = 0
    for name, value in weights(task).items():
        for i in range(value.numel()):
            f, d, old, new = (t.flatten()[i].item() for t in (of_forget[name], of_all[name], before[name], value))
            wanted = min(0.5 * d / f, 1) * old if f > 1.2 * d else old
            chosen += f > 1.2 * d
            assert new == pytest.approx(wanted, rel=1e-5), name
    assert chosen


def test_ssd_says_where_it_can_choose_nothing() -> None:
    """Of 12 in 60 no weight is more than 5 times as important for the forget set as for all."""
    with pytest.raises(
        ConfigError, match=r"ssd_alpha is 5, but for 12 of 60 samples no weight can be more than 5\.00 times"
    ):
        run("ssd", problem("ssd", ssd_alpha=5.0))


# -- SCRUB ---------------------------------------------------------------------------------------------------------


def test_scrub_leaves_the_teacher_on_the_forget_set_and_keeps_to_it_elsewhere() -> None:
    task = problem("scrub", epochs=15, max_epochs=10, lr=0.1)
    teacher = deepcopy(task.model)
    run("scrub", task)

    def divergence(rows: Tensor) -> float:
        x = task.data.images_of(rows)
        with torch.no_grad():
            return float(
                F.kl_div(
                    task.logits(x).log_softmax(1),
                    task.logits(x, teacher).log_softmax(1),
                    reduction="batchmean",
                    log_target=True,
                )
            )

    assert divergence(task.split.forget) > 3 * divergence(task.split.retain)
    assert ["forget" in row for row in task.history] == [False] + [True] * 10 + [False] * 4
    assert all("retain" in row for row in task.history)


def test_every_max_step_of_scrub_has_a_gradient() -> None:
    """Before any min step the student is its teacher: the divergence is 0, and so is its slope."""
    task = problem("scrub", epochs=2, max_epochs=1, lr=0.1, weight_decay=0.0)
    run("scrub", task)
    assert [row.get("forget", 0) < 0 for row in task.history] == [False, True]  # −KL
    still = problem("scrub", epochs=2, max_epochs=0, lr=0.1, weight_decay=0.0)
    run("scrub", still)
    assert loss_on(task, task.split.forget) > loss_on(still, still.split.forget)
    with pytest.raises(ConfigError, match="epochs is 1, but SCRUB begins to forget in its second epoch"):
        run("scrub", problem("scrub", epochs=1))


def test_dropout_draws_the_same_whatever_was_drawn_before() -> None:
    results, curves = [], []
    for noise in (1, 2):
        task = problem("ft")
        task.model = nn.Sequential(*task.model.children(), nn.Dropout(0.5))  # type: ignore[arg-type]
        task.mask = Mask.full(task.parameters)
        torch.manual_seed(noise)
        run("ft", task)
        results.append(weights(task))
        again = replace(task, model=task.fresh(), options=replace(task.options, train_lr=2.0, relearn=30))
        again.model = nn.Sequential(*again.model.children(), nn.Dropout(0.5))  # type: ignore[arg-type]
        torch.manual_seed(noise)
        wanted = settings(again.options)
        assert wanted is not None
        curves.append(relearn(SplitPredictions.of(again), wanted)["relearning"]["curve"])
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    assert curves[0] == curves[1]
    assert len({accuracy for _, accuracy in curves[0]}) > 2  # it learns, so that other draws would show


def test_iu_says_when_fewer_gradients_fit_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem("iu", gradients=40)
    run("iu", task)
    assert task.notes == []
    monkeypatch.setattr("salun.classification.curvature._HELD", 10 * sum(w.numel() for w in weights(task).values()))
    task = problem("iu", gradients=40)
    run("iu", task)
    assert len(task.notes) == 1 and "IU took 10 of 40 gradients" in task.notes[0]


# -- DELETE, bad teacher, JiT, LFSSD -------------------------------------------------------------------------------


def test_deletes_target_has_no_own_class_and_the_originals_ratios() -> None:
    target = without_own_class(torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 2.0]]), torch.tensor([0, 1]))
    assert target[0, 0] == target[1, 1] == 0
    torch.testing.assert_close(target[0, 1] / target[0, 2], torch.tensor(1.0).exp())
    torch.testing.assert_close(target.sum(1), torch.ones(2))


def test_delete_keeps_the_ratios_of_the_other_classes_where_relabeling_does_not() -> None:
    drift = {}
    for name in ("delete", "rl"):
        task = problem(name, epochs=30, lr=0.05)
        own, x = task.labels(task.split.forget), task.data.images_of(task.split.forget)
        with torch.no_grad():
            target = without_own_class(task.logits(x), own)
        run(name, task)
        with torch.no_grad():
            others = without_own_class(task.logits(x), own)
            probability = task.logits(x).softmax(1).gather(1, own[:, None])
        drift[name] = float((others - target).abs().mean())
        assert name == "rl" or probability.max() < 0.2
    assert drift["delete"] < drift["rl"]


def test_the_bad_teacher_is_imitated_on_the_forget_set_alone() -> None:
    task = problem("bad-teacher", epochs=40, lr=0.05, bt_retain=1.0)
    original, ignorant = deepcopy(task.model), task.fresh().eval()
    run("bad-teacher", task)
    with torch.no_grad():
        for rows, near, far in ((task.split.forget, ignorant, original), (task.split.retain, original, ignorant)):
            x = task.data.images_of(rows)
            predicted, a, b = (task.logits(x, model).softmax(1) for model in (task.model, near, far))
            assert (predicted - a).abs().mean() < 0.5 * (predicted - b).abs().mean()


def test_jit_smooths_the_output_around_the_forget_set() -> None:
    def slope(task: Task, rows: Tensor) -> float:
        x = task.data.images_of(rows)
        noise = 0.1 * torch.randn((50, *x.shape), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            change = torch.stack([task.logits(x + each) - task.logits(x) for each in noise]).norm(dim=2)
        return float((change / noise.flatten(2).norm(dim=2)).mean())

    task = problem("jit", epochs=30, lr=0.1)
    before = slope(task, task.split.forget), loss_on(task, task.split.forget)
    run("jit", task)
    assert slope(task, task.split.forget) < 0.8 * before[0]
    assert loss_on(task, task.split.forget) > before[1]


def test_lfssds_importance_is_the_mean_change_of_the_squared_output_and_needs_no_labels() -> None:
    task = problem("lfssd", lfssd_alpha=1.2, lfssd_lambda=0.5)
    before, rows = weights(task), task.split.forget
    expected = {name: torch.zeros_like(value) for name, value in before.items()}
    for x in task.data.images_of(rows):
        gradients = torch.autograd.grad(task.logits(x[None]).square().sum(), list(task.parameters.values()))
        for name, gradient in zip(before, gradients, strict=True):
            expected[name] += gradient.abs() / len(rows)
    of_forget, of_all = absolute_gradients(task, rows), absolute_gradients(task, task.split.train)
    for name, value in expected.items():
        torch.testing.assert_close(of_forget[name], value)
    task.data = replace(task.data, labels=torch.zeros_like(task.data.labels))
    run("lfssd", task)
    for name, value in weights(task).items():
        selected = of_forget[name] > 1.2 * of_all[name]
        assert torch.equal(value[~selected], before[name][~selected])
        factor = (0.5 * of_all[name] / of_forget[name]).clamp(max=1)
        torch.testing.assert_close(value[selected], (factor * before[name])[selected])
    with pytest.raises(ConfigError, match="lfssd_alpha is 5, but for 12 of 60 samples"):
        run("lfssd", problem("lfssd", lfssd_alpha=5.0))


# -- UNSIR ---------------------------------------------------------------------------------------------------------


def test_unsirs_noise_is_what_the_model_errs_on_most_and_its_norm_is_held() -> None:
    """On a linear model z = Wx the slope of −CE + λ‖N‖ in N is −Wᵀ(p − e_y) + λN/‖N‖, along which Adam moves."""
    task = problem("unsir", train=False)
    torch.manual_seed(2)
    task.model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False))
    weight = next(task.model.parameters()).detach()
    labels = torch.tensor([0, 0, 1])
    start, once = (error_maximizing_noise(task, labels, 2.0, steps) for steps in (0, 1))
    n = start.flatten(1)
    slope = 2.0 * n / n.norm(dim=1, keepdim=True) - ((n @ weight.T).softmax(1) - F.one_hot(labels, 3)) @ weight
    torch.testing.assert_close(once.flatten(1), n - 0.1 * slope.sign(), rtol=1e-4, atol=1e-4)  # Adam's first step
    assert abs(float(start.std()) - 1) < 0.3

    def error(weight: float) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(task.model(error_noise(weight)), labels))

    def error_noise(weight: float) -> Tensor:
        with torch.enable_grad():
            return error_maximizing_noise(task, labels, weight, 60)

    assert error(0.0) > error(10.0)
    assert error(0.0) > 3 * float(F.cross_entropy(task.model(start).detach(), labels))
    assert error_noise(10.0).norm() < 0.5 * error_noise(0.0).norm()
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_unsir_impairs_with_noise_at_the_full_rate_and_repairs_without_at_a_lower_one() -> None:
    """θ ← θ − η∇CE(D_r,sub ∪ N), then θ ← θ − η/4 ∇CE(D_r,sub), a batch each."""
    options = {"epochs": 2, "lr": 0.5, "batch_size": 40, "momentum": 0.0, "weight_decay": 0.0}
    task = problem("unsir", **options, unsir_retain=1.0, unsir_repair=0.25)
    expected, rows = deepcopy(task.model), task.split.retain
    wrong = torch.zeros(20, dtype=torch.int64)  # 40 retained images of two classes
    noise = error_maximizing_noise(task, wrong, 0.1, 40)
    x, y = task.data.images_of(rows), task.labels(rows)
    for rate, images, labels in ((0.5, torch.cat([x, noise]), torch.cat([y, wrong])), (0.125, x, y)):
        parameters = list(expected.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(task.logits(images, expected), labels), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
    run("unsir", task)
    for name, value in expected.named_parameters():
        torch.testing.assert_close(weights(task)[name], value, rtol=1e-4, atol=1e-5)


def test_unsir_forgets_a_class_without_its_images() -> None:
    """With other images in the forget rows it gives the very same bits."""
    tasks = [problem("unsir", epochs=6, lr=0.1, unsir_retain=1.0) for _ in range(2)]
    images = tasks[1].data.images.clone()
    images[tasks[1].split.forget] = 0
    before = loss_on(tasks[0], tasks[0].split.forget)
    other = replace(tasks[1], data=replace(tasks[1].data, images=images))
    for task in (tasks[0], other):
        run("unsir", task)
    assert all(torch.equal(v, weights(other)[k]) for k, v in weights(tasks[0]).items())
    assert loss_on(tasks[0], tasks[0].split.forget) > before + 1
    x, y = (f(tasks[0].split.retain) for f in (tasks[0].data.images_of, tasks[0].labels))
    assert (tasks[0].logits(x).argmax(1) == y).float().mean() > 0.9


def test_unsir_needs_two_epochs() -> None:
    with pytest.raises(ConfigError, match="epochs is 1, but UNSIR impairs in its first epoch"):
        run("unsir", problem("unsir", epochs=1))
