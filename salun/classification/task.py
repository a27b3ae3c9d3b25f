"""The task that a method gets, and the training loop of all methods: masked SGD over batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salun.classification.data import ImageData
from salun.classification.options import TaskOptions
from salun.classification.splits import Split
from salun.classification.training_state import TrainingState
from salun.compute.device import pick_dtype
from salun.masking.mask import Mask
from salun.masking.training import MakeOptimizer, Schedule, TrainingSettings, by_step, constant, cosine_decay, train
from salun.masking.training_state import LossRow
from salun.progress import Progress, Stage, silent
from salun.randomness import generator_of, seed_of

Part = Literal["forget", "retain", "both"]


@dataclass
class Task:
    """A model that is to forget some rows.

    model: θ_o at first; a method changes it in place. fresh: makes the model before any training, for Retrain.
    options: resolved; only options of other tasks are None. mask: the weights that train; None for methods that do not
    train.
    history: {"epoch": 1, …} with the mean loss on each part that the epoch had ("forget", "retain", "both"). recipe:
    the training options of the original and of Retrain; None: `options`. memo: values that a method has computed from
    θ_o, shared by the trials of a search. notes: what a user should know about these.
    """

    model: nn.Module
    data: ImageData
    split: Split
    options: TaskOptions
    fresh: Callable[[], nn.Module]
    progress: Progress = silent
    dtype: torch.dtype = torch.float32
    mask: Mask | None = None
    history: list[LossRow] = field(default_factory=list)
    recipe: TaskOptions | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def labels(self, rows: Tensor) -> Tensor:
        """The true labels of these rows, int64 (b,), on the data's device."""
        return self.data.labels[rows.to(self.data.labels.device)]

    @property
    def device(self) -> torch.device:
        """The device of the data and the model."""
        return self.data.device

    @property
    def size(self) -> int:
        """Rows in a batch."""
        assert self.options.batch_size is not None
        return self.options.batch_size

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.data.classes)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name."""
        return dict(self.model.named_parameters())

    def logits(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """float32 (b, classes) of normalized images (b, c, h, w), by θ or another model."""
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out: Tensor = (model or self.model)(x)
        return out.float()


@dataclass(frozen=True)
class Batch:
    """Rows of one training step, their target labels, and the set that they are from."""

    rows: Tensor
    labels: Tensor
    part: Part


Loss = Callable[[Tensor, Batch, int], Tensor]
"""normalized images (b, c, h, w), their batch, the epoch (0-based) → a scalar to minimize."""
Batches = Callable[[int, torch.Generator], Iterator[Batch]]
"""epoch (0-based), its random numbers → its batches in order."""


def batches_of(rows: Tensor, labels: Tensor, size: int, part: Part, generator: torch.Generator) -> Iterator[Batch]:
    """The rows once, in random order, with labels (b,) to match. A last single row joins the batch before it:
    BatchNorm needs two.
    """
    chunks = list(torch.randperm(len(rows), generator=generator).split(size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    for chunk in chunks:
        yield Batch(rows[chunk], labels[chunk.to(labels.device)], part)


def cross_entropy(task: Task) -> Loss:
    """CE(f(x), y), the mean over a batch."""
    return lambda x, batch, epoch: F.cross_entropy(task.logits(x), batch.labels.to(x.device))


def training_mode(model: nn.Module, batchnorm: str) -> None:
    """Train mode, with BatchNorm's running statistics used if `frozen`, updated if `updated`."""
    model.train()
    if batchnorm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def minimize(
    task: Task,
    batches: Batches,
    loss: Loss,
    *,
    epochs: int | None = None,
    lr: float | None = None,
    batchnorm: str | None = None,
    cosine: bool = False,
    factors: Sequence[float] | None = None,
    soft_density: float | None = None,
    extra: dict[str, nn.Parameter] | None = None,
    stage: Stage = Stage.UNLEARNING,
    stop: Callable[[int], bool] | None = None,
    state: TrainingState | None = None,
) -> None:
    """SGD (momentum, weight decay) on `loss` over the task's masked weights; leaves the model in eval mode.

    Args:
        batches, loss: Each epoch's batches, and what is minimized of one.
        epochs, lr, batchnorm: By default the task's options.
        cosine: Whether the rate falls to 0 along a half cosine.
        factors: Of the rate, for each epoch.
        soft_density: SalUn-soft's target density; its threshold follows every step.
        extra: Parameters of the loss itself, trained without a mask and discarded.
        stage: The stage of the progress; random numbers depend on it and the seed.
        stop: Called with the number of steps taken after each; True ends the training early.
        state: Where the training is saved from time to time; one that is there is resumed, to the same bytes.

    Raises:
        TrainingError: A loss or gradient is not finite.
    """
    options = task.options
    epochs, lr = epochs or options.epochs, lr or options.lr
    assert epochs is not None and lr is not None
    epoch_of = [epoch for epoch in range(epochs) for _ in batches(epoch, torch.Generator())]
    rates = _rates(lr, epoch_of, cosine, factors)
    settings = TrainingSettings(len(epoch_of), rates, _sgd(task, lr), {}, soft_density, mode="pack", stage=stage)
    samples: Iterator[tuple[Batch, Tensor]] = iter(())
    current = dict[int, tuple[Batch, Tensor]]()

    def losses(step: int) -> dict[str, Tensor]:
        nonlocal samples
        if step not in current:  # a repeated step has the same batch
            if not current:
                samples = _samples(task, batches, epoch_of, stage, step, state)
            current.clear()
            current[step] = next(samples)
        batch, x = current[step]
        alone = len(batch.rows) == 1  # BatchNorm has no batch statistics of one image
        training_mode(task.model, "frozen" if alone else batchnorm or options.batchnorm)
        return {batch.part: loss(x, batch, epoch_of[step])}

    saved = state.file(task.model) if state is not None else None
    with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
        parameters, mask = {**task.parameters, **(extra or {})}, _mask_with(task, extra or {})
        trained = train(parameters, mask, losses, settings, task.progress, stop=stop, state=saved)
    task.history += _epoch_means(trained.history, epoch_of)
    task.model.eval()


def _rates(lr: float, epoch_of: Sequence[int], cosine: bool, factors: Sequence[float] | None) -> Schedule:
    """The learning rate of each step, as of `minimize`. epoch_of: the epoch of each step."""
    if factors is not None:
        return by_step([lr * factors[epoch] for epoch in epoch_of])
    return cosine_decay(lr, len(epoch_of)) if cosine else constant(lr)


def _sgd(task: Task, lr: float) -> MakeOptimizer:
    """SGD by the task's options; on a GPU in one kernel, which leaves out a step that is not finite."""
    options, fused = task.options, True if task.device.type == "cuda" else None
    return partial(torch.optim.SGD, lr=lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=fused)


def _mask_with(task: Task, extra: dict[str, nn.Parameter]) -> Mask:
    """The task's mask, and all entries of further parameters."""
    assert task.mask is not None
    full = Mask.full(extra)
    return Mask({**task.mask.bits, **full.bits}, {**task.mask.shapes, **full.shapes}, task.mask.metadata)


def _samples(
    task: Task, batches: Batches, epoch_of: Sequence[int], stage: Stage, start: int, state: TrainingState | None
) -> Iterator[tuple[Batch, Tensor]]:
    """The batches of all steps from `start` on with their images (b, c, h, w), augmented and normalized.

    Of an epoch that begins before `start` the earlier batches draw their random numbers too.
    """
    first = epoch_of[start]
    skipped = start - epoch_of.index(first)
    for epoch in range(first, epoch_of[-1] + 1):
        generator = generator_of(task.options.seed, stage, epoch)
        torch.manual_seed(seed_of(task.options.seed, stage, epoch, "dropout"))  # for modules that draw by themselves
        for number, batch in enumerate(list(batches(epoch, generator))):
            x = task.data.augmented(batch.rows, generator)
            if epoch > first or number >= skipped:
                if skipped and (epoch, number) == (first, skipped) and state is not None:
                    state.restore_random_numbers()
                yield batch, x


def _epoch_means(history: list[LossRow], epoch_of: list[int]) -> list[LossRow]:
    """The mean of each named loss in each epoch: {"epoch": 1, …}."""
    means: list[LossRow] = []
    for epoch, rows in groupby(history, lambda row: epoch_of[int(row["step"]) - 1]):
        values: dict[str, list[float]] = {}
        for row in rows:
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        del values["step"]
        means.append({"epoch": epoch + 1, **{name: sum(each) / len(each) for name, each in values.items()}})
    return means


def train_from_scratch(task: Task, stage: Stage, state: TrainingState | None = None) -> None:
    """Train the model from its first weights on D_r, with the original's training options.

    SGD with the recipe's `train_…` options, momentum, weight decay, dtype and seed, and a cosine schedule of the
    learning rate. Every weight trains. stage: of the progress. state: as of `minimize`.
    """
    recipe = task.recipe or task.options
    task.model.load_state_dict(task.fresh().state_dict())
    task.mask = Mask.full(task.parameters)
    scratch = replace(task, options=recipe, dtype=pick_dtype(recipe.dtype, task.device))
    minimize(
        scratch,
        retain_batches(scratch, recipe.train_batch_size),
        cross_entropy(scratch),
        epochs=recipe.train_epochs,
        lr=recipe.train_lr,
        batchnorm="updated",
        cosine=True,
        stage=stage,
        state=state,
    )


def forget_batches(task: Task, labels: Tensor | None = None) -> Batches:
    """Each epoch D_f, with its true labels or the given ones, int64 (|D_f|,)."""
    rows = task.split.forget
    given = task.labels(rows) if labels is None else labels
    return lambda epoch, generator: batches_of(rows, given, task.size, "forget", generator)


def retain_batches(task: Task, size: int | None = None) -> Batches:
    """Each epoch D_r with its true labels, in batches of `size` or the options' batch size."""
    rows = task.split.retain
    return lambda epoch, generator: batches_of(rows, task.labels(rows), size or task.size, "retain", generator)


def forget_then_retain(task: Task, labels: Tensor | None = None) -> Batches:
    """Each epoch D_f (with its true labels or the given ones), then D_r."""
    first, then = forget_batches(task, labels), retain_batches(task)
    return lambda epoch, generator: chain(first(epoch, generator), then(epoch, generator))
