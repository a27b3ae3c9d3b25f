"""`salun ui` in a real browser, with the bundled model: everything by clicking.

Needs gradio, playwright and Chromium.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)"),
]
ROOT = Path(__file__).resolve().parents[1]
QUICK = {"steps": "6", "batch_size": "4", "forget_latents": "8", "retain_latents": "8", "eval_images": "8"}
QUICK |= {"sampling_steps": "7"}  # another number than that of the steps


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and data folder of a page of its own."""
    folder = tmp_path_factory.mktemp("ui")
    command = [sys.executable, "-m", "salun", "ui", "--port", "0", "--data", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split(" ")[0]
        yield address, folder
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def page(server: tuple[str, Path]) -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1100, "height": 900})
        opened.problems = []
        opened.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.set_default_timeout(60_000)
        opened.goto(server[0])
        opened.get_by_text("No job yet").wait_for()
        yield opened
        browser.close()


def fill(page: Any, name: str, text: str) -> None:
    page.locator(f"#salun_{name}").locator("input, textarea").first.fill(text)


def choose(page: Any, name: str, text: str) -> None:
    box = page.locator(f"#salun_{name}").locator("input").first
    box.click()
    page.get_by_role("listbox").get_by_role("option", name=text, exact=True).first.click()


def unfold(page: Any, name: str) -> None:
    page.locator(f"#salun_{name}").locator("button").first.click()


def newest(page: Any) -> Any:
    return page.locator(".salun-job").first


def test_a_button_without_a_choice_says_what_to_choose(page: Any) -> None:
    unfold(page, "history")
    assert not page.locator("#salun_use").is_visible()  # there is no WebUI to use a checkpoint
    for button in ("again", "resume", "layers"):
        page.locator(f"#salun_{button}").click()
        page.locator("#salun_details").get_by_text("Choose a run first", exact=True).wait_for()
    color = page.locator("#salun_details .salun-bad").evaluate("element => getComputedStyle(element).color")
    assert color == "rgb(185, 28, 28)"  # on white
    unfold(page, "history")
    page.locator(".salun-try").get_by_role("button", name="Try it").click()
    page.locator(".salun-try").get_by_text("Choose a run first.").wait_for()
    unfold(page, "deltas")
    page.locator("#salun_overlap").click()
    page.locator("#salun_delta_said").get_by_text("Choose two deltas first", exact=True).wait_for()


def test_no_other_checkpoint_than_the_one_seen_is_erased_from_and_unknown_concepts_are_refused(page: Any) -> None:
    """A text typed into a list was replaced by the previous choice without a word."""
    for name in ("model", "preset"):  # the others are in folded sections
        assert page.locator(f"#salun_{name} input").first.get_attribute("readonly") is not None, name
    page.locator("#salun_model").get_by_text("To add one, put a .safetensors file (not a link) into").wait_for()
    fill(page, "words", "teapot")
    page.locator("#salun_erase").click()
    page.locator("#salun_said").get_by_text("'teapot' is not in the vocabulary of the model shapes").wait_for()
    fill(page, "words", "")
    page.get_by_text("No job yet").wait_for()


def test_a_concept_is_erased_by_clicking(page: Any, server: tuple[str, Path]) -> None:
    choose(page, "preset", "circle")
    fill(page, "anchor", "square")
    unfold(page, "advanced")
    assert page.locator("#salun_batch_size input, #salun_batch_size textarea").first.get_attribute("placeholder") == (
        "auto: 16"
    )
    for name, value in QUICK.items():
        fill(page, name, value)
    fill(page, "preview", "3")
    page.locator("#salun_erase").dblclick()  # one job all the same
    job = newest(page)
    job.locator("progress").wait_for()
    percents = []
    while job.get_attribute("data-state") not in ("done", "failed"):
        found = re.match(r"(\d+) %", job.locator(".salun-metrics").inner_text())
        percents += [int(found[1])] if found else []
        time.sleep(0.1)
    assert job.get_attribute("data-state") == "done", job.inner_text()
    assert percents == sorted(percents)
    assert len(set(percents)) > 3
    assert page.locator(".salun-job").count() == 1
    assert re.search(r"forgotten \(UA\), not corrected for the detector's errors: \d+\.\d % \(", job.inner_text())
    job.locator("img:visible").wait_for()  # before and after
    verdict = job.locator(".salun-verdict")
    assert re.match(
        r"(Erased|Mostly erased|Barely changed|Damaged|Can't tell)\n.+\nNext: ", verdict.inner_text(), re.DOTALL
    )
    assert verdict.bounding_box()["y"] < job.locator("img:visible").bounding_box()["y"]  # the first thing
    job.locator(".salun-plot svg").wait_for()  # and the losses stay
    (run,) = (server[1] / "runs").iterdir()
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    options = record["options"]
    assert (options["concept"], options["anchor"], options["steps"]) == (["circle"], ["square"], 6)
    assert (server[1] / "models" / "shapes-no-circle" / "model_index.json").is_file()


def test_a_finished_run_is_tried_on_a_prompt_before_and_after(page: Any, server: tuple[str, Path]) -> None:
    newest(page).get_by_role("button", name="Try it").click()
    form = page.locator(".salun-try form")
    assert form.get_by_label("Prompt").input_value() == "circle"
    form.get_by_label("Prompt").fill("one <b>red</b> circle")
    form.get_by_label("Strength").fill("0.5")
    form.get_by_text("0.5", exact=True).wait_for()
    form.get_by_label("Seed").fill("3")
    page.keyboard.press("Enter")
    tried = page.locator('.salun-tries .salun-job[data-state="done"]')
    tried.locator("figcaption").get_by_text("strength 0.5", exact=True).wait_for()
    assert tried.locator("strong").inner_text() == "try “one <b>red</b> circle” at strength 0.5, seed 3"
    tried.locator("img:visible").nth(1).wait_for()
    shown = "images => images.filter((image) => image.naturalWidth === 64).map((image) => image.alt)"
    assert tried.locator(".salun-pair img").evaluate_all(shown) == [
        "original: one <b>red</b> circle", "strength 0.5: one <b>red</b> circle",
    ]  # fmt: skip
    (job,) = (server[1] / "jobs").glob("*/erased.png")
    assert job.read_bytes() != job.with_name("original.png").read_bytes()
    assert page.locator(".salun-live .salun-job").count() == 1  # it is shown next to its form, and nowhere else
    left, result = form.bounding_box(), tried.bounding_box()
    assert result["x"] >= left["x"] + left["width"] and abs(result["y"] - left["y"]) < 20
    jobs, section = (page.locator(place).bounding_box() for place in (".salun-live", "#salun_try"))
    assert jobs["x"] + jobs["width"] == pytest.approx(section["x"] + section["width"], abs=1)
    tried.get_by_role("button", name="Remove").click()
    tried.wait_for(state="detached")


@pytest.fixture
def beside(page: Any, server: tuple[str, Path]) -> Iterator[Any]:
    """A second look at the page: what is chosen on the first stays as it is."""
    opened = page.context.browser.new_page()
    opened.set_default_timeout(60_000)
    opened.requests = []
    opened.on("request", lambda request: opened.requests.append(request.url))
    opened.goto(server[0])
    newest(opened).wait_for()
    yield opened
    opened.close()


def test_an_image_that_is_gone_is_asked_for_once_and_the_preview_shown(beside: Any, server: tuple[str, Path]) -> None:
    (run,) = (server[1] / "runs").iterdir()
    kept = (run / "before_after.png").rename(run / "kept.png")
    beside.requests.clear()
    beside.reload()
    newest(beside).locator("img:visible").wait_for()
    beside.wait_for_timeout(5000)  # more than two looks at the jobs
    assert len([url for url in beside.requests if "/status" in url]) > 2
    asked = [url.split("name=")[1] for url in beside.requests if "name=" in url]
    assert asked == ["before_after.png", "preview-000003.png"]
    kept.rename(run / "before_after.png")


def test_lines_are_made_where_the_form_says_one_a_line(beside: Any) -> None:
    beside.locator("#salun_words").get_by_text("Erased together with the preset, if one is chosen.").wait_for()
    for name in ("words", "anchor", "keep"):
        box = beside.locator(f"#salun_{name} textarea").first
        box.click()
        box.press_sequentially("a")
        box.press("Enter")
        box.press_sequentially("b")
        assert box.input_value() == "a\nb", name


def test_a_refusal_is_shown_as_it_is_worded(beside: Any) -> None:
    """As under a name, where the program answers but not to this page."""
    refusal = {"status": 403, "json": {"error": "Open the page by its address"}}
    beside.route("**/salun/v1/status", lambda route: route.fulfill(**refusal))
    beside.get_by_text("Open the page by its address", exact=True).wait_for()
    beside.unroute("**/salun/v1/status")
    beside.route("**/salun/v1/status", lambda route: route.abort())
    beside.get_by_text("The program does not respond").wait_for()
    beside.unroute("**/salun/v1/status")
    newest(beside).wait_for()


def test_a_job_that_can_be_resumed_is_shown_however_many_have_ended_since(beside: Any) -> None:
    """Jobs of a stand-in: each look at a mask is one, and so is each LoRA."""
    (done,) = beside.request.get(beside.url + "salun/v1/status").json()["jobs"]
    later = [{**done, "id": f"later-{n}"} for n in range(12)]
    answered = {"jobs": [*later, {**done, "id": "stopped", "state": "cancelled", "resumable": True}]}
    beside.route("**/salun/v1/status", lambda route: route.fulfill(json=answered))
    beside.locator('[data-job="stopped"]').get_by_role("button", name="Resume").wait_for()
    assert beside.locator(".salun-job").count() == 9
    beside.unroute("**/salun/v1/status")


def test_the_report_opens_and_runs_no_script(page: Any) -> None:
    newest(page).get_by_role("button", name="Report").click()
    frame = page.locator(".salun-report iframe")
    assert frame.get_attribute("sandbox") == ""
    page.frame_locator(".salun-report iframe").get_by_text("circle").first.wait_for()
    page.get_by_role("button", name="Close").click()
    frame.wait_for(state="detached")


def test_a_job_is_cancelled_and_resumed_and_a_reload_loses_nothing(page: Any, server: tuple[str, Path]) -> None:
    fill(page, "steps", "40")
    fill(page, "seed", "7")
    page.locator("#salun_erase").click()
    job = page.locator('.salun-job[data-state="running"]')
    job.get_by_text("training, step").wait_for()
    page.reload()  # F5 in the middle of it
    job.get_by_text("training, step").wait_for()
    job.locator(".salun-plot text").get_by_text("forget", exact=True).wait_for()
    colors = "lines => lines.map((line) => getComputedStyle(line).stroke)"
    assert set(job.locator(".salun-plot polyline").evaluate_all(colors)) == {"rgb(214, 69, 42)", "rgb(42, 120, 214)"}
    began = time.monotonic()
    job.get_by_role("button", name="Cancel").click()
    stopped = page.locator('.salun-job[data-state="cancelled"]')
    stopped.wait_for()
    assert time.monotonic() - began < 4  # 2 s, and the page looks once a second
    asked: list[str] = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    stopped.get_by_role("button", name="Remove").click()  # beside Resume, and then there is none
    assert re.search(r"deletes its training state \(\d+ MB\), so that it can no longer be resumed", asked[0]), asked
    unfold(page, "history")  # it goes on from there as well
    choose(page, "runs", max(path.name for path in (server[1] / "runs").iterdir()))
    page.locator("#salun_resume").click()
    page.locator("#salun_details").get_by_text("Queued").wait_for()
    unfold(page, "history")
    stopped.get_by_role("button", name="Resume").wait_for(state="detached")  # one job goes on with a run
    page.locator('.salun-job[data-state="done"]').nth(1).wait_for(timeout=240_000)  # a busy machine takes its time
    runs = [json.loads(p.read_text(encoding="utf-8")) for p in (server[1] / "runs").glob("*/run.json")]
    assert [run["status"] for run in runs] == ["done", "done"]
    assert sorted(run.get("resumed", 0) for run in runs) == [0, 1]  # it went on, and did not begin anew


def test_history_loads_the_options_again_and_nothing_is_left_of_what_was_chosen(
    page: Any, server: tuple[str, Path]
) -> None:
    fill(page, "words", "something else")
    choose(page, "preset", "triangle")  # it would be erased as well
    unfold(page, "history")
    first = sorted(p.name for p in (server[1] / "runs").iterdir())[0]
    choose(page, "runs", first)
    page.locator("#salun_details").get_by_text("done").wait_for()
    assert page.locator("#salun_details .salun-verdict, #salun_details .salun-plot svg").count() == 2
    page.get_by_text("Options", exact=True).click()
    page.locator("#salun_details tr").filter(has_text="steps").get_by_text("6", exact=True).wait_for()
    page.locator("#salun_again").click()
    page.get_by_text(f"The options of {first} are loaded.").wait_for()
    assert page.locator("#salun_words textarea").first.input_value() == "circle"
    assert page.locator("#salun_preset input").first.input_value() == ""
    unfold(page, "advanced")
    assert page.locator("#salun_steps").locator("input, textarea").first.input_value() == "6"


def test_a_delta_is_applied_and_taken_out_again_bit_exactly(page: Any, server: tuple[str, Path]) -> None:
    unfold(page, "deltas")
    run = sorted(p.name for p in (server[1] / "runs").iterdir())[0]
    choose(page, "delta_1", run)
    fill(page, "new_name", "half")
    fill(page, "strength_1", "0.5")
    page.locator("#salun_strength_1").locator("input").first.press("Tab")
    page.locator("#salun_apply").click()
    page.locator('.salun-job[data-kind="stack"][data-state="done"]').wait_for()
    half = server[1] / "models" / "half" / "unet" / "diffusion_pytorch_model.safetensors"
    base = ROOT / "salun" / "assets" / "shapes" / "unet" / "diffusion_pytorch_model.safetensors"
    erased = server[1] / "models" / "shapes-no-circle" / "unet" / "diffusion_pytorch_model.safetensors"
    assert len({path.read_bytes() for path in (half, base, erased)}) == 3
    fill(page, "new_name", "back")
    choose(page, "base", "shapes-no-circle")
    page.locator("#salun_undo").click()
    page.locator('.salun-job[data-kind="undo"][data-state="done"]').wait_for()
    back = server[1] / "models" / "back" / "unet" / "diffusion_pytorch_model.safetensors"
    from salun.checkpoints import safetensors_io

    one, other = (dict(safetensors_io.tensors(path)) for path in (back, base))
    assert one.keys() == other.keys()
    assert all(safetensors_io.raw_bytes(one[name]).equal(safetensors_io.raw_bytes(other[name])) for name in one)


def test_a_done_jobs_buttons_save_its_lora_and_delta_and_undo_it(page: Any, server: tuple[str, Path]) -> None:
    card = page.locator('.salun-job[data-kind="erase"][data-state="done"]').first
    run = max((server[1] / "runs").glob("*/delta.salun.safetensors")).parent
    with page.expect_download() as download:
        card.get_by_role("button", name="Save the delta").click()
    assert Path(download.value.path()).read_bytes() == (run / "delta.salun.safetensors").read_bytes()
    assert download.value.suggested_filename == f"{run.name}.salun.safetensors"
    assert card.get_by_role("button", name="Use this checkpoint").count() == 0  # here is nothing that generates
    card.get_by_role("button", name="Save as LoRA").click()
    page.locator('.salun-job[data-kind="export"][data-state="done"]').wait_for()
    assert (run / f"no-{run.name}.lora.safetensors").is_file()
    undone = page.locator('.salun-job[data-kind="undo"][data-state="done"]')
    before = undone.count()
    card.get_by_role("button", name="Undo").click()
    undone.nth(before).wait_for()
    from salun.checkpoints import safetensors_io

    (back,) = [p for p in (server[1] / "models").iterdir() if p.name.endswith("undone")]
    one, other = (
        dict(safetensors_io.tensors(folder / "unet" / "diffusion_pytorch_model.safetensors"))
        for folder in (back, ROOT / "salun" / "assets" / "shapes")
    )
    assert all(safetensors_io.raw_bytes(one[name]).equal(safetensors_io.raw_bytes(other[name])) for name in other)


def test_a_list_that_somebody_is_choosing_from_stays_as_it_is(page: Any) -> None:
    """Lists are brought up to date when a job ends, but not under the pointer."""
    page.evaluate(
        "window.pressed = 0; document.querySelector('#salun_refresh').addEventListener('click', () => window.pressed++)"
    )
    page.locator("#salun_runs input").first.click()
    page.locator('[role="option"]').first.wait_for()
    page.evaluate(
        """async () => {
            const token = document.querySelector('.salun-live').dataset.token;
            const run = document.querySelector('[role="option"]').textContent.replace("✓", "").trim();
            await fetch('salun/v1/start', {method: 'POST', body: JSON.stringify({kind: 'inspect', run}),
                headers: {'Content-Type': 'application/json', 'X-Salun-Token': token}});
        }"""
    )
    page.locator('.salun-job[data-kind="inspect"][data-state="done"]').wait_for()
    page.wait_for_timeout(2500)  # more than one look at the jobs
    assert page.evaluate("window.pressed") == 0
    page.keyboard.press("Escape")
    page.locator("#salun_words textarea").first.click()
    page.wait_for_function("window.pressed === 1")


def test_untrusted_words_are_shown_as_text_and_mistakes_said(page: Any) -> None:
    fill(page, "words", "<img src=x onerror=window.harmed=1>")
    fill(page, "anchor", "")
    fill(page, "density", "2")
    page.locator("#salun_erase").click()
    page.locator("#salun_said").get_by_text("density is 2.0, but must be at most 1", exact=True).wait_for()
    fill(page, "density", "0.5")
    page.locator("#salun_erase").click()
    page.locator("#salun_said").get_by_text("'<img src=x onerror=window.harmed=1>' is not in the vocabulary").wait_for()
    assert page.evaluate("window.harmed") is None
    assert page.problems == []


def test_a_narrow_dark_window_and_the_keyboard_do(page: Any, server: tuple[str, Path]) -> None:
    page.set_viewport_size({"width": 380, "height": 800})
    page.goto(server[0] + "?__theme=dark")
    page.locator(".salun-job").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    parts = [page.locator(place) for place in ("#salun_erase", ".salun-live", "#salun_try", "#salun_history")]
    assert [part.bounding_box()["y"] for part in parts] == sorted(part.bounding_box()["y"] for part in parts)
    remove = newest(page).get_by_role("button", name="Remove")
    remove.focus()
    removed = page.locator(f'.salun-job[data-job="{newest(page).get_attribute("data-job")}"]')
    page.keyboard.press("Enter")
    removed.wait_for(state="detached")
    assert page.problems == []


SECTIONS = ("advanced", "history", "evaluate", "eval_more", "attack", "attack_more", "deltas")


@pytest.fixture
def everything(page: Any, server: tuple[str, Path]) -> Iterator[Any]:
    """The page with every section open, and stand-ins of jobs in other states next to the real ones."""
    jobs = page.request.get(f"{server[0]}salun/v1/status").json()["jobs"]
    done = next(job for job in jobs if job["kind"] == "erase" and job["state"] == "done")
    without = {**done, "result": None, "offers": []}
    running = {**without, "state": "running", "open": True, "fraction": 0.4, "left": 100.0, "stage_label": "training"}
    failed = {**without, "state": "failed", "error": "the loss is not finite at step 3. Use a smaller learning rate"}
    images = {"kind": "sample", "previews": ["original.png", "erased.png"]}
    tried = {**without, **images, "result": {"strength": 0.5, "prompt": "circle", "sensitive": True}}
    named = {"running": running, "failed": failed, "tried": tried}
    answer = {"jobs": [{**job, "id": name, "title": f"{name}: a circle"} for name, job in named.items()] + jobs}
    page.route("**/salun/v1/status", lambda route: route.fulfill(json=answer))
    page.route("**/salun/v1/preview?*", lambda route: route.fulfill(path=ROOT / "docs" / "mask.png"))
    page.set_viewport_size({"width": 1100, "height": 900})
    page.goto(f"{server[0]}?__theme=light")
    page.locator('[data-job="tried"] img').nth(1).wait_for()
    for name in SECTIONS:
        unfold(page, name)
    choose(page, "runs", done["run"])
    page.locator("#salun_details .salun-verdict").wait_for()
    for button in ("start_evaluation", "start_attack", "apply"):  # nothing is chosen: an error in each section
        page.locator(f"#salun_{button}").click()
    page.locator("#salun_delta_said .salun-bad").wait_for()
    yield page
    page.unroute("**/salun/v1/status")
    page.unroute("**/salun/v1/preview?*")
    page.goto(server[0])
    newest(page).wait_for()


def test_axe_finds_nothing_serious(everything: Any) -> None:
    """Names of controls, contrast and the like: the whole page wide and light, narrow and dark, and a report."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

    def serious(part: str | None = None, *, dark: bool, width: int = 1100) -> list[Any]:
        everything.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        everything.set_viewport_size({"width": width, "height": 900})
        everything.wait_for_timeout(500)  # colors change gradually
        found = axe.Axe().run(everything, part).response["violations"]
        return [
            (each["id"], [node["html"] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]

    assert serious(dark=False) == []
    assert serious(dark=True, width=380) == []
    assert everything.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    card = everything.locator('.salun-job[data-kind="erase"][data-state="done"]').first
    card.get_by_role("button", name="Report").click()
    everything.frame_locator(".salun-report iframe").locator("h1").wait_for()
    assert serious(".salun-report", dark=True) == []
    assert serious(".salun-report", dark=False) == []
    assert everything.problems == []


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a page with a password."""
    folder = tmp_path_factory.mktemp("guarded")
    command = [sys.executable, "-m", "salun", "ui", "--port", "0", "--data", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SALUN_AUTH": "ann:secret"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split(" ")[0]
        process.terminate()
        process.wait(30)


FOREIGN = """async ([address, token]) => {
  const read = async (path, options) => {
    try { return (await (await fetch(address + path, options)).text()).slice(0, 200); } catch { return "not read"; }
  };
  const headers = { "Content-Type": "application/json", "X-Salun-Token": token };
  const body = JSON.stringify({ kind: "mask", options: { concept: ["circle"], model: "shapes" } });
  const cookies = { credentials: "include" };
  const read_by = [await read("config", cookies), await read("", cookies), await read("salun/v1/status", cookies)];
  const started = [
    await read("salun/v1/start", { ...cookies, method: "POST", headers, body }),
    await read("salun/v1/start", { ...cookies, method: "POST", mode: "no-cors", body }),
    await read("gradio_api/queue/join", { ...cookies, method: "POST", headers, body: "{}" }),
  ];
  const frame = document.createElement("iframe");
  frame.src = address;
  document.body.append(frame);
  await new Promise((resolve) => frame.addEventListener("load", resolve));
  const image = new Image();
  const shown = new Promise((resolve) => { image.onload = () => resolve(true); image.onerror = () => resolve(false); });
  image.src = address + "favicon.ico";
  return { read_by, started, shown: await shown };
}"""


def test_a_page_at_another_port_reads_nothing_starts_nothing_and_frames_nothing(page: Any, guarded: str) -> None:
    """Its requests carry the cookies of the login: to a browser the ports of a host are one site."""
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(ROOT / "docs"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        context = page.context.browser.new_context()
        try:
            own = context.new_page()
            own.set_default_timeout(60_000)
            own.goto(guarded)
            own.locator("input").nth(0).fill("ann")
            own.locator("input").nth(1).fill("secret")
            own.get_by_role("button", name="Login").click()
            own.get_by_text("No job yet").wait_for()
            assert {cookie["sameSite"] for cookie in context.cookies()} == {"Strict"}
            token = own.locator(".salun-live").get_attribute("data-token")
            foreign = context.new_page()
            foreign.goto(f"http://127.0.0.1:{elsewhere.server_port}/")
            found = foreign.evaluate(FOREIGN, [guarded, token])
            assert found == {"read_by": ["not read"] * 3, "started": ["not read"] * 3, "shown": False}
            (framed,) = [frame for frame in foreign.frames if frame != foreign.main_frame]
            assert "Erase concept" not in framed.content()
            own.wait_for_timeout(2000)  # more than one look at the jobs
            own.get_by_text("No job yet").wait_for()
            assert own.evaluate("fetch('logout').then(() => fetch('config')).then((answer) => answer.status)") == 401
            own.get_by_text("nobody is signed in").wait_for()
        finally:
            context.close()
            elsewhere.shutdown()


def test_a_run_is_evaluated_by_clicking(page: Any, server: tuple[str, Path]) -> None:
    run = min((server[1] / "runs").iterdir()).name
    page.locator("#salun_refresh").click()
    unfold(page, "evaluate")
    choose(page, "eval_model", run)
    fill(page, "eval_n", "8")
    fill(page, "eval_detector", "attribute\nself")
    unfold(page, "eval_more")
    page.locator("#salun_eval_keep_images").get_by_role("checkbox").check()
    page.locator("#salun_start_evaluation").click()
    page.locator("#salun_evaluate_status").get_by_text(f"Queued: “evaluate {run}”").wait_for()
    job = page.locator(".salun-job").filter(has_text=f"evaluate {run}")
    job.get_by_role("button", name="Report").click(timeout=120_000)
    page.frame_locator(".salun-report iframe").get_by_text("Did it work?").first.wait_for()
    page.get_by_role("button", name="Close").click()
    assert (server[1] / "runs" / run / "eval.html").is_file() and not page.problems
    assert list((server[1] / "runs" / run / "images").glob("*/*.png"))


def test_a_run_is_attacked_by_clicking(page: Any, server: tuple[str, Path]) -> None:
    run = min((server[1] / "runs").iterdir()).name
    page.locator("#salun_refresh").click()
    unfold(page, "attack")
    choose(page, "attack_model", run)
    fill(page, "attack_n", "8")
    fill(page, "attack_attack", "quantize")
    page.locator("#salun_start_attack").click()
    page.locator("#salun_attack_status").get_by_text(f"Queued: “attack {run}”").wait_for()
    job = page.locator(".salun-job").filter(has_text=f"attack {run}")
    job.get_by_role("button", name="Report").click(timeout=120_000)
    page.frame_locator(".salun-report iframe").get_by_text("Does it come back?").first.wait_for()
    page.get_by_role("button", name="Close").click()
    assert (server[1] / "runs" / run / "attack.html").is_file() and not page.problems
