"""The options of erasures, and the numbers that depend on the model.

`None` stands for `auto`: the number comes from the model's recipe (data in the model's folder or in the alias table).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from salun.errors import ConfigError
from salun.methods import METHODS, option_names, with_method_options
from salun.options import MASKS, Checked, DeviceOptions, FileOptions, option
from salun.user_text import checked, prompt_text

SAMPLERS = ("dpm++2m", "ddim", "euler", "euler_a", "lcm")


@dataclass(frozen=True)
class ModelOptions(DeviceOptions, FileOptions):
    """How to find a model and read what its files do not say."""

    components: str | None = option(
        None,
        "for single files: a diffusers folder or hub id that has what the file lacks (VAE, text encoder, configs)",
        path=True,
    )
    prediction_type: str | None = option(
        None,
        "what the UNet predicts (default: what the model's files tell)",
        choices=("epsilon", "v_prediction"),
    )


@with_method_options("diffusion")
@dataclass(frozen=True)
class EraseOptions(ModelOptions):
    """What `salun erase` can be told; defaults are SalUn's where the paper states one."""

    anchor: list[str] = option(
        [], "what the concept becomes, one for each --concept, in order; '' is the empty prompt (default: the preset's)"
    )
    retain_prompts: list[str] = option([], "prompts to keep, added to the default ones; repeat the option")
    mask: str = option("saliency", "saliency, shuffled, random, full (the controls), or a mask file", path=True)
    density: float = option(0.5, "share of the weights that may move", above=0, maximum=1)
    combine: str = option(
        "joint",
        "several concepts: one mask from all of them together, or the union of their masks",
        choices=("joint", "union"),
    )
    method: str = option("salun", "how to unlearn (see `salun methods`)", choices=tuple(METHODS["diffusion"]))
    scope: str = option("full", "which layers, in ESD's words", choices=("full", "xattn", "selfattn", "noxattn"))
    steps: int | None = option(None, "training steps", minimum=1, maximum=1_000_000)
    batch_size: int | None = option(None, "forget samples a step, and as many retain samples", minimum=1, maximum=4096)
    lr: float | None = option(None, "Adam's learning rate", above=0, maximum=1)
    lr_decay: float | None = option(
        None, "share of the steps, at the end, over which the rate falls to 0; 0 for never", minimum=0, maximum=1
    )
    retain_weight: float | None = option(None, "α, the weight of the retain loss", minimum=0, maximum=1000)
    guidance: float | None = option(None, "guidance weight w inside the saliency loss", minimum=0, maximum=100)
    target: str | None = option(
        None, "the anchor's prediction: of the original model, or of the one in training", choices=("frozen", "online")
    )
    retain_target: str | None = option(
        None, "what retain samples are held to: the original's prediction, or the noise", choices=("frozen", "noise")
    )
    anchor_share: float | None = option(
        None, "share of the forget loss's latents that come from the anchor's own samples", minimum=0, maximum=1
    )
    forget_latents: int | None = option(None, "forget samples to draw from the model", minimum=1, maximum=1_000_000)
    retain_latents: int | None = option(None, "retain samples to draw from the model", minimum=0, maximum=1_000_000)
    eval_images: int | None = option(
        None, "pictures for the quick evaluation, each of forget and retain; 0 for none", minimum=0, maximum=1_000_000
    )
    forget_images: str | None = option(
        None,
        "a folder of pictures of the concept, in place of samples (several concepts: a folder in it for each)",
        path=True,
    )
    retain_images: str | None = option(
        None, "a folder of pictures to keep, added to the samples; x.txt beside x.png says what it shows", path=True
    )
    prompt_style: str = option(
        "natural",
        "of the prompts that are made: sentences, or tags for tag-trained models",
        choices=("natural", "tags"),
    )
    clip_skip: int | None = option(
        None, "text encoder layer, counted from the last as WebUIs do (default: the model's own)", minimum=1, maximum=12
    )
    negative_prompt: str | None = option(
        None, "what samples and pictures are guided away from, as in hosts (default: the empty prompt)"
    )
    sampling_steps: int | None = option(
        None, "sampler steps of training samples and images (default: the model's own)", minimum=1, maximum=1000
    )
    sampling_guidance: float | None = option(
        None,
        "guidance scale of training samples and images; 1 or less is without guidance, in half the time "
        "(default: the model's own)",
        minimum=0,
        maximum=100,
    )
    sampler: str | None = option(
        None,
        "sampler of training samples and images; lcm, euler and euler_a suit few-step models (default: the model's "
        "own DPM-Solver, else dpm++2m)",
        choices=SAMPLERS,
    )
    resolution: int | None = option(
        None, "pixels a side, of samples and pictures (default: the model's own)", minimum=8, maximum=4096
    )
    attention: str = option("sdpa", "attention kernel; xformers is an extra", choices=("sdpa", "xformers"))
    gradient_checkpointing: bool = option(False, "keep less in the forward pass, compute it again in the backward")
    low_vram: bool = option(
        False, "saliency sums, masters and moments in host memory, one sample at a time, gradient checkpointing"
    )
    optimizer: str = option(
        "adam", "adam, or adam8bit: moments in 8 bits by bitsandbytes, an extra", choices=("adam", "adam8bit")
    )
    deterministic: bool = option(True, "only kernels that give the same bits each time, where there are any")
    save_every: float = option(
        60.0, "seconds between saved states of training, to resume from; 0: every step", minimum=0
    )
    seed: int = option(0, "of everything random", minimum=0, maximum=2**63 - 1)
    keep_ema: bool = option(False, "keep a single file's EMA copy of the weights, though it still holds the concept")
    show_sensitive: bool = option(False, "do not blur the pictures of sensitive concepts")
    recipe: str = option("default", "where unset numbers come from", choices=("default", "paper"))

    def __post_init__(self) -> None:
        for name in ("anchor", "retain_prompts"):
            if isinstance(getattr(self, name), str):  # from Python one text is as good as a list of one
                object.__setattr__(self, name, [getattr(self, name)])
        super().__post_init__()
        if self.mask not in MASKS and not self.mask.endswith(".safetensors"):
            raise ConfigError(f"--mask is {self.mask!r}, but must be one of {', '.join(MASKS)}, or a .safetensors file")
        if any(not prompt.strip() for prompt in self.retain_prompts):
            raise ConfigError("--retain-prompts holds an empty prompt: give a text")


@dataclass(frozen=True)
class EraseJob(EraseOptions):
    """All that one erasure is told: its options, what to erase from which model, and where to write.

    What a config file may hold, and what the command line and a run.json agree on.
    """

    concept: list[str] = option(
        [], "what to forget: a preset, a word the model knows, or any text; repeat it for several"
    )
    model: str | None = option(
        None,
        "alias (see `salun models`), .safetensors file, diffusers folder, hub id, or a checkpoint's name in "
        "--models-dir (default: the small one that comes along)",
        path=True,
    )
    output: list[str] = option(
        [],
        "x.safetensors (checkpoint), x/ (diffusers folder), x.salun.safetensors (undoable delta), x.lora.safetensors "
        "or x.diff.safetensors (for stock loaders); repeat it for several (default: in the run folder, the model in "
        "its own layout and the delta)",
        path=True,
    )
    run_dir: str | None = option(None, "the run's folder (default: runs/<time>-<concept>)", path=True)

    def __post_init__(self) -> None:
        for name in ("concept", "output"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        super().__post_init__()

    @property
    def options(self) -> EraseOptions:
        """The options alone."""
        return EraseOptions(**{item.name: getattr(self, item.name) for item in dataclasses.fields(EraseOptions)})


GROUPS = {  # for people, in the order in which hosts show them
    "Concept": ("concept", "anchor", "retain_prompts", "prompt_style", "negative_prompt"),
    "Model": ("model", "components", "models_dir", "prediction_type", "clip_skip", "resolution", "allow_pickle"),
    "Data": ("forget_latents", "retain_latents", "forget_images", "retain_images"),
    "Sampling": ("sampling_steps", "sampling_guidance", "sampler"),
    "Mask": ("mask", "density", "combine", "scope", "method", "guidance"),
    "Training": (
        "steps", "batch_size", "lr", "lr_decay", "retain_weight", "target", "retain_target", "anchor_share",
        "optimizer", "recipe",
    ),
    "Other methods": option_names("diffusion"),
    "Evaluation": ("eval_images", "show_sensitive"),
    "Computing": (
        "device", "dtype", "low_vram", "gradient_checkpointing", "attention", "seed", "deterministic", "save_every",
    ),
    "Files": ("output", "run_dir", "keep_ema"),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe(Checked):
    """The numbers that depend on the model. Comes from `salun.yaml` beside it, or from the alias table.

    saliency_timesteps: draws of (t, ε) for each forget latent in the saliency pass. lr_decay: see `TrainingSettings`.
    """

    steps: int = option(100, "", minimum=1, maximum=1_000_000)
    batch_size: int = option(8, "", minimum=1, maximum=4096)
    lr: float = option(1e-5, "", above=0, maximum=1)
    retain_weight: float = option(1.0, "", minimum=0, maximum=1000)
    guidance: float = option(7.5, "", minimum=0, maximum=100)
    forget_latents: int = option(128, "", minimum=1, maximum=1_000_000)
    retain_latents: int = option(256, "", minimum=1, maximum=1_000_000)
    saliency_timesteps: int = option(4, "", minimum=1, maximum=1000)
    eval_images: int = option(16, "", minimum=0, maximum=1_000_000)
    lr_decay: float = option(0.5, "", minimum=0, maximum=1)
    target: str = option("frozen", "", choices=("frozen", "online"))
    retain_target: str = option("frozen", "", choices=("frozen", "noise"))
    anchor_share: float = option(0.5, "", minimum=0, maximum=1)


@dataclass(frozen=True)
class Sampling(Checked):
    """How to sample a model.

    guidance: 1 or less samples without guidance, one pass a step. resolution: pixels, both sides. negative_prompt: what
    guidance leads away from. sampler: None for the model's own DPM-Solver, or dpm++2m where it has none.
    """

    steps: int = option(20, "sampler steps", minimum=1, maximum=1000)
    guidance: float = option(7.5, "classifier-free guidance scale", minimum=0, maximum=100)
    resolution: int = option(512, "pixels, both sides", minimum=8, maximum=4096)
    negative_prompt: str = option("", "what guidance leads away from; '' is the empty prompt")
    sampler: str | None = option(None, "sampler", choices=SAMPLERS)

    def __post_init__(self) -> None:
        object.__setattr__(self, "negative_prompt", prompt_text(checked(self.negative_prompt, "--negative-prompt")))
        super().__post_init__()

    @property
    def guided(self) -> bool:
        """Whether guidance is computed. At 1 it has nothing to add; some models' cards call that 0."""
        return self.guidance > 1

    @property
    def passes(self) -> int:
        """Passes through the UNet that one sample takes."""
        return self.steps * (2 if self.guided else 1)
