"""How far the network's predictions moved, which needs no detector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salun.evaluation.estimate import Estimate, Unknown, Value, Z
from salun.evaluation.metric import EvaluationPair, Metric

if TYPE_CHECKING:
    from torch import Tensor


def anchor_gap(pair: EvaluationPair) -> Value:
    """Squared distance of predictions for forget prompts to the original's for the anchor; 1 is the original's own.

    ‖ε_u(c_f) − ε_o(c_a)‖² / ‖ε_o(c_f) − ε_o(c_a)‖²
    """
    before, after = pair.before.predictions, pair.after.predictions
    return _ratio(after.forget - before.anchor, before.forget - before.anchor)


def forget_change(pair: EvaluationPair) -> Value:
    """Squared change of predictions for forget prompts; 1 is as far as the anchor's are from them.

    ‖ε_u(c_f) − ε_o(c_f)‖² / ‖ε_o(c_f) − ε_o(c_a)‖²
    """
    before, after = pair.before.predictions, pair.after.predictions
    return _ratio(after.forget - before.forget, before.forget - before.anchor)


def retain_change(pair: EvaluationPair) -> Value:
    """Squared change of predictions for retain prompts, relative to their squared norm.

    ‖ε_u(c_r) − ε_o(c_r)‖² / ‖ε_o(c_r)‖²
    """
    before, after = pair.before.predictions, pair.after.predictions
    return _ratio(after.retain - before.retain, before.retain)


def _ratio(above: Tensor, below: Tensor) -> Value:
    """‖above‖² / ‖below‖² of (n, …), with the interval of a ratio of sums over n."""
    total = below.square().sum()
    if not total > 0:
        return Unknown("the original model's predictions, to which it is relative, do not differ")
    value, n = float(above.square().sum() / total), len(below)
    a, b = (tensor.double().square().flatten(1).sum(1) for tensor in (above, below))
    error = float((a - value * b).square().sum() * n / max(n - 1, 1)) ** 0.5 / float(b.sum())
    return Estimate(value, n, max(value - Z * error, 0.0), value + Z * error)


ANCHOR_GAP = Metric("anchor_gap", "Distance to the anchor", "lower", "", anchor_gap, needs="predictions")
FORGET_CHANGE = Metric(
    "forget_change", "Change of the concept's predictions", "higher", "", forget_change, needs="predictions"
)
RETAIN_CHANGE = Metric("retain_change", "Change of other predictions", "lower", "", retain_change, needs="predictions")
