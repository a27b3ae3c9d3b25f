"""The page, for gradio 3.41 and later: forms, and a panel of jobs that a script updates.

Names and texts are escaped where they are shown; `service` checks input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from html import escape
from typing import Any

from . import environment
from .access import Access
from .markup import bad, good, safe
from .page_deltas import Deltas
from .page_form import Form
from .page_history import History
from .page_look import LOOKS, LookSection
from .service import Service

LOADER = """() => {
  if (document.getElementById('salun-script')) return [];
  const base = new URL('salun/v1/', document.baseURI.replace(/[^/]*([?#].*)?$/, ''));
  const script = document.createElement('script'), style = document.createElement('link');
  Object.assign(script, {id: 'salun-script', type: 'module', src: new URL('page.js', base).href});
  Object.assign(style, {rel: 'stylesheet', href: new URL('page.css', base).href});
  document.head.append(style, script);
  return [];
}"""
ABOUT = (
    "Makes a Stable Diffusion model forget a concept: an object, a style, a person, or nudity. The weights that matter "
    "most to the concept are found and trained; all others stay bit-exact (SalUn, ICLR 2024). The result is a new "
    "checkpoint. The original is not changed."
)
logger = logging.getLogger("salun")


def build(gr: Any, service: Service, access: Access) -> Any:
    """The tab as gradio Blocks."""
    js = "_js" if int(gr.__version__.split(".")[0]) < 4 else "js"
    alone = service.host.checkpoints() is None  # not a tab of another page
    with gr.Blocks(analytics_enabled=False, title="Erase concepts: salun") as page:
        with gr.Column(elem_classes=["salun-page", *(["salun-standalone"] if alone else [])]):
            head = "h1" if alone else "h2"
            with gr.Row(elem_classes=["salun-top"]):
                gr.HTML(f'<header class="salun-header"><{head}>Erase concepts</{head}><p>{ABOUT}</p></header>')
                refresh = gr.Button("Refresh the lists", elem_id="salun_refresh", size="sm", scale=0, min_width=140)
            with gr.Row(elem_classes=["salun-columns"]):
                with gr.Column(scale=1, min_width=320):
                    form = Form(gr, service)
                with gr.Column(scale=1, min_width=320):
                    live = f'<div class="salun-live" data-token="{escape(access.token)}"></div>'
                    gr.HTML(f'<h2 class="salun-heading">Jobs</h2>{live}')
            with gr.Accordion("Try it", open=True, elem_id="salun_try"):
                gr.HTML('<div class="salun-try"></div>')
            history = History(gr, service)
            looks = [LookSection(gr, service, look) for look in LOOKS.values()]
            deltas = Deltas(gr, service)
            state = _setup(gr, service)
        form.connect(service)
        history.connect(gr, service, form)
        for look in looks:
            look.connect(service)
        deltas.connect(service)

        models = [form.model, deltas.base]
        runs = [history.run, history.other]
        options = [*form.advanced.items(), *(item for look in looks for item in look.options.items())]
        named = service.choices()
        listed = [(name, control) for name, control in options if name in named]
        shown = [*models, *runs, *(look.model for look in looks), *deltas.chosen, *(of for _, of in listed), state]

        def lists(opened: bool = False) -> list[Any]:
            """Updates of `shown`. opened: of a page that was just opened and has no choice yet."""
            chosen = {"value": service.models.first()} if opened else {}
            names, choices = [str(run["run"]) for run in service.history()], service.choices()
            return [
                *(gr.update(choices=choices["model"], **chosen) for _ in models),
                *(gr.update(choices=names) for _ in runs),
                *(gr.update(choices=[*names, *choices["model"]]) for _ in looks),
                *(gr.update(choices=["", *service.runs.deltas()]) for _ in deltas.chosen),
                *(gr.update(choices=choices[name]) for name, _ in listed),
                _setup_text(service),
            ]

        def safely(make: Callable[[], list[Any]]) -> list[Any]:
            try:
                return make()
            except Exception as error:  # such as a deleted folder: the lists are not changed
                logger.exception("the lists cannot be updated")
                return [*(gr.update() for _ in shown[:-1]), bad(str(error))]

        refresh.click(lambda: safely(lists), [], shown, queue=False)
        page.load(lambda: safely(lambda: lists(opened=True)), [], shown, queue=False)
        page.load(None, [], [], **{js: LOADER})
    return page


def _setup(gr: Any, service: Service) -> Any:
    """Add the section Set up, if the host has one. Returns its status line."""
    if not service.host.sets_up:
        return gr.HTML("", elem_id="salun_setup_text")
    with gr.Accordion("Set up", open=False, elem_id="salun_setup"):
        state = gr.HTML(_setup_text(service), elem_id="salun_setup_text")
        button = gr.Button("Set up", elem_id="salun_set_up")
    button.click(safe(lambda: good(service.set_up())), [], [state], queue=False)
    return state


def _setup_text(service: Service) -> str:
    if not service.host.sets_up:
        return ""
    ready, text = environment.state(service.host)
    return good(text) if ready else bad(text)
