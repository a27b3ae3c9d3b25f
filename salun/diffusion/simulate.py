"""What an erasure needs of a device: its very steps on fake tensors, which have shapes but no values.

Peak memory is the most bytes of tensors that are alive at once; a GPU's allocator and libraries need some more. A step
that runs on fake tensors reads no value, so on a GPU the host never waits in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from salun.checkpoints.single_file import shapes_of
from salun.compute.memory_peak import MemoryPeak
from salun.detectors import passes_of
from salun.diffusion.data.latents import batch_size_of
from salun.diffusion.losses import (
    ErasureData,
    draw,
    frozen_predictions,
    retain_saliency_losses,
    saliency_losses,
    training_losses,
)
from salun.diffusion.model.loading import ModelSpec
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.model.sketch import sketched, text_encoder_parameters
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.plan import Plan
from salun.diffusion.stages import erasure_stages, retain_growth
from salun.diffusion.targets import STATE_BYTES, trained_entries
from salun.masking.mask import Mask, entries
from salun.masking.optim import MaskedOptimizer
from salun.masking.optimizers import adam
from salun.masking.saliency import summed
from salun.masking.training import take_step
from salun.progress import Stage
from salun.runs.cache import Cache, key_of

NUMBERS = ("cpu", "sampled")  # fields of `Needs`
DECISIVE = (  # options on which needs depend, apart from those of the recipe and of sampling
    "mask",
    "density",
    "scope",
    "method",
    "optimizer",
    "gradient_checkpointing",
    "low_vram",
    "target_guidance",
    "gradient_surgery",
    "forget_images",
)
# numbers of a recipe on which the needs of one step do not depend
COUNTS_AND_RATES = ("steps", "lr", "lr_decay", "retain_weight", "saliency_timesteps", "eval_images")
MOMENTS_8BIT = 6  # bytes of an entry's moments that 8-bit ones save
SOFT_BYTES = 12  # of an entry: its original, its change, and the size of that, for a soft threshold


@dataclass(frozen=True)
class Needs:
    """What one erasure needs.

    Args:
        peak: Stage → bytes on the device at most, weights included.
        cpu: Bytes of CPU memory next to a GPU: moments and sums that are held there, frozen targets.
        sampled: Samples that are sampled at once.
    """

    peak: dict[Stage, int]
    cpu: int
    sampled: int

    @property
    def most(self) -> int:
        """Bytes on the device at most."""
        return max(self.peak.values())


def simulate(
    spec: ModelSpec,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    cache: Cache | None = None,
    processes: int = 1,
) -> Needs:
    """What the stages of a plan need on a device, which need not be there. No weight is read.

    Of a method that trains, the step is SalUn's; adversarial embeddings need some more.

    Args:
        spec: The model's files.
        plan: For this model.
        device: Its type decides what is held where.
        dtype: Of the network.
        cache: Of results; a simulation takes seconds.
        processes: That share the batch, each with a device of its own.

    Raises:
        ModelError: No model can be built from what the files say.
    """
    if processes > 1:
        part = -(-plan.recipe.batch_size // processes)
        plan = replace(plan, recipe=replace(plan.recipe, batch_size=part))
    key = key_of(
        what="needs",
        detector=passes_of(plan.detector),
        packs=processes > 1,
        shapes={name: list(shape) for name, shape in shapes_of(spec.stored).items()},
        config=[str(spec.family), spec.scheduler_config, plan.sampling.guided, plan.sampling.resolution],
        options={name: getattr(plan.options, name) for name in DECISIVE},
        recipe={name: value for name, value in asdict(plan.recipe).items() if name not in COUNTS_AND_RATES},
        trains=_trains(plan),
        goal=[plan.goal is not None, plan.all_latents, retain_growth(plan)],
        concepts=len(plan.concepts),
        device=device.type,
        dtype=str(dtype),
        torch=torch.__version__,
    )
    stored = cache.get(key) if cache is not None else None
    if stored is None:
        stored = _as_tensors(*_simulated(spec, plan, device, dtype, processes > 1))
        if cache is not None:
            cache.put(key, stored)
    return _with_targets(*_of_tensors(stored), plan, device)


def _simulated(spec: ModelSpec, plan: Plan, device: torch.device, dtype: torch.dtype, packs: bool) -> tuple[Needs, int]:
    """Without the frozen targets; and the bytes of a step's."""
    options = replace(plan.options, attention="sdpa")  # xformers' kernels need as much
    trains = _trains(plan)
    with sketched(spec, dtype) as model, model.configured(options):
        memory = MemoryPeak(model.unet)
        peak = {Stage.SAMPLING: _sampling(model, plan, memory), Stage.IMAGES_BEFORE: _decoding(model, memory)}
        with memory.measured():
            data = training_data(model, plan)  # alive from here on
        if plan.by_saliency:
            peak[Stage.SALIENCY] = _saliency(model, plan, data, memory)
        if trains:
            peak[Stage.TRAINING] = _training(model, plan, data, memory, device.type == "cpu", packs)
        total = sum(p.numel() for p in parameters_in_scope(model, plan.scope).values())
        sampled = batch_size_of(model)
    entries_trained, moments = trained_entries(total, plan), STATE_BYTES
    if options.optimizer == "adam8bit" and trains:
        moments -= MOMENTS_8BIT
        peak[Stage.TRAINING] -= MOMENTS_8BIT * entries_trained
    if options.method == "salun-soft" and trains:  # held where masters and moments are
        moments += SOFT_BYTES
        peak[Stage.TRAINING] += SOFT_BYTES * entries_trained
    encoders = text_encoder_parameters(spec) * dtype.itemsize
    vae = _bytes(model.vae)
    target, held = 4 * 2 * plan.recipe.batch_size * prod(model.latent_shape), 0
    if device.type == "cpu":  # where all parts lie in the same memory, from beginning to end
        others = {Stage.IMAGES_BEFORE: encoders}
        more = {stage: others.get(stage, encoders + vae) for stage in peak}
        if trains and plan.goal is not None:  # with the trained weights, while a probe needs the original ones
            peak[Stage.PROBING] = _probed(plan, peak) + (moments + dtype.itemsize) * total
            more[Stage.PROBING] = encoders + vae
        return Needs({stage: size + more[stage] for stage, size in peak.items()}, 0, sampled), target
    peak[Stage.LOADING] = _bytes(model.unet) + encoders
    if options.low_vram and Stage.SALIENCY in peak:
        sums = (8 if plan.by_ratio else 4) * total
        peak[Stage.SALIENCY] -= sums
        held += sums
    if options.low_vram and trains:
        peak[Stage.TRAINING] -= moments * entries_trained
        held += moments * entries_trained
    elif trains and plan.goal is not None:
        peak[Stage.PROBING] = _probed(plan, peak) + moments * entries_trained
    if trains and plan.goal is not None:
        held += total * dtype.itemsize  # the trained weights, while a probe needs the original ones
    return Needs(peak, held, sampled), target


def _with_targets(needs: Needs, target: int, plan: Plan, device: torch.device) -> Needs:
    """With the targets of all steps, which are held in CPU memory. target: bytes of a step's."""
    held = target * sum(cost.steps for cost in erasure_stages(plan) if cost.stage is Stage.FROZEN_TARGETS)
    if not held:
        return needs
    if device.type == "cpu":
        return replace(needs, peak={**needs.peak, Stage.TRAINING: needs.peak[Stage.TRAINING] + held})
    return replace(needs, cpu=needs.cpu + held)


def _trains(plan: Plan) -> bool:
    return any(cost.backward for cost in erasure_stages(plan) if cost.stage is not Stage.SALIENCY)


def _probed(plan: Plan, peak: Mapping[Stage, int]) -> int:
    """What sampling for a probe needs during training, and decoding, if the detector looks at images."""
    return peak[Stage.SAMPLING] if passes_of(plan.detector) else max(peak[Stage.SAMPLING], peak[Stage.IMAGES_BEFORE])


def _bytes(module: nn.Module | None) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters()) if module is not None else 0


def _sampling(model: Model, plan: Plan, memory: MemoryPeak) -> int:
    n = batch_size_of(model) * (2 if plan.sampling.guided else 1)
    with memory.measured(), torch.no_grad():
        model.predict(*_inputs(model, n))
    return memory.peak


def _inputs(model: Model, n: int) -> tuple[Tensor, Tensor, Any]:
    """(x_t, t, conditioning) of n samples."""
    t = torch.full((n,), model.schedule.t_at(0.5), device=model.device)
    return torch.zeros(n, *model.latent_shape, device=model.device), t, _prompts(model, n)


def _prompts(model: Model, n: int) -> Any:
    return model.encode([""]).expand(n)


def _decoding(model: Model, memory: MemoryPeak) -> int:
    """The VAE's decoder next to the network."""
    if model.vae is None:
        return memory.live
    with memory.measured(), torch.no_grad():
        latents = torch.empty(batch_size_of(model), *model.latent_shape, dtype=model.vae.dtype)
        model.vae.decode(latents).sample.float()
    return memory.peak + _bytes(model.vae)


def training_data(model: Model, plan: Plan) -> ErasureData:
    """A training set of the plan's sizes, with all that a goal may add to it."""
    n = (plan.all_latents or plan.recipe.forget_latents) * len(plan.concepts)
    retain = plan.recipe.retain_latents + retain_growth(plan)

    def latents(count: int) -> Tensor:
        return torch.zeros(count, *model.latent_shape, device=model.device)

    prompts = [_prompts(model, count) for count in (n, n, retain, 1)]
    return ErasureData(latents(n), latents(n), latents(retain), *prompts)


def _saliency(model: Model, plan: Plan, data: ErasureData, memory: MemoryPeak) -> int:
    parameters, recipe = parameters_in_scope(model, plan.scope), plan.recipe
    with memory.measured():
        sums = {name: torch.zeros(p.shape, dtype=torch.float32) for name, p in parameters.items()}
        losses = saliency_losses(model, data, recipe.guidance, recipe.batch_size, 1, 0)
        with summed(parameters, sums) as add:
            add(*next(losses))
        if plan.by_ratio:
            more = {name: torch.zeros(p.shape, dtype=torch.float32) for name, p in parameters.items()}
            losses = retain_saliency_losses(
                model, data, range(min(recipe.batch_size, len(data.forget))), recipe.batch_size, 1, 0
            )
            with summed(parameters, more) as add:
                add(*next(losses))
    return memory.peak


def _training(model: Model, plan: Plan, data: ErasureData, memory: MemoryPeak, cached: bool, packs: bool) -> int:
    """The second step of SalUn's training, when moments are there."""
    with memory.measured():
        optimizer = masked_optimizer(model, plan, cached, packs=packs)
        with optimizer:
            optimizer.make_moments()
            protected = "retain" if plan.options.gradient_surgery else ""
            take_step(optimizer, lambda step: losses_of(model, plan, data, step), 1, {}, protected=protected)
    return memory.peak


def masked_optimizer(
    model: Model, plan: Plan, cached: bool, cpu_offload: bool = False, packs: bool = False
) -> MaskedOptimizer:
    """The optimizer of a plan's training with some mask.

    Args:
        cached, cpu_offload: As in `MaskedOptimizer`.
        packs: Whether gradients are packed in any case, as several processes need it.
    """
    parameters, options = parameters_in_scope(model, plan.scope), plan.options
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    masked = plan.method.takes_mask and options.mask != "full"
    mask = _some_mask(shapes, options.density if masked else 1.0)
    make = adam("adam", 1e-5, parameters, cpu_offload)
    packs = packs or model.dtype == torch.float16 or options.method == "salun-soft" or options.gradient_surgery
    return MaskedOptimizer(parameters, mask, make, "pack" if packs else "step", None, cpu_offload, cached=cached)


def _some_mask(shapes: Mapping[str, tuple[int, ...]], density: float | str) -> Mask:
    """A mask of this density in each parameter: of its first entries."""
    bits = {}
    for name, shape in shapes.items():
        n = prod(shape)
        count = min(n, max(1, entries(n, density) if n * float(density) >= 1 else 0))
        row = np.zeros((n + 7) // 8, np.uint8)
        row[: count // 8] = 255
        if count % 8:
            row[count // 8] = (1 << count % 8) - 1
        bits[name] = row
    return Mask(bits, dict(shapes))


def losses_of(model: Model, plan: Plan, data: ErasureData, step: int) -> dict[str, Tensor]:
    """SalUn's losses of a step, with its draw and its frozen targets."""
    recipe = plan.recipe
    batch = draw(model, data, recipe.batch_size, recipe.anchor_share, 0, step)
    targets = frozen_predictions(model, batch, plan.options.target_guidance) if plan.needs_frozen else None
    apart = plan.options.gradient_surgery
    forget, retain = training_losses(model, batch, targets, recipe.target, recipe.retain_target, apart)
    return {"forget": forget, "retain": retain}


def operations(spec: ModelSpec, plan: Plan, dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of one sample's pass without gradients, and of one forward and backward.

    Args:
        spec: The model's files; no weight is read.
        plan: For this model.
        dtype: Of the network.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    with sketched(spec, dtype) as model, model.configured(replace(plan.options, attention="sdpa")):
        for graph in (False, True):
            for parameter in parameters_in_scope(model, plan.scope).values():
                parameter.requires_grad_(graph)
            with (
                FlopCounterMode(display=False, custom_mapping=_attention_operations()) as counter,
                torch.set_grad_enabled(graph),
            ):
                output = model.predict(*_inputs(model, 1))
                if graph:
                    output.square().mean().backward()
            counts.append(int(counter.get_total_flops()))
    return counts[0], counts[1]


def _attention_operations() -> dict[Any, Any]:
    """Formulas of the attention that runs on the CPU, for which torch's counter has none: as of a GPU's."""
    from torch.utils.flop_counter import sdpa_backward_flop, sdpa_flop

    def of_tensors(formula: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> int:
            return int(formula(*args, **kwargs))

        count._get_raw = True  # type: ignore[attr-defined]  # torch's formulas take tensors already
        return count

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: of_tensors(sdpa_flop),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: of_tensors(sdpa_backward_flop),
    }


def _as_tensors(needs: Needs, target: int) -> dict[str, Tensor]:
    numbers = {"target": target, **{name: getattr(needs, name) for name in NUMBERS}}
    numbers |= {f"peak {stage}": size for stage, size in needs.peak.items()}
    return {name: torch.tensor([number], dtype=torch.int64) for name, number in numbers.items()}


def _of_tensors(tensors: Mapping[str, Tensor]) -> tuple[Needs, int]:
    numbers = {name: int(tensor) for name, tensor in tensors.items()}
    peak = {Stage(name.removeprefix("peak ")): size for name, size in numbers.items() if name.startswith("peak ")}
    return Needs(peak, **{name: numbers[name] for name in NUMBERS}), numbers["target"]
