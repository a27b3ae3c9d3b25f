"""`salun ui`: what it refuses, and that name and password guard all of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import run_command

ROOT = Path(__file__).resolve().parents[1]
NO_GRADIO = "import sys; sys.modules['gradio'] = None; sys.argv = ['salun', *sys.argv[1:]]\n"
NO_GRADIO += "from salun.__main__ import main; main()"


def salun(*arguments: str, cwd: Path, program: tuple[str, ...] = ("-m", "salun")) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *program, "ui", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "host is 0.0.0.0, which other machines can reach"),
        (["--host", "192.168.1.7"], "which other machines can reach"),
        (["--host", "::"], "which other machines can reach"),
        (["--host", "my-machine"], "which other machines can reach"),
        (["--auth", "ann"], "auth needs a name and a password"),
        (["--auth", ":secret"], "auth needs a name and a password"),
        (["--auth", "ann:"], "auth needs a name and a password"),
        (["--auth", "ann: "], "auth needs a name and a password"),
        (["--auth", ""], "auth needs a name and a password"),
        (["--port", "70000"], "65535"),
    ],
    ids=str,
)
def test_an_open_door_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run_command("ui", *arguments, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not list(tmp_path.iterdir())


def test_an_empty_password_in_the_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `SALUN_AUTH=$PASSWORD` leaves it where there is no such variable."""
    monkeypatch.setenv("SALUN_AUTH", "")
    done = salun(cwd=tmp_path)
    assert (done.returncode, "SALUN_AUTH needs a name and a password" in done.stderr) == (2, True), done.stderr


def test_without_gradio_the_extra_is_named(tmp_path: Path) -> None:
    done = salun(cwd=tmp_path, program=("-c", NO_GRADIO))
    assert done.returncode == 1
    assert done.stderr.strip() == 'salun: the page needs gradio. Install it: pip install "gradio>=4.44" (the extra ui)'


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a client of the whole application, with a login or none, under an address."""
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    client = pytest.importorskip("starlette.testclient").TestClient
    from extension.host import StandaloneHost
    from extension.service import Service
    from extension.standalone import application

    service = Service(StandaloneHost(tmp_path))
    yield lambda login, address: client(application(service, login), base_url=address)
    service.queue.close()


def test_without_a_password_nothing_is_answered_under_a_name_or_for_another_site(page: Callable[..., Any]) -> None:
    """Gradio's own routes begin jobs too. A domain can be made to lead to this machine (DNS rebinding), and a page of
    another site can send what it needs no leave for."""
    for name in ("evil.example", "my-machine"):
        calling = page(None, f"http://{name}:7870")
        for path in ("/", "/config", "/gradio_api/info", "/salun/v1/status", "/salun/v1/page.js"):
            answer = calling.get(path)
            assert (answer.status_code, "--auth NAME:PASSWORD" in answer.text) == (403, True), path
    calling = page(None, "http://127.0.0.1:7870")
    assert [calling.get(path).status_code for path in ("/", "/config", "/salun/v1/status")] == [200, 200, 200]
    assert calling.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link
    framed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    assert calling.get("/", headers=framed).status_code == 403
    assert calling.get("/", headers={"X-Forwarded-Host": "evil.example"}).status_code == 403
    sent = {"content": '{"data": []}', "headers": {"Origin": "http://evil.example", "Content-Type": "text/plain"}}
    for path in ("/gradio_api/run/predict", "/gradio_api/queue/join", "/salun/v1/start"):
        answer = calling.post(path, **sent)
        assert (answer.status_code, answer.json()["error"]) == (403, "requests from other sites are rejected"), path


HOSTS_THAT_ARE_NONE = [
    "127.0.0.1:17870.evil.example", "127.0.0.1:70000", "127.0.0.1:0", "127.0.0.1:", "ann@127.0.0.1:7870", "localhost.",
    "127.0.0.1.:7870", "[127.0.0.1]:7870", "[::1", "::1", "127.0.0.1/..", "127.0.0.1:7870, evil.example", "0x7f.1",
    "2130706433", "127.1", "[::1%25eth0]", "１２７.0.0.1", "localhost\t", "",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS_THAT_ARE_NONE, ids=ascii)
def test_a_host_header_that_is_no_address_is_refused(host: str) -> None:
    from extension.access import Rejected, check_address, check_origin

    headers = {"host": host, "origin": f"http://{host}"}
    with pytest.raises(Rejected) as refused:
        check_origin(headers)
        check_address(headers)
    assert refused.value.status in (400, 403)


@pytest.mark.parametrize("login", [None, ("ann", "secret")], ids=["open", "login"])
def test_no_foreign_origin_is_answered_or_allowed_to_read(page: Callable[..., Any], login: Any) -> None:
    """Gradio itself echoes any origin, together with leave to send cookies."""
    disconnect = pytest.importorskip("starlette.websockets").WebSocketDisconnect
    calling = page(login, "http://127.0.0.1:7870")
    if login is not None:
        calling.post("/login", data={"username": "ann", "password": "secret"})
    for origin in ("http://127.0.0.1:9999", "https://evil.example", "null", "http://127.0.0.1:7870@evil.example"):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        for method, path in (("GET", "/config"), ("GET", "/"), ("POST", "/gradio_api/queue/join"),
                             ("OPTIONS", "/gradio_api/queue/join"), ("POST", "/login"), ("GET", "/gradio_api/info"),
                             ("GET", "/gradio_api/queue/data"), ("GET", "/salun/v1/status")):  # fmt: skip
            answer = calling.request(method, path, headers=headers)
            assert answer.status_code == 403, (method, path)
            assert not [name for name in answer.headers if name.startswith("access-control")]
        with pytest.raises(disconnect), calling.websocket_connect("/gradio_api/queue/join", headers=headers):
            pass
    own = calling.get("/config", headers={"Origin": "http://127.0.0.1:7870"})
    assert (own.status_code, [name for name in own.headers if name.startswith("access-control")]) == (200, [])
    assert calling.get("/config", headers={"Sec-Fetch-Site": "same-site"}).status_code == 403
    for path in ("/", "/salun/v1/status", "/salun/v1/page.js", "/nowhere"):
        headers = calling.get(path).headers
        assert (headers["x-frame-options"], headers["cross-origin-resource-policy"]) == ("DENY", "same-origin")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_the_pages_token_opens_the_api_together_with_the_login_alone(page: Callable[..., Any]) -> None:
    calling = page(("ann", "secret"), "https://my-machine")
    assert [calling.get(path).status_code for path in ("/", "/config", "/gradio_api/heartbeat/x")] == [200, 401, 401]
    answer = calling.post("/login", data={"username": "ann", "password": "secret"})
    for cookie in answer.headers.get_list("set-cookie"):
        assert ("samesite=none" in cookie.lower(), cookie.endswith("SameSite=Strict")) == (False, True)
        assert "; Secure" in cookie  # the address begins with https
    token = re.search('data-token=\\\\?"([^"\\\\]+)', calling.get("/config").text)
    assert token is not None
    headers = {"X-Salun-Token": token[1]}
    assert calling.get("/salun/v1/status", headers=headers).status_code == 200
    assert (
        calling.get("/salun/v1/status").status_code == 401
    )  # the cookie alone is no leave: other sites cause requests
    kept = dict(calling.cookies)
    calling.cookies.clear()
    assert calling.get("/salun/v1/status", headers=headers).status_code == 401
    for name, value in kept.items():
        calling.cookies.set(name, value)
    assert calling.get("/salun/v1/status", headers=headers).status_code == 200
    calling.get("/logout", follow_redirects=False)
    for name, value in kept.items():  # as somebody would who has copied them
        calling.cookies.set(name, value)
    assert calling.get("/salun/v1/status", headers=headers).status_code == 401
    assert calling.get("/config").status_code == 401


def test_a_body_is_bounded_before_anybody_reads_it(page: Callable[..., Any]) -> None:
    """Gradio takes 300 MB of JSON into memory, and asks for the password then."""
    calling = page(("ann", "secret"), "http://127.0.0.1:7870")
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 100_000
            yield bytes(100_000)

    kind = {"Content-Type": "application/json"}
    assert calling.post("/gradio_api/run/predict", content=bytes(100), headers=kind).status_code == 401
    assert calling.post("/login", content=bytes(20_000)).status_code == 413
    assert calling.post("/salun/v1/start", content=endless(), headers=kind).status_code == 413
    calling.post("/login", data={"username": "ann", "password": "secret"})
    for path in ("/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/upload"):
        assert calling.post(path, content=bytes(1_000_001), headers=kind).status_code == 413
        assert calling.post(path, content=endless(), headers=kind).status_code == 413


def test_a_body_that_is_not_sent_is_not_waited_for() -> None:
    from extension.access import Rejected
    from extension.body import read_body

    async def silent() -> Any:
        await asyncio.sleep(60)

    with pytest.raises(Rejected, match=r"did not arrive within 0\.05 s") as refused:
        asyncio.run(read_body(silent, {"content-length": "5"}, 10, seconds=0.05))
    assert refused.value.status == 408


async def ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.contextmanager
def serving(application: Any) -> Iterator[tuple[str, int]]:
    """An application behind our connections, and its address."""
    import uvicorn

    from extension import connections

    made = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(application, log_level="error", http=connections.Connection, ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [made]}, daemon=True)
    thread.start()
    try:
        yield made.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(10)


def test_half_sent_bodies_keep_nobody_from_signing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """More bodies than there are places for: the oldest give way at once, the rest in a short time."""
    from extension import front
    from extension.access import Access

    monkeypatch.setattr(front, "SECONDS_BEFORE_LOGIN", 0.5)
    monkeypatch.setattr(front, "MAX_CONNECTIONS", 12)
    statuses: list[int] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"user"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    application = front.Front(answer, Access({"ann": "secret"}, guarded=True))

    async def call(whole: bool) -> int:
        async def receive() -> Any:
            if not whole:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": b"user"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"host", b"x"), (b"content-length", b"4")]
        await application(
            {"type": "http", "method": "POST", "path": "/login", "headers": headers, "scheme": "http"}, receive, send
        )
        return statuses[-1]

    async def flood() -> None:
        waiting = [asyncio.create_task(call(whole=False)) for _ in range(10)]
        await asyncio.sleep(0.1)
        assert statuses == [408] * 7
        assert await call(whole=True) == 200
        await asyncio.wait_for(asyncio.gather(*waiting), 5)

    asyncio.run(flood())
    assert sorted(statuses) == [200] + [408] * 10


def test_connections_of_one_address_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own address stands for everybody behind a proxy, and has no limit of its own."""
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (it comes with the extra `ui`)")
    from extension import connections

    class Transport:
        def __init__(self, peer: Any) -> None:
            self.peer = peer

        def get_extra_info(self, name: str) -> Any:
            return self.peer

    addresses = {("203.0.113.5", 80): "203.0.113.5", ("::ffff:203.0.113.5", 80, 0, 0): "203.0.113.5",
                 ("127.0.0.1", 80): None, ("::1", 80, 0, 0): None, ("::ffff:127.0.0.1", 80, 0, 0): None,
                 ("fe80::1%eth0", 80, 0, 0): "fe80::1", "": None}  # fmt: skip
    for peer, address in addresses.items():
        assert connections._remote_address(Transport(peer)) == address

    monkeypatch.setattr(connections, "PER_ADDRESS", 2)
    monkeypatch.setattr(connections, "_remote_address", lambda transport: "203.0.113.5")
    with serving(ok) as address:
        calling = [socket.create_connection(address, timeout=10) for _ in range(3)]
        for one in calling:
            with contextlib.suppress(OSError):  # the third is closed
                one.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        received = []
        for one in calling:
            try:
                received.append(one.recv(4096) != b"")
            except ConnectionError:
                received.append(False)
            one.close()
        assert received == [True, True, False]
        deadline = time.monotonic() + 5
        while connections._connected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not connections._connected


def test_warnings_of_too_many_connections_are_one_a_minute() -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (it comes with the extra `ui`)")
    import logging

    from extension.connections import OncePerMinute

    def record(message: str) -> logging.LogRecord:
        return logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, message, None, None)

    once = OncePerMinute()
    assert [once.filter(record("Exceeded concurrency limit.")) for _ in range(3)] == [True, False, False]
    assert once.filter(record("another"))


def test_a_request_that_is_never_sent_in_full_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a head, half of one, and half of the second on the same connection."""
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (it comes with the extra `ui`)")
    from extension import connections

    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    whole, half = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost"
    with serving(ok) as address:
        for sent, answered in ((b"", False), (half, False), (whole + half, True)):
            with socket.create_connection(address, timeout=10) as calling:
                calling.sendall(sent)
                began, received = time.monotonic(), b""
                while part := calling.recv(4096):
                    received += part
                assert (received.endswith(b"ok"), time.monotonic() - began < 4) == (answered, True), sent


@pytest.mark.slow
def test_name_and_password_guard_page_and_api(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SALUN_AUTH": "ann:secret",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    command = [sys.executable, "-m", "salun", "ui", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split(" ")[0]

        def status(path: str, user: str | None = None) -> int:
            request = urllib.request.Request(address + path)
            if user is not None:
                request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        try:
            assert status("salun/v1/status") == status("salun/v1/status", "ann:other") == 401
            assert status("salun/v1/status", "ann:secret") == 200
            assert status("config") == 401  # gradio's own, which holds the page
            with urllib.request.urlopen(address, timeout=30) as page:
                assert b"data-token" not in page.read()
            again = salun("--port", "0", cwd=tmp_path)
            assert "another program uses the jobs" in again.stderr
        finally:
            process.terminate()
            process.wait(30)
