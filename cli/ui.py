"""`salun ui`: the page of the WebUI tab without a WebUI."""

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
from salun.extras import install_command

from . import interrupt
from .app import app
from .output import unquoted_path

PAGE = "salun_webui_extension"  # the page is a host of its own; this module only starts it
STOPPED = "stopped. Queued jobs start at the next start with the same --data; a job that was running can be resumed"


@app.command()
def ui(
    host: Annotated[str, typer.Option(help="Address to listen on; one that other machines can reach needs --auth.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 7870,
    auth: Annotated[
        str | None,
        typer.Option(help="NAME:PASSWORD for the page and its API (or set the variable SALUN_AUTH)."),
    ] = None,
    data: Annotated[Path, typer.Option(callback=unquoted_path, help="Folder of jobs, runs and images.")] = Path(
        "salun-ui"
    ),
    models_dir: Annotated[
        list[str] | None,
        typer.Option(
            callback=unquoted_path, help="Folder to search for checkpoints by name, as in `salun erase`; repeatable."
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in a browser.")] = False,
) -> None:
    """Start the web page for erasing concepts, watching runs, comparing results and undoing erasures."""
    login = _login(auth, "auth") if auth is not None else _login(os.environ.get("SALUN_AUTH"), None)
    if not _is_local(host) and login is None:
        raise ConfigError(
            f"is {host}, which other machines can reach", option="host", advice="Give NAME:PASSWORD as {auth}"
        )
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise SalunError("the page needs gradio", advice=f"Install it: {install_command('ui')}") from error
    page = _page()
    try:
        with interrupt.working(), interrupt.exit_message(lambda: STOPPED):
            page.serve(host, port, login, data, models_dir or [], browser, typer.echo)
    except KeyboardInterrupt as error:
        raise Cancelled(STOPPED, line=STOPPED) from error


def _login(text: str | None, option: str | None) -> tuple[str, str] | None:
    """The name and password of the page, None if no text is given. An empty text is an error, not a page open to all.

    option: the option that the text is from; None for the variable SALUN_AUTH.
    """
    if text is None:
        return None
    name, _, password = text.partition(":")
    if not name.strip() or not password.strip():
        subject = "" if option else "SALUN_AUTH "
        raise ConfigError(f"{subject}needs a name and a password: NAME:PASSWORD", option=option)
    return name.strip(), password  # gradio's login strips names too


def _is_local(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _page() -> ModuleType:
    """The module of the standalone page: from this clone's `extension/`, or installed."""
    clone = Path(__file__).resolve().parents[1]
    if (clone / "pyproject.toml").is_file() and (clone / "extension" / "__init__.py").is_file():
        home = clone / "extension"
        spec = importlib.util.spec_from_file_location(
            PAGE, home / "__init__.py", submodule_search_locations=[str(home)]
        )
        if spec is None or spec.loader is None:
            raise SalunError(f"{home} cannot be loaded", advice="Clone the repository again")
        module = importlib.util.module_from_spec(spec)
        sys.modules[PAGE] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{PAGE}.standalone")
