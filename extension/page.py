"""The page, for gradio 3.41 and later: controls for what to ask, and a panel that a script keeps up to date.

Whatever is shown of names and texts is escaped; whatever comes in is checked by `service`.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from contextlib import nullcontext
from html import escape
from pathlib import Path
from typing import Any

from salun.errors import ConfigError, SalunError

from . import environment
from .access import Access
from .controls import ADVANCED, FIRST, FOLDERS, control, label, shown_of, value_of
from .service import Service
from .words import in_the_pages_words

LOADER = """() => {
  if (document.getElementById('salun-script')) return [];
  const script = document.createElement('script');
  script.id = 'salun-script';
  script.src = new URL('salun/v1/page.js', document.baseURI.replace(/[^/]*([?#].*)?$/, '')).href;
  document.head.append(script);
  return [];
}"""
ROWS = 3  # deltas at once
logger = logging.getLogger("salun")


def build(gr: Any, service: Service, access: Access) -> Any:
    """The tab as gradio Blocks."""
    js = "_js" if int(gr.__version__.split(".")[0]) < 4 else "js"
    titles = list(service.models())
    first = service.first_model()
    names = [name for group in ADVANCED.values() for name in group]
    with gr.Blocks(analytics_enabled=False, title="Erase concept") as page:
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                others = service.host.left_out()
                model = gr.Dropdown(
                    choices=titles, value=first, label="Checkpoint", elem_id="salun_model",
                    info=f"{others} not shown: only .safetensors are, as a .ckpt can run code" if others else None,
                )  # fmt: skip
                preset = gr.Dropdown(
                    choices=list(service.concepts(first)), value=None, label="What to forget", elem_id="salun_preset",
                    info="a preset, or a word that the model knows",
                )  # fmt: skip
                words = gr.Textbox(
                    label="… or in your own words", lines=2, placeholder="one a line", elem_id="salun_words",
                    info="with a preset chosen above as well, the model forgets both",
                )  # fmt: skip
                anchor = gr.Textbox(
                    label="What it becomes", placeholder="empty: what the preset says", lines=2, elem_id="salun_anchor",
                    info="for several concepts one a line, in the same order",
                )  # fmt: skip
                keep = gr.Textbox(
                    label="What to keep", lines=2, elem_id="salun_keep",
                    placeholder="prompts whose pictures should stay as they are, one a line; many are kept anyway",
                )  # fmt: skip
                go = gr.Button("Erase concept", variant="primary", elem_id="salun_erase")
                said = gr.HTML("", elem_id="salun_said")
                with gr.Accordion("Advanced", open=False, elem_id="salun_advanced"):
                    name = gr.Textbox(label="Name of the new checkpoint", placeholder="made from model and concept",
                                      elem_id="salun_name")  # fmt: skip
                    preview = gr.Slider(
                        0, 500, value=0, step=1, label="Preview every so many steps", elem_id="salun_preview",
                        info="before/after pictures at fixed seeds while it trains; 0 for none. They take time.",
                    )  # fmt: skip
                    advanced = {}
                    for title, group in ADVANCED.items():
                        if group:
                            gr.Markdown(f"**{title}**")
                            masks, folders = service.made_masks(), service.picture_folders()
                            advanced.update({n: control(gr, n, masks, folders) for n in group})
                    only = gr.Button("Only make the mask", elem_id="salun_only_mask")
            with gr.Column(scale=1, min_width=320):
                gr.HTML(f'<div class="salun-live" data-token="{escape(access.token)}"></div>')
                refresh = gr.Button("Refresh the lists", elem_id="salun_refresh")
        controls = [model, words, anchor, keep, *(advanced[n] for n in names)]

        with gr.Accordion("History", open=False, elem_id="salun_history"):
            with gr.Row():
                runs = gr.Dropdown(choices=_runs(service), value=None, label="Run", elem_id="salun_runs")
                other = gr.Dropdown(choices=_runs(service), value=None, label="… against", elem_id="salun_other",
                                    info="a second run, to see how far the masks agree")  # fmt: skip
            with gr.Row():
                again = gr.Button("Load these options again", elem_id="salun_again")
                resume = gr.Button("Resume", elem_id="salun_resume")
                use = gr.Button("Use this checkpoint now", elem_id="salun_use")
                layers = gr.Button("Look at the mask", elem_id="salun_layers")
            details = gr.HTML("", elem_id="salun_details")

        with gr.Accordion("Deltas", open=False, elem_id="salun_deltas"):
            gr.Markdown("A delta holds what an erasure changed: it goes on top of its base at any strength, and comes "
                        "out again to the bit. **Who has the delta can undo the erasure.**")  # fmt: skip
            base = gr.Dropdown(choices=titles, value=first, label="Checkpoint", elem_id="salun_base")
            chosen, strengths = [], []
            for row in range(1, ROWS + 1):
                with gr.Row():
                    chosen.append(gr.Dropdown(choices=["", *service.deltas()], value="", label=f"Delta {row}",
                                              elem_id=f"salun_delta_{row}"))  # fmt: skip
                    strengths.append(gr.Slider(-0.5, 1.5, value=1.0, step=0.05, label=f"Strength {row}",
                                               elem_id=f"salun_strength_{row}"))  # fmt: skip
            new_name = gr.Textbox(
                label="Name of the new file", placeholder="made from the names", elem_id="salun_new_name"
            )
            with gr.Row():
                apply = gr.Button("Write a checkpoint with these", variant="primary", elem_id="salun_apply")
                undo = gr.Button("Undo delta 1 in this checkpoint", elem_id="salun_undo")
                lora = gr.Button("Save delta 1 as LoRA", elem_id="salun_lora")
                diff = gr.Button("Save delta 1 as full difference", elem_id="salun_diff")
                overlap = gr.Button("Overlap", elem_id="salun_overlap")
            delta_said = gr.HTML("", elem_id="salun_delta_said")

        with gr.Accordion("Set up", open=False, elem_id="salun_setup") if service.host.sets_up else nullcontext():
            state = gr.HTML(_setup_text(service), elem_id="salun_setup_text")
            set_up = gr.Button("Set up", elem_id="salun_set_up") if service.host.sets_up else None

        def erase(values: list[Any], preset: Any, name: Any, preview: Any) -> str:
            options = _options(names, values, preset)
            job = service.erase(options, int(preview or 0), str(name or ""))
            return _good(f"“{job.title}” is in the queue. It goes on when this page is closed.")

        def only_mask(values: list[Any], preset: Any) -> str:
            return _good(f"“{service.mask(_options(names, values, preset)).title}” is in the queue.")

        def lists() -> list[Any]:
            titles, runs = list(service.models()), _runs(service)
            deltas = ["", *service.deltas()]
            return [
                gr.update(choices=titles), gr.update(choices=runs), gr.update(choices=runs),
                gr.update(choices=titles), *(gr.update(choices=deltas) for _ in chosen),
                gr.update(choices=[*_masks(), *service.made_masks()]),
                *(gr.update(choices=["", *service.picture_folders()]) for _ in FOLDERS), _setup_text(service),
            ]  # fmt: skip

        def opened() -> list[Any]:
            """Of a page that is opened anew: nothing is chosen on it yet."""
            now = service.first_model()
            return [gr.update(choices=list(service.models()), value=now) if at in (model, base) else update
                    for at, update in zip(listed, lists(), strict=True)]  # fmt: skip

        def safely(make: Callable[[], list[Any]]) -> list[Any]:
            try:
                return make()
            except Exception as error:  # such as a folder that is not there any more: what is shown stays
                logger.exception("the lists")
                return [*(gr.update() for _ in listed[:-1]), _bad(str(error))]

        def load_again(run: Any) -> list[Any]:
            said = _good(f"The options of {run} are loaded.")
            try:
                options = service.options_of(str(run or ""))
                shown = {key: shown_of(key, value) for key, value in options.items() if key != "model"}
            except (SalunError, TypeError, ValueError) as error:
                why = str(error) if run else "Choose a run first."
                return [gr.update() for _ in range(5 + len(names))] + [_bad(why)]
            there = {"model": list(service.models()), "mask": [*_masks(), *service.made_masks()]}
            there |= {key: service.picture_folders() for key in FOLDERS if options.get(key)}
            for key, among in there.items():
                if options.get(key) not in among:
                    said += _bad(f"Its {key} {str(options.get(key))[:200]!r} is not here any more: choose another.")
                    options.pop(key, None)
                    shown.pop(key, None)
            first = [
                gr.update(value=None),  # a preset would be added to the run's own concepts
                gr.update(value=options["model"]) if "model" in options else gr.update(),
                *(gr.update(value=shown.get(k, "")) for k in ("concept", "anchor", "retain_prompts")),
            ]
            rest = [gr.update(value=shown[n]) if n in shown else gr.update() for n in names]
            return [*first, *rest, said]

        def pairs(deltas: list[Any], strengths: list[Any]) -> tuple[list[str], list[float]]:
            both = [(str(d), float(s)) for d, s in zip(deltas, strengths, strict=True) if d]
            return [d for d, _ in both], [s for _, s in both]

        def write(base: Any, name: Any, *rest: Any) -> str:
            names, values = pairs(list(rest[:ROWS]), list(rest[ROWS:]))
            return _good(f"“{service.stack(str(base), names, values, str(name or '')).title}” is in the queue.")

        def words_for(model: Any) -> Any:
            return gr.update(choices=list(service.concepts(str(model) if model else None)), value=None)

        def queued(make: Callable[..., Any]) -> Callable[..., str]:
            return lambda *given: _good(f"“{make(*given).title}” is in the queue.")

        quick: dict[str, Any] = {"queue": False}
        listed = [model, runs, other, base, *chosen, advanced["mask"], *(advanced[n] for n in FOLDERS), state]
        go.click(
            _safe(lambda preset, name, preview, *values: erase(list(values), preset, name, preview)),
            [preset, name, preview, *controls], [said], **quick,
        )  # fmt: skip
        only.click(_safe(lambda preset, *values: only_mask(list(values), preset)), [preset, *controls], [said], **quick)
        model.change(words_for, [model], [preset], **quick)
        refresh.click(lambda: safely(lists), [], listed, **quick)
        again.click(load_again, [runs], [preset, *controls, details], **quick)
        runs.change(_safe(lambda run: _details(service, run)), [runs], [details], **quick)
        resume.click(_safe(queued(lambda run: service.resume(str(run or "")))), [runs], [details], **quick)
        use.click(_safe(lambda run: _good(service.use(str(run or "")))), [runs], [details], **quick)
        layers.click(
            _safe(queued(lambda run, other: service.inspect(str(run or ""), str(other) if other else None))),
            [runs, other], [details], **quick,
        )  # fmt: skip
        apply.click(_safe(write), [base, new_name, *chosen, *strengths], [delta_said], **quick)
        undo.click(
            _safe(queued(lambda base, delta, name: service.undo(str(base), str(delta or ""), str(name or "")))),
            [base, chosen[0], new_name], [delta_said], **quick,
        )  # fmt: skip
        for pressed, form in ((lora, "lora"), (diff, "diff")):
            pressed.click(
                _safe(queued(lambda delta, base, form=form: service.export(
                    str(delta or ""), form, otherwise=str(base or "")))),
                [chosen[0], base], [delta_said], **quick,
            )  # fmt: skip
        overlap.click(
            _safe(queued(lambda *deltas: service.overlaps([str(d) for d in deltas if d]))),
            chosen,
            [delta_said],
            **quick,
        )
        if set_up is not None:
            set_up.click(_safe(lambda: _good(service.set_up())), [], [state], **quick)
        page.load(lambda: safely(opened), [], listed, **quick)
        page.load(None, [], [], **{js: LOADER})
    return page


def _masks() -> list[str]:
    from salun.options import MASKS

    return list(MASKS)


def _options(names: list[str], values: list[Any], preset: Any) -> dict[str, Any]:
    """The options of an erasure from what the controls hold."""
    model, words, anchor, keep = values[:4]
    options = {name: value_of(name, shown) for name, shown in zip(names, values[4:], strict=True)}
    own = value_of("concept", words)
    options["model"] = str(model) if model else None
    options["concept"] = [*([str(preset)] if preset and str(preset) not in own else []), *own]
    options["anchor"] = value_of("anchor", anchor)
    options["retain_prompts"] = value_of("retain_prompts", keep)
    assert set(FIRST) <= set(options)
    return options


def _safe(answer: Callable[..., str]) -> Callable[..., str]:
    """An event's function whose errors become a line on the page: a host may show another's error for ours."""

    def call(*given: Any) -> str:
        try:
            return answer(*given)
        except SalunError as error:
            return _bad(in_the_pages_words(str(error)))
        except Exception as error:
            logger.exception("the page")
            return _bad(f"{type(error).__name__}: {error}")

    return call


def _good(text: str) -> str:
    return f'<p role="status">{escape(text)}</p>'


def _bad(text: str) -> str:
    return f'<p class="salun-bad" role="alert">{escape(text)}</p>'


def _runs(service: Service) -> list[str]:
    return [str(run["run"]) for run in service.history()]


def _details(service: Service, run: Any) -> str:
    if not run:
        return ""
    found = next((one for one in service.history() if one["run"] == run), None)
    if found is None:
        raise ConfigError(f"there is no run {str(run)[:80]!r}")
    parts = [f"<p><strong>{escape(str(run))}</strong>: {escape(str(found['status']))}</p>"]
    parts += [f"<p>{escape(str(line))}</p>" for line in found["headline"]]
    if found["error"]:
        parts.append(_bad(in_the_pages_words(str(found["error"]))))
    if found["status"] == "unreadable":
        return "".join(parts)
    if found["figures"]:
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in found["figures"]
        )
        parts.append(
            f'<table class="salun-table"><tr><th></th><th>before</th><th>after</th><th></th></tr>{rows}</table>'
        )
    if "before_after.png" in found["files"]:
        path, _ = service.file(str(run), "before_after.png")
        parts.append(f'<img alt="before and after" style="max-width:100%" src="{_data_url(path)}">')
    if "report.html" in found["files"]:
        parts.append(f'<button type="button" data-salun-report="{escape(str(run))}">Open the report</button>')
    options = [
        (label(name), value) for name, value in service.options_of(str(run)).items() if value not in (None, "", [])
    ]
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_told(value))}</td></tr>" for name, value in options)
    parts.append(f'<details><summary>Its options</summary><table class="salun-table">{rows}</table></details>')
    return "".join(parts)


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _setup_text(service: Service) -> str:
    if not service.host.sets_up:
        return ""
    ready, text = environment.state(service.host)
    return _good(text) if ready else _bad(text)
