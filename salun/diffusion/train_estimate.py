"""What `salun train` would do, and how long that takes, before it begins."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from salun.compute.device import explained_memory_errors, pick_device, pick_dtype
from salun.diffusion.model.loading import quiet_libraries
from salun.diffusion.options import Sampling
from salun.diffusion.stages import class_training_stages
from salun.diffusion.train import checked_images, network_of, samples_shown
from salun.diffusion.train_options import ClassTrainOptions
from salun.diffusion.train_quality import judged_images
from salun.options import from_mapping
from salun.progress import Event, Progress, Stage, silent

TIMED = 3  # passes of each kind, after one that is not counted


def preview_training(options: ClassTrainOptions, progress: Progress = silent) -> dict[str, Any]:
    """What `train_class_model` would do with these options, and its time by steps measured here.

    Nothing is written.

    Returns:
        "images", "classes" and "left_out" of the data, "notes" on how it was read, "parameters" of the network, the
        resolved "options", and "seconds" of the training and its samples.

    Raises what `train_class_model` would before its first step.
    """
    options, preset = options.resolved()
    quiet_libraries()
    data, notes = checked_images(options)
    device = pick_device(options.device)
    network = network_of(options, data.images.shape[1], len(data.classes)).to(device, pick_dtype(options.dtype, device))
    progress(Event(Stage.MEASURING, message="measuring this machine for the network"))
    with explained_memory_errors("out of memory", "Try a smaller {batch_size}, {width} or {image_size}"):
        forward, step = (_seconds(network, options, trains) for trains in (False, True))
    sampling = from_mapping(Sampling, {**preset["sampling"], "resolution": options.image_size}, "the preset")
    judged = judged_images(data, options.judged) if options.classifier else 0
    stages = class_training_stages(options, sampling, samples_shown(data.classes), judged=judged)
    assert options.steps is not None and options.batch_size is not None
    seconds = options.steps * step + sum(stage.forward for stage in stages) * forward / options.batch_size
    return {
        "images": len(data.labels), "classes": list(data.classes), "left_out": list(options.without), "notes": notes,
        "shape": list(data.images.shape[1:]), "parameters": sum(p.numel() for p in network.parameters()),
        "options": {name: getattr(options, name) for name in ("data", "steps", "batch_size", "lr", "seed")},
        "device": str(device), "seconds": seconds,
    }  # fmt: skip


def _seconds(network: Any, options: ClassTrainOptions, trains: bool) -> float:
    """Of a pass of a batch, or of a training step."""
    first, times = next(network.parameters()), []
    assert options.batch_size is not None and options.image_size is not None
    shape = (options.batch_size, network.config.in_channels, options.image_size, options.image_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(first)
    t, labels = torch.zeros(2, len(x), dtype=torch.long, device=first.device)
    for _ in range(1 + TIMED):
        began = time.perf_counter()
        with torch.set_grad_enabled(trains):
            output = network(x, t, class_labels=labels).sample.float().square().mean()
        if trains:
            torch.autograd.grad(output, list(network.parameters()))
        output.item()  # waits for the device
        times.append(time.perf_counter() - began)
    return median(times[1:])
