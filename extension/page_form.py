"""The page's form of an erasure, with all options."""

from __future__ import annotations

from typing import Any

from .controls import ERASURE
from .jobs import Job
from .markup import queued
from .service import Service


class Form:
    """The controls of an erasure.

    Attributes:
        advanced: Controls under “Advanced”, by option.
        values: All controls that hold an option, in the order of `options`.
    """

    def __init__(self, gr: Any, service: Service) -> None:
        first = service.models.first()
        skipped = service.host.skipped_checkpoints()
        self.gr = gr
        self.model = gr.Dropdown(
            choices=list(service.models.all()), value=first, label="Checkpoint", elem_id="salun_model",
            info=f"{skipped} not shown: only .safetensors files are, as a .ckpt can run code" if skipped else None,
        )  # fmt: skip
        self.preset = gr.Dropdown(
            choices=list(service.models.concepts(first)), value=None, label="Concept to erase", elem_id="salun_preset",
            info="A preset, or a concept of the model's vocabulary.",
        )  # fmt: skip
        self.concepts = gr.Textbox(
            label="… or concepts in your own words", lines=2, placeholder="one per line", elem_id="salun_words",
            info="Added to the preset above, if one is chosen.",
        )  # fmt: skip
        self.anchor = gr.Textbox(
            label="Anchor", placeholder="empty: the preset's anchor", lines=2, elem_id="salun_anchor",
            info="What the model shows instead; for several concepts one per line, in the same order.",
        )  # fmt: skip
        self.retain = gr.Textbox(
            label="Prompts to retain", lines=2, elem_id="salun_keep",
            placeholder="prompts whose images should stay as they are, one per line (added to the default ones)",
        )  # fmt: skip
        self.erase = gr.Button("Erase concept", variant="primary", elem_id="salun_erase")
        self.status = gr.HTML("", elem_id="salun_said")
        with gr.Accordion("Advanced", open=False, elem_id="salun_advanced"):
            self._advanced(gr, service)
        self.values = [self.model, self.concepts, self.anchor, self.retain, *self.advanced.values()]

    def _advanced(self, gr: Any, service: Service) -> None:
        self.name = gr.Textbox(
            label="Name of the new checkpoint", placeholder="default: made from model and concept", elem_id="salun_name"
        )
        self.preview = gr.Slider(
            0, 500, value=0, step=1, label="Preview interval (steps)", elem_id="salun_preview",
            info="Before/after images at fixed seeds during training; they take time (default: 0, none).",
        )  # fmt: skip
        listed = service.choices()
        self.advanced: dict[str, Any] = {}
        for title, names in ERASURE.folded.items():
            if names:
                gr.Markdown(f"**{title}**")
                self.advanced.update({name: ERASURE.control(gr, name, listed) for name in names})
        self.only_mask = gr.Button("Only make the mask", elem_id="salun_only_mask")

    def connect(self, service: Service) -> None:
        """Connect the form's events."""

        def erase(preset: Any, name: Any, preview: Any, *values: Any) -> Job:
            return service.requests.erase(self.options(preset, values), int(preview or 0), str(name or ""))

        def concepts(model: Any) -> Any:
            return self.gr.update(choices=list(service.models.concepts(str(model) if model else None)), value=None)

        given = [self.preset, self.name, self.preview, *self.values]
        self.erase.click(queued(erase), given, [self.status], queue=False)
        self.only_mask.click(
            queued(lambda preset, *values: service.requests.mask(self.options(preset, values))),
            [self.preset, *self.values], [self.status], queue=False,
        )  # fmt: skip
        self.model.change(concepts, [self.model], [self.preset], queue=False)

    def options(self, preset: Any, values: tuple[Any, ...]) -> dict[str, Any]:
        """The options of an erasure from what the controls hold."""
        model, texts, anchor, retain = values[:4]
        folded = zip(self.advanced, values[4:], strict=True)
        options = {name: ERASURE.value_of(name, shown) for name, shown in folded}
        concepts = ERASURE.value_of("concept", texts)
        options["model"] = str(model) if model else None
        options["concept"] = [*([str(preset)] if preset and str(preset) not in concepts else []), *concepts]
        options["anchor"] = ERASURE.value_of("anchor", anchor)
        options["retain_prompts"] = ERASURE.value_of("retain_prompts", retain)
        assert set(ERASURE.main) <= set(options)
        return options
