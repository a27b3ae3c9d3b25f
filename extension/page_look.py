"""The page's sections that look at a run or a model: is the concept forgotten, and does it come back?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .controls import ATTACK, EVALUATION, Controls
from .jobs import Job
from .markup import chosen, named_only, queued
from .service import Service


@dataclass(frozen=True)
class Look:
    """What such a section shows.

    Args:
        id: Of its element. button: What its button says, and id of that.
        start: Queues a job, out of the operations, a model and options.
    """

    title: str
    text: str
    id: str
    button: tuple[str, str]
    controls: Controls
    start: Callable[[Service, str, Mapping[str, Any]], Job]


LOOKS = {
    "evaluate": Look(
        "Did it work?",
        "Evaluates a run, or any checkpoint compared with its original: on prompts that no training used, with the "
        "same seeds before and after.",
        "salun_evaluate",
        ("Evaluate", "salun_start_evaluation"),
        EVALUATION,
        lambda service, model, options: service.requests.evaluate(model, options),
    ),
    "attack": Look(
        "Does it come back?",
        "Tests a run, or any checkpoint with its original, by attacks that try to bring the concept back: other seeds, "
        "learned tokens, relearning, quantization and others. All of them take many times as long as an evaluation.",
        "salun_attack",
        ("Test this model", "salun_start_attack"),
        ATTACK,
        lambda service, model, options: service.requests.attack(model, options),
    ),
}


class LookSection:
    """A section of the page for one of LOOKS.

    Attributes:
        options: The control of each option.
    """

    def __init__(self, gr: Any, service: Service, look: Look) -> None:
        self.look = look
        controls, listed = look.controls, service.choices()
        names = [str(run["run"]) for run in service.history()]
        with gr.Accordion(look.title, open=False, elem_id=look.id):
            gr.Markdown(look.text)
            with gr.Row():
                self.model = gr.Dropdown(
                    choices=[*names, *listed["model"]], value=None, label="Run or checkpoint",
                    elem_id=f"{controls.prefix}model", **named_only(gr),
                )  # fmt: skip
                self.options = {"against": controls.control(gr, "against", listed)}
            self.options.update(controls.in_pairs(gr, controls.main[1:], listed))
            text, button = look.button
            self.start = gr.Button(text, elem_id=button)
            self.status = gr.HTML("", elem_id=f"{look.id}_status")
            with gr.Accordion("More", open=False, elem_id=f"{controls.prefix}more"):
                for title, folded in controls.folded.items():
                    if folded:
                        gr.Markdown(f"**{title}**")
                        self.options.update(controls.in_pairs(gr, folded, listed))

    def connect(self, service: Service) -> None:
        """Connect the section's events."""
        value_of = self.look.controls.value_of

        def begin(model: Any, *values: Any) -> Job:
            target = chosen(model, "a run or a checkpoint")
            options = {name: value_of(name, value) for name, value in zip(self.options, values, strict=True)}
            return self.look.start(service, target, options)

        self.start.click(queued(begin), [self.model, *self.options.values()], [self.status], queue=False)
