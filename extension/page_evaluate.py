"""The page's section that evaluates a run or a model."""

from __future__ import annotations

from typing import Any

from .controls import EVALUATION
from .jobs import Job
from .markup import queued
from .service import Service


class Evaluation:
    """The section “Is it forgotten?”.

    Attributes:
        options: The control of each option.
    """

    def __init__(self, gr: Any, service: Service) -> None:
        listed = service.choices()
        names = [str(run["run"]) for run in service.history()]
        with gr.Accordion("Is it forgotten?", open=False, elem_id="salun_evaluate"):
            gr.Markdown(
                "Evaluates a run, or any checkpoint compared with its original: on prompts that no training used, with "
                "the same seeds before and after."
            )
            with gr.Row():
                self.model = gr.Dropdown(
                    choices=[*names, *listed["model"]], value=None, label="Run or checkpoint",
                    elem_id="salun_eval_model",
                )  # fmt: skip
                self.options = {"against": EVALUATION.control(gr, "against", listed)}
            for name in EVALUATION.main[1:]:
                self.options[name] = EVALUATION.control(gr, name, listed)
            self.start = gr.Button("Evaluate", elem_id="salun_start_evaluation")
            self.status = gr.HTML("", elem_id="salun_evaluation")
            with gr.Accordion("More", open=False, elem_id="salun_eval_more"):
                for title, folded in EVALUATION.folded.items():
                    if folded:
                        gr.Markdown(f"**{title}**")
                        self.options.update({name: EVALUATION.control(gr, name, listed) for name in folded})

    def connect(self, service: Service) -> None:
        """Connect the section's events."""

        def evaluate(model: Any, *values: Any) -> Job:
            shown = zip(self.options, values, strict=True)
            return service.requests.evaluate(
                str(model or ""), {name: EVALUATION.value_of(name, value) for name, value in shown}
            )

        self.start.click(queued(evaluate), [self.model, *self.options.values()], [self.status], queue=False)
