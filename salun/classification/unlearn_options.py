"""The options of the classify commands: shared options, and those of every method in the registry."""

from __future__ import annotations

from dataclasses import dataclass, fields

from salun.classification.options import TaskOptions
from salun.errors import ConfigError
from salun.methods import METHODS, option_names, with_method_options
from salun.options import option

_METHODS = METHODS["classification"].values()
TUNED = "lr (" + ", ".join(f"{m.title}: {m.tunes}" for m in _METHODS if m.tunes not in ("lr", None)) + ")"


@with_method_options("classification")
@dataclass(frozen=True)
class UnlearnOptions(TaskOptions):
    """The options of `salun classify-unlearn`; those of single methods are their papers' symbols."""

    method: str = option("salun", "Unlearning method", choices=tuple(method.name for method in _METHODS))
    search: bool = option(False, f"Search the method's {TUNED} on a small grid around its default, without Retrain")

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", self.method.lower())
        super().__post_init__()


@dataclass(frozen=True)
class CompareOptions(UnlearnOptions):
    """The options of `salun classify-compare`; those in NOT_COMPARED are set by each variant or seed."""

    methods: list[str] = option(
        [],
        "Methods to compare, the first with each of the others: METHOD, METHOD/MASK, METHOD@DENSITY or "
        "METHOD/MASK@DENSITY, such as salun, rl/random or salun@0.1; repeat for several (default: SalUn, then every "
        "other method that fits the forget set)",
    )
    seeds: int = option(
        10, "Number of seeds, counted from seed; each draws its own forget set", minimum=1, maximum=1000
    )
    search: bool = option(True, f"Search each method's {TUNED} on a small grid around its default, without Retrain")
    noise_floor: bool = option(
        True, "Retrain with a second seed as well; the gap between the two is chance, the noise floor of all gaps"
    )
    search_seeds: int = option(2, "Number of seeds that search; the others use the result", minimum=1)
    workers: int | None = option(
        None,
        "Number of processes, with one thread each (default: one per core; one on a GPU)",
        minimum=1,
        maximum=1024,
    )

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):  # Python callers may give one name for a list of one
            object.__setattr__(self, "methods", [self.methods])
        super().__post_init__()
        for item in fields(self):
            if item.name in NOT_COMPARED and getattr(self, item.name) != item.default:
                raise ConfigError(
                    "cannot be set for all methods of a comparison", option=item.name, advice="Use {methods} instead"
                )


NOT_COMPARED = ("method", "mask", "lr", "retrain", "original")

_SHARED = {  # title → options, in the order in which hosts show them
    "Comparison": ("methods", "seeds", "noise_floor", "search_seeds", "workers"),
    "Method": ("method", "forget", "retrain", "labels", "order", "batchnorm", "epochs", "lr", "batch_size",
               "search", "relearn"),
    "Mask": ("mask", "density"),
    "Options of single methods": (),
    "Data": (
        "data", "data_config", "split", "image_column", "label_column", "image_size",
        "test_share", "validation_share", "split_seed",
    ),
    "Model": ("original", "model", "allow_pickle", "train_epochs", "train_lr", "train_batch_size", "augment",
              "momentum", "weight_decay"),
    "Computing": ("device", "dtype", "seed", "deterministic"),
}  # fmt: skip
_SINGLE = tuple(name for name in option_names("classification") if name not in _SHARED["Method"])
GROUPS: dict[str, tuple[str, ...]] = {**_SHARED, "Options of single methods": _SINGLE}
