"""The page's section of deltas: apply them to a checkpoint, remove them, export them."""

from __future__ import annotations

from typing import Any

from .jobs import Job
from .markup import chosen, named_only, queued
from .requests import MAX_STRENGTH, MIN_STRENGTH
from .service import Service

ROWS = 3  # maximum number of deltas at once
INTRODUCTION = (
    "A delta holds the weights that an erasure changed. It applies to its base at any strength, and can be removed "
    "bit-exactly. **Anyone with the delta can undo the erasure.**"
)


class Deltas:
    """The section of deltas."""

    def __init__(self, gr: Any, service: Service) -> None:
        with gr.Accordion("Deltas", open=False, elem_id="salun_deltas"):
            gr.Markdown(INTRODUCTION)
            self.base = gr.Dropdown(choices=list(service.models.all()), value=service.models.first(),
                                    label="Checkpoint", elem_id="salun_base", **named_only(gr))  # fmt: skip
            self.chosen, self.strengths = rows(gr, service.runs.deltas(), "salun")
            self.name = gr.Textbox(
                label="Name of the new file", placeholder="default: made from the names", elem_id="salun_new_name"
            )
            with gr.Row():
                self.apply = gr.Button("Write a checkpoint with these", variant="primary", elem_id="salun_apply")
                self.undo = gr.Button("Undo delta 1 in this checkpoint", elem_id="salun_undo")
                self.lora = gr.Button("Save delta 1 as LoRA", elem_id="salun_lora")
                self.diff = gr.Button("Save delta 1 as full difference", elem_id="salun_diff")
                self.overlap = gr.Button("Overlap", elem_id="salun_overlap")
            self.status = gr.HTML("", elem_id="salun_delta_said")

    def connect(self, service: Service) -> None:
        """Connect the section's events."""
        requests = service.requests

        def write(base: Any, name: Any, *rest: Any) -> Job:
            pairs = [(str(d), float(s)) for d, s in zip(rest[:ROWS], rest[ROWS:], strict=True) if d]
            chosen(pairs, "a delta")
            deltas, strengths = [delta for delta, _ in pairs], [strength for _, strength in pairs]
            return requests.stack(chosen(base, "a checkpoint"), deltas, strengths, str(name or ""))

        def undo(base: Any, delta: Any, name: Any) -> Job:
            return requests.undo(chosen(base, "a checkpoint"), chosen(delta, "delta 1"), str(name or ""))

        def overlap(*deltas: Any) -> Job:
            several = [str(d) for d in deltas if d]
            chosen(several[1:], "two deltas")
            return requests.overlaps(several)

        def export(form: str) -> Any:
            return queued(
                lambda delta, base: requests.export(chosen(delta, "delta 1"), form, otherwise=str(base or ""))
            )

        given = [self.base, self.name, *self.chosen, *self.strengths]
        self.apply.click(queued(write), given, [self.status], queue=False)
        self.undo.click(queued(undo), [self.base, self.chosen[0], self.name], [self.status], queue=False)
        self.overlap.click(queued(overlap), self.chosen, [self.status], queue=False)
        for button, form in ((self.lora, "lora"), (self.diff, "diff")):
            button.click(export(form), [self.chosen[0], self.base], [self.status], queue=False)


def rows(gr: Any, names: list[str], prefix: str, **more: Any) -> tuple[list[Any], list[Any]]:
    """Dropdowns of deltas with sliders of their strengths. more: arguments of the dropdowns."""
    chosen, strengths = [], []
    more = {**named_only(gr), **more}  # of gradio 3 both may hold the same
    for row in range(1, ROWS + 1):
        with gr.Row():
            chosen.append(gr.Dropdown(choices=["", *names], value="", label=f"Delta {row}",
                                      elem_id=f"{prefix}_delta_{row}", **more))  # fmt: skip
            strengths.append(gr.Slider(MIN_STRENGTH, MAX_STRENGTH, value=1.0, step=0.05, label=f"Strength {row}",
                                       elem_id=f"{prefix}_strength_{row}"))  # fmt: skip
    return chosen, strengths
