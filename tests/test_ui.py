"""`salun ui`: what it refuses, and that name and password guard all of it."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

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
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines: give --auth NAME:PASSWORD"),
        (["--host", "192.168.1.7"], "can be reached from other machines"),
        (["--host", "::"], "can be reached from other machines"),
        (["--host", "my-machine"], "can be reached from other machines"),
        (["--auth", "ann"], "--auth needs a name and a password"),
        (["--auth", ":secret"], "--auth needs a name and a password"),
        (["--port", "70000"], "65535"),
    ],
    ids=str,
)
def test_an_open_door_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = salun(*arguments, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not list(tmp_path.iterdir())


def test_without_gradio_the_extra_is_named(tmp_path: Path) -> None:
    done = salun(cwd=tmp_path, program=("-c", NO_GRADIO))
    assert done.returncode == 1
    assert done.stderr.strip() == "salun: the page needs gradio, an extra: pip install 'salun[ui]'"


def test_without_a_password_nothing_is_answered_under_a_name_or_for_another_site(tmp_path: Path) -> None:
    """Gradio's own routes begin jobs too. A domain can be made to lead to this machine (DNS rebinding), and a page of
    another site can send what it needs no leave for."""
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    client = pytest.importorskip("starlette.testclient").TestClient
    from extension.host import Alone
    from extension.service import Service
    from extension.standalone import application

    service = Service(Alone(tmp_path))
    try:
        app = application(service, None)
        for name in ("evil.example", "my-machine"):
            calling = client(app, base_url=f"http://{name}:7870")
            for path in ("/", "/config", "/gradio_api/info", "/salun/v1/status", "/salun/v1/page.js"):
                answer = calling.get(path)
                assert (answer.status_code, "--auth NAME:PASSWORD" in answer.text) == (403, True), path
        calling = client(app, base_url="http://127.0.0.1:7870")
        assert [calling.get(path).status_code for path in ("/", "/config", "/salun/v1/status")] == [200, 200, 200]
        assert calling.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link
        sent = {"content": '{"data": []}', "headers": {"Origin": "http://evil.example", "Content-Type": "text/plain"}}
        for path in ("/gradio_api/run/predict", "/gradio_api/queue/join", "/salun/v1/start"):
            answer = calling.post(path, **sent)
            assert (answer.status_code, answer.text) == (403, "requests from other sites are refused"), path
        guarded = client(application(service, ("ann", "secret")), base_url="http://my-machine:7870")
        assert guarded.get("/").status_code == 200  # the page that asks for the password
        assert guarded.get("/config").status_code == 401
    finally:
        service.queue.close()


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
            assert "another program works with the jobs" in again.stderr
        finally:
            process.terminate()
            process.wait(30)
