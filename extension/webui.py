"""The tab in A1111, Forge and reForge: the connection to the host, without computation.

`modules` and `backend` belong to the host and differ among hosts, so they are imported where they are used.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from html import escape
from pathlib import Path
from typing import Any

from salun.errors import ConfigError, SalunError

from . import environment
from .access import Access, gradio_login
from .api import add_routes
from .jobs import Job
from .messages import render
from .page import build
from .service import Service

TAB = "Erase concept"
STARTED = threading.Event()  # set once the host answers
DEVICE_JOBS = ("erase", "mask", "evaluate", "attack", "sample")  # these use the host's device; others only its files
logger = logging.getLogger("salun")
_state: dict[str, Any] = {}  # survives "Reload UI", as this module does


def register() -> None:
    """Ask the host to show the tab and serve the API. The host calls this when it runs the script, also after each
    reload.
    """
    from modules import script_callbacks

    script_callbacks.on_ui_tabs(_tab)
    script_callbacks.on_after_component(_add_update_buttons)
    script_callbacks.on_app_started(_started)


def service() -> Service:
    """The service of this process, made once. Raises ConfigError if another program uses its folder, or if the flags of
    access cannot be read.
    """
    access()
    if "service" not in _state:
        _state["service"] = Service(WebUI())
    current: Service = _state["service"]
    return current


def trouble() -> str | None:
    """The message that explains why there is no service; None if there is one."""
    try:
        service()
    except SalunError as error:
        return render(error)
    return None


def access() -> Access:
    """The rules of access from the host's flags: --api opens the API, --api-auth or --gradio-auth require a login.

    Raises ConfigError for flags that cannot be read, so that the API is never open where a password was intended.
    """
    if "access" not in _state:
        from modules import shared
        from modules.initialize_util import get_gradio_auth_creds

        flags = shared.cmd_opts
        page_flags = [getattr(flags, name, None) for name in ("gradio_auth", "gradio_auth_path")]
        try:
            pairs = list(get_gradio_auth_creds())
        except (OSError, ValueError) as error:  # no such file, or not a text file
            raise ConfigError(f"--gradio-auth-path cannot be read, so nobody has access: {error}") from error
        guards = _users("--gradio-auth or its file", pairs)
        if not guards and any(flag is not None for flag in page_flags):
            raise ConfigError(
                "--gradio-auth or its file names no user, so nobody has access", advice="Give NAME:PASSWORD"
            )
        given = flags.api_auth
        pairs = [pair.split(":", 1) for pair in given.split(",")] if given is not None else []
        users = _users("--api-auth", pairs) or guards
        closed = "start the WebUI with --api to use salun's API"
        _state["access"] = Access(users, bool(shared.cmd_opts.api), closed, guarded=bool(guards))
    current: Access = _state["access"]
    return current


def _users(flag: str, pairs: Sequence[Sequence[str]]) -> dict[str, str]:
    """Name → password."""
    if not all(len(pair) == 2 and all(part.strip() for part in pair) for pair in pairs):
        raise ConfigError(
            f"{flag} cannot be read, so nobody has access", advice="Give NAME:PASSWORD, separated by commas"
        )
    return {pair[0]: pair[1] for pair in pairs}


def _tab() -> list[tuple[Any, str, str]]:
    import gradio as gr

    problem = trouble()
    if problem is None:
        return [(build(gr, service(), access()), TAB, "salun")]
    with gr.Blocks(analytics_enabled=False, title=TAB) as page:
        gr.HTML(f'<p role="alert">{escape(problem)}</p>')
    return [(page, TAB, "salun")]


def _started(demo: Any, app: Any) -> None:
    problem = trouble()
    if problem is None:
        access().signed_in = gradio_login(app)
        add_routes(app, service(), access())
        STARTED.set()
    else:
        logger.warning("%s", problem)


def _add_update_buttons(component: Any, **kwargs: Any) -> None:
    """Add hidden buttons next to the host's list of checkpoints and its LoRA cards that update them; the page's script
    presses them.

    The host's buttons are not used because they empty the list of checkpoints first, which a running generation may
    need.
    """
    import gradio as gr
    from gradio.context import Context

    name, label = getattr(component, "elem_id", None), getattr(component, "label", None)
    forges = label == "Checkpoint" and "model_selection" in (getattr(component, "elem_classes", None) or [])
    cards = re.fullmatch("(txt2img|img2img)_lora_cards_html", name or "")
    if Context.root_block is None:
        return  # gradio 4 makes a component anew for each update, outside of any page
    if name == "setting_sd_model_checkpoint" or forges:
        update = gr.Button("checkpoints", visible=False, elem_id="salun_host_checkpoints")
        update.click(_checkpoints, [], [component], queue=False, show_progress=False)
    elif cards is not None:
        side = cards[1]
        update = gr.Button("LoRAs", visible=False, elem_id=f"salun_host_loras_{side}")
        js = "_js" if int(gr.__version__.split(".")[0]) < 4 else "js"
        update.click(lambda: _cards(side), [], [component], queue=False, show_progress=False).then(
            None, [], [], **{js: f"() => applyExtraNetworkFilter('{side}_lora')"}
        )


def _cards(side: str) -> Any:
    import gradio as gr
    from modules import ui_extra_networks

    page = next((page for page in ui_extra_networks.extra_pages if page.name == "lora"), None)
    return gr.update() if page is None else page.create_html(side)


def _checkpoints() -> Any:
    import gradio as gr
    from modules import sd_models, shared

    tiles = sd_models.checkpoint_tiles(getattr(shared.opts, "sd_checkpoint_dropdown_use_short", False))
    now = sd_models.get_closet_checkpoint_match(shared.opts.sd_model_checkpoint or "")
    infos = list(sd_models.checkpoints_list.values())
    shown = [tile for tile, info in zip(tiles, infos, strict=False) if now and info.filename == now.filename]
    return gr.update(choices=tiles, **({"value": shown[0]} if shown else {}))


class WebUI:
    """The WebUI as `host.Host` describes it."""

    sets_up = True

    def __init__(self) -> None:
        from modules import paths_internal

        self.forge = (
            importlib.util.find_spec("backend") is not None and importlib.util.find_spec("modules_forge") is not None
        )
        self.reforge = not self.forge and importlib.util.find_spec("ldm_patched") is not None
        self.name = "Forge" if self.forge else "reForge" if self.reforge else "WebUI"
        self.data = Path(paths_internal.data_path).absolute() / "salun"

    def how_to_add(self) -> str:
        from modules import sd_models, shared

        folder = Path(shared.cmd_opts.ckpt_dir or sd_models.model_path).name
        return f"To add one, put a .safetensors file into the WebUI's folder {folder}, then refresh the lists"

    def models(self) -> dict[str, str]:
        from modules import sd_models

        paths = {info.name: str(Path(info.filename).absolute()) for info in sd_models.checkpoints_list.values()}
        return {name: path for name, path in paths.items() if Path(path).suffix.lower() == ".safetensors"}

    def skipped_checkpoints(self) -> int:
        from modules import sd_models

        return len({info.name for info in sd_models.checkpoints_list.values()} - set(self.models()))

    def loaded(self) -> str | None:
        from modules import sd_models, shared

        now = sd_models.get_closet_checkpoint_match(shared.opts.sd_model_checkpoint or "")
        return now.name if now is not None and now.name in self.models() else None

    def checkpoints(self) -> Path | None:
        from modules import sd_models, shared

        return Path(shared.cmd_opts.ckpt_dir or sd_models.model_path).absolute()

    def loras(self) -> Path | None:
        from modules import shared

        folder = getattr(shared.cmd_opts, "lora_dir", None)
        return Path(folder).absolute() if folder else None

    def python(self) -> str:
        return environment.python(self)

    def environment(self) -> dict[str, str]:
        return {} if os.environ.get("SALUN_CACHE") else {"SALUN_CACHE": str(self.data / "cache")}

    @contextmanager
    def gpu_lease(self, job: Job) -> Iterator[None]:
        if job.kind not in DEVICE_JOBS:
            yield
            return
        from modules.call_queue import queue_lock

        STARTED.wait()  # stored jobs may be waiting while the host is still starting
        with queue_lock:
            if not job.open:  # cancelled during a generation: the host is not changed
                yield
                return
            model = self._loaded_model()
            try:
                self._free(model)
                yield
            finally:
                self._restore(model)

    def _loaded_model(self) -> Any:
        """A1111's model, to be restored; None on Forge and reForge, which load their models again."""
        from modules import sd_models

        if self.forge or self.reforge:
            return None
        lock = getattr(sd_models.model_data, "lock", None) or nullcontext()
        with lock:  # held while the host loads its first model; shared.sd_model would load one
            return sd_models.model_data.sd_model

    def _free(self, model: Any) -> None:
        """Remove the host's models from the device."""
        from modules import devices, sd_models

        if self.forge:
            from backend import memory_management

            memory_management.unload_all_models()
            memory_management.soft_empty_cache()
            sd_models.model_data.sd_model = sd_models.FakeInitialModel()  # the next generation loads it again
            sd_models.model_data.forge_hash = ""
        elif self.reforge:
            from ldm_patched.modules import model_management

            model_management.unload_all_models()
            model_management.soft_empty_cache()
        elif model is not None:
            sd_models.unload_model_weights(model)
        gc.collect()
        devices.torch_gc()

    def _restore(self, model: Any) -> None:
        if model is not None:
            from modules import sd_models

            sd_models.send_model_to_device(model)

    def changed(self, job: Job) -> None:
        if job.state != "done":
            return
        from modules import sd_models

        networks = sys.modules.get("networks")  # of the built-in LoRA extension
        for path in map(Path, job.outputs):  # one by one: the host's functions empty their lists first
            if path.is_file() and path.parent == self.checkpoints():
                sd_models.CheckpointInfo(str(path)).register()
            if job.kind == "export" and networks is not None:
                networks.update_available_networks_by_names([path.stem])

    def use(self, path: Path) -> str:
        from modules import sd_models, shared

        info = next(
            (i for i in sd_models.checkpoints_list.values() if Path(i.filename).resolve() == path.resolve()), None
        )
        if info is None:
            raise ConfigError(f"{path.name} is not among the WebUI's checkpoints")
        try:
            if self.forge:
                from modules_forge.main_entry import checkpoint_change

                checkpoint_change(info.name)  # as its list has it
            else:
                shared.opts.set("sd_model_checkpoint", info.title)  # which loads it later
                shared.opts.save(shared.config_filename)
        except AssertionError as error:  # --freeze-settings and the like
            raise ConfigError(f"the WebUI does not change its checkpoint: {error}") from error
        now = sd_models.get_closet_checkpoint_match(shared.opts.sd_model_checkpoint or "")  # its title may have changed
        if now is None or now.filename != info.filename:  # the host catches errors of loading
            raise ConfigError(f"the WebUI could not load {info.name}", advice="See its log")
        return f"{info.name} is now the checkpoint of the WebUI."
