"""The page's form of an erasure, with all options."""

from __future__ import annotations

from typing import Any

from .controls import ERASURE
from .jobs import Job
from .markup import chosen, named_only, queued, safe
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
        hidden = f"{skipped} not shown: only .safetensors files are, as a .ckpt can run code. " if skipped else ""
        self._automatic = service.models.automatic(first)
        self.gr = gr
        self.model = gr.Dropdown(
            choices=list(service.models.all()), value=first, label="Checkpoint", elem_id="salun_model",
            info=f"{hidden}{service.host.how_to_add()}.", **named_only(gr),
        )  # fmt: skip
        self.preset = gr.Dropdown(
            choices=list(service.models.concepts(first)), value=None, label="Concept to erase: a preset",
            elem_id="salun_preset", **named_only(gr),
            info="Or a word of the model's vocabulary. Empty where you describe the concept below.",
        )  # fmt: skip
        self.concepts = gr.Textbox(
            label="In your own words", lines=2, placeholder="one concept per line", elem_id="salun_words",
            info="Erased together with the preset, if one is chosen.",
        )  # fmt: skip
        self.anchor = gr.Textbox(
            label="Anchor", placeholder="empty: the preset's; for your own words, the empty prompt", lines=2,
            elem_id="salun_anchor",
            info="What the model shows instead; for several concepts one per line, in the same order.",
        )  # fmt: skip
        self.retain = gr.Textbox(
            label="Prompts to retain", lines=2, elem_id="salun_keep", placeholder="one per line",
            info="Prompts whose images should stay as they are, in addition to the default ones.",
        )  # fmt: skip
        self.erase = gr.Button("Erase concept", variant="primary", elem_id="salun_erase")
        self.status = gr.HTML("", elem_id="salun_said")
        with gr.Accordion("Advanced", open=False, elem_id="salun_advanced"):
            self._advanced(gr, service)
        self.values = [self.model, self.concepts, self.anchor, self.retain, *self.advanced.values()]

    def _advanced(self, gr: Any, service: Service) -> None:
        self.name = gr.Textbox(label="Name of the new checkpoint", placeholder="model-no-concept", elem_id="salun_name")
        self.preview = gr.Slider(
            0, 500, value=0, step=1, label="Preview interval (steps)", elem_id="salun_preview",
            info="Before/after images at fixed seeds during training; they take time (default: 0, none).",
        )  # fmt: skip
        listed = service.choices()
        self.advanced: dict[str, Any] = {}
        for title, names in ERASURE.folded.items():
            if names:
                gr.Markdown(f"**{title}**")
                self.advanced.update(ERASURE.in_pairs(gr, names, listed, self._automatic))
        self.only_mask = gr.Button("Only make the mask", elem_id="salun_only_mask")

    def connect(self, service: Service) -> None:
        """Connect the form's events."""

        def wanted(preset: Any, values: tuple[Any, ...]) -> dict[str, Any]:
            options = self.options(preset, values)
            if service.models.all():  # an empty field does not mean the bundled model
                chosen(options["model"], "a checkpoint")
            return options

        def erase(preset: Any, name: Any, preview: Any, *values: Any) -> Job:
            return service.requests.erase(wanted(preset, values), int(preview or 0), str(name or ""))

        numbers = [name for name in self.advanced if ERASURE.is_automatic(name)]

        def of_model(model: Any) -> list[Any]:
            """The concepts and numbers of a model, and a line where there is no such model."""
            title = str(model) if model else None
            values = service.models.automatic(title)
            concepts = self.gr.update(choices=list(service.models.concepts(title)), value=None)
            return [
                safe(lambda: service.models.named(title) and "" if title else "")(),
                concepts,
                *(self.gr.update(placeholder=ERASURE.placeholder(name, values)) for name in numbers),
            ]

        given = [self.preset, self.name, self.preview, *self.values]
        self.erase.click(queued(erase), given, [self.status], queue=False)
        self.only_mask.click(
            queued(lambda preset, *values: service.requests.mask(wanted(preset, values))),
            [self.preset, *self.values], [self.status], queue=False,
        )  # fmt: skip
        shown = [self.status, self.preset, *(self.advanced[name] for name in numbers)]
        self.model.change(of_model, [self.model], shown, queue=False)

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
