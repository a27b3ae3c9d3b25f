"""The tab's jobs: child processes in a queue, whose state no browser, reload or crash takes away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extension import job_process, parent_pipe
from extension.job_events import apply_event
from extension.job_process import CHILD
from extension.job_queue import Queue
from extension.jobs import Job
from extension.messages import from_fields, render, to_fields
from salun.errors import ConfigError, SalunError
from salun.progress import Event, Stage, StageCost

from .conftest import SHORT, SHOWN

Make = Callable[..., Queue]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    queues: list[Queue] = []

    def new(**given: Any) -> Queue:
        queues.append(Queue(tmp_path / "jobs", **given))
        return queues[-1]

    yield new
    for queue in queues:
        queue.close()


def asked(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "options": {"concept": ["circle"], "anchor": ["square"], "seed": 3, "run_dir": str(folder), **SHORT, **options}
    }


def error_of(job: Job) -> str:
    """A job's error as the page shows it; "" without any."""
    return render(from_fields(job.error)) if job.error is not None else ""


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_cancel_is_quick_and_a_resumed_job_does_what_the_core_does_and_tells_it_forwards(
    make: Make, tmp_path: Path, run_folder: Path
) -> None:
    """To the same bytes as `salun.erase` with the same options, previews or not."""
    seen: list[tuple[float, str]] = []
    queue = make(after=lambda job: seen.append((job.fraction, "after")))
    job = queue.submit("erase", "forget circle", {**asked(tmp_path / "run", **SHOWN), "preview_every": 2}, "run")
    until(lambda: job.stage == "saliency" or not job.open)
    began = time.monotonic()
    queue.cancel(job.id)
    assert queue.wait(job.id, 10).state == "cancelled"
    assert time.monotonic() - began < 2  # what HOSTS asks for
    assert not (tmp_path / "run" / "delta.salun.safetensors").exists()
    assert job.resumable
    until(lambda: bool(seen))
    seen.clear()
    again = queue.resume(job.id)
    while again.open:
        seen.append((again.fraction, again.stage))
        time.sleep(0.02)
    assert (again.state, again.error) == ("done", None)
    assert not job.resumable  # its run has been taken on
    fractions, stages = [f for f, _ in seen], list(dict.fromkeys(stage for _, stage in seen))
    assert fractions == sorted(fractions)
    assert [s for s in stages if s in ("saliency", "training", "saving")] == ["saliency", "training", "saving"]
    assert [row[0] for row in again.losses][-1] == SHORT["steps"]
    assert again.previews == ["preview-000002.png"]
    assert (queue.folder / again.id / again.previews[0]).read_bytes().startswith(b"\x89PNG")
    for name in ("delta.salun.safetensors", "mask.safetensors", "model/unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (run_folder / name).read_bytes(), name
    until(lambda: seen[-1] == (1.0, "after"))


def test_asked_twice_it_is_one_job_and_a_queued_one_is_cancelled_at_once(make: Make, tmp_path: Path) -> None:
    """While the host has the turn, nothing of ours runs; cancelled then, the job never does."""
    lock, ran = threading.Lock(), []

    @contextmanager
    def gpu_lease(job: Job) -> Iterator[None]:
        with lock:
            yield
            if job.began:
                ran.append(job.id)

    queue = make(gpu_lease=gpu_lease)
    with lock:
        first = queue.submit("erase", "one", asked(tmp_path / "a"))
        assert queue.submit("erase", "one", asked(tmp_path / "b")) is first  # the run folder is ours, not the asker's
        second = queue.submit("erase", "two", asked(tmp_path / "c", density=0.1))
        until(lambda: first.state == "waiting")
        assert second.state == "queued"
        began = time.monotonic()
        for job in (first, second):
            assert queue.cancel(job.id).state == "cancelled"
        assert time.monotonic() - began < 1
    time.sleep(0.2)
    assert ran == []
    assert not (tmp_path / "a").exists()


def test_what_the_core_refuses_is_the_jobs_error(make: Make, tmp_path: Path) -> None:
    queue = make()
    wrong = queue.submit("erase", "x", asked(tmp_path / "run", density=3))
    gone = queue.submit("inspect", "y", {"path": "nowhere.safetensors"})
    assert "density is 3, but must be at most 1" in error_of(queue.wait(wrong.id, 60))
    assert error_of(queue.wait(gone.id, 60)).startswith("nowhere.safetensors does not exist")
    assert gone.error is not None
    assert gone.error["code"] == "not-found"
    assert (wrong.state, gone.state) == ("failed", "failed")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_child_is_reported_and_the_next_job_runs(make: Make, tmp_path: Path) -> None:
    queue = make()
    job = queue.submit("erase", "x", asked(tmp_path / "run"))
    until(lambda: queue._child is not None)
    assert queue._child is not None
    os.kill(queue._child[1].pid, signal.SIGKILL)
    assert "ended with code -9 (killed" in error_of(queue.wait(job.id, 30))
    after = queue.submit("inspect", "y", {"path": "nowhere.safetensors"})
    assert queue.wait(after.id, 60).error is not None


def test_a_host_that_fails_at_its_part_costs_one_job(make: Make, tmp_path: Path) -> None:
    @contextmanager
    def gpu_lease(job: Job) -> Iterator[None]:
        if job.title == "first":
            raise RuntimeError("no memory was freed")
        yield

    queue = make(gpu_lease=gpu_lease)
    first = queue.submit("inspect", "first", {"path": "a"})
    second = queue.submit("inspect", "second", {"path": "b"})
    assert error_of(queue.wait(first.id, 30)) == "RuntimeError: no memory was freed"
    assert "'b' is not a known model" in error_of(queue.wait(second.id, 60))


def test_the_state_is_on_disk_and_another_program_is_kept_out(make: Make, tmp_path: Path) -> None:
    lock = threading.Lock()

    @contextmanager
    def gpu_lease(job: Job) -> Iterator[None]:
        with lock:
            yield

    queue = make(gpu_lease=gpu_lease)
    with lock:
        job = queue.submit("inspect", "x", {"path": "<b>"}, "some-run")
        until(lambda: job.state == "waiting")
        with pytest.raises(ConfigError, match="another program uses the jobs"):
            Queue(tmp_path / "jobs")
        kept = json.loads((queue.folder / job.id / "job.json").read_text(encoding="utf-8"))
        assert (kept["state"], kept["run"]) == ("waiting", "some-run")
        closing = threading.Thread(target=queue.close)
        closing.start()
        until(lambda: queue._closed)
    closing.join()
    # as a crash leaves it
    (queue.folder / job.id / "job.json").write_text(json.dumps({**kept, "state": "running"}), encoding="utf-8")
    strange = {"broken": "{", "older": '{"job": 1}', "moved": json.dumps(kept), "deep": "[" * 100_000}
    wrongs: list[dict[str, Any]] = [
        {"request": {"options": None}}, {"request": {"options": {"run_dir": 7}}}, {"request": None},
        {"created": "now"}, {"losses": None}, {"previews": [1]}, {"result": "x"}, {"error": 1}, {"step": None},
        {"fraction": "x"}, {"left": [1]}, {"resumable": "yes"}, {"request": {"model": 5}}, {"created": True},
        {"title": "a\0b"}, {"error": {**to_fields(SalunError("x")), "advice": "{a.b}"}},
    ]  # fmt: skip
    for n, wrong in enumerate(wrongs):
        strange[f"wrong-{n}"] = json.dumps({**kept, "id": f"wrong-{n}", "state": "running", **wrong})
    for name, text in strange.items():
        (queue.folder / name).mkdir()
        (queue.folder / name / "job.json").write_text(text, encoding="utf-8")
    os.mkfifo(queue.folder / "older" / "fifo")  # which nobody writes to
    (queue.folder / "older" / "fifo").replace(queue.folder / "older" / "job.json")
    found = make().all()
    assert [(one.id, one.state, error_of(one)) for one in found] == [
        (job.id, "cancelled", "the program ended before the job did")
    ]


def test_the_child_ends_with_the_program_that_began_it(tmp_path: Path) -> None:
    """Its stdin closes, however the parent ended; what libraries print is no event."""
    (tmp_path / "request.json").write_text(
        json.dumps({"kind": "erase", **asked(tmp_path / "run", steps=100_000)}), encoding="utf-8"
    )
    with subprocess.Popen(
        [sys.executable, str(CHILD), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        first = json.loads(child.stdout.readline())
        child.stdin.close()
        rest = [json.loads(line) for line in child.stdout]
        assert child.wait(60) == 130
    assert (first["event"], first["stage"]) == ("stage", "loading")
    assert rest[-1]["event"] == "stopping"


@pytest.mark.parametrize("closed", ["its pipes", "its stdout"])
def test_a_program_that_dies_costs_no_step_of_training(tmp_path: Path, closed: str) -> None:
    """Nobody reads the child any more, and the line in which it would say so breaks: it stops as when it is asked to,
    with its state saved, however seldom it saves otherwise."""
    options = asked(tmp_path / "run", steps=100_000, eval_images=0, save_every=3600.0, mask="random",
                    target="online", retain_target="noise")  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps({"kind": "erase", **options}), encoding="utf-8")
    with (tmp_path / "log.txt").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, str(CHILD), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    assert child.stdin is not None and child.stdout is not None
    for line in child.stdout:
        event = json.loads(line)
        if event.get("stage") == "training" and event["step"] > 2:
            break
    for pipe in (child.stdout, child.stdin) if closed == "its pipes" else (child.stdout,):
        pipe.close()
    try:
        assert child.wait(60) == 130
    finally:
        child.kill()
        child.stdin.close()
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "cancelled"
    assert list((tmp_path / "run" / "state").glob("*.safetensors"))


@given(st.text(max_size=60))
def test_lines_that_are_no_events_change_nothing(text: str) -> None:
    job = Job("id", "erase", "title", {})
    before = vars(job).copy()
    apply_event(job, text)
    assert vars(job) == before


class Sent:
    """A pipe to the parent that holds what is sent."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self.texts: list[str] = []

    def check(self) -> None:
        pass

    def send(self, event: str, **fields: Any) -> None:
        if event == "stage":
            self.stages.append(fields)
        else:
            self.texts.append(fields["text"])


def test_a_job_reports_the_time_left_of_all_announced_stages_as_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent_pipe, "EVERY", 0.0)
    pipe = Sent()
    progress = parent_pipe.pipe_progress(pipe)  # type: ignore[arg-type]
    stages = [StageCost(Stage.TRAINING, 10, backward=10, most=30), StageCost(Stage.IMAGES_AFTER, 10, forward=30)]
    progress(Event(Stage.PLANNING, message="a plan", stages=stages))
    time.sleep(0.6)
    progress(Event(Stage.TRAINING, 5, 10, {"forget": 0.5, "retain": 0.1}))
    progress(Event(Stage.TRAINING, metrics={"probing": 8}))
    progress(Event(Stage.TRAINING, message="after step 5"))
    first, probe = pipe.stages
    assert pipe.texts == ["a plan", "after step 5"] and first["fraction"] == 0.25
    low, high = first["left"]
    assert 1.8 <= low < 3 * 1.8 and high == pytest.approx(low + 20 / 5 * low / 3, rel=0.01)
    assert (probe["stage"], probe["step"], probe["total"]) == ("training", 5, 10), "a probe is no step"


def test_what_had_not_begun_when_the_program_ended_continues_at_its_next_start_in_order(
    make: Make, tmp_path: Path
) -> None:
    lock, ran = threading.Lock(), []

    @contextmanager
    def gpu_lease(job: Job) -> Iterator[None]:
        with lock:
            ran.append(job.title)
            yield

    queue = make(gpu_lease=gpu_lease)
    with lock:
        jobs = [queue.submit("inspect", title, {"path": title}) for title in ("b", "a", "c")]
        queue.cancel(jobs[2].id)
        until(lambda: jobs[0].state == "waiting")
        closing = threading.Thread(target=queue.close)
        closing.start()
        until(lambda: queue._closed)
    closing.join()
    assert all(job.began is None for job in jobs)
    ran.clear()
    later = make(gpu_lease=gpu_lease)
    for job in jobs[:2]:
        assert "is not a known model" in error_of(later.wait(job.id, 60))
    assert later.get(jobs[2].id).state == "cancelled"
    assert ran == ["b", "a"]


def test_going_on_with_a_run_is_never_another_job_that_asks_the_same(make: Make, tmp_path: Path) -> None:
    lock = threading.Lock()

    @contextmanager
    def gpu_lease(job: Job) -> Iterator[None]:
        with lock:
            yield

    queue = make(gpu_lease=gpu_lease)
    with lock:
        old = queue.submit("erase", "x", asked(tmp_path / "old"), "old")
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "run.json").write_text("{}", encoding="utf-8")
        queue.cancel(old.id)
        assert old.resumable
        equal = queue.submit("erase", "x", asked(tmp_path / "new"), "new")
        again = queue.resume(old.id)
        assert again is not equal
        assert (again.run, again.request["options"]["run_dir"]) == ("old", str(tmp_path / "old"))
        with pytest.raises(ConfigError, match="cannot be resumed"):
            queue.resume(old.id)
        for job in (equal, again):
            queue.cancel(job.id)


def test_a_full_disk_makes_no_job_that_is_nowhere_and_does_not_end_the_queue(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = threading.Lock()

    @contextmanager
    def gpu_lease(job: Job) -> Iterator[None]:
        with lock:
            yield

    queue = make(gpu_lease=gpu_lease)
    real = shutil.disk_usage
    with lock:
        waiting = queue.submit("inspect", "first", {"path": "a"})
        until(lambda: waiting.state == "waiting")
        with monkeypatch.context() as full:
            full.setattr("shutil.disk_usage", lambda path: real(path)._replace(free=0))
            with pytest.raises(ConfigError, match=r"the job cannot be written to disk: .* its disk has 0 free"):
                queue.submit("inspect", "second", {"path": "b"})
            assert queue.all() == [waiting]
            assert [p.name for p in queue.folder.iterdir() if p.is_dir()] == [waiting.id]
            lock.release()
            try:
                until(lambda: not waiting.open)  # its state could not be written, and it was done all the same
            finally:
                lock.acquire()
        assert "is not a known model" in error_of(waiting)
    assert queue.wait(queue.submit("inspect", "third", {"path": "c"}).id, 60).state == "failed"


def test_nothing_of_the_hosts_is_freed_for_a_job_that_cannot_run(make: Make, tmp_path: Path) -> None:
    freed = []

    @contextmanager
    def gpu_lease(job: Job) -> Iterator[None]:
        freed.append(job.id)
        yield

    def python() -> str:
        raise ConfigError("this program's Python lacks diffusers", advice="Press Set up")

    queue = make(gpu_lease=gpu_lease, python=python)
    job = queue.wait(queue.submit("erase", "x", asked(tmp_path / "run")).id, 30)
    assert (job.state, error_of(job)) == ("failed", "this program's Python lacks diffusers. Press Set up")
    assert freed == []


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> None:
    (folder / "child.py").write_text(program, encoding="utf-8")
    monkeypatch.setattr("extension.job_process.CHILD", folder / "child.py")


HALF = r"""
import json
print(json.dumps({"event": "message", "text": "cannot read \udcff.png"}), flush=True)
raise SystemExit(1)
"""


def test_half_a_character_in_a_name_ends_no_queue(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python spells a file's name that is no UTF-8."""
    queue = make()
    with monkeypatch.context() as patched:
        stand_in(patched, tmp_path, HALF)
        job = queue.wait(queue.submit("inspect", "x", {"path": "\udcff.safetensors"}).id, 30)
    assert (job.state, job.notes) == ("failed", ["cannot read \udcff.png"])
    assert json.loads((queue.folder / job.id / "job.json").read_text(encoding="utf-8"))["notes"] == job.notes
    later = queue.wait(queue.submit("inspect", "y", {"path": "gone"}).id, 60)
    assert "'gone' is not a known model" in error_of(later)


def test_what_cannot_be_written_down_is_no_job(make: Make) -> None:
    queue = make()
    with pytest.raises(ConfigError, match="the job cannot be written to disk"):
        queue.submit("inspect", "x", {"path": {1, 2}})
    assert (queue.all(), [p for p in queue.folder.iterdir() if p.is_dir()]) == ([], [])


MALFORMED = """
import json, time
print(json.dumps({"event": "stage"}), flush=True)
time.sleep(600)
"""


def test_no_child_continues_unheard(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's turn, with the memory of its device, ends with the child."""
    stand_in(monkeypatch, tmp_path, MALFORMED)
    queue = make()
    begun: list[subprocess.Popen[str]] = []
    start = job_process.start
    monkeypatch.setattr(job_process, "start", lambda *given: begun.append(start(*given)) or begun[0])
    job = queue.wait(queue.submit("inspect", "x", {"path": "a"}).id, 30)
    assert (job.state, error_of(job)) == ("failed", "KeyError: 'stage'")
    assert begun[0].poll() is not None


STEPS = """
import json, sys, threading, time
from pathlib import Path
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
for step in range(1, 20):
    print(json.dumps({"event": "stage", "stage": "training", "step": step, "total": 20, "fraction": 0, "left": None,
                      "metrics": {}}), flush=True)
    time.sleep(1.5)
    if stop.is_set():
        print(json.dumps({"event": "stopping"}), flush=True)
        time.sleep(0.5)
        Path("saved").touch()
        raise SystemExit(130)
"""


def test_a_step_of_training_that_takes_its_time_is_waited_for(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in the middle of it, a run would lose what it trained since it last saved. The stand-in's steps take
    longer than GRACE."""
    stand_in(monkeypatch, tmp_path, STEPS)
    queue = make()
    job = queue.submit("erase", "x", asked(tmp_path / "run"))
    until(lambda: job.step == 2)
    time.sleep(0.1)
    queue.cancel(job.id)
    assert queue.wait(job.id, 30).state == "cancelled"
    until(lambda: (queue.folder / job.id / "saved").exists(), 5)


DEAF = "import time; time.sleep(600)"


def test_a_cancel_while_the_child_is_being_begun_ends_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, DEAF)
    queue = make()
    start = job_process.start

    def slow(*given: Any) -> Any:
        queue.cancel(queue.all()[0].id)
        return start(*given)

    monkeypatch.setattr(job_process, "start", slow)
    job = queue.submit("inspect", "x", {"path": "a"})
    assert queue.wait(job.id, 10).state == "cancelled"


STAND_IN = """
import json, time
print(json.dumps({"event": "stage", "stage": STAGE, "step": 1, "total": 2, "fraction": 0.5,
                  "left": float("nan"), "metrics": {"forget": float("nan"), "retain": 1.0}}), flush=True)
time.sleep(2.5)
print(json.dumps({"event": "result", "result": {"figure": float("inf")}}), flush=True)
"""


@pytest.mark.parametrize(("stage", "state"), [("saving", "done"), ("training", "cancelled")])
def test_a_child_that_is_writing_its_files_is_left_to_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, state: str
) -> None:
    """Ended in the middle of that, a day's work would be lost; a step of training is only made again.

    The child is a stand-in that hears nothing for 2.5 s, more than GRACE. And no number reaches the job that JSON has
    not.
    """
    child = tmp_path / "child.py"
    child.write_text(STAND_IN.replace("STAGE", repr(stage)), encoding="utf-8")
    monkeypatch.setattr("extension.job_process.CHILD", child)
    queue = make()
    target = tmp_path / "models" / "erased.safetensors"
    target.parent.mkdir()
    job = queue.submit("erase", "x", asked(tmp_path / "run", output=[str(target)]))
    until(lambda: job.stage == stage)
    assert queue._child is not None
    half = target.with_name(f".{target.name}.0123456789abcdef.tmp")
    half.touch()
    queue.cancel(job.id)
    assert queue.wait(job.id, 30).state == state
    if state == "cancelled":  # and what it had half written goes with it
        until(lambda: not half.exists(), 10)
    assert (job.losses, job.left) == ([], None)
    kept = (queue.folder / job.id / "job.json").read_text(encoding="utf-8")
    json.loads(kept, parse_constant=lambda text: pytest.fail(f"{text} in job.json"))


def test_a_job_taken_off_the_list_does_not_come_back(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may still be coming to its end, and tell something."""
    child = tmp_path / "child.py"
    child.write_text(STAND_IN.replace("STAGE", "'training'"), encoding="utf-8")
    monkeypatch.setattr("extension.job_process.CHILD", child)
    monkeypatch.setattr("extension.job_queue.SAVE_EVERY", 0)
    queue = make()
    job = queue.submit("inspect", "x", {"path": "a"})
    until(lambda: job.stage == "training")
    with queue._change:
        queue._settle(job, "cancelled")  # as when it was ended without its answer
        queue.remove(job.id)
    time.sleep(3)
    assert not (queue.folder / job.id).exists()
    assert job.state == "cancelled"


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_a_job_costs_nothing(
    make: Make, tmp_path: Path, run_folder: Path
) -> None:
    """It fails with a message and without a partial file, and goes on to the same bytes once there is room."""
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(small)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.decode(errors='replace').strip()}")
    try:
        queue = make()
        job = queue.submit("erase", "x", asked(tmp_path / "run", output=[f"{small}/erased/"], **SHOWN), "run")
        until(lambda: job.stage == "saliency" or not job.open)
        free = shutil.disk_usage(small).free
        (small / "filler").write_bytes(bytes(free - 1_000_000))
        queue.wait(job.id, 120)
        assert job.state == "failed"
        assert "No space left" in error_of(job)
        assert error_of(job).endswith("The training is saved: correct the cause, then press Resume")
        assert [path.name for path in small.iterdir()] == ["filler"]
        (small / "filler").unlink()
        again = queue.wait(queue.resume(job.id).id, 120)
        assert (again.state, again.error) == ("done", None)
        name = "unet/diffusion_pytorch_model.safetensors"
        assert (small / "erased" / name).read_bytes() == (run_folder / "model" / name).read_bytes()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
