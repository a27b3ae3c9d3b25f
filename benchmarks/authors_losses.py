"""The losses of ESD, CA, LECO, SPM, EraseDiff and FMN compared with their authors' code, on the same random tensors.

    python -m benchmarks.authors_losses --esd PATH --ca PATH --leco PATH --spm PATH --erasediff PATH --fmn PATH

Each path is a clone (a checkout or a bare git directory) of a repository that is not part of this one:

    --esd        github.com/rohitgandikota/erasing
    --ca         github.com/nupurkmr9/concept-ablation
    --leco       github.com/p1atdev/LECO
    --spm        github.com/Con6924/SPM
    --erasediff  github.com/JingWu321/EraseDiff
    --fmn        github.com/SHI-Labs/Forget-Me-Not

The statements of one step of their training loop run unchanged, up to the gradient, with stand-ins for the pipeline,
the optimizer and the data around them. The method of salun runs its own first step. Both have the same small network
(FMN: the bundled model), embeddings, timesteps and noise, and the same partly denoised samples where a method makes
them. Prints for each the relative difference of the loss, and the largest difference of a gradient relative to the
largest gradient, after the constant factors and terms by which the two losses differ; these are named.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import salun
from benchmarks.authors_network import (
    ANCHOR,
    CONCEPT,
    SIZE,
    FirstStep,
    Model,
    N,
    first_step,
    gradients_of,
    network_of,
    show,
)  # fmt: skip
from benchmarks.authors_source import Source, Torch, commit
from salun.diffusion.losses import draw
from salun.diffusion.methods.ca import CaOptions, ca
from salun.diffusion.methods.erasediff import EraseDiffOptions, erasediff
from salun.diffusion.methods.esd import EsdOptions, esd
from salun.diffusion.methods.fmn import fmn
from salun.diffusion.methods.leco import LecoOptions, leco
from salun.diffusion.methods.spm import SpmOptions, spm
from salun.diffusion.negative_guidance import Denoised
from salun.options import NoOptions

ESD_2023 = "b8aeab6"  # the last commit of the first authors' code of ESD, which is in the same repository


def compare_esd(clone: Path) -> None:
    """The code of 2025 at η + 1, since its target begins at the concept's prediction; that of 2023 at η."""
    for strength in (1.0, 2.5):
        esd_of_2025(clone, strength)
        esd_of_2023(clone, strength)


def esd_of_2025(clone: Path, strength: float) -> None:
    source, model = Source(clone, "esd_sd.py"), Model()
    task, (sample,) = first_step(model, esd, EsdOptions(negative_guidance=strength, esd_samples="original"))
    network, pipe = deepcopy(model.network), MagicMock(return_value=SimpleNamespace(images=sample.x_t))
    pipe.scheduler.timesteps = [sample.t]
    names = source.run(
        source.loop("iteration", "pbar"),
        {
            "pipe": pipe, "base_unet": model.frozen, "esd_unet": network, "optimizer": MagicMock(),
            "random": MagicMock(randint=MagicMock(return_value=0)), "num_inference_steps": 50, "batchsize": N,
            "erase_concept": CONCEPT, "erase_concept_from": None, "guidance_scale": 3, "height": SIZE,
            "width": SIZE, "erase_embeds": sample.prompts.hidden, "null_embeds": sample.empty.hidden,
            "timestep_cond": None, "criteria": nn.MSELoss(), "negative_guidance": strength + 1, "losses": [],
            "pbar": MagicMock(),
        },
    )  # fmt: skip
    show(f"ESD {commit(clone)}, η = {strength}", task, names["loss"], gradients_of(network))


def esd_of_2023(clone: Path, strength: float) -> None:
    source, model = Source(clone, "train-scripts/train-esd.py", ESD_2023), Model()
    task, (sample,) = first_step(model, esd, EsdOptions(negative_guidance=strength))
    network, drawn = deepcopy(model.network), iter([torch.tensor([20]), sample.t])
    texts = {"": sample.empty.hidden, CONCEPT: sample.prompts.hidden}
    encode = MagicMock(side_effect=lambda prompts: texts[prompts[0]])
    names = source.run(
        source.loop("i", "pbar"),
        {
            "model": SimpleNamespace(get_learned_conditioning=encode, apply_model=network_of(network)),
            "model_orig": SimpleNamespace(apply_model=network_of(model.frozen)), "opt": MagicMock(), "words": [],
            "random": MagicMock(sample=MagicMock(return_value=[CONCEPT])), "ddim_steps": 50, "i": 1, "losses": [],
            "torch": Torch(randint=lambda *args, **named: next(drawn)), "devices": ["cpu", "cpu"],
            "quick_sample_till_t": lambda *args: sample.x_t, "start_guidance": 3, "criteria": nn.MSELoss(),
            "negative_guidance": strength, "pbar": MagicMock(), "history": [], "iterations": 1000,
        },
    )  # fmt: skip
    show(f"ESD {ESD_2023}, η = {strength}", task, names["loss"], gradients_of(network))


def compare_ca(clone: Path) -> None:
    """Their mask has one channel and a latent four, so that the loss of the concept is multiplied by four."""
    weight, source = 0.7, Source(clone, "diffusers/train.py")
    model = Model()
    task, _ = first_step(model, ca, CaOptions(ca_regularization=weight))
    rows, x_0, t, noise = task.drawn(0, task.training_set.anchor_latents)
    network = deepcopy(model.network)
    concept, anchor = task.training_set.forget[rows].hidden, task.training_set.anchor[rows].hidden
    vae = MagicMock()
    vae.encode.return_value.latent_dist.sample.return_value = torch.cat([x_0, x_0])
    vae.config.scaling_factor = 1.0
    config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon")
    loop = source.loop("(step, batch)", "enumerate(train_dataloader)")
    inside = next(statement.body for statement in loop if isinstance(statement, ast.With))
    names = source.run(
        inside,
        {
            "vae": vae, "weight_dtype": torch.float64, "unet": network, "F": F, "optimizer": MagicMock(),
            "torch": Torch(randn_like=lambda x: torch.cat([noise, noise]), randint=lambda *a, **n: torch.cat([t, t])),
            "noise_scheduler": SimpleNamespace(config=config, add_noise=model.schedule.add_noise),
            "text_encoder": lambda hidden: (hidden,), "lr_scheduler": MagicMock(),
            "batch": {
                "pixel_values": x_0, "input_ids": torch.cat([concept, anchor]), "input_anchor_ids": anchor,
                "mask": torch.ones(2 * N, 1, SIZE, SIZE),
            },
            "args": SimpleNamespace(
                loss_type_reverse="model-based", with_prior_preservation=True, prior_loss_weight=4 * weight,
                parameter_group="cross-attn", max_grad_norm=1.0,
            ),
            "accelerator": SimpleNamespace(backward=lambda loss: loss.backward(), sync_gradients=False),
        },
    )  # fmt: skip
    show(f"CA {commit(clone)}, a quarter of theirs at 4λ", task, names["loss"], gradients_of(network), 1 / 4)


def low_rank_step(
    clone: Path, train: str, utilities: str, pair: str, adapters: tuple[str, str, str], model: Model, task: FirstStep,
    sample: Denoised, rank: int, settings: Mapping[str, Any], more: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """(loss, gradients by the names of salun's factors) of a step of LECO's or SPM's loop.

    Args:
        train, utilities, pair: The files of their loop, of `predict_noise` and of the class with the loss.
        adapters: The file of their low-rank layers, and the classes of a layer and of all of them.
        rank: Of the change; theirs is divided by it.
        settings: Of their pair of prompts. more: Further names in their loop.
    """
    file, layer, layers = adapters
    around = {"math": math, "DEFAULT_TARGET_REPLACE": ["Transformer2DModel"]}
    defined = Source(clone, file).defined(layer, layers, LORA_PREFIX_UNET="lora_unet", **around)
    network = deepcopy(model.frozen).requires_grad_(False)
    with contextlib.redirect_stdout(io.StringIO()):
        named = {"module": defined[layer]} if layer == "SPMLayer" else {}
        change = defined[layers](network, rank=rank, alpha=1.0, **named)
    weights = dict(change.named_parameters())

    def adapter_weight(name: str) -> str:
        """The name of their weight that is a factor of salun."""
        path, factor = name.rsplit(".weight.", 1)
        return f"lora_unet_{path.replace('.', '_')}.lora_{'down' if factor == 'A' else 'up'}.weight"

    with torch.no_grad():
        for name, factor in task.trained.items():
            weights[adapter_weight(name)].copy_(factor)
    functions = Source(clone, utilities).defined("concat_embeddings", "predict_noise")
    utility = MagicMock(**{name: functions[name] for name in ("concat_embeddings", "predict_noise")})
    utility.diffusion.return_value = sample.x_t
    prompt, empty = sample.prompts.hidden[:1], sample.empty.hidden[:1]
    common = {"batch_size": N, "resolution": SIZE, "dynamic_resolution": False, "dynamic_crops": False}
    prompts = Source(clone, pair).defined("PromptEmbedsPair", ACTION_TYPES=str)["PromptEmbedsPair"](
        nn.MSELoss(), prompt, prompt, empty, empty, SimpleNamespace(**common, **settings)
    )
    scheduler = MagicMock(timesteps=[sample.t[:1]] * 1000, scale_model_input=lambda x, t: x)
    config = MagicMock()
    config.train.max_denoising_steps, config.train.max_grad_norm, config.train.iterations = 50, 0, 1000
    config.logging.verbose = config.logging.use_wandb = False
    source, losses = Source(clone, train), list[Tensor]()

    def loss_of(**latents: Any) -> Any:
        """Their loss, noted: their loop deletes it."""
        made = type(prompts).loss(prompts, **latents)
        losses.append(made if isinstance(made, Tensor) else made["loss"])
        return made

    prompts.loss = loss_of
    source.run(
        source.loop("i", "pbar"),
        {
            "i": 0, "noise_scheduler": scheduler, "config": config, "DEVICE_CUDA": "cpu", "optimizer": MagicMock(),
            "prompt_pairs": [prompts], "train_util": utility, "weight_dtype": torch.float64, "network": change,
            "unet": network, "lr_scheduler": MagicMock(), "pbar": MagicMock(), "flush": lambda: None,
            "PromptEmbedsPair": None, "tokenizer": None, "text_encoder": None, "trainable_params": [], **(more or {}),
        },
    )  # fmt: skip
    return losses[0], {name: weights[adapter_weight(name)].grad for name in task.gradients}


def compare_leco(clone: Path) -> None:
    """Both at rank 4."""
    model, strength = Model(moved=False), 1.5
    task, (sample,) = first_step(model, leco, LecoOptions(negative_guidance=strength))
    settings = {"guidance_scale": strength, "action": "erase"}
    files, adapters = ("train_lora.py", "train_util.py", "prompt_util.py"), ("lora.py", "LoRAModule", "LoRANetwork")
    show(f"LECO {commit(clone)}", task, *low_rank_step(clone, *files, adapters, model, task, sample, 4, settings))


def compare_spm(clone: Path) -> None:
    """Both at rank 1, holding the same prompts."""
    model, strength, weight = Model(moved=False), 1.5, 10.0
    picked: list[Tensor] = []
    draw_rows = torch.multinomial

    def noted(*args: Any, **named: Any) -> Tensor:
        picked.append(draw_rows(*args, **named))
        return picked[-1]

    with patch.object(torch, "multinomial", noted):
        task, (sample,) = first_step(model, spm, SpmOptions(strength, spm_anchoring=weight))
    held = torch.cat([sample.empty.hidden, task.encode("retain")[picked[0]].hidden])
    settings = {
        "guidance_scale": strength, "action": "erase_with_la", "la_strength": weight, "sampling_batch_size": N,
        "use_template": False,
    }  # fmt: skip
    files = "train_spm.py", "src/engine/train_util.py", "src/configs/prompt.py"
    adapters, more = ("src/models/spm.py", "SPMLayer", "SPMNetwork"), {"sample": lambda *args, **named: held}
    loss = low_rank_step(clone, *files, adapters, model, task, sample, 1, settings, more)
    show(f"SPM {commit(clone)}", task, *loss)


def compare_erasediff(clone: Path) -> None:
    """Theirs subtracts λ times the lower level's loss, a constant, which is 0.37 here."""
    weight, constant = 0.1, torch.tensor(0.37)
    source, ddpm = Source(clone, "sd/train_scripts/erasediff.py"), Source(clone, "sd/ldm/models/diffusion/ddpm.py")
    model = Model()
    task, _ = first_step(model, erasediff, EraseDiffOptions(erasediff_lambda=weight), anchor_share=0.0)
    batch = draw(model, task.training_set, N, 0.0, 0, 0)  # type: ignore[arg-type]
    network = deepcopy(model.network)
    functions = ddpm.run(
        [ddpm.definition("p_losses", "LatentDiffusion"), ddpm.definition("get_loss", "DDPM")],
        {"default": lambda value, make: make() if value is None else value},
    )
    latent_diffusion = SimpleNamespace(
        first_stage_key="jpg", num_timesteps=1000, device="cpu", training=True, parameterization="eps",
        loss_type="l2", logvar=torch.zeros(1000), learn_logvar=False, l_simple_weight=1.0, original_elbo_weight=0.0,
        lvlb_weights=torch.zeros(1000), train=lambda: None, apply_model=network_of(network),
        q_sample=lambda x_start, t, noise: model.schedule.add_noise(x_start, noise, t),
    )  # fmt: skip
    latent_diffusion.get_loss = MethodType(functions["get_loss"], latent_diffusion)
    anchor = model.embeddings[ANCHOR]

    def get_input(images: Mapping[str, Any], key: str) -> tuple[Tensor, Tensor]:
        """Latents and embeddings; a prompt that is text is that of their anchor."""
        rows = [anchor if isinstance(prompt, str) else prompt for prompt in images["txt"]]
        return images[key].permute(0, 3, 1, 2), torch.stack(rows)

    def shared_step(images: Mapping[str, Any]) -> Any:
        return functions["p_losses"](latent_diffusion, *get_input(images, "jpg"), batch.t[N:], batch.noise[N:])

    latent_diffusion.get_input, latent_diffusion.shared_step = get_input, shared_step
    names = source.run(
        source.loop("i", "range(len(forget_dl))"),
        {
            "model": latent_diffusion, "optimizer": MagicMock(), "descriptions": list(batch.prompts.hidden),
            "losses": [], "forget_dl": [(batch.x_0[:N], range(N))], "remain_dl": [(batch.x_0[N:], range(N, 2 * N))],
            "torch": Torch(randn_like=lambda *a, **n: batch.noise[:N], randint=lambda *a, **n: batch.t[:N]),
            "forget_input": batch.x_0[:N], "criteria": nn.MSELoss(), "unl_losses": SimpleNamespace(avg=constant),
            "lambda_bome": weight, "batch_size": N, "mask_path": None, "step": 0, "t": MagicMock(), "epoch": 0,
            "sleep": lambda seconds: None,
        },
    )  # fmt: skip
    loss = names["loss"] + weight * constant
    show(f"EraseDiff {commit(clone)}, their constant added", task, loss, gradients_of(network))


def compare_fmn(clone: Path) -> None:
    """Theirs is the norm, over the batch, of what salun takes the square of; on the bundled model, in float32."""
    torch.set_default_dtype(torch.float32)
    source = Source(clone, "src/train_attn.py")
    names = source.defined("AttnController", "MyCrossAttnProcessor")
    model = salun.load("shapes", device="cpu")
    for name, parameter in model.parameters().items():
        parameter.requires_grad_(".attn2.to_q." in name or ".attn2.to_k." in name)
    marked = torch.zeros(3, model.encode([CONCEPT]).hidden.shape[1])
    marked[:, 1 + len(model.tokens("a"))] = 1
    with patch("salun.diffusion.methods.fmn.concept_tokens", lambda task: marked):
        task, _ = first_step(model, fmn, NoOptions())
    rows, x_0, t, noise = task.drawn(0, task.training_set.forget_latents)
    controller = names["AttnController"]()
    controller.set_concept_positions(marked[rows].bool())
    for name, module in model.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(names["MyCrossAttnProcessor"](controller, name))
    model.predict(model.schedule.add_noise(x_0, noise, t), t, task.training_set.forget[rows])
    loss = controller.loss()
    gradients = torch.autograd.grad(loss, list(task.parameters.values()))
    factor = float(loss.detach()) / N
    doubled = {name: 2 * gradient for name, gradient in zip(task.parameters, gradients, strict=True)}
    show(f"FMN {commit(clone)}, the square of theirs by the batch", task, loss, doubled, factor)
    torch.set_default_dtype(torch.float64)


COMPARISONS = {
    "esd": compare_esd,
    "ca": compare_ca,
    "leco": compare_leco,
    "spm": compare_spm,
    "erasediff": compare_erasediff,
    "fmn": compare_fmn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in COMPARISONS:
        parser.add_argument(f"--{name}", type=Path, help="Clone of the authors' repository (default: skipped).")
    paths = vars(parser.parse_args())
    torch.set_default_dtype(torch.float64)
    for name, compare in COMPARISONS.items():
        if paths[name] is not None:
            compare(paths[name])


if __name__ == "__main__":
    main()
