"""`salun train`: a class-conditional diffusion model from scratch, on any labeled images."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from salun.checkpoints.families.classes import PIXELS
from salun.checkpoints.locate import LABELS, SETTINGS
from salun.compute.device import deterministic_kernels, explained_memory_errors, pick_device, pick_dtype
from salun.compute.processes import Processes, current_processes
from salun.diffusion.data.class_images import ClassImages
from salun.diffusion.data.latents import sample_latents
from salun.diffusion.model.class_conditional import ClassModel
from salun.diffusion.model.labels import as_written, check_labels, vocabulary_of
from salun.diffusion.model.loading import quiet_libraries
from salun.diffusion.model.schedule import COSINE
from salun.diffusion.model.settings import ModelSettings
from salun.diffusion.options import Recipe, Sampling
from salun.diffusion.stages import class_training_stages
from salun.diffusion.train_options import ClassTrainOptions
from salun.diffusion.train_quality import Judge, judged_images, quality
from salun.display import shown
from salun.errors import ConfigError, TrainingError
from salun.files import new_folder, write_bytes
from salun.masking.mask import Mask
from salun.masking.optimizers import adam
from salun.masking.training import TrainingSettings, linear_decay, train
from salun.masking.training_state import LossRow, StateFile
from salun.options import from_mapping
from salun.progress import Event, Progress, Stage
from salun.randomness import seed_of, step_generator
from salun.report.image_grid import png_bytes, sheet
from salun.runs.folder import check_folder
from salun.runs.record import RunRecord

if TYPE_CHECKING:
    from salun.classification.labeled import ImageData

TIMESTEPS = 1000
SHOWN = 8  # samples of each class in the image of them
MOST_SHOWN = 20  # classes in it
MODEL, SAMPLES = "model", "samples.png"


@dataclass(frozen=True, eq=False)
class TrainedClassModel:
    """The result of `train_class_model`.

    Args:
        folder: The model's diffusers folder; None without a run folder.
        model: The model, in memory.
    """

    folder: Path | None
    model: ClassModel
    record: RunRecord
    history: list[LossRow]


def training_images(options: ClassTrainOptions) -> tuple[ClassImages, list[str]]:
    """The training part of a data set without the classes that are left out, and notes on how it was read.

    Raises:
        ConfigError: A class is unknown, or fewer than two are left.
        DataError: The data set cannot be read.
    """
    from salun.classification.data import EMBEDDED, load_data
    from salun.classification.splits import make_split

    size = None if options.data in EMBEDDED else options.image_size
    columns = options.image_column, options.label_column
    data = load_data(options.data, size, *columns, options.data_config, options.split)
    rows = make_split(data, options.test_share, 0.0, options.split_seed).train
    left_out = [_class(name, data.classes) for name in options.without]
    rows = rows[~torch.isin(data.labels[rows], torch.tensor(left_out, dtype=torch.long))]
    labels = data.labels[rows]
    if len(labels.unique()) < 2:
        raise ConfigError("leaves fewer than two classes", option="without")
    images = _of_size(data, rows, options.image_size or data.size)
    return ClassImages(images, labels, data.classes, data.digest), list(data.notes)


def checked_images(options: ClassTrainOptions) -> tuple[ClassImages, list[str]]:
    """As `training_images`. Raises ConfigError for classes that no model could have too, or a batch for processes."""
    data, notes = training_images(options)
    check_labels(as_written(data.classes), options.data)
    count = current_processes().count
    assert options.batch_size is not None
    if options.batch_size % count:
        raise ConfigError(
            f"is {options.batch_size}, but must be divisible by the number of processes ({count})", option="batch_size"
        )
    return data, notes


def _class(name: str, classes: tuple[str, ...]) -> int:
    value = vocabulary_of(classes).value_of(name)
    if value not in classes:
        raise ConfigError(f"is {name[:80]!r}, but the classes are {', '.join(classes[:20])}", option="without")
    return classes.index(value)


def _of_size(data: ImageData, rows: Tensor, side: int) -> Tensor:
    """uint8 (n, c, side, side), resized where they are not of this size."""
    images = data.images[rows]
    if images.shape[2:] == (side, side):
        return images
    resized = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def scheduler_config(options: ClassTrainOptions) -> dict[str, Any]:
    """diffusers' config of the noise: linear (Ho et al. 2020), or cosine (Nichol & Dhariwal 2021)."""
    config: dict[str, Any] = {
        "_class_name": "DDPMScheduler", "num_train_timesteps": TIMESTEPS, "beta_schedule": "linear",
        "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": options.prediction_type, "clip_sample": True,
    }  # fmt: skip
    if options.noise == "cosine":
        config["beta_schedule"] = COSINE
    return config


def network_of(options: ClassTrainOptions, channels: int, classes: int) -> Any:
    """A UNet2DModel for that many classes and the null label, with random weights by the seed."""
    from diffusers import UNet2DModel

    levels, attended = options.levels, options.attended
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return UNet2DModel(
            sample_size=options.image_size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=options.layers,
            dropout=options.dropout,
            block_out_channels=tuple(levels),
            down_block_types=tuple(_block("Down", i in attended) for i in range(len(levels))),
            up_block_types=tuple(_block("Up", i in attended) for i in reversed(range(len(levels)))),
            norm_num_groups=32 if all(width % 32 == 0 and width >= 128 for width in levels) else 8,
            num_class_embeds=classes + 1,
        )


def _block(way: str, attention: bool) -> str:
    return f"{'Attn' if attention else ''}{way}Block2D"


class Average:
    """The moving average of the weights, which a resumed training continues (`Alongside`).

    Args:
        network: Whose weights it averages, as they are now at first.
        decay: Weight of the past; less in the first steps.
    """

    def __init__(self, network: Any, decay: float) -> None:
        self.network, self.decay = network, decay
        self.weights = {name: p.detach().float().clone() for name, p in network.named_parameters()}
        self.taken = torch.zeros(1, dtype=torch.int64)

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Take in the weights after that many steps, once."""
        if step <= int(self.taken):
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.network.named_parameters():
            self.weights[name].lerp_(p.detach().float(), 1 - decay)
        self.taken.fill_(step)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed training needs."""
        return {**self.weights, "taken": self.taken}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`, which may be untrusted input. Raises TrainingError for that of another network."""
        mine = self.state()
        if {n: (t.shape, t.dtype) for n, t in mine.items()} != {n: (t.shape, t.dtype) for n, t in state.items()}:
            raise TrainingError("the saved moving average does not fit the network")
        for name, tensor in mine.items():
            tensor.copy_(state[name])


def train_class_model(
    options: ClassTrainOptions,
    run_dir: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    command: str = "salun.train_class_model",
) -> TrainedClassModel:
    """Train a model; the moving average of its weights is written as a diffusers folder.

    Minimizes MSE(target, output(x_t, t, c)) with c the label, or the null label for a fraction of the images.

    Args:
        run_dir: For the model, its record, an image of samples and the state to resume from.
        resume: Continue the unfinished training of the folder.

    Raises:
        ConfigError: An option is wrong, or the folder holds something else.
        DataError: The data set cannot be used.
    """
    options, preset = options.resolved()
    quiet_libraries()
    processes = current_processes()
    if run_dir is not None and not processes.rank:
        check_folder(run_dir, resume)
    data, notes = checked_images(options)
    device = pick_device(options.device)
    judge = Judge(options.classifier, data.classes, device) if options.classifier else None
    facts = {"data": data.digest, "processes": str(processes.count)}
    folder = run_dir if not processes.rank else None
    record = RunRecord(folder, command, asdict(options), options.seed, str(device), facts, resume)
    record.notes += notes
    advice = "Try a smaller {batch_size}, {width} or {image_size}"
    with (
        shown(progress, quiet=processes.rank > 0) as progress,
        record.running(),
        explained_memory_errors("out of memory", advice),
        deterministic_kernels(True),
    ):
        return _trained(options, preset, data, record, device, progress, processes, judge)


def _trained(
    options: ClassTrainOptions,
    preset: Mapping[str, Any],
    data: ClassImages,
    record: RunRecord,
    device: torch.device,
    progress: Progress,
    processes: Processes,
    judge: Judge | None,
) -> TrainedClassModel:
    """The training, and its files."""
    assert options.steps is not None and options.lr is not None
    assert options.lr_decay is not None and options.ema is not None
    dtype = pick_dtype(options.dtype, device)
    network = network_of(options, data.images.shape[1], len(data.classes)).to(device).train()
    model = _model_of(options, preset, data, copy.deepcopy(network).eval().requires_grad_(False), device)
    network = network.to(dtype)
    if options.channels_last:
        network = network.to(memory_format=torch.channels_last)
    average = Average(network, options.ema)
    parameters = dict(network.named_parameters())
    path = processes.broadcast(record.state("training.safetensors"))
    fingerprint = processes.broadcast(record.fingerprint)
    state = StateFile(path, fingerprint, options.save_every, average) if path is not None else None
    settings = TrainingSettings(options.steps, linear_decay(options.lr, options.steps, options.lr_decay),
                                adam("adam", options.lr, parameters), max_norm=options.grad_clip or None)  # fmt: skip

    def go_on(event: Event, /) -> None:  # sampling on the way is part of the training
        progress(Event(Stage.TRAINING))

    def looked_at(done: int) -> bool:
        if options.samples_every and done % options.samples_every == 0:  # by all processes, which share the samples
            model.load(average.weights)
            progress(Event(Stage.TRAINING, done, options.steps or 0, image=_samples(model, record.folder, go_on)))
        return False

    judged = judged_images(data, options.judged) if judge is not None else 0
    count, saved = len(_shown(model)), record.folder is not None
    stages = class_training_stages(options, model.settings.sampling, count, saved, judged)
    progress(Event(Stage.PLANNING, stages=stages, resumed=record.resumed > 0))
    with record.stage(Stage.TRAINING):
        losses = _Losses(options, data, network, average, model, processes)
        history = train(
            parameters, Mask.full(parameters), losses, settings, progress, stop=looked_at, state=state,
            processes=processes,
        ).history  # fmt: skip
    average.take(options.steps)
    model.load(average.weights)
    record.losses = history
    target = record.folder / MODEL if record.folder is not None else None
    if target is not None:
        _saved(target, model, data, preset, record, progress)
    with record.stage(Stage.SAMPLING):
        _samples(model, record.folder, progress)
    if judge is not None:
        with record.stage(Stage.EVALUATING):
            record.metrics |= quality(judge, model, data, options.judged, options.seed, progress)
    return TrainedClassModel(target, model, record, history)


def _saved(
    target: Path,
    model: ClassModel,
    data: ClassImages,
    preset: Mapping[str, Any],
    record: RunRecord,
    progress: Progress,
) -> None:
    with record.stage(Stage.SAVING):
        write_class_model(target, model, data.classes, preset)
        record.add_output("folder", target / "unet" / "diffusion_pytorch_model.safetensors", f"{MODEL}/unet")
        progress(Event(Stage.SAVING, 1, 1))


@dataclass(eq=False)
class _Losses:
    """The loss of each step, which depends on its number alone."""

    options: ClassTrainOptions
    data: ClassImages
    network: Any
    average: Average
    model: ClassModel
    processes: Processes

    def __call__(self, step: int) -> dict[str, Tensor]:
        options, data, schedule = self.options, self.data, self.model.schedule
        assert options.batch_size is not None and options.label_dropout is not None
        self.average.take(step)
        generator, count = step_generator(options.seed, step), options.batch_size
        rows = torch.randint(len(data.labels), (count,), generator=generator)
        mirrored = torch.rand(count, generator=generator) < (0.5 if options.flip else 0.0)
        dropped = torch.rand(count, generator=generator) < options.label_dropout
        t = schedule.sample_t(count, generator)
        x_0 = data.batch(rows, mirrored)
        noise = torch.randn(x_0.shape, generator=generator)
        labels = torch.where(dropped, len(data.classes), data.labels[rows])
        part, device = slice(self.processes.rank, None, self.processes.count), self.model.device
        x_0, noise, t, labels = (each[part].to(device) for each in (x_0, noise, t, labels))
        x_t = schedule.add_noise(x_0, noise, t).to(self.network.dtype)
        if options.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout draws by itself
            torch.manual_seed(seed_of(options.seed, "dropout", step, self.processes.rank))
            output = self.network(x_t, t, class_labels=labels).sample.float()
        return {"denoise": F.mse_loss(output, schedule.target(x_0, noise, t))}


def _model_of(
    options: ClassTrainOptions,
    preset: Mapping[str, Any],
    data: ClassImages,
    network: Any,
    device: torch.device,
) -> ClassModel:
    """The model around a network of float32 weights, for sampling and for its folder."""
    sampling = from_mapping(Sampling, {**preset["sampling"], "resolution": options.image_size}, "the preset")
    settings = ModelSettings(sampling, Recipe(), {}, vocabulary_of(data.classes), None)
    return ClassModel(
        name="the model",
        stored=None,  # type: ignore[arg-type]  # it is written by `write_class_model`
        family=PIXELS,
        settings=settings,
        unet=network,
        vae=None,
        text_encoders=[],
        tokenizers=[],
        scheduler_config=scheduler_config(options),
        device=device,
        dtype=torch.float32,
    )


def samples_shown(classes: Sequence[str]) -> int:
    """Images of `_samples`."""
    return SHOWN * len(classes[:MOST_SHOWN])


def _shown(model: ClassModel) -> list[str]:
    """The label of each image of `_samples`."""
    return [label for label in model.labels[:MOST_SHOWN] for _ in range(SHOWN)]


def _samples(model: ClassModel, folder: Path | None, progress: Progress) -> np.ndarray:
    """A row of samples for each class, uint8 (H, W, 3); also written into the run folder."""
    prompts = _shown(model)
    with torch.no_grad():
        images = model.decode(sample_latents(model, prompts, list(range(len(prompts))), progress))
    image = sheet(images, SHOWN, prompts[::SHOWN])
    if folder is not None:
        write_bytes(folder / SAMPLES, png_bytes(image))
    return image


def write_class_model(target: Path, model: ClassModel, classes: tuple[str, ...], preset: Mapping[str, Any]) -> None:
    """Write a model as a diffusers folder with its labels and settings; an existing one is replaced."""
    settings: dict[str, Any] = {"schema": 1, **{key: dict(value) for key, value in preset.items() if value}}
    settings.setdefault("sampling", {})["resolution"] = model.settings.sampling.resolution
    index = {
        "_class_name": PIXELS.pipeline, "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }  # fmt: skip
    with new_folder(target) as temporary:
        model.unet.save_pretrained(temporary / "unet")
        (temporary / "scheduler").mkdir()
        for path, content in (
            (temporary / "scheduler" / "scheduler_config.json", model.scheduler_config),
            (temporary / "model_index.json", index),
        ):
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (temporary / LABELS).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        lines = json.dumps(settings, indent=2)  # which is YAML too
        (temporary / SETTINGS).write_text(lines + "\n", encoding="utf-8")
