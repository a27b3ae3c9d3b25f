"""`salun ui`: the page of the WebUI tab by itself, for people without a WebUI."""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from salun.errors import Cancelled, ConfigError, SalunError

from . import interrupt
from .app import app
from .output import path_given

PAGE = "salun_webui_extension"  # the page is a host of its own; here it is only opened
STOPPED = "stopped. Queued jobs go on at the next start with the same --data; one that was at work can be resumed there"


@app.command()
def ui(
    host: Annotated[str, typer.Option(help="address to listen at; another than this machine's own needs --auth")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="port to listen at; 0 takes a free one", min=0, max=65535)] = 7870,
    auth: Annotated[
        str | None,
        typer.Option(help="NAME:PASSWORD for the page and its API (SALUN_AUTH keeps it off the command line)"),
    ] = None,
    data: Annotated[Path, typer.Option(callback=path_given, help="the folder of jobs, runs and pictures")] = Path(
        "salun-ui"
    ),
    models_dir: Annotated[
        list[str] | None,
        typer.Option(
            callback=path_given, help="a folder to find checkpoints in, as in `salun erase`; repeat it for several"
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="open the page in a browser")] = False,
) -> None:
    """Open the page: erase concepts by clicking, watch, compare, undo."""
    name, text = ("--auth", auth) if auth is not None else ("SALUN_AUTH", os.environ.get("SALUN_AUTH"))
    login = _login(name, text)
    if not _own(host) and login is None:
        raise ConfigError(f"--host {host} can be reached from other machines: give --auth NAME:PASSWORD")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise SalunError("the page needs gradio, an extra: pip install 'salun[ui]'") from error
    page = _page()
    try:
        with interrupt.working(), interrupt.exit_message(lambda: STOPPED):
            page.serve(host, port, login, data, models_dir or [], browser, typer.echo)
    except KeyboardInterrupt as error:
        raise Cancelled(STOPPED, line=STOPPED) from error


def _login(option: str, text: str | None) -> tuple[str, str] | None:
    """None only where nothing is given: an empty text, as an unset variable leaves it, does not mean open to all."""
    if text is None:
        return None
    name, _, password = text.partition(":")
    if not name.strip() or not password.strip():
        raise ConfigError(f"{option} needs a name and a password: NAME:PASSWORD")
    return name.strip(), password  # gradio's login strips names too


def _own(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _page() -> ModuleType:
    """The standalone page: of this very copy, a clone's `extension/` or what is installed."""
    clone = Path(__file__).resolve().parents[1]
    if (clone / "pyproject.toml").is_file() and (clone / "extension" / "__init__.py").is_file():
        home = clone / "extension"
        spec = importlib.util.spec_from_file_location(
            PAGE, home / "__init__.py", submodule_search_locations=[str(home)]
        )
        if spec is None or spec.loader is None:
            raise SalunError(f"{home} cannot be loaded: clone the repository again")
        module = importlib.util.module_from_spec(spec)
        sys.modules[PAGE] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{PAGE}.standalone")
