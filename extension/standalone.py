"""The server of `salun ui`: the page and the API without a WebUI."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from salun.errors import ConfigError

from .access import Access, gradio_login
from .api import add_routes
from .front import Front
from .host import StandaloneHost
from .limits import MAX_CONNECTIONS
from .page import build
from .service import Service


def serve(
    address: str,
    port: int,
    login: tuple[str, str] | None,
    data: Path,
    models_dirs: Sequence[str],
    browser: bool,
    say: Callable[[str], Any],
) -> None:
    """Serve until interrupted, then stop running jobs. say: called with the address once the page can be opened."""
    import uvicorn

    from .connections import Connection, OncePerMinute

    service = Service(StandaloneHost(data, models_dirs))
    try:
        listening = _listen(address, port)
        where = f"http://{address}:{listening.getsockname()[1]}/" if ":" not in address else f"port {port} of {address}"
        config = uvicorn.Config(
            application(service, login),
            log_level="warning",
            http=Connection,
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
        )
        logging.getLogger("uvicorn.error").addFilter(OncePerMinute())
        server = uvicorn.Server(config)
        say(f"{where} (Ctrl-C stops it; runs are in {service.runs.folder})")
        if browser:
            import webbrowser

            webbrowser.open(where)
        server.run(sockets=[listening])
    finally:
        service.queue.close()


def application(service: Service, login: tuple[str, str] | None) -> Any:
    """The API and the page as an ASGI application, behind the same name and password."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.routing import Mount

    access = Access(dict([login]) if login is not None else {}, guarded=login is not None)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_routes(app, service, access)
    gr.mount_gradio_app(app, build(gr, service, access), path="/", auth=login)
    gradio_app = next(route.app for route in app.routes if isinstance(route, Mount) and route.path == "")
    access.signed_in = gradio_login(gradio_app)
    return Front(app, access)


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(128)  # the printed address accepts connections at once
    except OSError as error:
        made.close()
        problem = f"cannot listen on {address}, port {port}: {error.strerror or error}"
        raise ConfigError(problem, advice="Choose another {host} or {port}") from error
    return made
