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

from salun.errors import ConfigError, SalunError

from .app import app
from .output import path_given

PAGE = "salun_webui_extension"  # the page is a host of its own; here it is only opened


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
    login = _login(auth or os.environ.get("SALUN_AUTH"))
    if not _own(host) and login is None:
        raise ConfigError(f"--host {host} can be reached from other machines: give --auth NAME:PASSWORD")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise SalunError("the page needs gradio, an extra: pip install 'salun[ui]'") from error
    _page().serve(host, port, login, data, models_dir or [], browser, typer.echo)


def _login(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    name, _, password = text.partition(":")
    if not name or not password:
        raise ConfigError("--auth needs a name and a password: NAME:PASSWORD")
    return name, password


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
