"""The tab in a real A1111 or Forge on the CPU: the hard points of `docs/tested-hosts.md`, one after the other.

    WEBUI_DIR=path/to/webui [WEBUI_PYTHON=its/venv/bin/python] pytest tests/test_webui_real.py

It needs 12 GB of memory, 15 GB of disk, Chromium, playwright and requires nothing of the WebUI but that it starts: it
gets a data folder of its own, with a checkpoint of random weights in Stable Diffusion 1.5's true size.
"""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from salun.checkpoints import safetensors_io

ROOT = Path(__file__).resolve().parents[1]
LINK = "forget things"  # the clone's folder, under a name of the user's own
WEBUI = os.environ.get("WEBUI_DIR")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WEBUI is None, reason="WEBUI_DIR names no checkout of A1111 or Forge"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]
FORGE = WEBUI is not None and (Path(WEBUI) / "backend").is_dir()
REFORGE = WEBUI is not None and (Path(WEBUI) / "ldm_patched").is_dir()
FLAGS = (
    "--skip-prepare-environment --skip-torch-cuda-test --skip-version-check --skip-python-version-check "
    "--no-download-sd-model --do-not-download-clip --disable-console-progressbars --api "
) + ("--always-cpu --all-in-fp32" if FORGE or REFORGE else "--use-cpu all --no-half --precision full --loglevel DEBUG")
QUICK = {
    "concept": ["teapot"], "anchor": ["cup"], "steps": 2, "batch_size": 1, "forget_images": "teapots",
    "retain_images": "others", "retain_latents": 0, "eval_images": 0, "dtype": "bf16", "resolution": 64,
    "density": 0.001, "mask": "random", "lr": 0.1, "anchor_share": 0.0,
}  # fmt: skip
LONG = {**QUICK, "steps": 500, "target": "online", "retain_target": "noise"}  # no targets to prepare first
PICTURE = {
    "prompt": "a teapot",
    "seed": 1,
    "steps": 2,
    "width": 64,
    "height": 64,
    "sampler_name": "Euler",
    "cfg_scale": 3,
}


HOSTS_LIST = ".model_selection input" if FORGE else "#setting_sd_model_checkpoint input"


@dataclass
class Server:
    """A running WebUI. data: its data folder."""

    address: str
    data: Path
    log: Path

    def call(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        request = urllib.request.Request(self.address + path, headers=headers or {})
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    def picture(self, **options: Any) -> bytes:
        """The pixels' PNG without its texts."""
        found = self.call("/sdapi/v1/txt2img", {**PICTURE, **options})
        image = Image.open(io.BytesIO(base64.b64decode(found["images"][0])))
        return image.tobytes()

    def start(self, kind: str = "erase", **asked: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.call("/salun/v1/start", {"kind": kind, **asked})
        return found

    def job(self, job: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.call(f"/salun/v1/status?id={job['id']}")
        return found

    def wait(self, job: dict[str, Any], true: Callable[[dict[str, Any]], bool], seconds: float = 900) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while True:
            found = self.job(job)
            if true(found):
                return found
            assert time.monotonic() < end, found
            time.sleep(0.1)

    def done(self, job: dict[str, Any]) -> dict[str, Any]:
        found = self.wait(job, lambda j: j["state"] in ("done", "failed", "cancelled"))
        assert found["state"] == "done", found
        return found


@contextmanager
def webui(data: Path, *flags: str, route: str | None = None) -> Iterator[Server]:
    """A WebUI on loopback with this data folder, once a route answers: our own, or one of its own without us."""
    assert WEBUI is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    venv = Path(WEBUI) / "venv/bin/python"
    python = os.environ.get("WEBUI_PYTHON") or (
        str(venv) if venv.is_file() else str(Path(WEBUI).parent / "venv/bin/python")
    )
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False",
        "COMMANDLINE_ARGS": "", "PYTHONUNBUFFERED": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    log = data / f"log-{port}.txt"
    command = [python, "launch.py", *FLAGS.split(), "--port", str(port), "--data-dir", str(data), *flags]
    if FORGE:  # with a data folder elsewhere its page gets none of its own scripts (403)
        command += ["--gradio-allowed-path", WEBUI]
    else:
        environment["HF_HOME"] = str(hub_cache(data / "hub-cache"))
    ours = (data / "extensions").is_dir() and any((data / "extensions").iterdir())
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, cwd=WEBUI, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        server = Server(f"http://127.0.0.1:{port}", data, log)
        try:
            end = time.monotonic() + 900
            while True:
                logged = log.read_text(errors="replace")
                assert process.poll() is None and time.monotonic() < end, logged[-3000:]
                if "Startup time" not in logged:  # A1111 ends at once if it is called while it starts
                    time.sleep(0.5)
                    continue
                try:
                    server.call(route or ("/salun/v1/status" if ours else "/sdapi/v1/options"))
                    break
                except urllib.error.HTTPError as error:
                    if error.code in (401, 403):
                        break
                except (OSError, ValueError):
                    pass
                time.sleep(0.5)
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_tab(page: Any, name: str) -> None:
    """gradio 3 gives its tabs no role, and Forge writes Txt2img."""
    page.locator("#tabs button").filter(has_text=re.compile(rf"^\s*{name}\s*$", re.I)).first.click()


def option(page: Any, text: str) -> Any:
    """Of the dropdown that is open."""
    return page.locator('[data-testid="dropdown-option"]').filter(has_text=text).first


def open_until(page: Any, dropdown: Any, text: str) -> Any:
    """The choice with this text, of a dropdown that is opened until it has it: an update filters one that is open."""
    end = time.monotonic() + 60
    while True:
        dropdown.click()
        with suppress(playwright.TimeoutError):
            option(page, text).wait_for(timeout=2000)
            return option(page, text)
        assert time.monotonic() < end, f"{text} is not offered"
        dropdown.blur()


def shoot(page: Any, name: str) -> None:
    """A screenshot, if WEBUI_SHOTS names a folder for them."""
    folder = os.environ.get("WEBUI_SHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png")


def errors_of(server: Server, tab: bool) -> list[str]:
    """What the page complains of, without addresses; with `tab`, our tab is opened and must be there."""
    found: list[str] = []
    with browser() as opened:
        page = opened.new_page()
        page.on("console", lambda m: found.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: found.append(str(error)))
        page.goto(server.address)
        page.locator("#txt2img_generate").wait_for(timeout=60_000)
        if tab:
            open_tab(page, "Erase concept")
            page.get_by_text("No job yet").wait_for(timeout=20_000)
        page.wait_for_timeout(2000)
    return sorted(re.sub(r"https?://\S+|:\d+", "", text) for text in found)


def hub_cache(folder: Path) -> Path:
    """A hub cache with what A1111 fetches of CLIP when it first loads a model: its tokenizer and config, no weights."""
    from transformers import CLIPTextConfig

    from salun.diffusion.model.clip_tokenizer import clip_tokenizer

    repo = folder / "hub" / "models--openai--clip-vit-large-patch14"
    if repo.is_dir():
        return folder
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40, encoding="ascii")
    place = repo / "snapshots" / ("0" * 40)
    place.mkdir(parents=True)
    words = clip_tokenizer("<|endoftext|>").get_vocab()
    (place / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    shutil.copy(ROOT / "salun" / "assets" / "clip" / "merges.txt", place)
    (place / "tokenizer_config.json").write_text('{"model_max_length": 77}', encoding="utf-8")
    CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    ).save_pretrained(str(place))
    return folder


def install(data: Path) -> Path:
    """Our extension in a data folder, under a name of the user's."""
    (data / "extensions").mkdir(parents=True)
    (data / "extensions" / LINK).symlink_to(ROOT, target_is_directory=True)
    (data / "models" / "Stable-diffusion").mkdir(parents=True)
    return data


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in a process of its own, whose memory is the hosts' again."""
    file = tmp_path_factory.mktemp("model") / "base.safetensors"
    text = "import sys; from pathlib import Path; from tools.checkpoints import make; "
    text += "make(Path(sys.argv[1]), 'sd1', size='true')"
    subprocess.run([sys.executable, "-c", text, str(file)], cwd=ROOT, check=True)
    return file


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = install(tmp_path_factory.mktemp("data"))
    os.link(base, data / "models" / "Stable-diffusion" / "base.safetensors")
    for name in ("teapots", "others"):  # pictures of one's own: sampling at this size takes minutes on a CPU
        folder = data / "salun" / "pictures" / name
        folder.mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((64, 64), 40 + i).convert("RGB").save(folder / f"{i}.png")
    with webui(data) as running:
        _set_up(running)
        yield running


def _set_up(server: Server) -> None:
    """As a user would: read what the tab says, and press the button where it says so."""
    with browser() as opened:
        page = opened.new_page()
        page.set_default_timeout(60_000)
        page.goto(server.address)
        open_tab(page, "Erase concept")
        page.get_by_text("No job yet").wait_for()
        page.locator("#salun_setup").get_by_text("Set up").first.click()
        said = page.locator("#salun_setup_text p")
        said.wait_for()
        print(said.inner_text())
        if "lacks" in said.inner_text():
            page.locator("#salun_set_up").click()
            began = time.monotonic()
            while not said.inner_text().startswith("Ready"):
                assert "failed" not in said.inner_text() and time.monotonic() - began < 900, said.inner_text()
                page.wait_for_timeout(3000)
                page.locator("#salun_refresh").click()
            print(f"{said.inner_text()} It took {time.monotonic() - began:.0f} s.")


@pytest.fixture(autouse=True)
def nothing_goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """A job that a failed test left at work would hold up every test after it."""
    yield
    if "server" in request.fixturenames:
        server: Server = request.getfixturevalue("server")
        for job in server.call("/salun/v1/status")["jobs"]:
            if job["state"] in ("queued", "waiting", "running"):
                server.call("/salun/v1/cancel", {"id": job["id"]})


@pytest.fixture(scope="module")
def plain(server: Server) -> bytes:
    """The base's picture."""
    return server.picture()


@pytest.fixture(scope="module")
def erased(server: Server, plain: bytes) -> dict[str, Any]:
    """A finished erasure, begun by clicking in the tab."""
    return _clicked(server)


def _clicked(server: Server) -> dict[str, Any]:
    seen: list[tuple[int, str]] = []
    with browser() as opened:
        page = opened.new_page(viewport={"width": 1200, "height": 1100})
        page.set_default_timeout(60_000)
        page.goto(server.address)
        open_tab(page, "Erase concept")
        page.get_by_text("No job yet").wait_for()
        page.locator("#salun_advanced").get_by_text("Advanced").first.click()
        for name, value in {**QUICK, "words": "teapot", "anchor": "cup"}.items():
            box = page.locator(f"#salun_{name}").locator("input, textarea").first
            if name in ("mask", "dtype", "forget_images", "retain_images"):
                box.click()
                option(page, str(value)).click()
            elif name != "concept":
                box.fill(str(value))
        page.locator("#salun_erase").dblclick()
        job = page.locator(".salun-job").first
        job.wait_for()
        while job.get_attribute("data-state") in ("queued", "waiting", "running"):
            figures, stage = job.locator(".salun-metrics").inner_text(), job.locator(".salun-stage").inner_text()
            found = re.match(r"(\d+) %", figures)
            seen += [(int(found[1]), stage)] if found else []
            time.sleep(0.05)
        assert job.get_attribute("data-state") == "done", job.inner_text()
        assert page.locator(".salun-job").count() == 1  # of a double click
        assert not job.locator("progress").is_visible()
        page.locator("#salun_deltas").get_by_text("Deltas").first.click()
        lists = page.locator("#salun_base input").first, page.locator(HOSTS_LIST).first
        for listed in lists:  # without pressing refresh
            open_until(page, listed, "base-no-teapot")
        server.call("/sdapi/v1/refresh-checkpoints", {})  # sorts them, so that the new one takes the old one's place
        page.locator("#salun_refresh").click()
        open_until(page, lists[0], "base-no-teapot").click()
        playwright.expect(lists[0]).to_have_value(re.compile("^base-no-teapot"))
    percents = [percent for percent, _ in seen]
    assert percents == sorted(percents)
    assert any(stage.startswith("saving") for _, stage in seen)
    found: dict[str, Any] = server.call("/salun/v1/status")["jobs"][0]
    return found


def titles(server: Server) -> list[str]:
    return [Path(model["filename"]).name for model in server.call("/sdapi/v1/sd-models")]


def made(server: Server) -> list[Path]:
    return sorted((server.data / "models" / "Stable-diffusion").glob("base-no-*.safetensors"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- 1 ----------------------------------------------------------------------------------------------------------------


NOT_OFFERED_FAILED = (
    re.compile(  # a frame of ours in a traceback, by its folder's name or its true one; or the host's own words
        rf'File "(?:[^"]*/{LINK}|{re.escape(str(ROOT))})/|Error (?:executing callback|running|loading script).*salun'
    )
)


def test_1_a_clean_start_without_checkpoints_and_a_page_that_complains_no_more_than_before(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with webui(tmp_path_factory.mktemp("bare")) as without:
        before = errors_of(without, tab=False)
    with webui(install(tmp_path_factory.mktemp("empty"))) as running:
        # a slow machine may run the host's load events before its scripts are there: then once more
        assert any(errors_of(running, tab=True) == before for _ in range(3))
        assert not NOT_OFFERED_FAILED.search(running.log.read_text(errors="replace"))


def test_1_without_the_hosts_own_lora_extension_images_are_made_as_ever(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ours is called before every sampling, and needs that extension only for a delta."""
    data = install(tmp_path_factory.mktemp("no_lora"))
    (data / "config.json").write_text('{"disabled_extensions": ["Lora", "sd_forge_lora"]}', encoding="utf-8")
    os.link(base, data / "models" / "Stable-diffusion" / "base.safetensors")
    with webui(data) as running:
        with pytest.raises(urllib.error.HTTPError):
            running.call("/sdapi/v1/loras")
        assert running.picture() == running.picture()
        logged = running.log.read_text(errors="replace")
        assert not NOT_OFFERED_FAILED.search(logged), logged[-3000:]
    (data / "models" / "Stable-diffusion" / "base.safetensors").unlink()


def test_1_with_a_checkpoint_too(server: Server) -> None:
    assert [model["title"] for model in server.call("/salun/v1/models")["models"]] == ["base.safetensors"]
    assert not NOT_OFFERED_FAILED.search(server.log.read_text(errors="replace"))


# -- 2 and 3 ----------------------------------------------------------------------------------------------------------


def test_2_3_a_real_job_by_clicking_whose_result_the_host_lists_and_loads(
    server: Server, plain: bytes, erased: dict[str, Any], base: Path
) -> None:
    (file,) = made(server)
    assert file.name in titles(server)
    assert server.picture(override_settings={"sd_model_checkpoint": file.name}) != plain
    assert server.picture(override_settings={"sd_model_checkpoint": "base.safetensors"}) == plain
    old, new = dict(safetensors_io.tensors(base)), dict(safetensors_io.tensors(file))
    assert list(old) == list(new)
    changed = [
        name for name in old if not safetensors_io.raw_bytes(old[name]).equal(safetensors_io.raw_bytes(new[name]))
    ]
    assert changed
    assert all(name.startswith("model.diffusion_model.") for name in changed)


def test_3_used_now_and_undone_by_clicking(server: Server, plain: bytes, erased: dict[str, Any]) -> None:
    """The buttons of a job that is done; the host's own list shows what it generates with."""
    (file,) = [path for path in made(server) if path.name in json.dumps(erased)]
    true = server.picture(override_settings={"sd_model_checkpoint": file.name})
    with browser() as opened:
        page = opened.new_page(viewport={"width": 1200, "height": 1100})
        page.set_default_timeout(60_000)
        page.goto(server.address)
        open_tab(page, "Erase concept")
        card = page.locator(f'.salun-job[data-job="{erased["id"]}"]')
        shown = page.locator(HOSTS_LIST).first
        for button, name, picture in (
            ("Use this checkpoint", file.name, true),
            ("Undo", "base.safetensors", plain),
        ):
            card.get_by_role("button", name=button).click()
            card.locator(".salun-status").get_by_text(f"{name} is now the checkpoint").wait_for()
            listed = f"document.querySelector({json.dumps(HOSTS_LIST)}).value"
            page.wait_for_function(f"{listed}.startsWith({json.dumps(name)})")
            print(button, shown.input_value())
            assert server.picture() == picture
        shoot(page, "tab")


# -- 4 to 7 -----------------------------------------------------------------------------------------------------------


def test_4_cancel_while_running(server: Server, plain: bytes) -> None:
    before = made(server)
    job = server.start(options={**LONG, "seed": 4, "model": "base.safetensors"})
    server.wait(job, lambda j: j["stage"] == "training" and j["step"] > 1)
    began = time.monotonic()
    server.wait(job, lambda j: j["step"] > 4)
    pace = (time.monotonic() - began) / 3
    began = time.monotonic()
    server.call("/salun/v1/cancel", {"id": job["id"]})
    found = server.wait(job, lambda j: j["state"] == "cancelled", 30)
    took = time.monotonic() - began
    print(f"cancelled after {took:.1f} s, a step takes {pace:.1f} s")
    assert took < 2 * pace + 2  # the step under way, and the end of the process on a machine that others use
    assert found["resumable"]
    assert made(server) == before
    assert server.picture() == plain


def test_5_cancel_while_queued_behind_a_txt2img(server: Server, plain: bytes) -> None:
    whole = server.picture(steps=12)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(server.picture, steps=12)
        time.sleep(1.0)
        job = server.start(options={**QUICK, "seed": 5, "model": "base.safetensors"})
        server.wait(job, lambda j: j["state"] in ("waiting", "running"), 20)
        found = server.call("/salun/v1/cancel", {"id": job["id"]})
        assert (found["state"], found["began"]) == ("cancelled", None)
        assert running.result() == whole  # every step was made
    time.sleep(1)
    assert server.job(job)["began"] is None


def test_6_a_txt2img_waits_for_the_job(server: Server, plain: bytes) -> None:
    asked = {"options": {**QUICK, "seed": 6, "model": "base.safetensors"}}
    job = server.start(**asked)
    assert server.start(**asked)["id"] == job["id"]
    server.wait(job, lambda j: j["state"] == "running")
    assert server.picture() == plain  # answers only once the job is over
    assert server.job(job)["state"] == "done"


def test_7_f5_and_reload_ui_in_the_middle_of_a_job(server: Server) -> None:
    job = server.start(options={**LONG, "seed": 7, "model": "base.safetensors"})
    server.wait(job, lambda j: j["stage"] == "training")
    with browser() as opened:
        page = opened.new_page()
        page.set_default_timeout(90_000)
        page.goto(server.address)
        open_tab(page, "Erase concept")
        card = page.locator('.salun-job[data-state="running"]')
        card.wait_for()
        page.reload()
        open_tab(page, "Erase concept")
        card.wait_for()
        open_tab(page, "Settings")
        page.locator("#settings_restart_gradio").click()
        page.wait_for_timeout(8000)
        end = time.monotonic() + 90
        while True:
            try:
                assert server.job(job)["state"] == "running"
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.5)
        page.goto(server.address)
        open_tab(page, "Erase concept")
        card.wait_for()
        card.get_by_role("button", name="Cancel").click()
        page.locator('.salun-job[data-state="cancelled"]').first.wait_for()


# -- 8 and 9 ----------------------------------------------------------------------------------------------------------


def test_8_what_cannot_be_is_our_own_message_and_harms_nothing(server: Server, plain: bytes, base: Path) -> None:
    folder = server.data / "models" / "Stable-diffusion"
    short, strange = folder / "short <b>.safetensors", folder / "strange.safetensors"
    with base.open("rb") as source:
        short.write_bytes(source.read(50_000_000))
    safetensors_io.write(
        strange, {"joint_blocks.0.x_block.attn.qkv.weight": next(iter(dict(safetensors_io.tensors(base)).values()))}
    )
    hashes = {path: digest(path) for path in (short, strange)}
    server.call("/sdapi/v1/refresh-checkpoints", {})
    with pytest.raises(urllib.error.HTTPError):  # a generation that fails first: its error must not be shown as ours
        server.picture(**({"enable_hr": True} if FORGE else {"enable_hr": True, "hr_upscaler": "none"}))
    for path in (short, strange):
        job = server.start(options={**QUICK, "seed": 8, "model": path.name})
        found = server.wait(job, lambda j: j["state"] == "failed", 100)
        print(found["error"])
        assert path.name in found["error"]
        assert not re.search("upscaler|NoneType", found["error"])
        assert digest(path) == hashes[path]
    assert not list(folder.glob("*corrupted*"))
    assert server.picture() == plain
    short.unlink()
    strange.unlink()
    server.call("/sdapi/v1/refresh-checkpoints", {})


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of its own in the place of a folder: an image in a file beside it, so that it takes no memory."""
    image = folder.with_name(f"{folder.name}.img")
    with image.open("wb") as file:
        file.truncate(size)
    for command in (["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            image.unlink()
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode(errors='replace').strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        image.unlink()


def test_8_a_disk_that_fills_up_in_the_middle_of_a_job_costs_nothing(server: Server, plain: bytes, base: Path) -> None:
    """It fails with our message and without a partial file, and goes on once there is room."""
    folder = base_in(server).parent
    whole = base.stat().st_size
    with small_disk(folder, 2 * whole + 300_000_000):
        shutil.copy(base, folder / "base.safetensors")
        job = server.start(options={**QUICK, "steps": 6, "seed": 80, "model": "base.safetensors"}, name="full")
        server.wait(job, lambda j: j["stage"] in ("frozen targets", "training") or j["state"] == "failed", 200)
        with (folder / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, 1_500_000_000)
        found = server.wait(job, lambda j: j["state"] not in ("queued", "waiting", "running"), 300)
        print(found["error"])
        assert found["state"] == "failed"
        assert found["error"].startswith("full.safetensors needs")
        assert "Free disk space" in found["error"]
        assert sorted(path.name for path in folder.iterdir()) == ["base.safetensors", "filler", "lost+found"]
        (folder / "filler").unlink()
        assert found["resumable"]
        server.done(server.call("/salun/v1/resume", {"id": job["id"]}))
        assert sorted(path.name for path in folder.iterdir()) == ["base.safetensors", "full.safetensors", "lost+found"]
    server.call("/sdapi/v1/refresh-checkpoints", {})
    assert server.picture() == plain


def base_in(server: Server) -> Path:
    return server.data / "models" / "Stable-diffusion" / "base.safetensors"


def test_9_the_same_name_twice_is_two_files(server: Server) -> None:
    asked = {**QUICK, "model": "base.safetensors"}
    for seed in (91, 92):
        server.done(server.start(options={**asked, "seed": seed}, name="mine"))
    names = sorted(p.name for p in (server.data / "models" / "Stable-diffusion").glob("mine*"))
    assert names == ["mine-2.safetensors", "mine.safetensors"]
    one, two = (server.picture(override_settings={"sd_model_checkpoint": name}) for name in names)
    assert one != two
    server.picture(override_settings={"sd_model_checkpoint": "base.safetensors"})


# -- 10 and the accordion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["diff", "lora"])
def test_10_an_exported_file_works_in_a_prompt_and_leaves_nothing(
    server: Server, plain: bytes, erased: dict[str, Any], form: str
) -> None:
    with browser() as opened:
        page = opened.new_page(viewport={"width": 1200, "height": 1100})
        page.set_default_timeout(60_000)
        page.goto(server.address)
        open_tab(page, "Erase concept")
        page.locator(".salun-job").first.wait_for()
        page.wait_for_timeout(4000)
        done = server.done(
            server.start("export", delta=erased["run"], form=form, **({"rank": 4} if form == "lora" else {}))
        )
        name = done["result"]["output"].removesuffix(".safetensors")
        time.sleep(1)
        assert name in [lora["name"] for lora in server.call("/sdapi/v1/loras")]
        card = page.locator(f'#txt2img_lora_cards .card[data-name="{name}"]')
        card.wait_for(state="attached")  # without the host's own refresh button
        open_tab(page, "txt2img")
        page.locator("#txt2img_extra_tabs button").filter(has_text="Lora").first.click()
        card.wait_for()
        shoot(page, f"cards-{form}")
        page.reload()
        page.locator("#txt2img_generate").wait_for()
        card.wait_for(state="attached")  # the host's own is as old as the first page that was opened
    said = len(server.log.read_text(errors="replace"))
    with_it = server.picture(prompt=f"a teapot <lora:{name}:1>")
    logged = server.log.read_text(errors="replace")
    assert (f"{name}.safetensors for KModel-UNet with" if FORGE else "DEBUG") in logged  # it tells of keys at all
    assert not re.search("unmatched keys|didn't match keys|[Mm]ismatch", logged[said:])
    assert with_it != plain
    assert server.picture() == plain
    if form == "diff":  # the same as the checkpoint but for fp16 rounding of the differences
        (file,) = [path for path in made(server) if path.name in json.dumps(erased)]
        true = server.picture(override_settings={"sd_model_checkpoint": file.name})
        server.picture(override_settings={"sd_model_checkpoint": "base.safetensors"})
        worst = max(abs(a - b) for a, b in zip(with_it, true, strict=True))
        print(f"{form}: {worst} of 255 at most")
        assert worst <= 2


def test_the_accordion_gives_the_erased_checkpoints_image_and_off_the_bases(
    server: Server, plain: bytes, erased: dict[str, Any]
) -> None:
    run = erased["run"]
    on = {"alwayson_scripts": {"Erased delta": {"args": [True, run, "", "", 1.0, 1.0, 1.0]}}}
    half = {"alwayson_scripts": {"Erased delta": {"args": [True, run, "", "", 0.5, 1.0, 1.0]}}}
    (file,) = [path for path in made(server) if path.name in json.dumps(erased)]
    folder = server.data / "models" / "Lora"
    if not any(folder.glob("*.safetensors")):
        server.done(server.start("export", delta=run, form="lora", rank=4))
    lora, *_ = sorted(folder.glob("*.safetensors"), key=lambda path: ".lora." not in path.name)
    hires: dict[str, Any] = {
        "enable_hr": True,
        "hr_scale": 2,
        "hr_upscaler": "Latent",
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 1,
    }
    if FORGE:
        hires["hr_additional_modules"] = ["Use same choices"]  # its API fails without
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "hires": hires,
        "lora": {"prompt": f"a teapot <lora:{lora.name.removesuffix('.safetensors')}:0.5>"},
    }
    got, off, base, true = {}, {}, {}, {}
    for way, options in ways.items():
        base[way] = server.picture(**options)
        got[way] = server.picture(**options, **on)
        off[way] = server.picture(**options)
    middle = server.picture(**half)
    assert server.picture() == plain
    for way, options in ways.items():
        true[way] = server.picture(**options, override_settings={"sd_model_checkpoint": file.name},
                                   override_settings_restore_afterwards=False)  # fmt: skip
    server.picture(override_settings={"sd_model_checkpoint": "base.safetensors"},
                   override_settings_restore_afterwards=False)  # fmt: skip
    assert off == base
    assert base["plain"] == plain
    assert got == true
    assert len({plain, middle, got["plain"]}) == 3
    with browser() as opened:
        page = opened.new_page(viewport={"width": 1200, "height": 1100})
        page.set_default_timeout(60_000)
        page.goto(server.address)
        for name, value in (("steps", 1), ("width", 64), ("height", 64)):
            page.locator(f"#txt2img_{name} input[type=number]").first.fill(str(value))
        accordion = page.locator("#salun_txt2img_delta")
        accordion.get_by_text("Erased delta").first.click()
        accordion.locator("#salun_txt2img_on input").click()
        accordion.locator("#salun_txt2img_refresh").click()
        page.wait_for_timeout(2000)
        accordion.locator("#salun_txt2img_delta_1 input").first.click()
        option(page, run).click()
        page.locator("#txt2img_generate").click()
        page.locator("#html_info_txt2img").get_by_text(f"Erased delta: {run} 1").wait_for()
        accordion.scroll_into_view_if_needed()
        shoot(page, "accordion")


# -- who may call -----------------------------------------------------------------------------------------------------


def test_the_hosts_flags_guard_our_routes(tmp_path_factory: pytest.TempPathFactory) -> None:
    def status(server: Server, **headers: str) -> int:
        try:
            server.call("/salun/v1/runs", headers=headers)
            return 200
        except urllib.error.HTTPError as error:
            return error.code

    right = "Basic " + base64.b64encode(b"ann:secret").decode()
    wrong = "Basic " + base64.b64encode(b"ann:other").decode()
    with webui(install(tmp_path_factory.mktemp("guarded")), "--api-auth", "ann:secret") as server:
        assert status(server) == 401
        assert status(server, Authorization=wrong) == 401
        assert status(server, Authorization=right) == 200
        assert status(server, Authorization=right, Origin="http://evil.example") == 403
        errors_of(server, tab=True)  # opens the tab


def test_a_second_webui_on_the_same_data_folder_says_so(server: Server) -> None:
    flags = () if FORGE else ("--skip-load-model-at-start",)
    with webui(server.data, *flags, route="/sdapi/v1/options") as second, browser() as opened:
        page = opened.new_page()
        page.goto(second.address)
        page.locator("#txt2img_generate").wait_for(timeout=60_000)
        open_tab(page, "Erase concept")
        page.get_by_text("another program uses the jobs").first.wait_for(timeout=20_000)
        _, *tracebacks = second.log.read_text(errors="replace").split("Traceback")
        of_host = "do_read_info_from_repo"  # A1111 looks for the address of a clone, which may have none
        assert [each for each in tracebacks if of_host not in each] == []


def test_the_tab_in_a_narrow_dark_window_and_by_the_keyboard(server: Server) -> None:
    with browser() as opened:
        page = opened.new_page(viewport={"width": 400, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(f"{server.address}/?__theme=dark")
        open_tab(page, "Erase concept")
        for name in (".salun-live", "#salun_erase", "#salun_words", "#salun_history"):
            page.locator(name).first.wait_for()
            box = page.locator(name).first.bounding_box()
            assert box["x"] >= 0, name
            assert box["x"] + box["width"] <= 400, name
        colour = page.evaluate("getComputedStyle(document.querySelector('.salun-live')).color")
        assert min(map(int, re.findall(r"\d+", colour)[:3])) > 128, colour  # light on dark
        page.locator("#salun_erase").focus()
        page.keyboard.press("Enter")
        page.locator("#salun_said").get_by_text("no concept is given").first.wait_for()


def test_install_py_changes_nothing() -> None:
    python = os.environ.get("WEBUI_PYTHON") or str(Path(str(WEBUI)).parent / "venv/bin/python")

    def versions() -> str:
        return subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout

    before = versions()
    for _ in range(2):
        subprocess.run([python, str(ROOT / "install.py")], check=True, cwd=str(WEBUI))
    assert versions() == before
