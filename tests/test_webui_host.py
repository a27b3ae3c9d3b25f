"""Our part in a WebUI's process, with stand-ins for its modules: what real ones do is seen by `test_webui_real.py`."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from extension import environment, webui
from extension.access import Access, Rejected, gradio_login
from extension.environment import Missing
from extension.host import StandaloneHost
from extension.job_queue import Queue
from extension.jobs import Job
from extension.page import build
from extension.service import Service
from salun.errors import ConfigError


class Modules:
    """A1111's modules as far as a job's turn meets them. calls: what was done to its model, in order."""

    def __init__(self, data: Path) -> None:
        self.calls: list[str] = []
        self.lock, self.fails = threading.Lock(), False
        self.sd_models = SimpleNamespace(
            model_data=SimpleNamespace(lock=threading.Lock(), sd_model="the model"),
            unload_model_weights=self._unload,
            send_model_to_device=lambda model: self.calls.append(f"{model} is back"),
        )
        self.devices = SimpleNamespace(torch_gc=lambda: None)
        self.call_queue = SimpleNamespace(queue_lock=self.lock)
        self.paths_internal = SimpleNamespace(data_path=str(data))

    def _unload(self, model: str) -> None:
        self.calls.append(f"{model} is freed")
        if self.fails:
            raise RuntimeError("the device is lost")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    made = Modules(tmp_path)
    package = ModuleType("modules")
    for name in ("sd_models", "devices", "call_queue", "paths_internal"):
        setattr(package, name, getattr(made, name))
        monkeypatch.setitem(sys.modules, f"modules.{name}", getattr(made, name))
    monkeypatch.setitem(sys.modules, "modules", package)
    monkeypatch.setattr(webui, "_state", {})
    webui.STARTED.set()
    yield made
    webui.STARTED.clear()


def test_a_model_that_could_not_be_freed_as_a_whole_is_given_back_all_the_same(modules: Modules) -> None:
    host = webui.WebUI()
    with host.gpu_lease(Job("id", "erase", "x", {})):
        assert modules.calls == ["the model is freed"]
        assert modules.lock.locked()
    assert modules.calls[1:] == ["the model is back"]
    modules.calls.clear()
    modules.fails = True
    with pytest.raises(RuntimeError, match="the device is lost"), host.gpu_lease(Job("id", "erase", "x", {})):
        pytest.fail("it was not freed")
    assert modules.calls == ["the model is freed", "the model is back"]
    assert not modules.lock.locked()


def test_a_job_of_an_earlier_start_waits_until_the_host_has_started(modules: Modules) -> None:
    webui.STARTED.clear()
    entered = threading.Event()

    def take_turn() -> None:
        with webui.WebUI().gpu_lease(Job("id", "erase", "x", {})):
            entered.set()

    thread = threading.Thread(target=take_turn)
    thread.start()
    assert not entered.wait(0.2)
    webui.STARTED.set()
    assert entered.wait(10)
    thread.join()


def test_a_second_webui_on_one_data_folder_says_so_in_the_tab(modules: Modules, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    webui._state["access"] = Access()
    first = Queue(tmp_path / "salun" / "jobs")
    try:
        assert "another program uses the jobs" in str(webui.trouble())
        ((page, title, _),) = webui._tab()
        assert title == "Erase concept"
        (said,) = page.blocks.values()
        assert "another program uses the jobs" in said.value
        webui._started(None, None)  # adds no routes to the application, and raises nothing
    finally:
        first.close()
    assert webui.trouble() is None
    webui.service().queue.close()


@pytest.fixture
def options(modules: Modules, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A1111's options and list of checkpoints, as far as choosing one meets them: what loading raises stays inside."""
    infos = {name: SimpleNamespace(name=name, title=name, filename=f"/checkpoints/{name}")
             for name in ("old.safetensors", "new.safetensors")}  # fmt: skip
    made = SimpleNamespace(sd_model_checkpoint="old.safetensors", fails=False, frozen=False, save=lambda file: None)

    def set_option(key: str, value: str) -> bool:
        assert not made.frozen, "changing settings is disabled"
        if made.fails:
            return False  # the old value was put back
        setattr(made, key, f"{value} [1234abcd]")  # hashed meanwhile
        return True

    made.set = set_option
    modules.sd_models.checkpoints_list = infos
    modules.sd_models.get_closet_checkpoint_match = lambda text: infos.get(text.split(" [")[0])
    shared = SimpleNamespace(opts=made, config_filename="config.json")
    monkeypatch.setattr(sys.modules["modules"], "shared", shared, raising=False)
    monkeypatch.setitem(sys.modules, "modules.shared", shared)
    return made


def test_checkpoints_that_are_not_offered_are_reported(
    options: SimpleNamespace, modules: Modules, tmp_path: Path
) -> None:
    """A .ckpt may run code: a host may have some."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    listed = modules.sd_models.checkpoints_list
    listed["a.ckpt"] = SimpleNamespace(name="a.ckpt", filename="/checkpoints/a.ckpt")
    assert (list(webui.WebUI().models()), webui.WebUI().skipped_checkpoints()) == (
        ["old.safetensors", "new.safetensors"],
        1,
    )

    class Some(StandaloneHost):
        def skipped_checkpoints(self) -> int:
            return 1

    service = Service(Some(tmp_path / "some"))
    assert "1 not shown: only .safetensors files are" in str(build(gradio, service, Access()).get_config_file())
    service.queue.close()


def test_a_checkpoint_is_the_hosts_now_only_if_the_host_took_it(options: SimpleNamespace) -> None:
    new = Path("/checkpoints/new.safetensors")
    assert webui.WebUI().use(new) == "new.safetensors is now the checkpoint of the WebUI."
    options.sd_model_checkpoint, options.fails = "old.safetensors", True
    with pytest.raises(ConfigError, match=r"could not load new\.safetensors. See its log"):
        webui.WebUI().use(new)
    options.frozen = True
    with pytest.raises(ConfigError, match="does not change its checkpoint: changing settings is disabled"):
        webui.WebUI().use(new)


# -- the accordion ----------------------------------------------------------------------------------------------------


def test_a_webui_without_the_lora_extension_makes_its_images_as_long_as_no_delta_is_chosen(
    modules: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is called before every sampling, whatever is chosen."""
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    interrupted: list[str] = []
    state = SimpleNamespace(interrupt=lambda: interrupted.append("now"))
    for name, made in {
        "scripts": SimpleNamespace(Script=object, AlwaysVisible=object()),
        "shared": SimpleNamespace(state=state),
    }.items():
        monkeypatch.setattr(sys.modules["modules"], name, made, raising=False)
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    monkeypatch.delitem(sys.modules, "extension.webui_delta", raising=False)
    said: list[str] = []
    picture = SimpleNamespace(sd_model=object(), extra_generation_params={}, comment=said.append)
    from extension import webui_delta

    script, chosen = webui_delta.ErasedDelta(), ("run", "", "", 1.0, 1.0, 1.0)
    script.process_before_every_sampling(picture)
    script.process_before_every_sampling(picture, False, *chosen)
    assert (said, interrupted) == ([], [])
    with pytest.raises(RuntimeError, match="needs the built-in extension Lora"):
        script.process_before_every_sampling(picture, True, *chosen)
    assert interrupted == ["now"]
    left = SimpleNamespace(loaded_networks=[SimpleNamespace(name="salun:x"), SimpleNamespace(name="a style")])
    monkeypatch.setitem(sys.modules, "networks", left)
    script.process_before_every_sampling(picture, False, *chosen)  # the last picture's goes, LoRAs stay
    assert [network.name for network in left.loaded_networks] == ["a style"]


# -- who opens the page -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("login", ["", "ann:secret"])
def test_the_pages_token_leads_in_under_a_name_only_where_the_page_asks_for_a_password(
    modules: Modules, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    """--api-auth guards the host's API, not its page, from which a name made to lead here reads the token."""
    creds = SimpleNamespace(get_gradio_auth_creds=lambda: [tuple(login.split(":"))] if login else [])
    shared = SimpleNamespace(cmd_opts=SimpleNamespace(api_auth="api:other", api=True))
    for name, made in {"initialize_util": creds, "shared": shared}.items():
        monkeypatch.setattr(sys.modules["modules"], name, made, raising=False)
        monkeypatch.setitem(sys.modules, f"modules.{name}", made)
    access = webui.access()
    headers = {"host": "evil.example", "origin": "http://evil.example", "x-salun-token": access.token}
    if login:
        with pytest.raises(Rejected, match="nobody is signed in"):
            access.check(headers)  # who has read the token has not signed in yet, or not any more
        page = SimpleNamespace(tokens={"t": "ann"})
        access.signed_in = gradio_login(page)
        headers["cookie"] = "theme=dark; access-token-unsecure=t"
        access.check(headers)
        del page.tokens["t"]  # a logout
        with pytest.raises(Rejected, match="nobody is signed in"):
            access.check(headers)
        page.tokens["t"] = "ann"
    else:
        with pytest.raises(Rejected, match="by its address"):
            access.check(headers)
    access.check({**headers, "host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"})
    basic = {"authorization": "Basic " + base64.b64encode(b"api:other").decode()}
    access.check({"host": "my-machine:7860", **basic})


@pytest.mark.parametrize(
    ("flags", "login", "message"),
    [
        ({"api_auth": "ann"}, "", "--api-auth cannot be read"),
        ({"api_auth": "ann:secret,bob"}, "", "--api-auth cannot be read"),
        ({"api_auth": ":"}, "", "--api-auth cannot be read"),
        ({"api_auth": "ann: "}, "", "--api-auth cannot be read"),
        ({"api_auth": ""}, "", "--api-auth cannot be read"),
        ({"api_auth": ","}, "ann:secret", "--api-auth cannot be read"),
        ({"gradio_auth": ""}, "", "--gradio-auth or its file names no user"),
        ({"gradio_auth_path": "empty.txt"}, "", "--gradio-auth or its file names no user"),
        ({}, "ann", "--gradio-auth or its file cannot be read"),
        ({"api_auth": "ann:secret"}, "ann:", "--gradio-auth or its file cannot be read"),
        ({}, None, "--gradio-auth-path cannot be read"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_read_let_nobody_in(
    modules: Modules, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], login: str | None, message: str
) -> None:
    """A password that was meant to be asked for is not left out; the host itself goes on."""
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")

    def creds() -> Iterator[tuple[str, ...]]:  # as the host's: it reads the file when it is asked for the first
        if login is None:
            raise FileNotFoundError(2, "No such file or directory", "passwords.txt")
        if login:
            yield tuple(login.split(":"))

    shared = SimpleNamespace(cmd_opts=SimpleNamespace(**{"api_auth": None, "api": True, **flags}))
    for name, made in {"initialize_util": SimpleNamespace(get_gradio_auth_creds=creds), "shared": shared}.items():
        monkeypatch.setattr(sys.modules["modules"], name, made, raising=False)
        monkeypatch.setitem(sys.modules, f"modules.{name}", made)
    assert message in str(webui.trouble())
    ((page, _, _),) = webui._tab()
    (said,) = page.blocks.values()
    assert message in said.value
    webui._started(None, None)  # adds no routes, and raises nothing
    assert "service" not in webui._state


# -- the environment of the jobs --------------------------------------------------------------------------------------


@pytest.fixture
def lacking(modules: Modules, monkeypatch: pytest.MonkeyPatch) -> webui.WebUI:
    """A host whose Python lacks a package."""
    monkeypatch.setattr(environment, "missing", lambda: (Missing("diffusers", "0.31", None),))
    monkeypatch.setattr(environment, "_failed", {})
    monkeypatch.setattr(environment, "PACKAGES", ("pip",))  # there already: the package index is not asked
    monkeypatch.setattr(environment, "SMALL", ())
    monkeypatch.setattr(environment, "TRIAL", "import numpy")
    return webui.WebUI()


@pytest.mark.slow
def test_a_set_up_that_fails_leaves_the_environment_that_worked(
    lacking: webui.WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="lacks diffusers"):
        lacking.python()
    assert environment.set_up(lacking, wait=True).startswith("Ready")
    python = lacking.python()
    assert Path(python).is_relative_to(lacking.data / "environment")
    assert subprocess.run([python, "-c", "import numpy"], check=False).returncode == 0  # the host's own
    with monkeypatch.context() as broken:
        broken.setattr(environment, "TRIAL", "import no_such_package")
        said = environment.set_up(lacking, wait=True)
    assert "No module named 'no_such_package'" in said
    with monkeypatch.context() as old:
        old.setitem(environment.LOWEST, "diffusers", "999")  # what was installed does not suffice
        assert "still missing after the installation: diffusers 999" in environment.set_up(lacking, wait=True)
    assert "The previous environment stays in use" in said
    assert lacking.python() == python
    assert [path.name for path in (lacking.data / "environment").iterdir() if path.is_dir()] == [Path(python).parts[-3]]


@pytest.mark.slow
def test_a_set_up_works_under_any_name_and_language(
    lacking: webui.WebUI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under C:\\Users\\Jörg, where Python writes and reads in the system's own encoding."""
    site = tmp_path / "Jörg" / "site-packages"
    site.mkdir(parents=True)
    (site / "of_the_host.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    lacking.data = tmp_path / "Jörg" / "salun"
    assert environment.set_up(lacking, wait=True).startswith("Ready")
    as_a_job = {"LC_ALL": "C", "PYTHONUTF8": "1"}
    seen = subprocess.run([lacking.python(), "-c", "import of_the_host"], env=as_a_job, capture_output=True)
    assert seen.returncode == 0, seen.stderr.decode(errors="replace")


def test_what_a_set_up_cannot_change_is_said_and_nothing_is_made(
    lacking: webui.WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch and numpy stay the WebUI's own: with too old ones the tab is never ready."""
    made = environment._executable(lacking.data / "environment" / "old")
    made.parent.mkdir(parents=True)
    made.touch()
    (lacking.data / "environment" / "current").write_text("old", encoding="utf-8")  # made while torch sufficed
    assert environment.state(lacking)[0]
    monkeypatch.setattr(
        environment, "missing", lambda: (Missing("torch", "2.1", "2.0.1"), Missing("diffusers", "0.31", None))
    )
    said = r"need torch 2\.1 \(has 2\.0\.1\), which Set up takes from this program"
    for ask in (lacking.python, lambda: environment.set_up(lacking, wait=True)):
        with pytest.raises(ConfigError, match=said):
            ask()
    ready, text = environment.state(lacking)
    assert not ready
    assert re.search(said, text)
    assert sorted(path.name for path in (lacking.data / "environment").iterdir()) == ["current", "old"]


def test_salun_ui_offers_no_set_up_that_it_would_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    monkeypatch.setattr(environment, "missing", lambda: (Missing("transformers", "4.46", "4.44"),))
    shown = {}
    for host in (StandaloneHost(tmp_path / "alone"), Setting(tmp_path / "setting")):
        service = Service(host)
        shown[host.data.name] = str(build(gradio, service, Access()).get_config_file())
        service.queue.close()
    assert "Set up makes an environment" in shown["setting"]
    assert "Set up" not in shown["alone"]


class Setting(StandaloneHost):
    """A host whose jobs may run in an environment of ours."""

    sets_up = True


def test_while_a_job_is_at_work_its_environment_is_not_made_anew(lacking: webui.WebUI) -> None:
    service = Service(lacking)
    job = Job("id", "erase", "forget circle", {}, state="running")
    service.queue._jobs["id"] = job
    with pytest.raises(ConfigError, match="“forget circle” has not ended"):
        service.set_up()
    job.state = "done"
    service.queue.close()
