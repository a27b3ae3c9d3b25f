"""The registry of attacks on unlearned models. It imports nothing heavy, since options and help texts are made from it.

To add an attack, write one file with its options (a frozen dataclass, whose defaults are the small budget) and its
function, and add one line here. The file imports torch, and whatever imports torch, inside its functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from salun.methods import TaskName, load


@dataclass(frozen=True)
class Attack:
    """An attempt to bring back, or to detect, what a model has unlearned.

    Args:
        name: Its value of the option `attack`.
        title: As in tables.
        paper: Its source.
        task: What the attacked model has unlearned.
        run: "module:function", imported when used. In diffusion (`AttackTask`, options) → `AttackResult`; in
            classification (`SplitPredictions`, options) → entries of the metrics in `run.json`.
        options_from: "module:class" of the dataclass of its options.
        settings: "module:function" of an attack on classifiers: a run's options → the attack's, or None if the run
            does not include it.
        argument: What may follow the name after a colon; "" for nothing.
        default: Whether it runs when no attack is named.
        paper_budget: Values of its options in its paper.
        tokens: Of the prompts that it makes, at least; 0 where it makes none of tokens, which ComfyUI does not show.
        cost: "module:function": its options, prompts, `Sampling`, samples of a training step → passes that it takes of
            one sample through the network, a forward and backward one counted as three; "" where that is not known.
    """

    name: str
    title: str
    paper: str
    task: TaskName
    run: str
    options_from: str = "salun.options:NoOptions"
    settings: str = ""
    argument: str = ""
    default: bool = True
    paper_budget: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    cost: str = ""

    @property
    def options(self) -> type[Any]:
        """The dataclass of its options."""
        kind: type[Any] = load(self.options_from)
        return kind

    def call(self, target: Any, options: Any) -> Any:
        """Attack a target."""
        return load(self.run)(target, options)

    def passes(self, options: Any, n: int, sampling: Any, batch_size: int) -> int | None:
        """Passes that it takes for n prompts of a concept, at most; None where that is not known."""
        return load(self.cost)(options, n, sampling, batch_size) if self.cost else None

    def settings_of(self, options: Any) -> Any:
        """Of an attack on classifiers: its options out of those of a run; None if the run does not include it."""
        return load(self.settings)(options)


def _registry(*attacks: Attack) -> dict[str, Attack]:
    return {attack.name: attack for attack in attacks}


_IN, _ON = "salun.classification.attacks", "salun.diffusion.attacks"
_C: TaskName = "classification"
_D: TaskName = "diffusion"
_LU = "Lu et al. 2025, arXiv:2505.17013"
_RING = "Tsai et al. 2024, arXiv:2310.10012"
ATTACKS: dict[TaskName, dict[str, Attack]] = {
    "classification": _registry(
        Attack("mia", "Membership inference (MIA)", "Song & Mittal 2021, arXiv:2003.10595", _C,
               f"{_IN}.mia:infer_membership", f"{_IN}.mia:MiaOptions", f"{_IN}.mia:settings"),
        Attack("relearning", "Relearning", "Golatkar et al. 2020, arXiv:1911.04933", _C, f"{_IN}.relearning:relearn",
               f"{_IN}.relearning:RelearningOptions", f"{_IN}.relearning:settings"),
    ),
    "diffusion": _registry(  # those that cost least come first
        Attack("seeds", "Other seeds", "the plain prompt", _D, f"{_ON}.seeds:seeds", f"{_ON}.seeds:SeedsOptions",
               cost=f"{_ON}.seeds:cost",
               paper_budget={"tries": 40}),
        Attack("noise", "Noise in sampling", _LU, _D, f"{_ON}.noise:noise", f"{_ON}.noise:NoiseOptions",
               cost=f"{_ON}.noise:cost",
               paper_budget={"scales": 4, "steps": 50}),
        Attack("completion", "Completion of the original's images", _LU, _D, f"{_ON}.completion:completion",
               f"{_ON}.completion:CompletionOptions",
               cost=f"{_ON}.completion:cost", paper_budget={"steps": 50}),
        Attack("inpaint", "Inpainting of the original's images", _LU, _D, f"{_ON}.inpaint:inpaint",
               f"{_ON}.inpaint:InpaintOptions",
               cost=f"{_ON}.inpaint:cost", paper_budget={"steps": 50, "side": 0.5}),
        Attack("concept-vector", "Concept vector", _RING, _D, f"{_ON}.concept_vector:concept_vector",
               f"{_ON}.concept_vector:ConceptVectorOptions",
               cost=f"{_ON}.concept_vector:cost"),
        Attack("ring-a-bell", "Ring-A-Bell", _RING, _D, f"{_ON}.ring_a_bell:ring_a_bell",
               f"{_ON}.ring_a_bell:RingABellOptions",
               cost=f"{_ON}.ring_a_bell:cost", paper_budget={"population": 200, "generations": 3000},
               tokens=2),
        Attack("prompt-search", "Prompt search (UnlearnDiffAtk)", "Zhang et al. 2024, arXiv:2310.11868", _D,
               f"{_ON}.prompt_search:prompt_search", f"{_ON}.prompt_search:PromptSearchOptions",
               cost=f"{_ON}.prompt_search:cost",
               paper_budget={"length": None, "timesteps": 50, "iterations": 40, "lr": 0.01}, tokens=2),
        Attack("embedding-search", "Embedding search (P4D)", "Chin et al. 2024, arXiv:2309.06135", _D,
               f"{_ON}.embedding_search:embedding_search", f"{_ON}.embedding_search:EmbeddingSearchOptions",
               cost=f"{_ON}.embedding_search:cost",
               paper_budget={"length": 16, "steps": 3000, "every": 50}, tokens=2),
        Attack("inversion", "Concept inversion", "Pham et al. 2024, arXiv:2308.01508", _D, f"{_ON}.inversion:inversion",
               f"{_ON}.inversion:InversionOptions",
               cost=f"{_ON}.inversion:cost", paper_budget={"steps": 3000}, tokens=1),
        Attack("relearn", "Relearning", "Suriyakumar et al. 2024, arXiv:2410.08074", _D, f"{_ON}.relearn:relearn",
               f"{_ON}.relearn:RelearnOptions",
               cost=f"{_ON}.relearn:cost"),
        Attack("quantize", "Quantization", "Zhang et al. 2024, arXiv:2410.16454, for language models", _D,
               f"{_ON}.quantize:quantize", cost=f"{_ON}.quantize:cost"),
        Attack("merge", "Merge with another model", "the merges of hosts", _D, f"{_ON}.merge:merge",
               f"{_ON}.merge:MergeOptions",
               cost=f"{_ON}.merge:cost", argument="MODEL"),
        Attack("lora", "LoRA on top", "the LoRA loaders of hosts", _D, f"{_ON}.lora:lora", f"{_ON}.lora:LoraOptions",
               cost=f"{_ON}.lora:cost",
               argument="FILE", default=False),
        Attack("prompts", "Prompts of a file", "any", _D, f"{_ON}.prompts:prompts", argument="FILE", default=False),
    ),
}  # fmt: skip


def requested(options: Any) -> list[str]:
    """The names of the attacks on classifiers that a run's options include."""
    return [name for name, of in ATTACKS["classification"].items() if of.settings_of(options) is not None]
