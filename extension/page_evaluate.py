"""The page's section that evaluates a run or a model."""

from __future__ import annotations

from typing import Any

from salun.detectors import DETECTORS

from .controls import lines_of
from .jobs import Job
from .markup import queued
from .service import Service

IMAGES = 64  # of each set, at first


class Evaluation:
    """The section “Is it forgotten?”."""

    def __init__(self, gr: Any, service: Service) -> None:
        models = list(service.models.all())
        names = [str(run["run"]) for run in service.history()]
        with gr.Accordion("Is it forgotten?", open=False, elem_id="salun_evaluate"):
            gr.Markdown(
                "Evaluates a run, or any checkpoint compared with its original: on prompts that no training used, with "
                "the same seeds before and after."
            )
            with gr.Row():
                self.model = gr.Dropdown(
                    choices=[*names, *models], value=None, label="Run or checkpoint", elem_id="salun_judged"
                )
                self.against = gr.Dropdown(
                    choices=["", *models], value="", label="Its original", elem_id="salun_original",
                    info="For a checkpoint; a run knows its own.",
                )  # fmt: skip
            self.concepts = gr.Textbox(
                label="Concept", placeholder="what the checkpoint should have forgotten, one per line", lines=1,
                elem_id="salun_judged_concept", info="For a checkpoint; a run knows its own.",
            )  # fmt: skip
            with gr.Row():
                self.detectors = gr.Textbox(
                    label="Detectors", placeholder="empty: the default one", lines=1, elem_id="salun_detectors",
                    info=f"One per line: {', '.join(DETECTORS)}.",
                )  # fmt: skip
                self.images = gr.Slider(
                    8, 512, value=IMAGES, step=8, label="Images of each set", elem_id="salun_images"
                )
            self.start = gr.Button("Evaluate", elem_id="salun_start_evaluation")
            self.status = gr.HTML("", elem_id="salun_evaluation")

    def connect(self, service: Service) -> None:
        """Connect the section's events."""

        def evaluate(model: Any, against: Any, concepts: Any, detectors: Any, images: Any) -> Job:
            return service.requests.evaluate(
                str(model or ""),
                str(against) if against else None,
                lines_of(str(concepts or "")),
                lines_of(str(detectors or "")),
                int(images),
            )

        given = [self.model, self.against, self.concepts, self.detectors, self.images]
        self.start.click(queued(evaluate), given, [self.status], queue=False)
