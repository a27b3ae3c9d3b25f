"""The unlearning methods, one short function each, registered by the names their papers use.

A method is `f(task)`: it changes `task.model` in place. To add one, write such a function, list it in METHODS, and add
its name to the choices in `salun/classification/options.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from salun.classification.methods.boundary import boundary_expanding, boundary_shrink
from salun.classification.methods.distillation import scrub
from salun.classification.methods.fisher import fisher_forgetting, influence_unlearning, ssd
from salun.classification.methods.relabelling import random_labels, salun, salun_soft
from salun.classification.methods.retaining import fine_tune, gradient_ascent, l1_sparse, retrain
from salun.classification.task import Task


@dataclass(frozen=True)
class Method:
    """title: the paper's name. epochs, lr: what it takes where nobody says. mask: the same; None if it has none.

    tunes: the option that `--search` finds, None if there is none. factors: what it multiplies the option by at first,
    rising.
    """

    title: str
    run: Callable[[Task], None]
    epochs: int | None = None
    lr: float | None = None
    mask: str | None = None
    tunes: str | None = "lr"
    factors: tuple[float, ...] = (1 / 16, 1 / 4, 1, 4, 16)


METHODS = {  # rates: what the search found on the clutter, random 10 %, at seeds 0 and 1; another model wants its own
    "retrain": Method("Retrain", retrain, tunes=None),
    "ft": Method("FT", fine_tune, 10, 0.02, "full"),
    "rl": Method("RL", random_labels, 10, 0.006, "full"),
    "ga": Method("GA", gradient_ascent, 5, 0.00125, "full"),
    "ff": Method("FF", fisher_forgetting, tunes="noise"),
    "iu": Method("IU", influence_unlearning, tunes="influence"),
    "be": Method("BE", boundary_expanding, 10, 1e-4, "full"),
    "bs": Method("BS", boundary_shrink, 10, 2.5e-5, "full"),
    "l1-sparse": Method("ℓ1-sparse", l1_sparse, 10, 0.02, "full"),
    "salun": Method("SalUn", salun, 10, 0.012, "saliency"),
    "salun-soft": Method("SalUn-soft", salun_soft, 10, 0.012),
    "scrub": Method("SCRUB", scrub, 10, 0.01, "full"),
    "ssd": Method("SSD", ssd, tunes="ssd_alpha", factors=(0.3, 0.5, 0.7, 1, 1.4, 1.9)),
}
