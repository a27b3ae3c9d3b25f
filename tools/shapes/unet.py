"""Stage 3: tokenizer, text encoder and UNet, trained together on the latents of drawn images and their captions."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.shapes import world
from tools.shapes.state import Stage
from tools.shapes.vae import encode

STEPS, CALM_FROM, BATCH, WIDTH = 7600, 3747, 64, 96
START, END = "<|startoftext|>", "<|endoftext|>"


def scheduler() -> DPMSolverMultistepScheduler:
    """beta_end 0.02 leaves √ᾱ = 0.015 at the last step, so that sampling from pure noise starts where training did."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's file format, its merges learned from the captions."""
    if not (folder / "merges.txt").exists():
        learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        learner.normalizer = normalizers.Lowercase()
        learner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        learner.train_from_iterator(
            sorted(set(captions)),
            trainers.BpeTrainer(
                vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
            ),
        )
        merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]
        words = [*alphabet, *(c + "</w>" for c in alphabet)]
        words += [w for w in dict.fromkeys(a + b for a, b in merges) if w not in set(words)]
        vocabulary = {word: i for i, word in enumerate([*words, START, END])}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
        text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
        (folder / "merges.txt").write_text(text, encoding="utf-8")
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return unet, text


def train(pictures: world.Pictures, calm: world.Pictures, vae: AutoencoderKL, folder: Path) -> None:
    """ε-prediction with min-SNR-5 weights, AdamW with a cosine, EMA 0.999, 10 % empty captions.

    The first half sees the wide world, mirrored too; the second half the calm one, which the model then draws well.
    """
    torch.manual_seed(5)
    tokenizer = train_tokenizer(pictures.captions, folder / "tokenizer")
    unet, text = build(tokenizer)
    average = copy.deepcopy(torch.nn.ModuleList([unet, text])).requires_grad_(False)
    live = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(live, lr=1e-3, weight_decay=1e-2, fused=True)
    stage = Stage(folder / "unet.pt", STEPS, optimizer, unet, text, average)
    denoise = torch.compile(unet)
    wide_captions, n = [*pictures.captions, *pictures.captions], 2 * len(pictures.captions)
    if stage.step < CALM_FROM:
        wide = torch.cat([encode(vae, pictures.images), encode(vae, pictures.images[:, :, ::-1].copy())])
    else:
        wide = torch.empty(n, 4, 8, 8)
    latents = torch.cat([wide, encode(vae, calm.images)])
    captions = [*wide_captions, *calm.captions, ""]
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    alphas = scheduler().alphas_cumprod
    weights = torch.clamp(alphas / (1 - alphas), max=5) / (alphas / (1 - alphas))

    def loss(generator: torch.Generator) -> Tensor:
        span = (0, n) if stage.step < CALM_FROM else (n, len(latents))
        pick = torch.randint(*span, (BATCH,), generator=generator)
        words = torch.where(torch.rand(BATCH, generator=generator) < 0.1, len(latents), pick)
        t = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 4, 8, 8, generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        hidden = text(tokens[words]).last_hidden_state
        predicted = denoise(a.sqrt() * latents[pick] + (1 - a).sqrt() * noise, t, hidden).sample
        return (weights[t] * ((predicted - noise) ** 2).mean((1, 2, 3))).mean()

    def follow() -> None:
        decay = min(0.999, (stage.step + 1) / (stage.step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in live], 1 - decay)

    stage.run(loss, follow)
    average[0].save_pretrained(folder / "unet")
    average[1].save_pretrained(folder / "text_encoder")
