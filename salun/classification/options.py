"""The options that all tasks of classifiers share: name, default, help, range.

`None` stands for `auto`: the value comes from the data set's entry in `datasets.yaml`, or from the method.
"""

from __future__ import annotations

from dataclasses import dataclass

from salun.options import MASKS, DeviceOptions, option


@dataclass(frozen=True)
class TrainOptions(DeviceOptions):
    """The data, the model, and how an original (or Retrain) is trained."""

    data: str = option(
        "digits",
        "Data set: digits, clutter, cifar10, cifar100, svhn, tiny-imagenet, a folder with a subfolder of images for "
        "each class (also in train, val and test) or with metadata.csv, or a Hugging Face data set (hub id, saved or "
        "cloned)",
        path=True,
    )
    image_column: str | None = option(
        None, "Column of images (or image files) of a Hugging Face data set or metadata.csv (default: detected)"
    )
    label_column: str | None = option(
        None, "Column of labels of a Hugging Face data set or metadata.csv (default: detected)"
    )
    data_config: str | None = option(
        None, "Configuration of a Hugging Face data set, or folder in the data's folder (default: the only one)"
    )
    split: str | None = option(
        None,
        "Parts of the data by role, such as train=fold1,test=fold2 or validation=NAME (default: by their names)",
    )
    image_size: int | None = option(
        None, "Side length in pixels that images are resized to (default: no resizing)", minimum=4, maximum=1024
    )
    test_share: float = option(
        0.2, "Fraction of all images in the test set, if the data has no test part", above=0, maximum=0.9
    )
    validation_share: float = option(
        0.1, "Fraction of the non-test images in the validation set", minimum=0, maximum=0.9
    )
    split_seed: int = option(0, "Seed of the split into train, validation and test", minimum=0, maximum=2**63 - 1)
    model: str | None = option(
        None,
        "Architecture: small, resnet18, resnet20, vgg16-bn, timm:NAME, or an image classifier of transformers (folder "
        "or hub id) (default: the data set's)",
        path=True,
    )
    allow_pickle: bool = option(
        False, "Read a transformers model's pytorch_model.bin: a pickle, unpacked with weights_only (default: off)"
    )
    train_epochs: int | None = option(
        None, "Training epochs of the original and of Retrain (default: the data set's)", minimum=1, maximum=100_000
    )
    train_lr: float | None = option(
        None,
        "Initial learning rate of the original and of Retrain; it falls along a cosine (default: the data set's)",
        above=0,
        maximum=10,
    )
    train_batch_size: int | None = option(
        None, "Batch size of the original and of Retrain (default: the data set's)", minimum=2, maximum=65_536
    )
    augment: str | None = option(
        None, "Augmentation of training images (default: the data set's)", choices=("none", "crop", "crop-flip")
    )
    momentum: float = option(0.9, "Momentum of SGD", minimum=0, maximum=0.999)
    weight_decay: float = option(5e-4, "Weight decay of SGD", minimum=0, maximum=1)
    deterministic: bool = option(True, "Use deterministic kernels where there are any, so that results are bit-exact")
    seed: int = option(0, "Seed of everything random except the split", minimum=0, maximum=2**63 - 1)


@dataclass(frozen=True)
class TaskOptions(TrainOptions):
    """How a classifier unlearns, except for the options of single methods."""

    method: str = option("salun", "Unlearning method")
    forget: str | None = option(
        None,
        "Forget set: random:FRACTION of the training images, class:NAME, or a .json list of rows (default: the data "
        "set's: a class of digits, random:0.1 of any other)",
        path=True,
    )
    original: str | None = option(
        None,
        "Model to unlearn from: a run folder or .safetensors of `salun classify-train`, or a transformers folder or "
        "hub id (default: trained and cached)",
        path=True,
    )
    retrain: str = option(
        "auto",
        "Whether to train Retrain, a model without the forget set, for comparison; auto: only on digits and clutter",
        choices=("auto", "yes", "no"),
    )
    mask: str | None = option(
        None, "Which weights are trained (default: saliency for salun, full for others that train)", choices=MASKS
    )
    density: float = option(0.5, "Fraction of weights that are trained", above=0, maximum=1)
    batchnorm: str = option("frozen", "BatchNorm's running statistics while unlearning", choices=("frozen", "updated"))
    epochs: int | None = option(None, "Epochs of unlearning (default: the method's)", minimum=1, maximum=100_000)
    lr: float | None = option(None, "Learning rate of unlearning (default: the method's)", above=0, maximum=10)
    batch_size: int | None = option(
        None, "Batch size of unlearning (default: the data set's; JiT: 16)", minimum=2, maximum=65_536
    )
    relearn: int = option(
        0,
        "Largest number of steps of fine-tuning on the forget set, to measure how fast it is relearned, by the "
        "unlearned model and by Retrain; 0 for none",
        minimum=0,
        maximum=100_000,
    )
