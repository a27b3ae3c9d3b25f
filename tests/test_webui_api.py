"""The HTTP API: who may call it, what it takes, and that no name leads out of the folders meant for it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed (the extra `ui`)")
pytest.importorskip("httpx", reason="httpx is not installed (it comes with the extra `ui`)")
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.testclient import TestClient

from extension.access import Access, Rejected
from extension.api import LARGEST, PREFIX, RECENT, add_routes, job_to_json, schema
from extension.host import StandaloneHost
from extension.jobs import Job
from extension.messages import to_fields
from extension.paths import confined, new_file, safe_name
from extension.runs import DELTA
from extension.service import Service
from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.options import EraseJob
from salun.errors import ConfigError, ModelError, SalunError
from salun.methods import METHODS
from salun.runs.folder import exclusive_lock

ROUTES = ["status", "runs", "models", "concepts", "schema", "openapi.json", "file", "preview", "losses", "evaluation"]
LOOSE = b'{"options": {"concept": ["a"], "model": "shapes", "save_every": %s}}'
POSTS = ["start", "cancel", "resume", "remove", "use", "undo"]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(StandaloneHost(tmp_path / "data"))
    yield made
    made.queue.close()


def client(service: Service, access: Access | None = None) -> TestClient:
    app = Starlette()
    add_routes(app, service, access or Access())
    return TestClient(app, base_url="http://127.0.0.1:7860")


def basic(pair: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def write_run(service: Service, name: str = "20260101-000000-circle") -> Path:
    folder = service.runs.folder / name
    folder.mkdir()
    record = {"status": "done", "options": {"concept": ["circle"], "model": "shapes", "steps": 5, "mask": "saliency"}}
    record |= {"concepts": [{"name": "circle", "anchor": "square"}], "metrics": {"ua": None, "reason": "none"}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "report.html").write_text("<p>report</p>", encoding="utf-8")
    return folder


# -- who may call -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [*ROUTES, *POSTS])
def test_every_route_wants_name_and_password_where_there_are_any(service: Service, route: str) -> None:
    calling = client(service, Access({"ann": "secret"}))
    ask = calling.post if route in POSTS else calling.get
    for headers in ({}, basic("ann:other"), basic("bob:secret"), basic("ann"), {"Authorization": "Basic ???"},
                    {"Authorization": "Bearer secret"}, {"X-Salun-Token": "guessed"}):  # fmt: skip
        answer = ask(f"{PREFIX}/{route}", headers=headers)
        assert answer.status_code == 401, headers
        assert ("www-authenticate" in answer.headers) == ("X-Salun-Token" not in headers)
    assert ask(f"{PREFIX}/{route}", headers=basic("ann:secret")).status_code != 401


@pytest.mark.parametrize("route", [*ROUTES, *POSTS])
def test_every_route_refuses_other_sites_and_a_host_that_serves_no_api(service: Service, route: str) -> None:
    open_to_all, closed = Access(), Access(open=False, closed_because="start it with --api")
    ask = {False: "get", True: "post"}[route in POSTS]
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:9999"},
                    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):  # fmt: skip
        for access in (open_to_all, Access({"ann": "secret"})):
            headers = {**headers, **basic("ann:secret"), "X-Salun-Token": access.token}
            assert getattr(client(service, access), ask)(f"{PREFIX}/{route}", headers=headers).status_code == 403
    refused = getattr(client(service, closed), ask)(f"{PREFIX}/{route}")
    assert (refused.status_code, refused.json()) == (403, {"error": "start it with --api"})


def test_the_page_calls_by_its_token_under_any_flags(service: Service) -> None:
    for access in (Access(), Access({"ann": "secret"}), Access(open=False)):
        headers = {"X-Salun-Token": access.token, "Origin": "http://127.0.0.1:7860", "Sec-Fetch-Site": "same-origin"}
        assert client(service, access).get(f"{PREFIX}/status", headers=headers).status_code == 200
    assert Access().token != Access().token


# -- what it takes ----------------------------------------------------------------------------------------------------


def test_the_schema_tells_every_option_with_the_cores_default() -> None:
    for key, core in (("options", EraseJob()), ("evaluation", EvalOptions()), ("attack", AttackOptions())):
        answered = schema()[key]
        assert {name: of["default"] for name, of in answered.items()} == {n: getattr(core, n) for n in answered}
    answered = schema()["options"]
    assert answered["density"]["maximum"] == 1
    assert answered["method"]["choices"] == list(METHODS["diffusion"])
    assert json.loads(json.dumps(schema())) == schema()


def test_openapi_describes_every_call(service: Service) -> None:
    found = client(service).get(f"{PREFIX}/openapi.json").json()
    assert found["servers"] == [{"url": PREFIX}]
    assert set(found["paths"]) == {f"/{route}" for route in [*ROUTES, *POSTS]}
    body = found["paths"]["/start"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert [set(kind["properties"]) for kind in body["oneOf"]][1] == {"kind", "options"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"kind": "format-disk"}, 400, "kind is 'format-disk', but must be one of"),
        ({"options": {"concept": ["a"], "output": ["/x.safetensors"]}}, 400, "'output' cannot be set here"),
        ({"options": ["a"]}, 400, "options: "),
        ({"kind": ["erase"]}, 400, "kind is \"['erase']\", but must be one of"),
        ({"kind": {"a": 1}}, 400, "but must be one of"),
        ({"options": {"concept": ["a"], "steps": 10**400}}, 400, "a number of 401 digits"),
        ({"options": {"concept": ["a"], "forget_images": {"a": 1}}}, 400, "{'a': 1}, but must be a text"),
        ({"options": {"concept": ["a"], "components": [1]}}, 400, "components is [1], but must be a text"),
        ({"options": {"concept": [[[[[[[["a"]]]]]]]]}}, 400, "nested deeper than 8 levels"),
        ({"options": {"concept": ["a\0b"]}}, 400, "text with NUL"),
        ({"options": {"concept": [["a"]]}}, 400, "concept is"),
        ({"options": {"concept": ["a"], "model": []}}, 400, "model is [], but must be a text"),
        ({"kind": "mask", "options": {"concept": ["a"], "model": [[1]]}}, 400, "model is [[1]], but must be a text"),
        ({"kind": "mask", "options": {"concept": "circle"}}, 400, "concept is 'circle', but must be a list"),
        ({"kind": "mask", "options": {"concept": [1]}}, 400, "concept is [1], but must be a list"),
        ({"options": {"concept": ["a"], "steps": "9; rm"}}, 400, "steps is '9; rm', but must be an integer"),
        ({"options": {"concept": ["a"]}, "command": "x"}, 400, "command: "),
        ({"options": {"concept": ["a"]}, "preview_every": True}, 400, "preview_every: "),
        ({"kind": "mask", "options": {"concept": ["a"]}, "name": "x"}, 400, "name: "),
        ({"kind": "stack", "model": "shapes"}, 400, "deltas: "),
        ({"kind": "stack", "model": "shapes", "deltas": ["x"], "strengths": [True]}, 400, "strengths.0"),
        ({"kind": "stack", "model": "shapes", "deltas": ["x"], "strengths": [9]}, 400, "strength is 9, but must be"),
        ({"kind": "undo", "model": "shapes", "delta": "../x"}, 400, "cannot be a name here"),
        ({"kind": "undo", "model": "shapes", "delta": "gone"}, 404, "there is no 'gone' here"),
        ({"kind": "export", "delta": "gone", "form": "exe"}, 400, "form is 'exe', but must be lora or diff"),
        ({"kind": "inspect", "run": "/etc"}, 400, "cannot be a name here"),
        ({"kind": "evaluate", "model": "/etc"}, 404, "there is no model '/etc'"),
        ({"kind": "evaluate", "model": "shapes"}, 400, "no concept is given"),
        (
            {"kind": "evaluate", "model": "shapes", "options": {"concept": ["a"], "detector": ["q16:/etc"]}},
            400,
            "can name no folder",
        ),
        ({"kind": "evaluate", "model": "shapes", "options": {"concept": ["a"], "n": 1}}, 400, "n is 1"),
        ({"kind": "evaluate", "model": "shapes", "options": {"concept": ["a"], "against": [1]}}, 400, "against is [1]"),
        ({"kind": "evaluate", "model": "shapes", "options": {"prompts": ["/etc/x.csv"]}}, 400, "cannot be a name here"),
        ({"kind": "evaluate", "model": "shapes", "concept": ["a"]}, 400, "concept: "),
    ],
    ids=str,
)
def test_start_invalid_request_is_an_error_and_starts_no_job(
    service: Service, body: Any, status: int, message: str
) -> None:
    answer = client(service).post(f"{PREFIX}/start", json=body)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
    assert service.queue.all() == []


LONG = {
    "concept": (
        {"options": {"concept": ["a" * 900_000]}},
        "concept has a text of 900,000 characters; the limit is 2,000",
    ),
    "concepts": ({"options": {"concept": ["a"] * 1001}}, "concept has 1,001 entries; the limit is 1,000"),
    "anchor": ({"options": {"concept": ["a"], "anchor": ["a" * 2001]}}, "anchor has a text of 2,001 characters"),
    "name": ({"options": {"concept": ["a"]}, "name": "\u0316\u0301" * 150_000}, "the name has 300,000 characters"),
    "delta": ({"kind": "undo", "model": "shapes", "delta": "\u0316\u0301" * 150_000}, "a name has 300,000 characters"),
    "run": ({"kind": "inspect", "run": "--run-dir : " * 10_000}, "a name has 120,000 characters; the limit is 1,000"),
    "mask": ({"options": {"concept": ["a"], "mask": "--run-dir : " * 10_000}}, "mask has a text of 120,000 characters"),
}
"""What takes long to look at: the text itself, what Unicode makes of it, or the message about it."""


@pytest.mark.parametrize("which", LONG)
def test_a_text_that_is_too_long_is_refused_at_once(service: Service, which: str) -> None:
    body, message = LONG[which]
    began = time.monotonic()
    answer = client(service).post(f"{PREFIX}/start", json=body)
    assert time.monotonic() - began < 2
    assert (answer.status_code, message in answer.json()["error"]) == (400, True), answer.text[:300]
    assert len(answer.content) < 3_000


@pytest.mark.parametrize("path", ["cancel", "resume", "remove", "use", "undo"])
@pytest.mark.parametrize("value", [7, None, [1], {"a": 1}, True, ...], ids=str)
def test_an_id_that_is_no_text_is_the_callers_error(service: Service, path: str, value: Any) -> None:
    answer = client(service).post(f"{PREFIX}/{path}", json={} if value is ... else {"id": value})
    assert (answer.status_code, answer.json()["error"].startswith("id: ")) == (400, True)


def test_only_json_of_a_sane_size_is_read(service: Service) -> None:
    calling = client(service)
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what a page of another site could send unasked
    assert calling.post(f"{PREFIX}/start", content="kind=erase", headers=form).status_code == 415
    kind = {"Content-Type": "application/json"}
    assert calling.post(f"{PREFIX}/start", content=b"{" + b" " * LARGEST, headers=kind).status_code == 413
    half = b'{"options": {"concept": ["\\ud800"], "model": "shapes"}}'
    for text in (b"{", b"[]", b"[" * 100_000, b"\xff", LOOSE % b"NaN", LOOSE % b"1e999", half):
        assert calling.post(f"{PREFIX}/start", content=text, headers=kind).status_code == 400
    assert calling.get(f"{PREFIX}/cancel").status_code == 405
    assert calling.get(f"{PREFIX}/status?id=none").status_code == 404


def test_a_time_left_counts_down_between_two_reports_and_is_not_told_once_it_is_over(service: Service) -> None:
    job = service.requests.mask({"concept": ["circle"], "model": "shapes"})
    service.queue.cancel(job.id)
    cases = (
        ([300.0, 600.0], 120.0, "3 to 8 minutes left"), ([5.0, 90.0], 8.0, "up to 1 minute left"),
        ([1.0, 5.0], 8.0, "less than a minute left"), ([5.0, 5.0], 360.0, ""), (None, 1.0, ""),
    )  # fmt: skip
    for left, silence, shown in cases:
        job.left, job.heard = left, time.time() - silence
        answered = job_to_json(job, service)
        assert (answered["time_left"], answered["left"] is None) == (shown, not shown)


def test_a_job_is_begun_seen_cancelled_and_taken_off(service: Service) -> None:
    calling = client(service)
    job = calling.post(f"{PREFIX}/start", json={"options": {"concept": ["circle"], "model": "shapes"}}).json()
    assert job["state"] in ("queued", "waiting", "running")
    assert calling.get(f"{PREFIX}/status", params={"id": job["id"]}).json()["title"] == "erase circle from shapes"
    calling.post(f"{PREFIX}/cancel", json={"id": job["id"]})
    assert service.queue.wait(job["id"], 30).state == "cancelled"
    assert calling.post(f"{PREFIX}/remove", json={"id": job["id"]}).status_code == 200
    assert calling.get(f"{PREFIX}/status").json()["jobs"] == []


def test_no_place_of_this_machine_is_reported(service: Service, tmp_path: Path) -> None:
    """The core names files as the command line does, by their whole paths."""
    models = tmp_path / "models of mine"
    job = service.requests.mask({"concept": ["circle"], "model": "shapes"})
    service.queue.cancel(job.id)
    job.request["model"] = str(models / "base.safetensors")
    job.state, job.error = "failed", to_fields(ModelError(f"{models / 'base.safetensors'} is truncated"))
    job.notes = [f"writing {service.runs.folder / 'x' / 'delta.salun.safetensors'}", f"{service.host.data} is full",
                 f"{service.host.data}-2/x"]  # fmt: skip
    job.result = {"notes": [f"left out: {models}/a"], "output": str(service.host.data / "masks" / "m.safetensors")}
    run = write_run(service)
    record = {"status": "failed", "options": {}, "error": f"{run} cannot be written (full)"}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    calling = client(service)
    answered = calling.get(f"{PREFIX}/status").json()["jobs"][0]
    assert answered["error"] == "base.safetensors is truncated"
    assert answered["notes"] == [f"writing {os.path.join('runs', 'x', 'delta.salun.safetensors')}", "data is full",
                             f"{service.host.data}-2/x"]  # fmt: skip
    assert answered["result"] == {"notes": ["left out: a"], "output": "m.safetensors"}
    (listed,) = calling.get(f"{PREFIX}/runs").json()["runs"]
    assert listed["error"].startswith(f"{os.path.join('runs', run.name)} cannot be written")


def test_an_error_of_our_own_is_not_the_callers(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(deltas: list[str]) -> Job:
        raise TypeError("'NoneType' object is not iterable")

    monkeypatch.setattr(service.requests, "overlaps", broken)
    answer = client(service).post(f"{PREFIX}/start", json={"kind": "overlaps", "deltas": ["a", "b"]})
    assert (answer.status_code, "internal error" in answer.json()["error"]) == (500, True)


def stopped(service: Service) -> tuple[Job, Path]:
    """A job as it is once it was cancelled in training, and its run's folder."""
    job = service.requests.erase({"concept": ["circle"], "model": "shapes"})
    service.queue.wait(service.queue.cancel(job.id).id, 30)
    folder = service.runs.folder / str(job.run)
    (folder / "state").mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text('{"status": "cancelled", "options": {}}', encoding="utf-8")
    (folder / "state" / "training.safetensors").write_bytes(bytes(1000))
    job.resumable = True
    return job, folder


def test_what_a_stopped_job_keeps_is_reported_and_goes_with_it(service: Service) -> None:
    """It is 12 bytes for each weight that trains, gigabytes of a large model: nothing else would ever free them."""
    job, folder = stopped(service)
    calling = client(service)
    assert calling.get(f"{PREFIX}/status").json()["jobs"][0]["kept_bytes"] == 1000
    with exclusive_lock(folder):  # as a child that outlived the program does
        answer = calling.post(f"{PREFIX}/remove", json={"id": job.id})
        assert answer.status_code == 400
        assert answer.json()["error"].endswith(". Wait until it is done")
        assert service.queue.all() == [job]
    assert calling.post(f"{PREFIX}/remove", json={"id": job.id}).status_code == 200
    assert service.queue.all() == []
    assert not (folder / "state").exists()
    assert (folder / "run.json").exists()


def test_a_job_whose_run_went_on_takes_nothing_with_it(service: Service) -> None:
    job, folder = stopped(service)
    later = service.queue.resume(job.id)
    service.queue.wait(service.queue.cancel(later.id).id, 30)
    (folder / "state").mkdir(exist_ok=True)
    service.remove(job.id)
    assert (folder / "state").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_linked_state_is_left_alone(service: Service, tmp_path: Path) -> None:
    job, folder = stopped(service)
    other = tmp_path / "other"
    (folder / "state").rename(other)
    (folder / "state").symlink_to(other, target_is_directory=True)
    service.remove(job.id)
    assert (other / "training.safetensors").exists()


def test_a_runs_files_come_with_no_script_rights(service: Service) -> None:
    run = write_run(service).name
    calling = client(service)
    found = calling.get(f"{PREFIX}/file", params={"run": run, "name": "report.html"})
    assert (found.status_code, found.text) == (200, "<p>report</p>")
    assert found.headers["content-security-policy"] == "sandbox; frame-ancestors 'none'"
    assert found.headers["x-frame-options"] == "DENY"
    assert found.headers["x-content-type-options"] == "nosniff"
    (answered,) = calling.get(f"{PREFIX}/runs").json()["runs"]
    assert (answered["run"], answered["status"], answered["concept"]) == (run, "done", ["circle"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_file_that_is_not_regular_is_missing(service: Service) -> None:
    run = write_run(service)
    (run / "report.html").unlink()
    job = service.queue.submit("overlaps", "overlap", {"deltas": []})
    job.previews.append("1.png")
    for path in (run / "report.html", run / "mask.safetensors", run / DELTA, service.queue.folder / job.id / "1.png"):
        os.mkfifo(path)
    (run / "log.txt").mkdir()
    calling = client(service)
    for name in ("report.html", "mask.safetensors", DELTA, "log.txt"):
        answer = calling.get(f"{PREFIX}/file", params={"run": run.name, "name": name})
        assert (answer.status_code, "not a regular file" in answer.text) == (404, True), name
    assert calling.get(f"{PREFIX}/preview", params={"id": job.id, "name": "1.png"}).status_code == 404
    for body in (
        {"options": {"concept": ["a"], "model": "shapes", "mask": run.name}},
        {"kind": "undo", "model": "shapes", "delta": run.name},
    ):
        assert calling.post(f"{PREFIX}/start", json=body).status_code == 404, body


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_run_whose_name_is_not_utf8_is_listed_as_unreadable(service: Service) -> None:
    write_run(service)
    write_run(service, os.fsdecode(b"caf\xe9"))
    first, second = client(service).get(f"{PREFIX}/runs").json()["runs"]
    assert (first["run"], first["status"]) == ("caf\\udce9", "unreadable")
    assert "Rename the folder" in first["error"]
    assert second["status"] == "done"


def test_a_number_that_json_has_not_is_given_as_none(service: Service) -> None:
    """A loss may be NaN, and so may a figure in a run.json."""
    job = service.requests.mask({"concept": ["circle"], "model": "shapes"})
    service.queue.cancel(job.id)
    job.losses, job.fraction, job.result = [[1, float("nan"), 1.0]], float("inf"), {"metrics": {"ua": float("nan")}}
    job.notes = ["cannot read \udcff.png"]  # nor has UTF-8 half a character
    (listed,) = client(service).get(f"{PREFIX}/status").json()["jobs"]
    assert (listed["losses"], listed["notes"]) == ([], ["cannot read ?.png"])  # over: its plot is not sent each second
    answered = client(service).get(f"{PREFIX}/status", params={"id": job.id}).json()
    assert (answered["losses"], answered["fraction"], answered["result"]) == (
        [[1, None, 1.0]],
        None,
        {"metrics": {"ua": None}},
    )
    run = write_run(service)
    (run / "run.json").write_text('{"status": "done", "options": {"concept": [NaN]}}', encoding="utf-8")
    (listed,) = client(service).get(f"{PREFIX}/runs").json()["runs"]
    assert (listed["concept"], listed["status"]) == (None, "unreadable")  # no concept is a number


def test_a_job_that_is_not_over_or_may_continue_is_reported_however_many_came_after_it(service: Service) -> None:
    lock = threading.Lock()

    @contextmanager
    def gpu_lease(job: Job) -> Iterator[None]:
        with lock:
            yield

    may_go_on, _ = stopped(service)
    service.queue._gpu_lease = gpu_lease
    with lock:
        first = service.queue.submit("inspect", "first", {"path": "a"})
        for n in range(RECENT + 5):
            service.queue.cancel(service.queue.submit("inspect", f"{n}", {"path": f"{n}"}).id)
        answered = client(service).get(f"{PREFIX}/status").json()["jobs"]
        assert len(answered) == RECENT + 2
        assert {first.id, may_go_on.id} <= {job["id"] for job in answered}
        service.queue.cancel(first.id)


def test_a_full_queue_refuses_more(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extension.job_queue.MAX_OPEN", 2)
    calling, lock = client(service), threading.Lock()

    @contextmanager
    def gpu_lease(job: Job) -> Iterator[None]:
        with lock:
            yield

    service.queue._gpu_lease = gpu_lease

    def start(word: str) -> Any:
        options = {"concept": [word], "model": "shapes"}
        return calling.post(f"{PREFIX}/start", json={"kind": "mask", "options": options})

    with lock:
        ids = [start(word).json()["id"] for word in ("circle", "square")]
        refused = start("triangle")
        assert refused.status_code == 429
        assert refused.json()["error"] == "2 jobs are in the queue; the limit is 2. Wait, or cancel a job"
        assert start("circle").json()["id"] == ids[0]  # a double click is no new job
        calling.post(f"{PREFIX}/cancel", json={"id": ids[0]})
        ids.append(start("triangle").json()["id"])
        for job in ids:
            calling.post(f"{PREFIX}/cancel", json={"id": job})


def test_a_status_is_short_whatever_a_job_holds(service: Service) -> None:
    """It is asked for once a second."""
    words = [f"{n} " + "x" * 1990 for n in range(1000)]
    job = service.queue.submit("mask", f"mask of {', '.join(words)}", {})
    service.queue.cancel(job.id)
    job.state, job.notes = "failed", ["n" * 100_000] * 100
    job.error = {**to_fields(SalunError()), "message": "cannot be resumed: " * 6_000}  # 120 kB
    job.previews = [f"preview-{n:06d}.png" for n in range(100_000)]
    began = time.monotonic()
    answer = client(service).get(f"{PREFIX}/status")
    assert time.monotonic() - began < 2
    assert len(answer.content) < 100_000
    (answered,) = answer.json()["jobs"]
    assert (answered["title"][:9], answered["previews"][-1], len(answered["previews"])) == (
        "mask of 0",
        job.previews[-1],
        20,
    )


def test_what_a_job_offers_is_reported_and_nothing_else_is_done(service: Service) -> None:
    job = service.requests.mask({"concept": ["circle"], "model": "shapes"})
    service.queue.cancel(job.id)
    calling = client(service)
    assert calling.get(f"{PREFIX}/status").json()["jobs"][0]["offers"] == []
    for path in ("use", "undo"):
        answer = calling.post(f"{PREFIX}/{path}", json={"id": job.id})
        assert (answer.status_code, "forget" in answer.json()["error"] or "mask of" in answer.json()["error"]) == (
            400,
            True,
        )
        assert calling.post(f"{PREFIX}/{path}", json={"id": "../x"}).status_code == 404
    job.state, job.kind, job.run = "done", "erase", write_run(service).name
    (service.runs.folder / job.run / DELTA).touch()
    assert calling.get(f"{PREFIX}/status").json()["jobs"][0]["offers"] == ["undo", "lora", "diff", "delta", "sample"]
    assert calling.get(f"{PREFIX}/losses?id={job.id}").text == ""
    job.losses = [[step, 0.5 / step, 0.1] for step in range(1, 40)]
    chart = calling.get(f"{PREFIX}/losses?id={job.id}")
    assert chart.headers["content-type"] == "image/svg+xml" and chart.text.count("<polyline") == 4  # and their means


# -- names ------------------------------------------------------------------------------------------------------------

LEADING_OUT = [
    "..", "../secret.txt", "a/../../secret.txt", "/etc/passwd", "//etc/passwd", "\\\\host\\share", "..\\secret.txt",
    "C:\\secret.txt", "C:secret.txt", "./secret.txt", "a//b", "", ".", "a/", "\0", "a\nb", "．．/secret.txt",
    "‥/secret.txt", "．．／secret.txt", "..／secret.txt", "\u202e..", "%2e%2e/secret.txt", "..%2fsecret.txt",
    "..%252fsecret.txt", "~", "~root/x", "secret.txt ", "con", "NUL.txt", "file:secret.txt", "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", LEADING_OUT, ids=ascii)
def test_no_name_leads_out_of_a_folder_by_any_spelling(service: Service, name: str) -> None:
    run = write_run(service)
    (service.runs.folder / "secret.txt").write_text("secret", encoding="utf-8")
    (service.host.data / "secret.txt").write_text("secret", encoding="utf-8")
    (run / "secret.txt").write_text("secret", encoding="utf-8")  # in the run, but not one of the files it shows
    with pytest.raises(ConfigError):
        confined(name, service.inputs.images)
    calling = client(service)
    for query in (
        {"run": name, "name": "run.json"},
        {"run": run.name, "name": name},
        {"run": f"{run.name}/{name}", "name": "run.json"},
    ):
        for asked in ("&".join(f"{k}={quote(v, safe='')}" for k, v in query.items()),
                      "&".join(f"{k}={quote(quote(v, safe=''), safe='')}" for k, v in query.items())):  # fmt: skip
            answer = calling.get(f"{PREFIX}/file?{asked}")
            assert answer.status_code in (400, 404), asked
            assert "secret" not in answer.text.replace(name, "").replace("secret.txt", "")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_lead_nowhere(service: Service, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "run.json").write_text('{"status": "done", "options": {}}', encoding="utf-8")
    (outside / "report.html").write_text("secret", encoding="utf-8")
    (service.runs.folder / "linked").symlink_to(outside, target_is_directory=True)
    run = write_run(service)
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(outside / "report.html")
    (run / DELTA).symlink_to(outside / "report.html")
    calling = client(service)
    for query in ({"run": "linked", "name": "report.html"}, {"run": run.name, "name": "report.html"}):
        answer = calling.get(f"{PREFIX}/file", params=query)
        assert (answer.status_code, "secret" in answer.text) == (400, False)
    with pytest.raises(ConfigError, match="is outside the folder"):
        service.runs.delta(run.name)


@given(st.text(max_size=80))
def test_made_names_are_plain_whatever_they_are_made_of(text: str) -> None:
    name = safe_name(text)
    assert name
    assert all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    assert len(name) <= 60


def test_a_new_file_never_has_an_old_name(tmp_path: Path) -> None:
    for expected in ("X", "x-2", "x-3"):
        file = new_file(tmp_path, "X" if expected == "X" else "x", ".safetensors")
        assert file.name == f"{expected}.safetensors"
        file.touch()


@pytest.mark.parametrize("host", ["evil.example:7870", "127.0.0.1.evil.example", "localhost.evil.example:80"])
def test_without_a_password_no_name_that_another_site_owns_leads_here(host: str) -> None:
    """A domain can be made to lead to this machine after its page has loaded (DNS rebinding)."""
    answered = {"host": host, "origin": f"http://{host}"}
    with pytest.raises(Rejected, match="by its address"):
        Access().check(answered)
    Access({"ann": "secret"}).check({**answered, "authorization": "Basic YW5uOnNlY3JldA=="})
    for own in ("127.0.0.1:7870", "localhost:7870", "[::1]:7870", "192.168.0.5:7860"):
        Access().check({"host": own, "origin": f"http://{own}"})


OUTCOMES = ("Can't tell", "Damaged", "Barely changed", "Mostly erased", "Erased")


@pytest.mark.slow
def test_a_run_and_a_model_are_evaluated_and_their_pages_served(service: Service, run_folder: Path) -> None:
    shutil.copytree(run_folder, service.runs.folder / "mine")
    asks = client(service)
    (service.inputs.prompts / "two.txt").write_text("one red circle\none blue star\n", encoding="utf-8")
    several = {"n": 2, "detector": ["attribute", "self"], "prompts": ["two.txt"], "keep_images": True}
    bodies = (
        {"model": "mine", "options": several},
        {"model": "shapes", "options": {"against": "shapes", "concept": ["circle"], "n": 2}},
    )
    for body in bodies:
        id = asks.post(f"{PREFIX}/start", json={"kind": "evaluate", **body}).json()["id"]
        job = service.queue.wait(id, 120)
        assert (job.state, job.error) == ("done", None)
        status = asks.get(f"{PREFIX}/status?id={id}").json()
        assert status["offers"] == ["evaluation"] and status["result"]["banner"]["outcome"] in OUTCOMES
        page = asks.get(f"{PREFIX}/evaluation?id={id}")
        assert page.headers["content-type"].startswith("text/html") and "Did it work?" in page.text
        if "prompts" in body["options"]:
            rates = [note for note in status["result"]["notes"] if note.startswith("two.txt · 2 · ")]
            kinds = ("(corrected)", "(raw)", "unknown", "drift of images")
            assert rates and all(any(kind in rate for kind in kinds) for rate in rates)
    found = json.loads((service.runs.folder / "mine" / "eval.json").read_text(encoding="utf-8"))
    assert set(found["detectors"]) == {"attribute", "self"} and found["sets"]["two.txt"]["n"] == 2
    assert len(list((service.runs.folder / "mine" / "images" / "two.txt").iterdir())) == 4
    tested = {"n": 8, "images": 2, "attack": ["seeds+tries=1", "quantize"]}
    id = asks.post(f"{PREFIX}/start", json={"kind": "attack", "model": "mine", "options": tested}).json()["id"]
    job = service.queue.wait(id, 120)
    assert (job.error, job.state) == (None, "done")
    status = asks.get(f"{PREFIX}/status?id={id}").json()
    assert status["offers"] == ["evaluation"] and any("Quantization: " in note for note in status["result"]["notes"])
    assert "Does it come back?" in asks.get(f"{PREFIX}/evaluation?id={id}").text
    assert "Does it come back?" in asks.get(f"{PREFIX}/file?run=mine&name=report.html").text
    tried = {"kind": "sample", "run": "mine", "prompt": "one red circle", "strength": 0.5, "seed": 3}
    id = asks.post(f"{PREFIX}/start", json=tried).json()["id"]
    job = service.queue.wait(id, 120)
    assert (job.error, job.state, job.previews) == (None, "done", ["original.png", "erased.png"])
    pair = [asks.get(f"{PREFIX}/preview?id={id}&name={name}").content for name in job.previews]
    assert pair[0] != pair[1] and all(image.startswith(b"\x89PNG") for image in pair)
    given = {"kind": "evaluate", "model": "mine", "options": {"concept": ["star"]}}
    twice = asks.post(f"{PREFIX}/start", json=given)
    assert twice.status_code == 400 and "concept is named by the run already" in twice.json()["error"]
    assert asks.get(f"{PREFIX}/evaluation?id=nothing").status_code == 404
