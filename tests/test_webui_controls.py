"""The tab's controls hold the core's options and defaults, and read back what the core takes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import salun
from extension import child, paths
from extension.access import Access
from extension.controls import ATTACK, ERASURE, EVALUATION, Controls
from extension.host import StandaloneHost
from extension.inputs import NAMES, NOT_OFFERED, TITLES
from extension.jobs import Job
from extension.messages import PAGE_ADVICE, from_fields, render, to_fields
from extension.page import build
from extension.page_deltas import rows
from extension.page_history import details
from extension.parent_pipe import ParentPipe
from extension.service import Service
from salun.detectors import DETECTORS
from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.options import EraseJob
from salun.errors import ConfigError
from salun.evaluation.verdict import Outcome, Verdict
from salun.options import MASKS, from_mapping

BOTH = pytest.mark.parametrize("controls", [ERASURE, EVALUATION, ATTACK], ids=["erasure", "evaluation", "attack"])
OTHERS = {  # a value beside the default, as a run.json holds it
    "bool": True, "str": "text", "int": 7, "float": 0.25, "list": ["one", "two"],
}  # fmt: skip


@BOTH
def test_every_option_has_one_control_but_for_places(controls: Controls) -> None:
    shown = [*controls.main, *(name for group in controls.folded.values() for name in group)]
    every = [item.name for item in dataclasses.fields(controls.kind)]
    assert sorted([*shown, *(name for name in NOT_OFFERED if name in every)]) == sorted(every)
    assert all(controls.help_of(name) for name in shown)


@BOTH
def test_an_option_that_names_a_path_is_looked_up_by_name(controls: Controls) -> None:
    paths = {name for name, item in controls.fields.items() if item.metadata["path"]}
    assert paths <= {*TITLES, *NAMES}


@BOTH
def test_untouched_controls_give_the_cores_defaults(controls: Controls) -> None:
    values = {name: controls.value_of(name, controls.default_of(name)) for name in controls.fields}
    given = {name: value for name, value in values.items() if value is not None}
    assert from_mapping(controls.kind, given, "the controls") == controls.kind()


@pytest.mark.parametrize(
    ("controls", "name"), [(each, name) for each in (ERASURE, EVALUATION, ATTACK) for name in each.fields], ids=str
)
def test_a_value_shown_is_read_back(controls: Controls, name: str) -> None:
    item = controls.fields[name]
    choices = item.metadata["choices"] or (MASKS if name == "mask" else ())
    kind = str(item.type).removesuffix(" | None")
    other = choices[-1] if choices else OTHERS[kind.split("[")[0]]
    for value in (other, item.default if item.default is not dataclasses.MISSING else []):
        assert controls.value_of(name, controls.shown_of(name, value)) == value


def test_what_is_no_number_is_said_by_its_name() -> None:
    with pytest.raises(ConfigError, match="lr is 'fast', but must be a number"):
        ERASURE.value_of("lr", "fast")
    assert ERASURE.value_of("lr", " 1e-5 ") == 1e-5
    assert ERASURE.value_of("steps", "") is None
    assert ERASURE.value_of("retain_prompts", "a dog\n\n a cat ") == ["a dog", "a cat"]
    assert EVALUATION.value_of("sets", ["synonyms"]) == ["synonyms"]  # of a list with several choices


def test_render_names_options_by_their_labels_and_advises_what_the_page_offers() -> None:
    error = ConfigError("is -1.0, but must be above 0", option="lr", advice="Use a smaller {batch_size}")
    assert render(error) == "learning rate is -1.0, but must be above 0. Use a smaller batch size"
    assert render(ConfigError("x exists", advice="Add {force}", code="exists")) == "x exists. Choose another name"


@pytest.mark.parametrize("advice", ["{0}", "{a.b}", "{a!r}", "{a:>9999999999}", "{", "{}"])
def test_error_fields_of_a_file_hold_only_option_names_in_braces(advice: str) -> None:
    """They are filled by `str.format`, and a job.json is untrusted input."""
    fields = to_fields(ConfigError("x", advice="Use {low_vram}"))
    assert render(from_fields(fields)) == "x. Use low VRAM"
    with pytest.raises(ValueError):
        from_fields({**fields, "advice": advice})


def test_every_code_of_the_page_is_raised_somewhere() -> None:
    """A code that nothing raises would be advice that nobody sees."""
    sources = "".join(p.read_text(encoding="utf-8") for p in Path(salun.__file__).parent.rglob("*.py"))
    assert [code for code in PAGE_ADVICE if f'"{code}"' not in sources] == []


@pytest.fixture
def service(tmp_path: Path) -> Any:
    made = Service(StandaloneHost(tmp_path))
    yield made
    made.queue.close()


def change_host(service: Service, host: StandaloneHost) -> None:
    """Another host for a service and its parts."""
    for part in (service, service.runs, service.models, service.requests):
        part.host = host


def test_a_jobs_request_is_what_the_command_line_would_run(service: Service) -> None:
    """Same dataclass, same defaults; only the places are ours, and the checkpoint's name says what was erased."""
    job = service.requests.erase({"concept": ["circle"], "model": "shapes", "steps": 3})
    service.queue.cancel(job.id)
    asked = job.request["options"]
    expected = EraseJob(concept=["circle"], model="shapes", steps=3, run_dir=asked["run_dir"])
    assert asked == dataclasses.asdict(dataclasses.replace(expected, output=asked["output"]))
    assert Path(asked["run_dir"]).parent == service.runs.folder
    checkpoint, delta = asked["output"]
    assert checkpoint == f"{service.host.data / 'models' / 'shapes-no-circle'}/"
    assert Path(delta) == Path(asked["run_dir"]) / "delta.salun.safetensors"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concept": ["a"], "run_dir": "/tmp/x"}, "'run_dir' cannot be set here"),
        ({"concept": ["a"], "output": ["/tmp/x.safetensors"]}, "'output' cannot be set here"),
        ({"concept": ["a"], "models_dir": ["/"]}, "'models_dir' cannot be set here"),
        ({"concept": ["a"], "allow_pickle": True}, "'allow_pickle' cannot be set here"),
        ({"concept": ["a"], "model": "/etc/passwd"}, "there is no model '/etc/passwd'"),
        ({"concept": ["a"], "model": "../../x.safetensors"}, "no model"),
        ({"concept": ["a"], "mask": "/tmp/mask.safetensors"}, "cannot be a name here"),
        ({"concept": ["a"], "mask": "no-such-run"}, "there is no 'no-such-run' here"),
        ({"concept": ["a"], "forget_images": "/etc"}, "cannot be a name here"),
        ({"concept": ["a"], "forget_images": "../jobs"}, "cannot be a name here"),
        ({"concept": ["a"], "components": "/etc"}, "must be an alias or a hub id"),
        ({"concept": ["a"], "components": "../x"}, "must be an alias or a hub id"),
        ({"concept": ["a"], "density": 2}, "density is 2, but must be at most 1"),
        ({"concept": [" "]}, "no concept is given"),
        ({"concept": ["a dog"]}, "'a dog' is not in the vocabulary of the model shapes"),
        ({"concept": ["circle"], "anchor": ["square", "star"]}, "anchor"),
        (
            {"concept": ["circle"], "model": "x.ckpt"},
            "To add one, put a .safetensors file .not a link. into .*/models, or start",
        ),
        ({"concept": ["a"], "stepz": 3}, "'stepz' cannot be set here"),
    ],
    ids=str,
)
def test_what_a_form_must_not_say_is_refused_before_anything_begins(
    service: Service, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        service.requests.erase(options)
    assert service.queue.all() == []


def test_jobs_of_one_second_write_to_different_places_and_a_repeated_one_is_the_same(service: Service) -> None:
    change_host(service, Keeping(service.host.data))
    asked = {"concept": ["circle"], "model": "shapes"}
    first, second = service.requests.erase(asked), service.requests.erase({**asked, "seed": 1})
    assert service.requests.erase(asked) is first
    outputs = [path for job in (first, second) for path in job.request["options"]["output"]]
    assert len(set(outputs)) == 4
    assert Path(outputs[0]).parent == service.host.data / "checkpoints"
    named = [
        service.requests.erase({**asked, "seed": seed}, name="mine").request["options"]["output"][0] for seed in (2, 3)
    ]
    assert [Path(path).name for path in named] == ["mine.safetensors", "mine-2.safetensors"]
    for job in service.queue.all():
        service.queue.cancel(job.id)


class Keeping(StandaloneHost):
    """A host that has a folder of checkpoints, and says what it was asked to use."""

    used: Path | None = None
    now: str | None = None

    def loaded(self) -> str | None:
        return self.now

    def checkpoints(self) -> Path | None:
        return self.data / "checkpoints"

    def use(self, path: Path) -> str:
        self.used = path
        return f"{path.name} is now the checkpoint of the WebUI."


@pytest.fixture
def held(service: Service) -> Iterator[Service]:
    """A service of a host with checkpoints, whose jobs only wait."""
    change_host(service, Keeping(service.host.data))
    (service.host.data / "checkpoints").mkdir()
    lock = threading.Lock()

    @contextmanager
    def gpu_lease(job: Any) -> Iterator[None]:
        with lock:
            yield

    service.queue._gpu_lease = gpu_lease
    with lock:
        yield service
        for job in service.queue.all():
            service.queue.cancel(job.id)


def test_where_the_host_has_checkpoints_none_chosen_never_means_the_embedded_model(
    held: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result would be put among theirs."""
    assert "circle" not in held.models.concepts(None)
    assert "nudity" in held.models.concepts(None)
    for begin in (held.requests.erase, held.requests.mask):
        with pytest.raises(ConfigError, match=r"^no checkpoint is chosen"):
            begin({"concept": ["circle"]})
    monkeypatch.setattr(held.host, "models", lambda: {})  # as at a first start
    with pytest.raises(ConfigError, match=r"no checkpoint is chosen. .* has no \.safetensors checkpoint yet"):
        held.requests.erase({"concept": ["circle"], "model": None})
    assert held.queue.all() == []


def test_without_a_host_none_chosen_means_the_embedded_model(service: Service) -> None:
    assert "circle" in service.models.concepts(None)
    job = service.requests.erase({"concept": ["circle"]})
    service.queue.cancel(job.id)
    assert job.request["options"]["model"] is None


def test_names_are_chosen_one_job_after_the_other(held: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two people may press the button in the same moment."""

    def slow(*given: Any, **more: Any) -> Path:
        found = paths.new_file(*given, **more)
        time.sleep(0.1)
        return found

    monkeypatch.setattr("extension.requests.new_file", slow)
    with ThreadPoolExecutor() as pool:
        asked = [{"concept": ["circle"], "model": "shapes", "seed": seed} for seed in range(3)]
        jobs = list(pool.map(lambda options: held.requests.erase(options, name="mine"), asked))
    assert len({job.run for job in jobs}) == 3
    names = sorted(Path(job.request["options"]["output"][0]).name for job in jobs)
    assert names == ["mine-2.safetensors", "mine-3.safetensors", "mine.safetensors"]


def test_another_name_or_form_is_another_job(held: Service) -> None:
    asked = {"concept": ["circle"], "model": "shapes"}
    assert held.requests.erase(asked, name="one") is held.requests.erase(asked, name="one")
    assert held.requests.erase(asked, name="one") is not held.requests.erase(asked, name="two")
    run = write_run(held)
    lora, diff = held.requests.export(run.name, "lora"), held.requests.export(run.name, "diff")
    assert lora is held.requests.export(run.name, "lora")
    assert [Path(job.request["output"]).name.split(".", 1)[1] for job in (lora, diff)] == [
        "lora.safetensors", "diff.safetensors",
    ]  # fmt: skip


def test_the_name_of_a_job_that_may_continue_is_not_given_to_another(held: Service) -> None:
    first = held.requests.erase({"concept": ["circle"], "model": "shapes"}, name="mine")
    Path(first.request["options"]["run_dir"]).mkdir()
    (Path(first.request["options"]["run_dir"]) / "run.json").write_text("{}", encoding="utf-8")
    held.queue.cancel(first.id)
    assert first.resumable
    second = held.requests.erase({"concept": ["square"], "model": "shapes"}, name="mine")
    assert Path(second.request["options"]["output"][0]).name == "mine-2.safetensors"


def test_a_given_name_is_never_cut_and_a_made_one_tells_the_concept(held: Service) -> None:
    model = "realisticVisionV60B1_v51HyperVAE_fp16_pruned_and_more-of-it.safetensors"
    folder = held.host.data / "checkpoints"
    (folder / model).touch()
    held.host._dirs.append(str(folder))  # type: ignore[attr-defined]

    def name_of(job: Job) -> str:
        options = job.request.get("options", {})
        return Path(job.request.get("output") or options["output"][0]).name

    asked = {"concept": ["nudity"], "model": model}
    assert re.fullmatch(
        r"realisticVisionV60B1_v51HyperVAE_f-no-nudity-\d{8}-\d{6}\.safetensors", name_of(held.requests.erase(asked))
    )
    assert name_of(held.requests.mask(asked)).endswith("-nudity.safetensors")
    many = {**asked, "concept": ["the style of a painter whose name is long", "a dog"]}
    assert re.fullmatch(
        r"realisticVis-no-the-style-of-a-painter-whose-\d{8}-\d{6}\.safetensors", name_of(held.requests.erase(many))
    )
    run = write_run(held)
    assert name_of(held.requests.stack(model, [run.name], [1.0])).endswith(f"-with-{run.name}.safetensors")
    assert name_of(held.requests.undo(model, run.name)).endswith("-undone.safetensors")
    given = "dreamshaper-8-without-nudity-and-without-the-artist-v2"
    assert name_of(held.requests.erase({**asked, "seed": 1}, name=given)) == f"{given}.safetensors"
    assert name_of(held.requests.stack(model, [run.name], [0.5], name=given)) == f"{given}-2.safetensors"
    before = len(held.queue.all())
    for wrong, why in (
        (f"{given}-longer", "has .* characters; the limit is 60"),
        ("猫", "'猫' cannot be a file name"),
    ):
        with pytest.raises(ConfigError, match=why):
            held.requests.erase({**asked, "seed": 2}, name=wrong)
        with pytest.raises(ConfigError, match=why):
            held.requests.undo(model, run.name, name=wrong)
    assert len(held.queue.all()) == before


def test_where_a_runs_base_is_gone_the_one_that_is_chosen_is_taken(held: Service, tmp_path: Path) -> None:
    """The core takes no wrong one: a delta holds its base's hash."""
    folder = tmp_path / "checkpoints"
    (folder / "renamed.safetensors").touch()
    held.host._dirs.append(str(folder))  # type: ignore[attr-defined]
    run = write_run(held, model=str(folder / "base.safetensors"))
    with pytest.raises(ConfigError, match="Under Deltas, choose it as Checkpoint"):
        held.requests.export(run.name)
    job = held.requests.export(run.name, otherwise="renamed.safetensors")
    assert job.request["model"] == str(folder / "renamed.safetensors")
    (folder / "base.safetensors").touch()
    there = held.requests.export(run.name, "diff", otherwise="renamed.safetensors")
    assert there.request["model"] == str(folder / "base.safetensors")


def write_run(service: Service, name: str = "20260101-000000-circle", **options: Any) -> Path:
    folder = service.runs.folder / name
    folder.mkdir()
    record = {"status": "done", "options": {"concept": ["circle"], "model": "shapes", **options}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "delta.salun.safetensors").touch()
    return folder


def test_an_untrusted_run_json_names_no_file_outside_our_folders(held: Service, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.touch()
    ours = tmp_path / "checkpoints" / "erased.safetensors"
    ours.touch()
    (tmp_path / "checkpoints" / "link.safetensors").symlink_to(secret)
    for n, path in enumerate(
        [secret, tmp_path / "checkpoints" / ".." / secret.name, ours.with_name("link.safetensors")]
    ):
        run = write_run(held, f"planted-{n}", output=[str(path)], model=str(path))
        for reads in (held.runs.checkpoint, held.use, held.models.named):
            with pytest.raises(ConfigError, match=r"no longer exists|no model"):
                reads(run.name)
        with pytest.raises(ConfigError, match="is no longer among the checkpoints"):
            held.requests.export(run.name)
    (held.runs.folder / "planted-0" / "model").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ConfigError, match="no longer exists"):
        held.runs.checkpoint("planted-0")
    assert held.runs.checkpoint(write_run(held, "own", output=[str(ours)]).name) == ours


@pytest.mark.parametrize(
    "wrong",
    [{"metrics": []}, {"metrics": "x"}, {"metrics": {"ua": 1}, "concepts": [{"name": "a"}]}, {"concepts": None},
     {"metrics": {"ua": 1, "ra_before": {"value": "x"}, "ra_after": {"value": 1}, "per_concept": {}}}],
    ids=str,
)  # fmt: skip
def test_an_untrusted_run_json_spoils_no_list(service: Service, wrong: dict[str, Any]) -> None:
    good = write_run(service, "20260101-000000-good", concept=["good"])
    bad = write_run(service, "20260101-000001-bad")
    record = {"status": "done", "options": {}, "concepts": [], "metrics": {"ua": None, "reason": "x"}, **wrong}
    (bad / "run.json").write_text(json.dumps(record), encoding="utf-8")
    first, second = service.history()
    assert first["run"] == bad.name
    assert re.search("is from another version|is not a valid record of a run: (metrics|concepts) is", first["error"])
    assert (second["run"], second["concept"]) == (good.name, ["good"])


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such names and files")
def test_a_run_that_cannot_be_read_is_listed_as_such_and_harms_no_other(service: Service, tmp_path: Path) -> None:
    """Such as a folder that somebody has sent: the page opens, and the API lists it."""
    gr = pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    texts = {
        "nul": '{"status": "done", "options": {"model": "a\\u0000b"}}',
        "half": '{"status": "done", "options": {"model": "/a\\udc00b"}}',
        "deep": '{"status": "done", "options": ' + "[" * 100_000,
        "type": '{"status": "done", "options": {"model": ["a"], "output": 7}}',
        "bytes": "\udcff",
    }
    for name, text in texts.items():
        write_run(service, name)
        (service.runs.folder / name / "run.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    os.mkfifo(write_run(service, "fifo") / "other")
    (service.runs.folder / "fifo" / "other").replace(service.runs.folder / "fifo" / "run.json")
    (service.runs.folder / "loop").mkdir()
    (service.runs.folder / "loop" / "run.json").symlink_to("run.json")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "run.json").write_text('{"status": "done", "options": {"concept": ["secret"]}}', encoding="utf-8")
    (service.runs.folder / "out").symlink_to(outside, target_is_directory=True)
    shutil.copytree(
        write_run(service, "zz-good", concept=["good"]), os.fsdecode(os.fsencode(service.runs.folder) + b"/\xff")
    )
    (service.runs.folder / "zz-good" / "model.safetensors").touch()
    (tmp_path / "models").mkdir(exist_ok=True)
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/models/\xff.safetensors"))).touch()
    change_host(service, StandaloneHost(service.host.data, [str(tmp_path / "models")]))

    listed = [run for run in service.history() if run["run"] != "\\udcff"]
    assert len(listed) == len(service.history()) - 1  # the name that is not UTF-8 is shown escaped
    good, *bad = listed
    assert (good["run"], good["concept"], good["status"]) == ("zz-good", ["good"], "done")
    assert {run["run"] for run in bad} - {"loop"} == {*texts, "fifo", "out"}  # the loop may be no file at all
    assert {run["status"] for run in bad} == {"unreadable"}
    assert all(run["error"] and not run["concept"] for run in bad)
    assert str(service.host.data) not in str(listed)
    config = build(gr, service, Access()).get_config_file()
    json.dumps(config, ensure_ascii=False).encode("utf-8")  # as gradio sends it
    for run in bad:
        assert "unreadable" in details(service, run["run"])
        with pytest.raises(ConfigError):
            service.options_of(run["run"])
        with pytest.raises(ConfigError):
            service.runs.checkpoint(run["run"])


@pytest.mark.parametrize("state", ["queued", "running", "cancelled"])
@pytest.mark.parametrize(
    "asked",
    [
        {"output": ["/elsewhere/x.safetensors"]},
        {"run_dir": "/elsewhere"},
        {"allow_pickle": True},
        {"models_dir": ["/"]},
    ],
    ids=str,
)
def test_a_job_in_a_folder_that_somebody_has_sent_is_not_run(tmp_path: Path, state: str, asked: dict[str, Any]) -> None:
    """It would write where its file says, with what its file allows."""
    first = Service(StandaloneHost(tmp_path / "data"))
    job = first.requests.erase({"concept": ["circle"], "model": "shapes"})
    first.queue.cancel(job.id)
    first.queue.wait(job.id, 30)
    first.queue.close()
    file = first.queue.folder / job.id / "job.json"
    held = json.loads(file.read_text(encoding="utf-8")) | {"state": state, "resumable": state == "cancelled"}
    sent = {**held, "request": {**held["request"], "options": {**held["request"]["options"], **asked}}}
    file.write_text(json.dumps(sent), encoding="utf-8")
    second = Service(StandaloneHost(tmp_path / "data"))
    try:
        (found,) = second.queue.all()
        assert (found.state, found.resumable) == ("failed", False)
        assert "belongs to another folder" in str(found.error)
        with pytest.raises(ConfigError):
            second.queue.resume(job.id)
    finally:
        second.queue.close()


def test_a_number_of_many_digits_is_refused_in_words() -> None:
    for text in ("9" * 400, "9" * 5_000):
        with pytest.raises(ConfigError, match=rf"steps has {len(text)} digits; the limit is 30"):
            ERASURE.value_of("steps", text)


def test_options_of_a_wrong_type_are_not_loaded_again(service: Service) -> None:
    with pytest.raises(ConfigError, match="the options of odd: forget_images is 5, but must be a text"):
        service.options_of(write_run(service, "odd", forget_images=5).name)
    path = "/" + "x" * 5000
    run = write_run(service, "long", model=path, output=[path])
    with pytest.raises(ConfigError, match="no longer exists"):
        service.runs.checkpoint(run.name)
    assert len(service.history()) == 2


def test_a_runs_mask_is_loaded_again_by_the_name_it_is_chosen_by(service: Service) -> None:
    """A mask of another run is called as that run is, one made alone as its file is."""
    run = write_run(service)
    (run / "mask.safetensors").touch()
    (service.inputs.masks / "shapes-circle.safetensors").touch()
    for mask in service.inputs.mask_names():
        job = service.requests.erase({"concept": ["circle"], "model": "shapes", "mask": mask})
        service.queue.cancel(job.id)
        later = write_run(service, f"later-{mask}", mask=job.request["options"]["mask"])
        assert service.options_of(later.name)["mask"] == mask


def test_without_a_host_what_was_made_is_in_the_list_and_a_name_is_kept_to(service: Service, tmp_path: Path) -> None:
    for name, place in {"20260101-000000-a": "model", "20260101-000001-b": "model.safetensors"}.items():
        run = write_run(service, name)
        if place == "model":
            (run / place).mkdir()
            (run / place / "model_index.json").touch()
        else:
            (run / place).touch()
    named = service.requests.erase({"concept": ["circle"], "model": "shapes"}, name="mine")
    service.queue.cancel(named.id)
    mine, delta = named.request["options"]["output"]
    assert mine == f"{service.host.data / 'models' / 'mine'}/"  # in the layout of its base
    assert Path(delta) == service.runs.folder / str(named.run) / "delta.salun.safetensors"
    Path(mine).mkdir()
    (Path(mine) / "model_index.json").touch()
    (tmp_path / "models" / "single.safetensors").touch()
    (tmp_path / "models" / ".half.safetensors.7.tmp").touch()
    (tmp_path.parent / "secret.safetensors").touch()
    (tmp_path / "models" / "link.safetensors").symlink_to(tmp_path.parent / "secret.safetensors")
    made = [name for name in service.models.all() if name != "shapes"]
    assert [name for name in made if Path(service.models.all()[name]).is_relative_to(tmp_path)] == [
        "mine", "single.safetensors", "20260101-000001-b", "20260101-000000-a",
    ]  # fmt: skip
    assert service.runs.checkpoint(write_run(service, "named", output=[mine, delta]).name) == Path(mine)


@pytest.mark.parametrize("version", ["3.41.2", "4.40.0"])
def test_a_delta_of_a_prompt_that_is_not_in_the_list_is_taken_by_every_gradio(version: str) -> None:
    """A name that a saved image holds may not be in the list."""
    made = SimpleNamespace(
        Dropdown=lambda **shown: shown, Slider=lambda *_, **shown: shown, Row=nullcontext, __version__=version
    )
    chosen, strengths = rows(made, ["a"], "salun_txt2img", allow_custom_value=True)
    assert len(chosen) == len(strengths) > 1 and all(each["allow_custom_value"] for each in chosen)
    assert chosen[0]["choices"] == ["", "a"]


def test_what_can_be_chosen_of_files_is_listed_and_the_help_names_no_other(service: Service, tmp_path: Path) -> None:
    """The command line's help speaks of paths, which are refused here."""
    (service.inputs.images / "my cat").mkdir()
    (service.inputs.images / "note.txt").touch()
    (tmp_path / "elsewhere").mkdir()
    (service.inputs.images / "linked").symlink_to(
        tmp_path / "elsewhere", target_is_directory=True
    )  # refused when chosen
    assert service.inputs.image_folders() == ["my cat"]
    made = SimpleNamespace(Dropdown=lambda **shown: shown, __version__="4.40.0")
    for name in ("forget_images", "retain_images"):
        shown = ERASURE.control(made, name, service.choices())
        assert (shown["choices"], shown["value"]) == (["", "my cat"], "")
        assert "a folder in `pictures`" in shown["info"]
    assert "diffusers folder" not in ERASURE.help_of("components")
    assert "file" not in ERASURE.help_of("mask")


def test_files_of_prompts_are_listed_and_chosen_by_name(service: Service, tmp_path: Path) -> None:
    for name in ("i2p.csv", "mine.txt", "notes.md"):
        (service.inputs.prompts / name).write_text("a cat\n", encoding="utf-8")
    (tmp_path / "secret.txt").write_text("x", encoding="utf-8")
    (service.inputs.prompts / "linked.txt").symlink_to(tmp_path / "secret.txt")
    (service.inputs.prompts / "folder.csv").mkdir()
    made = SimpleNamespace(Dropdown=lambda **shown: shown, __version__="4.40.0")
    shown = EVALUATION.control(made, "prompts", service.choices())
    assert (shown["choices"], shown["value"], shown["multiselect"]) == (["i2p.csv", "mine.txt"], [], True)


@BOTH
def test_the_help_names_no_detector_that_cannot_be_used_here(controls: Controls, service: Service) -> None:
    text = controls.help_of("detector")
    assert "q16" in DETECTORS and "q16" not in text
    for name in DETECTORS:
        if re.search(rf"\b{name}\b(?!-)", text) and name != "images":
            assert service.inputs.detector(name) == name


# -- evaluations ------------------------------------------------------------------------------------------------------


def test_an_evaluations_request_is_what_the_command_line_would_run(held: Service) -> None:
    (held.inputs.images / "real").mkdir()
    (held.inputs.prompts / "i2p.csv").write_text("prompt\na cat\n", encoding="utf-8")
    given = {
        "against": "shapes", "concept": ["circle", " "], "anchor": ["square"], "detector": ["self", "images:real"],
        "metric": ["clip-score", "fid:real"], "clip": "openai/clip-vit-base-patch32", "n": 8, "seed": 3,
        "prompts": ["i2p.csv", "AIML-TUDA/i2p"], "sets": ["synonyms"], "synonyms": ["a disc"], "keep_images": True,
    }  # fmt: skip
    job = held.requests.evaluate("shapes", given)
    real, prompts = held.inputs.images / "real", held.inputs.prompts / "i2p.csv"
    expected = EvalOptions(**{
        **given, "concept": ["circle"], "detector": ["self", f"images:{real}"],
        "metric": ["clip-score", f"fid:{real}"], "prompts": [str(prompts), "AIML-TUDA/i2p"],
    })  # fmt: skip
    assert job.request["options"] == dataclasses.asdict(expected)
    assert job.request["target"] == "shapes"


def test_a_run_names_its_own_concept_anchor_and_original(held: Service) -> None:
    run = write_run(held)
    job = held.requests.evaluate(run.name, {"against": "", "concept": [], "anchor": [""], "n": 8})
    assert job.request == {"target": str(run), "options": dataclasses.asdict(EvalOptions(n=8))}
    for name in ("concept", "anchor"):
        with pytest.raises(ConfigError, match="is named by the run already"):
            held.requests.evaluate(run.name, {name: ["star"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models_dir": ["/"]}, "'models_dir' cannot be set here"),
        ({"allow_pickle": True}, "'allow_pickle' cannot be set here"),
        ({"against": "/etc/model.safetensors"}, "there is no model '/etc/model.safetensors'"),
        ({"prompts": ["/etc/passwd.txt"]}, "cannot be a name here"),
        ({"prompts": ["../jobs/x.csv"]}, "cannot be a name here"),
        ({"prompts": ["owner/name.csv"]}, "there is no 'owner/name.csv' here"),
        ({"prompts": ["linked.txt"]}, "is outside the folder"),
        ({"prompts": [["x.csv"]]}, "but must be a text"),
        ({"metric": ["fid:/etc"]}, "cannot be a name here"),
        ({"metric": ["fid:../masks"]}, "cannot be a name here"),
        ({"metric": ["lpips:x"]}, "lpips takes no argument"),
        ({"metric": ["fd"]}, "is 'fd', but must be one of fid, "),
        ({"detector": ["images:/etc"]}, "cannot be a name here"),
        ({"detector": ["clip:/etc/model"]}, "can name no folder here"),
        ({"detector": ["q16"]}, "can name no folder here"),
        ({"detector": ["eye"]}, "is 'eye', but must be one of attribute, "),
        ({"detector": "self"}, "must be a list of texts"),
        ({"clip": "/models/clip"}, "must be a hub id"),
        ({"clip": ["owner/name"]}, "clip is .*must be a text"),
        ({"components": "../x"}, "must be an alias or a hub id"),
        ({"synonyms": ["a" * 2_001]}, "synonyms has a text of 2,001 characters"),
        ({"sampling_guidance": float("inf")}, "must be a finite number"),
        ({"n": 1}, "n is 1, but must be at least 2"),
        ({"concept": [" "]}, "no concept is given"),
        ({"steps": 3}, "'steps' cannot be set here"),
    ],
    ids=str,
)
def test_what_an_evaluation_must_not_name_is_refused_before_anything_begins(
    service: Service, options: dict[str, Any], message: str
) -> None:
    (service.host.data / "secret.txt").write_text("x", encoding="utf-8")
    (service.inputs.prompts / "linked.txt").symlink_to(service.host.data / "secret.txt")
    with pytest.raises(ConfigError, match=message):
        service.requests.evaluate("shapes", {"concept": ["circle"], **options})
    assert service.queue.all() == []


def test_an_attacks_request_is_what_the_command_line_would_run(held: Service) -> None:
    run = write_run(held)
    (run / "adversarial.safetensors").write_bytes(b"")
    (held.inputs.prompts / "mine.txt").write_text("a cat\n", encoding="utf-8")
    given = ["inversion+steps=40", f"prompts:{run.name}", "prompts:mine.txt"]
    job = held.requests.attack(run.name, {"against": "", "attack": given, "n": 8, "control": True})
    expected = [given[0], f"prompts:{run / 'adversarial.safetensors'}", f"prompts:{held.inputs.prompts / 'mine.txt'}"]
    options = dataclasses.asdict(AttackOptions(attack=expected, n=8, control=True))
    assert job.request == {"target": str(run), "options": options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": ["sneaky"]}, "must be one of seeds, noise"),
        ({"attack": ["seeds+tries=0"]}, "must be at least 1"),
        ({"attack": ["merge:/etc"]}, "merge can name no file or model here"),
        ({"attack": ["lora:x.safetensors"]}, "lora can name no file or model here"),
        ({"attack": ["prompts:/etc/passwd"]}, "cannot be a name here"),
        ({"attack": ["prompts:gone.csv"]}, "there is no 'gone.csv' here"),
        ({"attack": ["prompts"]}, "needs a file"),
        ({"detector": "images:/etc"}, "cannot be a name here"),
        ({"against": None}, "against is needed to attack a checkpoint"),
        ({"n": 1}, "n is 1, but must be at least 2"),
    ],
    ids=str,
)
def test_what_an_attack_must_not_name_is_refused_before_anything_begins(
    service: Service, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        service.requests.attack("shapes", {"concept": ["circle"], "against": "shapes", **options})
    assert service.queue.all() == []


def finished(service: Service, run: Path) -> Job:
    job = service.requests.erase({"concept": ["circle"], "model": "shapes"})
    service.queue.cancel(job.id)
    job.state, job.run = "done", run.name
    return job


def test_after_a_job_its_checkpoint_is_used_and_the_base_again(held: Service, tmp_path: Path) -> None:
    base, erased = (tmp_path / "checkpoints" / f"{name}.safetensors" for name in ("base", "erased"))
    base.touch()
    erased.touch()
    held.host._dirs.append(str(base.parent))  # type: ignore[attr-defined]
    job = finished(held, write_run(held, model=str(base), output=[str(erased)]))
    assert held.offers(job) == ["use", "undo", "lora", "diff", "delta", "sample"]
    assert held.use_result(job.id) == "erased.safetensors is now the checkpoint of the WebUI."
    assert "base.safetensors is now the checkpoint of the WebUI." in held.undo_result(job.id)
    assert held.host.used == base  # type: ignore[attr-defined]
    base.unlink()
    assert "without" in held.undo_result(job.id)  # the base is gone: it is written again
    (undo,) = [one for one in held.queue.all() if one.kind == "undo"]
    assert undo.request["model"] == str(erased)
    assert held.offers(undo) == []
    held.queue.cancel(undo.id)
    other = held.requests.erase({"concept": ["square"], "model": "shapes"})
    for state in ("queued", "waiting", "running", "stopping"):  # its turn may come before that of what is asked now
        other.state = state
        with pytest.raises(ConfigError, match="“erase square from shapes” has not ended"):
            held.use_result(job.id)
    other.state = "queued"


def test_a_sample_names_a_run_with_its_delta_a_prompt_and_a_strength(held: Service) -> None:
    run = write_run(held)
    job = held.requests.sample(run.name, "a red circle", 0.5, 7)
    assert (job.title, job.run) == ("try “a red circle” at strength 0.5, seed 7", run.name)
    assert job.request == {
        "target": str(run), "model": "shapes", "prompt": "a red circle", "strength": 0.5, "seed": 7,
    }  # fmt: skip
    for given, message in (
        (("../x", "a", 1.0, 0), "cannot be a name here"),
        ((run.name, " ", 1.0, 0), "no prompt is given"),
        ((run.name, "a" * 2001, 1.0, 0), "prompt has a text of 2,001 characters"),
        ((run.name, "a", 1.6, 0), r"strength is 1\.6, but must be from -0\.5 to 1\.5"),
        ((run.name, "a", 1.0, -1), "seed is -1"),
    ):
        with pytest.raises(ConfigError) as refused:
            held.requests.sample(*given)
        assert re.search(message, render(refused.value))
    (run / "delta.salun.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"there is no 'delta\.salun\.safetensors' here"):
        held.requests.sample(run.name, "a")


def test_an_empty_field_shows_the_number_that_the_model_gets(service: Service) -> None:
    values = service.models.automatic("shapes")
    assert ERASURE.placeholder("batch_size", values) == f"auto: {values['batch_size']}"
    assert ERASURE.placeholder("resolution", values) == "auto: 64"
    assert ERASURE.placeholder("lr", values) == "auto"  # a goal decides it
    assert service.models.automatic("no such model") == {}


# -- the page's lists -------------------------------------------------------------------------------------------------


def _on_load(page: Any) -> Any:
    """What brings the lists of a page up to date when it is opened."""
    (found,) = [event.fn for event in page.fns.values() if event.targets[0][1] == "load" and event.outputs]
    return found


def test_a_page_opens_with_the_checkpoint_that_the_host_has_loaded(service: Service) -> None:
    gr = pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    page = build(gr, service, Access())
    model = next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == "salun_model")
    assert model.value == next(iter(service.models.all()))
    change_host(service, Keeping(service.host.data))
    service.host.now = "sd15"  # type: ignore[attr-defined]
    assert _on_load(page)()[0]["value"] == "sd15"


def test_a_folder_that_is_gone_leaves_the_lists_as_they_are_and_is_said(service: Service) -> None:
    gr = pytest.importorskip("gradio", reason="gradio is not installed (the extra `ui`)")
    page = build(gr, service, Access())
    service.inputs.images.rmdir()
    *lists, said = _on_load(page)()
    assert all(update == gr.update() for update in lists)
    assert 'role="alert"' in said
    assert "pictures" in said


def test_the_advice_of_an_evaluation_names_its_own_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = SimpleNamespace(metrics={"self": {}}, notes=[], as_json=lambda: {"sets": {}, "verdict": None})
    monkeypatch.setattr("salun.diffusion.evaluate.evaluate", lambda *_: result)
    monkeypatch.setattr("salun.diffusion.eval_output.write_evaluation", lambda *_: [])
    advice = Verdict(Outcome.UNKNOWN, "Few images", "Use {eval_images} 16")
    monkeypatch.setattr("salun.report.metrics.verdict_on", lambda _: advice)
    request = {"target": str(tmp_path), "options": {}}
    shown = child.evaluate(request, ParentPipe(io.StringIO(), io.StringIO()), tmp_path)
    assert shown["banner"]["next"] == "Next: Use images of each set 16."
