"""What a run needs around it: a model lent and set up, and an error that says what to try when memory is short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from salun.compute.device import deterministic_kernels, is_out_of_memory
from salun.compute.processes import current
from salun.diffusion.data.images import folder_digest
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.plan import Plan
from salun.errors import TrainingError
from salun.files import sha256_file
from salun.options import MASKS
from salun.user_text import as_spelled


@contextmanager
def prepared(model: DiffusionModel, plan: Plan) -> Iterator[None]:
    """Within, the model is lent and set up as the plan says, and running out of memory says what to try."""
    with (
        model.temporarily_trainable(),
        model.set_up(plan.options),
        deterministic_kernels(plan.options.deterministic),
        enough_memory(plan),
    ):
        yield


@contextmanager
def enough_memory(plan: Plan) -> Iterator[None]:
    """Turns running out of memory into a TrainingError that says what to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"--batch-size {plan.batch_size // 2}, " if plan.batch_size > 1 else ""
        also = "" if plan.options.low_vram else "--low-vram, "
        raise TrainingError(
            f"out of memory with --batch-size {plan.batch_size}: try {smaller}{also}"
            "--dtype bf16, or a smaller --resolution"
        ) from error


def _facts(model: Model, plan: Plan) -> dict[str, str]:
    """What the result depends on beside the options and the versions."""
    facts = {
        "model": model.base_hash,
        "parts": model.parts_hash,
        "prompts": plan.prompts.digest,
        "sampling": repr((model.settings.sampling, plan.saliency_timesteps)),
        "processes": str(current().count),
        "gpu": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "none",
    }
    for name in ("forget_images", "retain_images"):
        folder = getattr(plan.options, name)
        if folder is not None:
            facts[name] = folder_digest(as_spelled(Path(folder).expanduser()))
    if plan.options.components is not None:
        facts["components"] = model.parts_hash
    if plan.options.method == "salun" and plan.options.mask not in MASKS:
        facts["mask"] = sha256_file(as_spelled(Path(plan.options.mask).expanduser()))
    return facts
