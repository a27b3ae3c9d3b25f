"""LFSSD: dampening of the weights that the forget set needs most, where the need is measured without a loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from salun.classification.methods.fisher import check_alpha, half_of_largest
from salun.options import Checked, option

if TYPE_CHECKING:
    from salun.classification.options import TaskOptions
    from salun.classification.splits import Split
    from salun.classification.task import Task


@dataclass(frozen=True)
class LfssdOptions(Checked):
    """Options of LFSSD."""

    lfssd_alpha: float | None = option(
        None,
        "LFSSD: selection threshold α, the importance for D_f relative to D (default: half of the largest possible)",
        minimum=0,
    )
    lfssd_lambda: float = option(1.0, "LFSSD: dampening constant λ", minimum=0)


def resolve(options: LfssdOptions, shared: TaskOptions, split: Split) -> LfssdOptions:
    """As SSD's: α is half of the largest where none is given. Raises ConfigError where no weight would be selected."""
    if not len(split.forget):
        return options
    if options.lfssd_alpha is None:
        options = replace(options, lfssd_alpha=half_of_largest(split))
    check_alpha(options.lfssd_alpha, split, "lfssd_alpha")
    return options


def lfssd(task: Task, options: LfssdOptions) -> None:
    """LFSSD, loss-free SSD (Foster et al. 2024, arXiv:2402.19308): SSD with I = E_x |∂‖f_θ(x)‖₂²/∂θ|, f the logits.

    That is how much the output changes with a weight (the importance of memory aware synapses), which needs no labels
    and does not vanish for images that are learned well.
    """
    from salun.classification.curvature import absolute_gradients, once
    from salun.classification.methods.fisher import dampen

    alpha = options.lfssd_alpha
    assert alpha is not None
    check_alpha(alpha, task.split, "lfssd_alpha")
    of_forget = once(task, "output of D_f", lambda: absolute_gradients(task, task.split.forget))
    of_all = once(task, "output of D", lambda: absolute_gradients(task, task.split.train))
    dampen(task, of_forget, of_all, alpha, options.lfssd_lambda)
