"""Other families, as small random models in diffusers' format: SD 2 (v-prediction) and SDXL."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import salun
from salun.checkpoints.locate import ASSETS
from salun.diagnostics.inspect import inspect
from salun.diffusion.model.schedule import alphas_cumprod, schedule_of
from salun.errors import ModelError

from .conftest import SHORT

TINY = {**SHORT, "steps": 2, "forget_latents": 4, "retain_latents": 4, "eval_images": 2, "lr": 1e-3}


def make(folder: Path, pipeline: str, prediction_type: str, dtype: torch.dtype) -> Path:
    """A random model whose folder has what diffusers writes."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    xl = pipeline == "StableDiffusionXLPipeline"
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=3,
        num_attention_heads=2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    sdxl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 if xl else 16, use_linear_projection=True, **(sdxl if xl else {}),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2, sample_size=32,
    )  # fmt: skip
    variant = "fp16" if dtype == torch.float16 else None
    unet.to(dtype).save_pretrained(folder / "unet", variant=variant)
    vae.to(dtype).save_pretrained(folder / "vae", variant=variant)
    CLIPTextModel(text).to(dtype).save_pretrained(folder / "text_encoder", variant=variant)
    tokenizer.save_pretrained(folder / "tokenizer")
    if xl:
        CLIPTextModelWithProjection(text).to(dtype).save_pretrained(folder / "text_encoder_2", variant=variant)
        tokenizer.save_pretrained(folder / "tokenizer_2")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}), encoding="utf-8")
    settings = {"sampling": {"steps": 2, "guidance": 3.0}}  # the resolution, 4 · 8, is in the configs
    (folder / "salun.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("pipeline", "prediction_type", "dtype"),
    [
        ("StableDiffusionPipeline", "v_prediction", torch.float32),
        ("StableDiffusionXLPipeline", "epsilon", torch.float16),
    ],
)
def test_an_erasure_runs_and_writes_the_models_own_layout(
    pipeline: str, prediction_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", pipeline, prediction_type, dtype)
    model = salun.load(str(folder), device="cpu")
    assert model.schedule.prediction_type == prediction_type
    run = salun.erase(model, salun.Concept("golf ball"), run_dir=tmp_path / "run", **TINY)
    name = next(p.name for p in (folder / "unet").glob("*.safetensors"))
    assert (".fp16." in name) == (dtype == torch.float16)
    before, after = load_file(folder / "unet" / name), load_file(tmp_path / "run" / "model" / "unet" / name)
    integers = torch.int16 if dtype.itemsize == 2 else torch.int32
    changed = 0
    for key, tensor in before.items():
        assert after[key].dtype == dtype
        differs = tensor.view(integers) != after[key].view(integers)
        assert not torch.any(differs & ~run.mask.dense(key))
        changed += int(differs.sum())
    assert changed
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in run.history)


def test_predictions_are_those_of_diffusers_own_pipeline(tmp_path: Path) -> None:
    """SDXL's two text encoders, pooled text and sizes, wired as the pipeline wires them."""
    from diffusers import StableDiffusionXLPipeline

    folder = make(tmp_path / "xl", "StableDiffusionXLPipeline", "epsilon", torch.float32)
    model = salun.load(str(folder), device="cpu")
    pipeline = StableDiffusionXLPipeline(
        model.vae, *model.text_encoders, *model.tokenizers, model.unet, scheduler=None, add_watermarker=False
    )
    hidden, _, pooled, _ = pipeline.encode_prompt("one red circle", device="cpu", do_classifier_free_guidance=False)
    ours = model.encode(["one red circle"])
    torch.testing.assert_close(ours.hidden, hidden)
    torch.testing.assert_close(ours.extra["text_embeds"], pooled)
    assert ours.extra["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_noise_schedules_are_diffusers_own(schedule: str, zero_snr: bool) -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    ours = alphas_cumprod(dict(theirs.config), "a model")
    # float32 products of a thousand factors, rescaled in another order
    torch.testing.assert_close(ours, theirs.alphas_cumprod, atol=1e-6, rtol=1e-3)


BETAS = [0.001 + 0.03 * i / 999 for i in range(1000)]


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("DDIMScheduler", {"trained_betas": BETAS}),
        ("DPMSolverMultistepScheduler", {"trained_betas": BETAS, "beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("EulerDiscreteScheduler", {"trained_betas": BETAS[:500], "num_train_timesteps": 500}),
        ("LCMScheduler", {}),  # these three have defaults of their own
        ("TCDScheduler", {"num_train_timesteps": 100}),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {"beta_end": 0.012}),
        ("DDPMScheduler", {"beta_schedule": "scaled_linear"}),
    ],
)
def test_noise_schedule_is_that_of_the_named_scheduler(scheduler: str, config: dict[str, object]) -> None:
    """In training and in sampling, with every field that defines it, and its own defaults where a field is absent."""
    import diffusers

    from salun.diffusion.model.sampler import _scheduler

    theirs = getattr(diffusers, scheduler)(**config).alphas_cumprod
    config_of = {"_class_name": scheduler, **config}
    torch.testing.assert_close(alphas_cumprod(config_of, "a model"), theirs, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(_scheduler(config_of, None).alphas_cumprod, theirs, atol=1e-6, rtol=1e-4)


UNKNOWN_SCHEDULES: list[tuple[dict[str, object], str]] = [
    ({"beta_schedule": "laplace"}, "laplace"),
    ({"beta_schedule": ["linear"]}, "noise schedule"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler"),
    ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0}, "EDMDPMSolverMultistepScheduler"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type 'continuous'"),
    ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
    ({"trained_betas": BETAS[:7]}, "7 trained_betas for 1000 num_train_timesteps"),
    ({"trained_betas": []}, "0 trained_betas"),
    ({"trained_betas": "0.1"}, "not a list of numbers"),
    ({"trained_betas": [*BETAS[:-1], 2.0]}, "number 1000 is 2.0"),
    ({"trained_betas": [*BETAS[:-1], float("nan")]}, "number 1000 is nan"),
    ({"trained_betas": [None] * 1000}, "number 1 is None"),
    ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
    ({"num_train_timesteps": 1}, "num_train_timesteps"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
    ({"beta_start": "0.1"}, "beta_start"),
    ({"beta_end": float("nan")}, "beta_end"),
    ({"prediction_type": "flow_prediction"}, "predicts 'flow_prediction'"),
    ({"prediction_type": "sample"}, "predicts 'sample'"),
]


@pytest.mark.parametrize(("config", "message"), UNKNOWN_SCHEDULES)
def test_unknown_noise_schedule_is_rejected(config: dict[str, object], message: str, tmp_path: Path) -> None:
    """By inspect too, which must not say that such a model can be erased from."""
    with pytest.raises(ModelError, match=message):
        schedule_of({"_class_name": "DDIMScheduler", **config}, "a model")
    shutil.copytree(ASSETS / "shapes", tmp_path / "model")
    place = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps({"_class_name": "DDIMScheduler", **config}), encoding="utf-8")
    assert message in inspect(str(tmp_path / "model"))["verdict"]
    with pytest.raises(ModelError, match=message):
        salun.load(str(tmp_path / "model"), device="cpu")


def test_sampler_facts_hold_nothing_that_varies_between_processes() -> None:
    """Samples are kept under a key of them. (diffusers keeps a set's order in a private entry of its configs.)"""
    from salun.diffusion.model.sampler import facts
    from salun.diffusion.options import Sampling

    stated = facts({"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}, Sampling())["sampler"]
    assert stated["beta_schedule"] == "'scaled_linear'"
    assert not [name for name in stated if name.startswith("_")]


@pytest.mark.parametrize(
    ("part", "weights", "lost"),
    [
        ("unet", "diffusion_pytorch_model", "conv_in.weight"),
        ("vae", "diffusion_pytorch_model", "decoder.conv_norm_out.weight"),
        ("text_encoder", "model", "mlp.fc1.weight"),
    ],
)
def test_a_folder_that_lacks_a_tensor_or_holds_nan_is_rejected(
    part: str, weights: str, lost: str, tmp_path: Path
) -> None:
    """The libraries would make the tensor up, and only warn."""
    folder = make(tmp_path / "model", "StableDiffusionPipeline", "epsilon", torch.float32)
    file = folder / part / f"{weights}.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(lost))
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(ModelError, match=lost.replace(".", r"\.")):
        salun.load(str(folder), device="cpu")
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file)
    with pytest.raises(ModelError, match="NaN"):
        salun.load(str(folder), device="cpu")


def test_links_inside_a_model_folder_are_part_of_a_written_model(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "StableDiffusionPipeline", "epsilon", torch.float32)
    (folder / "vae").rename(folder / "shared")
    (folder / "vae").symlink_to("shared", target_is_directory=True)
    (folder / "up").symlink_to(folder, target_is_directory=True)  # leads back: not followed for ever
    salun.erase(salun.load(str(folder), device="cpu"), "golf ball", **TINY).save(f"{tmp_path}/out/")
    assert (tmp_path / "out" / "vae" / "config.json").is_file()
    salun.load(str(tmp_path / "out"), device="cpu")


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "vae", "tokenizer/tokenizer.json", "salun.yaml"]
)
def test_load_follows_no_link_out_of_a_model_folder(name: str, tmp_path: Path) -> None:
    """Messages could show what the target holds, and outputs could hold a copy of it."""
    folder = make(tmp_path / "model", "StableDiffusionPipeline", "epsilon", torch.float32)
    (folder / "salun.yaml").write_text("sampling:\n  steps: 3\n", encoding="utf-8")
    (folder / name).rename(tmp_path / "private")
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(ModelError, match=f"{name} is a link out of the model's folder"):
        salun.load(str(folder), device="cpu")


def test_load_follows_the_links_of_a_snapshot_in_the_hubs_cache(tmp_path: Path) -> None:
    made = make(tmp_path / "model", "StableDiffusionPipeline", "epsilon", torch.float32)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in made.rglob("*") if p.is_file())):
        place = snapshot / path.relative_to(made)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    (tmp_path / "secret").write_text("the user's", encoding="utf-8")
    for name in ("LICENSE.key", "vae/LICENSE", "notes"):
        (snapshot / name).symlink_to(tmp_path / "secret")
    run = salun.erase(salun.load(str(snapshot), device="cpu"), "golf ball", **TINY)
    run.save(f"{tmp_path}/out/")
    copied = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= copied
    assert not copied & {"LICENSE.key", "LICENSE", "notes"}
