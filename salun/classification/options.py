"""Every option of the classify commands once: name, default, help, range.

`None` stands for `auto`: the number comes from the data set's entry in `datasets.yaml`, or from the method.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from salun.errors import ConfigError
from salun.options import MASKS, DeviceOptions, option

METHODS = (
    "retrain", "ft", "rl", "ga", "ff", "iu", "be", "bs", "l1-sparse", "salun", "salun-soft", "scrub", "ssd"
)  # fmt: skip


@dataclass(frozen=True)
class TrainOptions(DeviceOptions):
    """The data, the model, and how an original (or Retrain) is trained."""

    data: str = option(
        "digits",
        "digits, clutter, cifar10, cifar100, svhn, tiny-imagenet, a folder with a sub-folder of images for each class "
        "(also in train, val and test) or with metadata.csv, or a Hugging Face data set (hub id, saved or cloned)",
        path=True,
    )
    image_column: str | None = option(
        None, "column of images (or image files) of a Hugging Face data set or metadata.csv (default: found)"
    )
    label_column: str | None = option(
        None, "column of labels of a Hugging Face data set or metadata.csv (default: found)"
    )
    image_size: int | None = option(
        None, "pixels a side, to bring pictures to (default: as they are)", minimum=4, maximum=1024
    )
    test_share: float = option(0.2, "of all pictures, where the data has no test part of its own", above=0, maximum=0.9)
    validation_share: float = option(0.1, "of the pictures that are not test", minimum=0, maximum=0.9)
    split_seed: int = option(0, "of the split into train, validation and test", minimum=0, maximum=2**63 - 1)
    model: str | None = option(
        None,
        "small, resnet18, vgg16-bn, timm:NAME, or an image classifier of transformers (folder or hub id) (default: "
        "the data set's)",
        path=True,
    )
    allow_pickle: bool = option(
        False, "Read a transformers model's pytorch_model.bin: a pickle, unpacked with weights_only (default: off)."
    )
    train_epochs: int | None = option(
        None, "of the original, and of Retrain (default: the data set's)", minimum=1, maximum=100_000
    )
    train_lr: float | None = option(
        None, "their learning rate at the start; it falls as a cosine (default: the data set's)", above=0, maximum=10
    )
    train_batch_size: int | None = option(None, "(default: the data set's)", minimum=2, maximum=65_536)
    augment: str | None = option(
        None, "how pictures are varied in training (default: the data set's)", choices=("none", "crop", "crop-flip")
    )
    momentum: float = option(0.9, "of SGD", minimum=0, maximum=0.999)
    weight_decay: float = option(5e-4, "of SGD", minimum=0, maximum=1)
    deterministic: bool = option(True, "only kernels that give the same bits each time, where there are any")
    seed: int = option(0, "of everything random but the split", minimum=0, maximum=2**63 - 1)


@dataclass(frozen=True)
class UnlearnOptions(TrainOptions):
    """What `salun classify-unlearn` can be told. The method's own numbers are its paper's symbols."""

    method: str = option("salun", "how to unlearn", choices=METHODS)
    forget: str = option(
        "random:0.1", "random:SHARE of the training pictures, class:NAME, or a .json list of rows", path=True
    )
    original: str | None = option(
        None,
        "the model to unlearn from: a run folder or .safetensors of `salun classify-train`, or a transformers folder "
        "or hub id (default: trained here, and kept in the cache)",
        path=True,
    )
    retrain: str = option(
        "auto",
        "also train without the forget set, to compare; auto: on digits and clutter",
        choices=("auto", "yes", "no"),
    )
    mask: str | None = option(
        None, "which weights may move (default: saliency for salun, full for others that train)", choices=MASKS
    )
    density: float = option(0.5, "share of the weights that may move", above=0, maximum=1)
    labels: str = option(
        "other", "random labels: other than a picture's own, or any (as in the authors' code)", choices=("other", "any")
    )
    order: str = option(
        "forget-first",
        "of an epoch's batches, for methods that train on both: the forget set's, then the retain set's; or mixed",
        choices=("forget-first", "mixed"),
    )
    batchnorm: str = option("frozen", "BatchNorm's running statistics while unlearning", choices=("frozen", "updated"))
    epochs: int | None = option(None, "of unlearning (default: the method's)", minimum=1, maximum=100_000)
    lr: float | None = option(None, "learning rate of unlearning (default: the method's)", above=0, maximum=10)
    batch_size: int | None = option(None, "(default: the data set's)", minimum=2, maximum=65_536)
    search: bool = option(
        False,
        "find the method's --lr (FF: --noise, IU: --influence, SSD: --ssd-alpha) by a small grid around it, without "
        "looking at Retrain",
    )
    gamma: float = option(5e-4, "l1-sparse: weight γ of the ℓ1 norm at the start", minimum=0, maximum=1)
    noise: float = option(0.01, "FF: strength α of the noise α·F^(−1/4)", minimum=0, maximum=100)
    ff_damping: float = option(1e-8, "FF: added to the Fisher information", above=0, maximum=100)
    damping: float = option(1e-2, "IU: λ added to the Fisher information", above=0, maximum=100)
    influence: float = option(1.0, "IU: the step along the influence", minimum=0, maximum=1000)
    gradients: int = option(
        512, "IU: gradients of single pictures that stand for the Fisher information", minimum=1, maximum=1_000_000
    )
    epsilon: float = option(0.1, "BS: the step across the boundary, in pixels of 0 to 1", minimum=0, maximum=1)
    ssd_alpha: float | None = option(
        None, "SSD: α, how much more important for D_f a weight must be (default: half of what is possible)", minimum=0
    )
    ssd_lambda: float = option(1.0, "SSD: λ, how much such a weight is dampened", minimum=0)
    distill: float = option(0.5, "SCRUB: α, weight of staying near the original on D_r", minimum=0, maximum=1000)
    max_epochs: int = option(
        3, "SCRUB: epochs, from the second on, that also push away on D_f", minimum=0, maximum=100_000
    )
    relearn: int = option(
        0,
        "steps of fine-tuning on the forget set, at most, to see how soon it is known again, here and after Retrain",
        minimum=0,
        maximum=100_000,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", self.method.lower())
        super().__post_init__()


@dataclass(frozen=True)
class CompareOptions(UnlearnOptions):
    """What `salun classify-compare` can be told. The options that a variant sets are not its own (`NOT_COMPARED`)."""

    methods: list[str] = option(
        [],
        "what to compare, the first with each other: METHOD, METHOD/MASK, METHOD@DENSITY or METHOD/MASK@DENSITY, such "
        "as salun, rl/random or salun@0.1; repeat it for several (default: SalUn, then every other method)",
    )
    seeds: int = option(10, "how many, counted from --seed; each draws its own forget set", minimum=1, maximum=1000)
    search: bool = option(
        True,
        "find each method's --lr (FF: --noise, IU: --influence, SSD: --ssd-alpha) by a small grid around its default, "
        "without looking at Retrain",
    )
    noise_floor: bool = option(
        True,
        "also retrain with another seed: what lies between the two Retrains is chance, and no method can be nearer",
    )
    search_seeds: int = option(2, "on how many of the seeds to search; the rest takes what was found", minimum=1)
    workers: int | None = option(
        None, "processes side by side, one thread each (default: one a core; one on a GPU)", minimum=1, maximum=1024
    )

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):  # from Python one text is as good as a list of one
            object.__setattr__(self, "methods", [self.methods])
        super().__post_init__()
        for item in fields(self):
            if item.name in NOT_COMPARED and getattr(self, item.name) != item.default:
                flag = "--" + item.name.replace("_", "-")
                raise ConfigError(f"{flag} is not one option for all in a comparison: leave it out, see --methods")


NOT_COMPARED = ("method", "mask", "lr", "retrain", "original")  # each variant's own, or each seed's

GROUPS = {  # for people, in the order in which hosts show them
    "Comparison": ("methods", "seeds", "noise_floor", "search_seeds", "workers"),
    "Method": ("method", "forget", "retrain", "labels", "order", "batchnorm", "epochs", "lr", "batch_size",
               "search", "relearn"),
    "Mask": ("mask", "density"),
    "Method's own numbers": (
        "gamma", "noise", "ff_damping", "damping", "influence", "gradients", "epsilon", "ssd_alpha", "ssd_lambda",
        "distill", "max_epochs",
    ),
    "Data": (
        "data", "image_column", "label_column", "image_size", "test_share", "validation_share", "split_seed",
    ),
    "Model": ("original", "model", "allow_pickle", "train_epochs", "train_lr", "train_batch_size", "augment",
              "momentum", "weight_decay"),
    "Computing": ("device", "dtype", "seed", "deterministic"),
}  # fmt: skip
