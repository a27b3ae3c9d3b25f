"""The options of erasures, and the numbers that depend on the model.

`None` stands for `auto`: the number comes from the model's recipe (data in the model's folder or in the alias table).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from salun.detectors import DETECTORS
from salun.diffusion.goal import Goal
from salun.errors import ConfigError
from salun.methods import METHODS, option_names, with_method_options
from salun.options import MASKS, Checked, DeviceOptions, FileOptions, option
from salun.user_text import prompt_text

SCOPES = ("full", "xattn", "xattn-strict", "selfattn", "attn", "noxattn")
SAMPLERS = ("dpm++2m", "ddim", "euler", "euler_a", "lcm")
OF_RECIPE = "the model's recipe"  # what an unset number is, unless its option says otherwise


@dataclass(frozen=True)
class ModelOptions(DeviceOptions, FileOptions):
    """How to find a model and read what its files do not say."""

    components: str | None = option(
        None,
        "Diffusers folder or hub id that supplies what a single file lacks (VAE, text encoder, configs)",
        path=True,
    )
    prediction_type: str | None = option(
        None, "Prediction type of the UNet", auto="read from the model's files", choices=("epsilon", "v_prediction")
    )


def schedule_part(text: str) -> tuple[float, float]:
    """The two fractions of the noise schedule in FROM-TO. Raises ConfigError unless 0 <= FROM < TO <= 1.

    (YAML would read 0:0.5 as a number, in base 60.)
    """
    try:
        first, end = map(float, text.split("-"))
        valid = 0 <= first < end <= 1
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(
            f"is {text[:60]!r}, but must be FROM-TO, two rising fractions from 0 to 1",
            option="forget_timesteps",
            advice="Use {forget_timesteps} 0-0.5 for the half with less noise",
        )
    return first, end


@with_method_options("diffusion")
@dataclass(frozen=True)
class EraseOptions(ModelOptions):
    """The options of an erasure; defaults are SalUn's where the paper states one."""

    anchor: list[str] = option(
        [], "Anchor that replaces the concept, one per concept in order; '' is the empty prompt", auto="the preset's"
    )
    retain_prompts: list[str] = option([], "Additional retain prompt; repeatable")
    mask: str | None = option(
        None,
        "Mask: saliency, saliency-ratio (relative to that of the retain set), saliency-by-layer (the density within "
        "each layer's tensors), a control (shuffled, random, full), or a mask file",
        auto="the method's: saliency for salun and ant, full for others",
        path=True,
    )
    density: float = option(0.5, "Mask density: the fraction of the weights to train", above=0, maximum=1)
    combine: str = option(
        "joint",
        "Mask of several concepts: one joint mask, or the union of one mask per concept",
        choices=("joint", "union"),
    )
    method: str = option(
        "salun",
        "Unlearning method (`salun methods`); uce, rece and speed take seconds",
        choices=tuple(METHODS["diffusion"]),
    )
    scope: str | None = option(
        None,
        "Layers that the mask may select, named as in ESD",
        auto="the method's; full for salun",
        choices=SCOPES,
    )
    until: str | None = option(
        None,
        "Goal to train towards; probes of held-out prompts on the way decide on steps and learning rate. With `steps` "
        "too, those are the most that it takes",
        auto=f'"{Goal()}" for salun without `steps`, `lr-decay` and `recipe`, else a fixed number of steps',
    )
    steps: int | None = option(
        None,
        "Training steps, in place of a goal",
        auto=f"as many as the goal needs; without a goal {OF_RECIPE}, for each concept",
        minimum=1,
        maximum=1_000_000,
    )
    batch_size: int | None = option(
        None, "Forget samples per step; as many retain samples are added", minimum=1, maximum=4096
    )
    lr: float | None = option(
        None, "Learning rate", auto=f"measured, with a goal; without one {OF_RECIPE}", above=0, maximum=1
    )
    lr_decay: float | None = option(
        None,
        "Fraction of the steps, at the end, over which the learning rate decays to 0; 0 keeps it constant",
        auto=f"decided by the goal; without one {OF_RECIPE}",
        minimum=0,
        maximum=1,
        expert=True,
    )
    retain_weight: float | None = option(None, "Weight α of the retain loss", minimum=0, maximum=1000)
    guidance: float | None = option(
        None, "Classifier-free guidance weight w in the saliency loss", minimum=0, maximum=100, expert=True
    )
    target: str | None = option(
        None,
        "Forget target: the anchor prediction of the frozen original model, or of the model in training",
        choices=("frozen", "online"),
        expert=True,
    )
    target_guidance: float = option(
        0.0,
        "Guidance η of the frozen forget target, which leads past the anchor, away from the concept: "
        "ε(anchor) − η·(ε(concept) − ε(anchor))",
        minimum=0,
        maximum=100,
        expert=True,
    )
    harden: int = option(
        0,
        "Adversarial embeddings of each concept, learned against the model in training, so that none brings the "
        "concept back (0: none; a step takes about three times the time)",
        minimum=0,
        maximum=1024,
    )
    harden_weight: float = option(
        0.3, "Weight of the loss on adversarial embeddings", minimum=0, maximum=1000, expert=True
    )
    gradient_surgery: bool = option(
        False,
        "Take out of the forget loss's gradient what opposes that of the retain loss; for salun, salun-soft and "
        "finetune",
        expert=True,
    )
    retain_target: str | None = option(
        None,
        "Retain target: the prediction of the frozen original model, or the noise",
        choices=("frozen", "noise"),
        expert=True,
    )
    forget_timesteps: str = option(
        "0-1",
        "Part of the noise schedule from which the forget loss draws timesteps, as FROM-TO in fractions: 0 is nearly "
        "without noise, 1 noise alone; for salun, salun-soft and finetune",
        expert=True,
    )
    anchor_share: float | None = option(
        None, "Fraction of the forget latents that are sampled under the anchor", minimum=0, maximum=1, expert=True
    )
    forget_latents: int | None = option(
        None,
        "Forget latents to sample from the model",
        auto=f"{OF_RECIPE}; with a goal half as many",
        minimum=1,
        maximum=1_000_000,
    )
    retain_latents: int | None = option(None, "Retain latents to sample from the model", minimum=0, maximum=1_000_000)
    eval_images: int | None = option(
        None,
        "Images per set (forget, retain) of the evaluation before and after; 0 disables it",
        minimum=0,
        maximum=1_000_000,
    )
    detector: str | None = option(
        None,
        f"Detector that decides whether images show the concept ({', '.join(DETECTORS)}), with an argument after a "
        "colon where it takes one",
        auto="the classifier in the model's folder, else self: the original model as classifier",
    )
    forget_images: str | None = option(
        None,
        "Folder of images of the concept, used instead of sampled latents; with several concepts, a folder of each",
        path=True,
    )
    retain_images: str | None = option(
        None, "Folder of images to retain, added to the sampled latents; x.txt is the prompt of x.png", path=True
    )
    prompt_style: str = option(
        "natural",
        "Style of the generated prompts: natural sentences, or tags for tag-trained models",
        choices=("natural", "tags"),
    )
    clip_skip: int | None = option(
        None,
        "CLIP skip: the text encoder layer to use, counted from the last as in WebUIs",
        auto="the model's",
        minimum=1,
        maximum=12,
    )
    negative_prompt: str | None = option(None, "Negative prompt of all sampling", auto="the empty prompt")
    sampling_steps: int | None = option(
        None, "Sampler steps of training samples and images", auto="the model's", minimum=1, maximum=1000
    )
    sampling_guidance: float | None = option(
        None,
        "Guidance scale of training samples and images; 1 or less disables guidance and takes half the time",
        auto="the model's",
        minimum=0,
        maximum=100,
    )
    sampler: str | None = option(
        None,
        "Sampler of training samples and images; lcm, euler and euler_a suit few-step models",
        auto="the model's DPM-Solver, else dpm++2m",
        choices=SAMPLERS,
    )
    resolution: int | None = option(
        None, "Side length of samples and images, in pixels", auto="the model's", minimum=8, maximum=4096
    )
    attention: str = option(
        "sdpa", "Attention kernel; xformers needs the xformers extra", choices=("sdpa", "xformers"), expert=True
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory")
    low_vram: bool = option(
        False,
        "Keep saliency sums, fp32 master weights and optimizer moments in CPU memory; sample one image at a time; "
        "gradient checkpointing",
    )
    as_given: bool = option(
        False,
        "Keep these options also where a GPU's memory does not suffice; by default an erasure then turns on "
        "gradient_checkpointing, then low_vram, then makes batches smaller if no batch_size is given",
    )
    optimizer: str = option(
        "adam",
        "Optimizer; adam8bit keeps its moments in 8 bits and needs the bitsandbytes extra",
        choices=("adam", "adam8bit"),
    )
    deterministic: bool = option(True, "Use deterministic kernels where available", expert=True)
    save_every: float = option(
        60.0, "Seconds between training checkpoints to resume from; 0 saves every step", minimum=0, expert=True
    )
    seed: int = option(0, "Random seed", minimum=0, maximum=2**63 - 1)
    keep_ema: bool = option(False, "Keep the EMA weights of a single file, which still contain the concept")
    show_sensitive: bool = option(False, "Do not blur images of sensitive concepts")
    recipe: str = option(
        "default", "Source of unset numbers: the model's default recipe, or the paper's", choices=("default", "paper")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in (None, *MASKS) and not str(self.mask).endswith(".safetensors"):
            raise ConfigError(
                f"is {self.mask!r}, but must be one of {', '.join(MASKS)}, or a .safetensors file", option="mask"
            )
        if self.until is not None:
            Goal.parse(self.until)
        schedule_part(self.forget_timesteps)
        if any(not prompt.strip() for prompt in self.retain_prompts):
            raise ConfigError("contains an empty prompt", option="retain_prompts")


@dataclass(frozen=True)
class EraseJob(EraseOptions):
    """One erasure: its options, what to erase from which model, and where to write.

    What a config file may contain, and what the command line and a run.json agree on.
    """

    concept: list[str] = option(
        [], "Concept to erase: a preset, a word of the model's vocabulary, or any text; repeatable"
    )
    model: str | None = option(
        None,
        "Model: an alias (`salun models`), a .safetensors file, a diffusers folder, a hub id, or the name of a "
        "checkpoint in the model folders",
        auto="the bundled `shapes`",
        path=True,
    )
    output: list[str] = option(
        [],
        "Output, with the format by its name: x.safetensors (checkpoint), x/ (diffusers folder), x.salun.safetensors "
        "(delta that can be undone), x.lora.safetensors or x.diff.safetensors (for any LoRA loader); repeatable",
        auto="the model in the format of its input and the delta, in the run folder",
        path=True,
    )
    run_dir: str | None = option(None, "Run folder", auto="runs/<time>-<concept>", path=True)

    @property
    def options(self) -> EraseOptions:
        """The options alone."""
        return EraseOptions(**{item.name: getattr(self, item.name) for item in dataclasses.fields(EraseOptions)})


GROUPS = {  # title → options, in the order in which hosts show them
    "Concept": ("concept", "anchor", "retain_prompts", "prompt_style", "negative_prompt"),
    "Model": ("model", "components", "models_dir", "prediction_type", "clip_skip", "resolution", "allow_pickle"),
    "Data": ("forget_latents", "retain_latents", "forget_images", "retain_images"),
    "Sampling": ("sampling_steps", "sampling_guidance", "sampler"),
    "Mask": ("mask", "density", "combine", "scope", "method", "guidance"),
    "Training": (
        "until", "steps", "batch_size", "lr", "lr_decay", "retain_weight", "target", "target_guidance",
        "harden", "harden_weight",
        "gradient_surgery", "retain_target", "anchor_share", "forget_timesteps", "optimizer", "recipe",
    ),
    "Other methods": option_names("diffusion"),
    "Evaluation": ("eval_images", "detector", "show_sensitive"),
    "Computing": (
        "device", "dtype", "low_vram", "gradient_checkpointing", "as_given", "attention", "seed", "deterministic",
        "save_every",
    ),
    "Files": ("output", "run_dir", "keep_ema"),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe(Checked):
    """The numbers that depend on the model. Comes from its folder's `salun.yaml`, or from the alias table.

    Args:
        saliency_timesteps: Draws of (t, ε) per forget latent in the saliency pass.
        lr_decay: See `TrainingSettings`.
    """

    steps: int = option(100, "", minimum=1, maximum=1_000_000)
    batch_size: int = option(8, "", minimum=1, maximum=4096)
    lr: float = option(1e-5, "", above=0, maximum=1)
    retain_weight: float = option(1.0, "", minimum=0, maximum=1000)
    guidance: float = option(7.5, "", minimum=0, maximum=100)
    forget_latents: int = option(128, "", minimum=1, maximum=1_000_000)
    retain_latents: int = option(256, "", minimum=0, maximum=1_000_000)
    saliency_timesteps: int = option(4, "", minimum=1, maximum=1000)
    eval_images: int = option(16, "", minimum=0, maximum=1_000_000)
    lr_decay: float = option(0.5, "", minimum=0, maximum=1)
    target: str = option("frozen", "", choices=("frozen", "online"))
    retain_target: str = option("frozen", "", choices=("frozen", "noise"))
    anchor_share: float = option(0.5, "", minimum=0, maximum=1)


@dataclass(frozen=True)
class Sampling(Checked):
    """How to sample a model."""

    steps: int = option(20, "Sampler steps", minimum=1, maximum=1000)
    guidance: float = option(
        7.5,
        "Classifier-free guidance scale; 1 or less disables guidance, with one pass per step",
        minimum=0,
        maximum=100,
    )
    resolution: int = option(512, "Side length in pixels", minimum=8, maximum=4096)
    negative_prompt: str = option("", "Negative prompt")
    sampler: str | None = option(None, "Sampler", auto="the model's DPM-Solver, else dpm++2m", choices=SAMPLERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "negative_prompt", prompt_text(self.negative_prompt))

    @property
    def guided(self) -> bool:
        """Whether guidance is computed. At 1 it adds nothing; some model cards call that 0."""
        return self.guidance > 1

    @property
    def passes(self) -> int:
        """Passes through the UNet per sample."""
        return self.steps * (2 if self.guided else 1)
