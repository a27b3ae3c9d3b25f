"""The page's history: earlier runs, their results and options."""

from __future__ import annotations

from html import escape
from typing import Any

from salun.errors import ConfigError, SalunError

from .controls import ERASURE
from .inputs import IMAGE_FOLDERS
from .markup import bad, chosen, good, image, named_only, queued, safe, table, verdict
from .messages import label, render
from .page_form import Form
from .service import Service


class History:
    """The section of earlier runs."""

    def __init__(self, gr: Any, service: Service) -> None:
        names = [str(run["run"]) for run in service.history()]
        with gr.Accordion("History", open=False, elem_id="salun_history"):
            with gr.Row():
                self.run = gr.Dropdown(choices=names, value=None, label="Run", elem_id="salun_runs",
                                       **named_only(gr))  # fmt: skip
                self.other = gr.Dropdown(choices=names, value=None, label="Compare with", elem_id="salun_other",
                                         info="A second run, to compare the masks.", **named_only(gr))  # fmt: skip
            with gr.Row():
                self.load = gr.Button("Load these options", elem_id="salun_again")
                self.resume = gr.Button("Resume", elem_id="salun_resume")
                self.use = gr.Button("Use this checkpoint", elem_id="salun_use",
                                     visible=service.host.checkpoints() is not None)  # fmt: skip
                self.mask = gr.Button("Inspect the mask", elem_id="salun_layers")
            self.details = gr.HTML("", elem_id="salun_details")

    def connect(self, gr: Any, service: Service, form: Form) -> None:
        """Connect the section's events. form: where a run's options are loaded."""
        self.load.click(
            lambda run: loaded_options(gr, service, form, run),
            [self.run], [form.preset, *form.values, self.details], queue=False,
        )  # fmt: skip
        self.run.change(safe(lambda run: details(service, run)), [self.run], [self.details], queue=False)
        resume = queued(lambda run: service.resume(chosen(run)))
        self.resume.click(resume, [self.run], [self.details], queue=False)
        use = safe(lambda run: good(service.use(chosen(run))))
        self.use.click(use, [self.run], [self.details], queue=False)
        inspect = queued(lambda run, other: service.requests.inspect(chosen(run), str(other) if other else None))
        self.mask.click(inspect, [self.run, self.other], [self.details], queue=False)


def loaded_options(gr: Any, service: Service, form: Form, run: Any) -> list[Any]:
    """Updates of a form's preset and values to the options of a run, and a status line."""
    names = ["model", "concept", "anchor", "retain_prompts", *form.advanced]
    try:
        options = service.options_of(chosen(run))
        shown = {name: ERASURE.shown_of(name, value) for name, value in options.items()}
        listed = service.choices()
    except (SalunError, OSError, TypeError, ValueError) as error:
        text = render(error) if isinstance(error, SalunError) else str(error)
        return [*(gr.update() for _ in ("preset", *names)), bad(text)]
    status = good(f"The options of {run} are loaded.")
    for name in ("model", "mask", *(name for name in IMAGE_FOLDERS if options.get(name))):
        if options.get(name) not in listed[name]:
            status += bad(f"Its {label(name)} {str(options.get(name))[:200]!r} no longer exists: choose another.")
            shown.pop(name, None)
    shown = {"concept": "", "anchor": "", "retain_prompts": "", **shown}
    updates = [gr.update(value=shown[name]) if name in shown else gr.update() for name in names]
    return [gr.update(value=None), *updates, status]  # a preset would be added to the run's own concepts


def details(service: Service, run: Any) -> str:
    """A run's result, images and options as HTML."""
    if not run:
        return ""
    entry = next((each for each in service.history() if each["run"] == run), None)
    if entry is None:
        raise ConfigError(f"there is no run {str(run)[:80]!r}", code="not-found")
    parts = [f"<p><strong>{escape(str(run))}</strong>: {escape(str(entry['status']))}</p>"]
    lines = entry["headline"]
    if entry["banner"]:
        parts.append(verdict(**entry["banner"]))
        lines = lines[2:]  # the first two say the same
    parts += [f"<p>{escape(str(line))}</p>" for line in lines]
    if entry["error"]:
        parts.append(bad(str(entry["error"])))
    if entry["status"] == "unreadable":
        return "".join(parts)
    if entry["figures"]:
        parts.append(table(entry["figures"], ("", "before", "after", "")))
    if "before_after.png" in entry["files"]:
        parts.append(image(service.runs.file(str(run), "before_after.png")[0], "before and after"))
    if chart := service.runs.losses(str(run)):
        parts.append(f'<div class="salun-plot">{chart}</div>')
    if "report.html" in entry["files"]:
        parts.append(f'<button type="button" data-salun-report="{escape(str(run))}">Open the report</button>')
    options = [(label(name), value) for name, value in service.options_of(str(run)).items()]
    rows = [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in options
        if value not in (None, "", [])
    ]
    return "".join([*parts, f"<details><summary>Options</summary>{table(rows)}</details>"])
