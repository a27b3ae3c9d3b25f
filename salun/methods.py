"""The registry of unlearning methods. It imports nothing heavy, since options and help texts are made from it.

To add a method, write one file with its options (a frozen dataclass) and its function, and add one line here. The file
imports torch, and whatever imports torch, inside its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, Literal, TypeVar

from salun.options import NoOptions

TaskName = Literal["diffusion", "classification"]
MaskUse = Literal["saliency", "full", "learned", "none"]
Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Method:
    """One unlearning method.

    Args:
        name: Its value of the option `method`, as papers spell it.
        title: Its name in tables and messages.
        paper: Who proposed it, and where.
        task: What it unlearns.
        run: "module:function", imported when used: (task, its own options) → new weights (`Unlearned`) in diffusion; in
            classification None: it changes the task's model in place.
        mask: Which weights train by default: those of the saliency mask, all ("full"), or those that the method finds
            while it trains ("learned", without an option `mask`). "none": it does not train under a mask.
        options_from: "module:class" of the dataclass of its own options.
        resolve: "module:function": (options, shared options, split) → options without None. Raises ConfigError for
            options that the method cannot follow.
        defaults: Values of shared options where the user gives none.
        reads: Shared options that a diffusion method's training reads; others of a training have no effect with it.
        data: What a diffusion method needs: "latents": a training set; "forget" or "anchor": those samples of one
            alone; "prompts": prompts alone.
        check: "module:function": (plan, model or None) → None, which raises ConfigError for what a diffusion method
            cannot do: when a plan is made, where there may be no model yet, and with it before the first sample.
        stages: "module:function": (plan) → list of `StageCost`, what a diffusion method's training takes; "" for the
            default.
        whole_classes: Whether a classification method forgets whole classes only.
        tunes: The option that a search tries values of; None for none.
        factors: What the search multiplies it by in its first round, rising.
        stronger, weaker: What to try, options in braces, where a diffusion method erased too little, or did damage.
        goal: Whether a diffusion method can be trained towards a goal, of `until`, and does by default.
        text: Whether a diffusion method edits how text enters the network, which a class-conditional model lacks.
        attention: Whether a diffusion method trains on the attention to the tokens that name a concept.
        anchored: Whether a diffusion method trains towards the anchor.
        grows: Whether a diffusion method's training takes further samples, where a goal needs them.
        hardens: Whether a diffusion method's training takes adversarial embeddings, of the option `harden`.
        salun_losses: Whether a diffusion method minimizes SalUn's losses, to which the options `forget_timesteps` and
            `gradient_surgery` apply.
        paper_recipe: Numbers of a diffusion method's paper, for `recipe` paper; empty where it has none for SD.
    """

    name: str
    title: str
    paper: str
    task: TaskName
    run: str
    mask: MaskUse = "none"
    options_from: str = "salun.options:NoOptions"
    resolve: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    data: Literal["latents", "forget", "anchor", "prompts"] = "latents"
    check: str = ""
    stages: str = ""
    whole_classes: bool = False
    tunes: str | None = "lr"
    factors: tuple[float, ...] = (1 / 16, 1 / 4, 1, 4, 16)
    stronger: str = "Raise {steps} or {lr}"
    weaker: str = "Lower {lr} or {steps}, or raise {retain_weight}"
    goal: Literal["default", "able", "none"] = "none"
    anchored: bool = True
    grows: bool = False
    hardens: bool = False
    salun_losses: bool = False
    text: bool = False
    attention: bool = False
    paper_recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> type[Any]:
        """The dataclass of its own options, whose file imports no torch."""
        kind: type[Any] = load(self.options_from)
        return kind

    @property
    def trains(self) -> bool:
        """Whether it takes training steps under a mask."""
        return self.mask != "none"

    @property
    def takes_mask(self) -> bool:
        """Whether the option `mask` applies to it."""
        return self.mask in ("saliency", "full")

    def call(self, task: Any, options: Any) -> Any:
        """Run the method with its own options, taken from `options` by name."""
        return load(self.run)(task, self.options_of(options))

    def options_of(self, options: Any) -> Any:
        """Its own options out of those of a run."""
        return self.options(**{item.name: getattr(options, item.name) for item in fields(self.options)})

    def resolved(self, options: Any, split: Any) -> dict[str, Any]:
        """Its own options by name, resolved for a split."""
        resolved = self.options_of(options)
        resolved = load(self.resolve)(resolved, options, split) if self.resolve else resolved
        return {item.name: getattr(resolved, item.name) for item in fields(resolved)}


def load(path: str) -> Any:
    """The function or class that "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _registry(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


_IN, _ERASE = "salun.classification.methods", "salun.diffusion.methods"
_C: TaskName = "classification"
_D: TaskName = "diffusion"
_GOLATKAR = "Golatkar et al. 2020, arXiv:1911.04933"
_BOUNDARY = "Chen et al. 2023, arXiv:2303.11570"
_UP_TO_TWICE = (0.3, 0.5, 0.7, 1, 1.4, 1.9)  # a threshold α, whose default is half of the largest possible
_SALUN = "Fan et al. 2024, arXiv:2310.12508"
_LOOP = ("steps", "batch_size", "lr", "lr_decay", "optimizer")  # options of the training loop
_LOSSES = (*_LOOP, "retain_weight", "target", "target_guidance", "retain_target", "anchor_share")  # and SalUn's losses
_GUIDED: dict[str, Any] = {
    "anchored": False,
    "stronger": "Raise {steps}, {lr} or {negative_guidance}",
    "weaker": "Lower {lr}, {steps} or {negative_guidance}",
}
_CLOSED: dict[str, Any] = {
    "text": True,
    "defaults": {"scope": "xattn-strict"},
    "data": "prompts",
    "check": "salun.diffusion.closed_form:check",
    "stages": "salun.diffusion.closed_form:stages",
}
METHODS: dict[TaskName, dict[str, Method]] = {
    # rates: what the search found on the clutter, random 10 %, at seeds 0 and 1; another model needs its own. Those of
    # bad-teacher, jit, delete, neggrad-plus and unsir are guesses that the search has not seen.
    "classification": _registry(
        Method("retrain", "Retrain", "training without the forget set", _C, f"{_IN}.retaining:retrain", tunes=None),
        Method("ft", "FT", f"{_GOLATKAR}; Warnecke et al. 2021, arXiv:2108.11577", _C, f"{_IN}.retaining:fine_tune",
               "full", defaults={"epochs": 10, "lr": 0.02}),
        Method("rl", "RL", _GOLATKAR, _C, f"{_IN}.relabeling:random_labels",
               "full", f"{_IN}.relabeling:RelabelingOptions", defaults={"epochs": 10, "lr": 0.006}),
        Method("ga", "GA", "Graves et al. 2021, arXiv:2010.10981; Thudi et al. 2022, arXiv:2109.13398", _C,
               f"{_IN}.retaining:gradient_ascent", "full", defaults={"epochs": 5, "lr": 0.00125}),
        Method("ff", "FF", _GOLATKAR, _C, f"{_IN}.fisher:fisher_forgetting",
               options_from=f"{_IN}.fisher:FisherOptions", tunes="noise"),
        Method("iu", "IU", "Koh & Liang 2017, arXiv:1703.04730; Jia et al. 2023, arXiv:2304.04934", _C,
               f"{_IN}.fisher:influence_unlearning", options_from=f"{_IN}.fisher:InfluenceOptions", tunes="influence"),
        Method("be", "BE", _BOUNDARY, _C, f"{_IN}.boundary:boundary_expanding",
               "full", defaults={"epochs": 10, "lr": 1e-4}),
        Method("bs", "BS", _BOUNDARY, _C, f"{_IN}.boundary:boundary_shrink",
               "full", f"{_IN}.boundary:BoundaryShrinkOptions", defaults={"epochs": 10, "lr": 2.5e-5}),
        Method("l1-sparse", "ℓ1-sparse", "Jia et al. 2023, arXiv:2304.04934", _C, f"{_IN}.retaining:l1_sparse",
               "full", f"{_IN}.retaining:SparseOptions", defaults={"epochs": 10, "lr": 0.02}),
        Method("salun", "SalUn", _SALUN, _C, f"{_IN}.relabeling:salun",
               "saliency", f"{_IN}.relabeling:RelabelingOptions", defaults={"epochs": 10, "lr": 0.012}),
        Method("salun-soft", "SalUn-soft", f"{_SALUN}, appendix B", _C, f"{_IN}.relabeling:salun_soft",
               "learned", f"{_IN}.relabeling:RelabelingOptions", defaults={"epochs": 10, "lr": 0.012}),
        Method("scrub", "SCRUB", "Kurmanji et al. 2023, arXiv:2302.09880", _C, f"{_IN}.scrub:scrub",
               "full", f"{_IN}.scrub:ScrubOptions", f"{_IN}.scrub:resolve", {"epochs": 10, "lr": 0.01}),
        Method("ssd", "SSD", "Foster et al. 2024, arXiv:2308.07707", _C, f"{_IN}.fisher:ssd",
               options_from=f"{_IN}.fisher:SsdOptions",
               resolve=f"{_IN}.fisher:resolve_ssd", tunes="ssd_alpha", factors=_UP_TO_TWICE),
        Method("lfssd", "LFSSD", "Foster et al. 2024, arXiv:2402.19308", _C, f"{_IN}.lfssd:lfssd",
               options_from=f"{_IN}.lfssd:LfssdOptions",
               resolve=f"{_IN}.lfssd:resolve", tunes="lfssd_alpha", factors=_UP_TO_TWICE),
        Method("bad-teacher", "Bad teacher", "Chundawat et al. 2023, arXiv:2205.08096", _C,
               f"{_IN}.bad_teacher:bad_teacher", "full", f"{_IN}.bad_teacher:BadTeacherOptions",
               defaults={"epochs": 5, "lr": 0.01}),
        Method("jit", "JiT", "Foster et al. 2024, arXiv:2402.01401", _C, f"{_IN}.jit:jit",
               "full", f"{_IN}.jit:JitOptions", defaults={"epochs": 1, "lr": 0.01, "batch_size": 16}),
        Method("delete", "DELETE", "Zhou et al. 2025, arXiv:2503.23751", _C, f"{_IN}.delete:delete",
               "full", defaults={"epochs": 10, "lr": 0.001}),
        Method("neggrad-plus", "NegGrad+", "Kurmanji et al. 2023, arXiv:2302.09880", _C,
               f"{_IN}.neggrad_plus:neggrad_plus", "full", f"{_IN}.neggrad_plus:NegGradOptions",
               defaults={"epochs": 10, "lr": 0.001}),
        Method("unsir", "UNSIR", "Tarun et al. 2021, arXiv:2111.08947", _C, f"{_IN}.unsir:unsir",
               "full", f"{_IN}.unsir:UnsirOptions", f"{_IN}.unsir:resolve", {"epochs": 10, "lr": 0.02},
               whole_classes=True),
    ),
    "diffusion": _registry(
        Method("salun", "SalUn", _SALUN, _D, f"{_ERASE}.salun:salun", "saliency", reads=_LOSSES,
               goal="default", grows=True, hardens=True, salun_losses=True),
        Method("salun-soft", "SalUn-soft", f"{_SALUN}, appendix B", _D, f"{_ERASE}.salun:salun_soft", "learned",
               reads=_LOSSES, hardens=True, salun_losses=True),
        Method("finetune", "Fine-tuning", "SalUn's loss without a mask", _D, f"{_ERASE}.salun:salun", "full",
               reads=_LOSSES, goal="able", grows=True, hardens=True, salun_losses=True),
        Method("esd", "ESD", "Gandikota et al. 2023, arXiv:2303.07345", _D, f"{_ERASE}.esd:esd",
               "full", f"{_ERASE}.esd:EsdOptions", defaults={"scope": "xattn"}, reads=_LOOP, data="prompts",
               stages=f"{_ERASE}.esd:stages", goal="able",
               paper_recipe={"steps": 1000, "lr": 1e-5, "lr_decay": 0.0, "batch_size": 1}, **_GUIDED),
        Method("ca", "CA", "Kumari et al. 2023, arXiv:2303.13516", _D, f"{_ERASE}.ca:ca",
               "full", f"{_ERASE}.ca:CaOptions", defaults={"scope": "xattn-strict", "anchor_share": 1.0},
               reads=_LOOP, data="anchor", check=f"{_ERASE}.ca:check", stages=f"{_ERASE}.ca:stages", goal="able",
               weaker="Lower {lr} or {steps}, or raise {ca_regularization}"),
        Method("leco", "LECO", "p1atdev 2023, github.com/p1atdev/LECO", _D, f"{_ERASE}.leco:leco",
               options_from=f"{_ERASE}.leco:LecoOptions", defaults={"scope": "attn"}, reads=_LOOP, data="prompts",
               stages=f"{_ERASE}.leco:stages",
               paper_recipe={"steps": 500, "lr": 1e-4, "lr_decay": 0.0, "batch_size": 1}, **_GUIDED),
        Method("ileco", "iLECO", "p1atdev 2023, github.com/p1atdev/LECO, towards the anchor", _D,
               f"{_ERASE}.leco:ileco", options_from=f"{_ERASE}.leco:IlecoOptions", defaults={"scope": "attn"},
               reads=_LOOP, data="prompts", stages=f"{_ERASE}.leco:stages", weaker="Lower {lr} or {steps}"),
        Method("spm", "SPM", "Lyu et al. 2024, arXiv:2312.16145", _D, f"{_ERASE}.spm:spm",
               options_from=f"{_ERASE}.spm:SpmOptions", reads=_LOOP, data="prompts",
               stages=f"{_ERASE}.spm:stages", anchored=False,
               paper_recipe={"steps": 3000, "lr": 1e-4, "lr_decay": 0.0, "batch_size": 1},
               stronger="Raise {steps}, {lr} or {negative_guidance}, or lower {spm_anchoring}",
               weaker="Lower {lr} or {negative_guidance}, or raise {spm_anchoring}"),
        Method("erasediff", "EraseDiff", "Wu et al. 2024, arXiv:2401.05779", _D, f"{_ERASE}.erasediff:erasediff",
               "full", f"{_ERASE}.erasediff:EraseDiffOptions",
               defaults={"scope": "noxattn", "anchor_share": 0.0, "target": "online", "retain_target": "noise"},
               reads=(*_LOOP, "anchor_share"), stages=f"{_ERASE}.erasediff:stages", goal="able",
               stronger="Raise {steps}, {lr} or {erasediff_lambda}",
               weaker="Lower {lr}, {steps} or {erasediff_lambda}"),
        Method("ant", "ANT", "Li et al. 2025, arXiv:2504.12782", _D, f"{_ERASE}.ant:ant",
               "saliency", f"{_ERASE}.ant:AntOptions", reads=_LOOP, data="prompts",
               stages=f"{_ERASE}.ant:stages", goal="able",
               paper_recipe={"steps": 250, "lr": 5e-4, "lr_decay": 0.0, "batch_size": 1}, **_GUIDED),
        Method("fmn", "FMN", "Zhang et al. 2023, arXiv:2303.17591", _D, f"{_ERASE}.fmn:fmn",
               "full", defaults={"scope": "xattn"}, reads=_LOOP, data="forget",
               check=f"{_ERASE}.fmn:check", stages=f"{_ERASE}.fmn:stages", goal="able",
               anchored=False, text=True, attention=True,
               paper_recipe={"steps": 35, "lr": 2e-6, "lr_decay": 0.0, "batch_size": 1}),
        Method("uce", "UCE", "Gandikota et al. 2024, arXiv:2308.14761", _D, f"{_ERASE}.uce:uce",
               options_from=f"{_ERASE}.uce:UceOptions", tunes="uce_erase",
               stronger="Raise {uce_erase}, or lower {uce_lambda}",
               weaker="Lower {uce_erase}, or raise {uce_preserve}", **_CLOSED),
        Method("rece", "RECE", "Gong et al. 2024, arXiv:2407.12383", _D, f"{_ERASE}.rece:rece",
               options_from=f"{_ERASE}.rece:ReceOptions", tunes="rece_erase",
               stronger="Raise {rece_rounds} or {rece_erase}, or lower {rece_lambda}",
               weaker="Lower {rece_rounds} or {rece_erase}, or raise {rece_preserve}", **_CLOSED),
        Method("speed", "SPEED", "Li et al. 2025, arXiv:2503.07392", _D, f"{_ERASE}.speed:speed",
               options_from=f"{_ERASE}.speed:SpeedOptions", tunes="speed_threshold", stronger="Raise {speed_threshold}",
               weaker="Lower {speed_threshold}", **_CLOSED),
    ),
}  # fmt: skip


def option_names(task: TaskName) -> tuple[str, ...]:
    """The names of all methods' own options, in the registry's order."""
    names = (item.name for method in METHODS[task].values() for item in fields(method.options))
    return tuple(dict.fromkeys(names))


def with_method_options(task: TaskName) -> Callable[[Class], Class]:
    """A class decorator: adds every method's own options to a frozen dataclass of options."""

    def compose(kind: Class) -> Class:
        bases = dict.fromkeys(method.options for method in METHODS[task].values() if method.options is not NoOptions)
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        return dataclass(frozen=True)(type(kind.__name__, (kind, *bases), names))  # type: ignore[return-value]

    return compose
