"""The command line as a user meets it: exit codes, one-line errors, clean JSON, and what only a real process shows."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from salun.masking.mask import Mask
from salun.runs.cache import Cache

from .conftest import run_command as salun

SHORT = ["--steps", "3", "--batch-size", "4", "--forget-latents", "8", "--retain-latents", "8", "--eval-images", "4"]
SHORT += ["--sampling-steps", "6"]


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As `salun`, but in a process of its own, into whose output libraries may write too."""
    command = [sys.executable, "-m", "salun", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def erased(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which `salun erase --json` ran."""
    folder = tmp_path_factory.mktemp("cli")
    done = process(
        "erase", "--concept", "circle", "--model", "shapes", "--run-dir", "run", *SHORT, "--json", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_json_is_one_object_and_nothing_else(erased: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = erased
    record = json.loads(done.stdout)
    assert record == json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["command"].startswith("salun erase --concept circle")


def test_erase_begins_with_its_plan_and_ends_with_the_verdict_the_files_and_a_line_to_try(tmp_path: Path) -> None:
    done = process("erase", "--concept", "night", *SHORT, "--output", "out.salun.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan, folder, *steps = done.stderr.splitlines()
    assert plan == "Erasing “night” (anchor: “plain”) from shapes by SalUn on 50 % of the weights, 3 steps"
    assert folder.startswith(f"Run folder: {tmp_path / 'runs'}")
    assert "5/7 Training: 3/3" in done.stderr and steps[0].startswith("1/7 Sampling: ")
    measured, verdict, files, line = done.stdout.strip().split("\n\n")
    assert "Forgotten (UA)" in measured and verdict.splitlines()[1].startswith("Next: ")
    paths = dict(each.split(":", 1) for each in files.splitlines())
    assert list(paths) == ["Delta", "Report", "Run folder"]
    assert all(Path(path.strip()).is_absolute() and Path(path.strip()).exists() for path in paths.values())
    command = shlex.split(line.removeprefix("Try it: "))
    assert command[:2] == ["salun", "sample"]
    for name in ("sample.png", "sample-2.png"):  # pasted twice
        tried = salun(*command[1:], "-n", "1", cwd=tmp_path)
        assert (tried.returncode, tried.stdout.strip()) == (0, str(tmp_path / name)), tried.stderr


def commands() -> dict[str, Any]:
    """Every command and group, by what follows `salun`."""
    from typer.main import get_command

    from cli.main import app

    root: Any = get_command(app)
    inner = {f"delta {name}": each for name, each in root.commands["delta"].commands.items()}
    return {"": root, **root.commands, **inner}


def test_every_help_has_examples_that_its_command_accepts() -> None:
    from cli.help import EXAMPLES

    listed = commands()
    assert set(EXAMPLES) == set(listed)
    for line in {line for of in EXAMPLES.values() for line in of}:
        assert len(line) <= 78, "it fits a terminal of 80 columns, indented"
        program, *arguments = shlex.split(line)
        name = next(n for n in (" ".join(arguments[:2]), arguments[0]) if n in listed)
        assert program == "salun"
        listed[name].make_context(name, arguments[len(name.split()) :])  # raises for what it does not accept


@pytest.mark.parametrize("name", ["", "erase", "delta apply"])
def test_help_shows_examples_and_fits_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from cli.help import EXAMPLES
    from cli.main import app

    monkeypatch.setenv("COLUMNS", "80")
    text = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="salun").output
    assert all(f"  {line}\n" in text for line in EXAMPLES[name])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


WRONG = [
    (["erase", "--concept", "dragon"], 2, "shape: circle, square"),
    (
        ["erase", "--concept", "circel", "--model", "shapes"],
        2,
        "vocabulary of the model shapes; did you mean 'circle'? `salun concepts --model shapes` lists all",
    ),
    (
        ["erase", "--concept", "circle", "--resume"],
        2,
        "--resume needs the folder of the run to resume. Give it by --run-dir",
    ),
    (["classify-train", "--model", "nope", "--run-dir", "run"], 1, "there is no model 'nope'"),
    (["compare", "--resume"], 2, "--resume needs the folder of the run to resume. Give it by --run-dir"),
    (["erase", "--concept", ""], 2, "--concept is empty"),
    (
        ["erase", "--concept", "circle", "--model", "shape"],
        1,
        "did you mean 'shapes'? Use a name that `salun models` lists",
    ),
    (["erase", "--concept", "circle", "--model", "nobody/nothing-here"], 1, "could not be downloaded"),
    (["erase", "--concept", "circle", "--density", "0"], 2, "--density is 0.0, but must be above 0"),
    (["erase", "--concept", "circle", "--density", "2"], 2, "--density is 2.0, but must be at most 1"),
    (["erase", "--concept", "circle", "--steps", "0"], 2, "--steps is 0, but must be at least 1"),
    (["erase", "--concept", "circle", "--mask", "best"], 2, "saliency-by-layer, shuffled, random, full"),
    (["erase", "--concept", "circle", "--mask", "gone.safetensors"], 1, "gone.safetensors cannot be read"),
    (["erase", "--concept", "circle", "--scope", "all"], 2, "full, xattn, xattn-strict, selfattn, attn, noxattn"),
    (["erase", "--concept", "circle", "--retain-prompts", " "], 2, "empty prompt"),
    (["erase", "--concept", "circle", "--device", "tpu9"], 2, "--device is tpu9, which is not available"),
    (["erase", "--concept", "circle", "--recipe", "paper"], 2, "the paper has no recipe"),
    (["erase", "--concept", "circle", "--output", "model.ckpt"], 2, "End it in .safetensors"),
    (["erase"], 2, "no concept is given"),
    (["erase", "--resume", "--run-dir", "nowhere"], 2, "there is no run in nowhere to resume, and no concept is given"),
    (["erase", "circle"], 2, "To name a concept: --concept circle"),
    (["erase", "red circle"], 2, "unexpected argument 'red circle'. To name a concept: --concept 'red circle'"),
    (["mask", "circle", "--scope", "full"], 2, "unexpected argument 'circle'. To name a concept: --concept circle"),
    (["sample", "red", "circle"], 2, "unexpected argument 'red circle'. To give a prompt: --prompt 'red circle'"),
    (["mask"], 2, "Missing option '--concept'"),
    (["erase", "--concept", "nudity"], 2, "The bundled demo model is used because no --model is given"),
    (["delta", "apply", "shapes", "gone.salun.safetensors", "--output", "x"], 1, "gone.salun.safetensors"),
    (["erase", "--config", "nowhere.yaml"], 2, "nowhere.yaml cannot be read"),
    (["mask", "--concept", "circle", "--output", "mask.png"], 2, "--output is mask.png, but must end in .safetensors"),
    (["eval", "nowhere"], 2, "nowhere is not a run folder, so a concept is needed"),
    (["eval", "nowhere", "--concept", "nudity"], 1, "nowhere"),
    (["inspect", "nowhere.safetensors"], 1, "nowhere.safetensors does not exist"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_mistakes_are_one_line_and_leave_nothing(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = salun(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("erase", "--concept", "circle", "--model", "gone.safetensors"),
        ("erase", "--concept", "circle", "--model", "gone.safetensors", "--dry-run"),
        ("classify-train", "--data", "gone"),
        ("train", "--data", "gone"),
        ("compare", "--concept", "circle", "--model", "gone.safetensors"),
    ],
    ids=" ".join,
)
def test_resume_where_no_run_is_says_so(arguments: tuple[str, ...], tmp_path: Path) -> None:
    note = "There is no run in nowhere to resume; a new one starts"
    resumed = salun(*arguments, "--resume", "--run-dir", "nowhere", cwd=tmp_path).stderr.splitlines()
    assert resumed[0] == note and len(resumed) == 2, "what is missing comes after it"
    assert note not in salun(*arguments, "--run-dir", "nowhere", cwd=tmp_path).stderr


@pytest.mark.parametrize(("arguments", "code", "message"), [WRONG[0], WRONG[3], WRONG[22]])
def test_libraries_print_nothing_beside_that_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = process(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1), done.stderr
    assert message in done.stderr


def test_an_unknown_option_is_wrong_usage(tmp_path: Path) -> None:
    assert salun("erase", "--concept", "circle", "--densty", "0.5", cwd=tmp_path).returncode == 2


def test_the_single_steps_work(erased: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = erased
    masked = salun(
        "mask", "--concept", "red", "--density", "0.1", "--forget-latents", "4", "--output", "m.safetensors", cwd=folder
    )
    assert masked.returncode == 0, masked.stderr
    assert "(10.00%) selected" in masked.stdout
    looked = json.loads(salun("inspect", "m.safetensors", "--json", cwd=folder).stdout)
    assert (looked["kind"], looked["concept"], looked["density"]) == ("mask", "red", pytest.approx(0.1, abs=1e-6))
    assert json.loads(salun("inspect", "shapes", "--json", cwd=folder).stdout)["base_hash"] == looked["base_hash"]
    assert json.loads(salun("inspect", "run", "--json", cwd=folder).stdout)["status"] == "done"
    delta = "run/delta.salun.safetensors"
    assert json.loads(salun("inspect", delta, "--json", cwd=folder).stdout)["salun.concept"] == "circle"
    for name, options in (
        ("base", []),
        ("erased", ["--delta", delta]),
        ("none", ["--delta", delta, "--strength", "0"]),
    ):
        done = salun("sample", "--prompt", "one red circle", "-n", "2", "--output", f"{name}.png", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "1/2 Sampling: 2/2\n2/2 Saving: 1/1\n" in done.stderr
    pictures = {name: (folder / f"{name}.png").read_bytes() for name in ("base", "erased", "none")}
    assert pictures["base"] == pictures["none"] != pictures["erased"]


def test_inspect_draws_what_a_mask_and_a_run_touch(erased: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = erased
    shown = salun("inspect", "run", "--html", "layers.html", cwd=folder).stdout
    assert "Fraction of each block in the mask:" in shown
    assert "Fraction of each block that changed:" in shown
    assert max(map(len, shown.split("\n\n")[1].splitlines())) <= 80
    assert "\nForgotten (UA):" in shown and re.search(r"\nNext: .*\n", shown), "what erase said"
    assert re.search(r"mid_block.\w+ +█+ +\d+\.\d% of", shown)
    page = (folder / "layers.html").read_text(encoding="utf-8")
    found = json.loads(salun("inspect", "run", "--json", cwd=folder).stdout)
    assert page.count("<svg") == 3
    assert page.count('class="bar"') == len(found["blocks"]) + len(found["moved"]) + len(found["layers"]) > 200
    assert "http" not in page
    assert sum(some for some, _ in found["blocks"].values()) == 2118978  # half of 4,237,956
    assert sum(some for some, _ in found["moved"].values()) <= 2118978
    same = json.loads(salun("inspect", "run", "--against", "run/mask.safetensors", "--json", cwd=folder).stdout)
    assert same["jaccard"] == 1
    assert same["by_chance"] == pytest.approx(1 / 3, abs=1e-6)  # of two halves: a quarter in both, three in either


def test_the_doctor_looks_at_everything(tmp_path: Path) -> None:
    done = salun("doctor", "--offline", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {one["what"]: one for one in json.loads(done.stdout)}
    for what in (
        "salun",
        "Python",
        "torch",
        "CPU",
        "attention",
        "xformers",
        "working folder",
        "cache",
        "hub",
        "erasing",
    ):
        assert what in found
    assert "worked" in found["erasing"]["found"]
    assert not any(one["verdict"] == "fails" for one in found.values())
    text = salun("doctor", "--offline", cwd=tmp_path).stdout
    assert "ok     torch" in text
    assert not list(tmp_path.iterdir())


def test_the_doctor_says_what_will_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALUN_CACHE_SIZE", "plenty")
    done = salun("doctor", "--offline", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAILS  cache: SALUN_CACHE_SIZE is 'plenty'" in done.stdout


def test_shell_completion_can_be_shown(tmp_path: Path) -> None:
    # the shell is recognised among the processes above, so one has to be there
    command = f"{shlex.quote(sys.executable)} -m salun --show-completion; exit $?"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "complete -o default -F _salun_completion salun" in done.stdout


def test_lists(tmp_path: Path) -> None:
    assert "nudity" in salun("concepts", cwd=tmp_path).stdout
    assert (
        json.loads(salun("concepts", "--model", "shapes", "--json", cwd=tmp_path).stdout)["circle"]["anchor"]
        == "square"
    )
    assert {"shapes", "sd15", "sd14", "sd21", "sdxl"} <= set(json.loads(salun("models", "--json", cwd=tmp_path).stdout))


def test_a_second_run_does_not_overwrite_the_first(erased: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = erased
    before = (folder / "run" / "run.json").read_bytes()
    done = salun("erase", "--concept", "circle", "--run-dir", "run", *SHORT, cwd=folder)
    assert done.returncode == 2
    assert "holds a finished run" in done.stderr
    assert (folder / "run" / "run.json").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_stops_within_a_step_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "salun", "erase", "--concept", "circle", "--run-dir", "run"]
    command += ["--output", "out.salun.safetensors", "--force"]  # which only the command line may allow
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("1/7 Sampling"):
                break
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "salun erase --resume --run-dir run --output out.salun.safetensors --force" in rest
    assert time.monotonic() - began < 30  # a sampling batch of 64 on a busy machine
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "cancelled"
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("seconds", "times"), [(0.15, 1), (0.6, 1), (2.0, 1), (1.0, 3), (3.0, 3)])
def test_ctrl_c_ends_with_130_and_one_line_at_any_moment(seconds: float, times: int, tmp_path: Path) -> None:
    """During imports, while the model is loaded, and while another Ctrl-C is at work."""
    command = [sys.executable, "-m", "salun", "erase", "--concept", "circle", "--run-dir", "run", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for i in range(times):
            time.sleep(seconds if not i else 0.05)
            process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert (process.returncode, len(printed.splitlines())) == (130, 1), printed
    assert printed.startswith("salun: interrupted")


RESUMABLE = """
import signal
from pathlib import Path
from cli import interrupt
from cli.resuming import resumable
interrupt.install()
with interrupt.working(), resumable("erase", Path("run"), ["--force"]):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
"""
REPEATABLE = RESUMABLE.replace("import resumable", "import repeatable").replace(
    'resumable("erase", Path("run"), ["--force"])', "repeatable()"
)
PAGE = """
import signal
from types import SimpleNamespace
from cli import interrupt, main, ui
def serve(*_):
    signal.raise_signal(signal.SIGINT)
ui._page = lambda: SimpleNamespace(serve=serve)
main.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("program", "run", "line"),
    [
        (RESUMABLE, True, "interrupted; resume with: salun erase --resume --run-dir run --force"),
        (RESUMABLE, False, "interrupted. Run the command again to restart"),
        (REPEATABLE, False, "interrupted. Run the command again to continue it"),
        (PAGE, False, "stopped. Queued jobs start at the next start with the same --data; a job that was running can "
            "be resumed"),
    ],
)  # fmt: skip
def test_ctrl_c_tells_the_line_of_what_was_under_way(program: str, run: bool, line: str, tmp_path: Path) -> None:
    """Also where the process ends at once, upon a Ctrl-C while an earlier one is at work."""
    if run:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").touch()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", program, "ui"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (130, f"salun: {line}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
def test_a_command_works_with_closed_standard_streams(tmp_path: Path) -> None:
    """The first file that is opened would take their numbers, and a library's warning would land in it."""
    options = shlex.join(["--concept", "circle", "--output", "m.safetensors", "--mask", "random"])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    for closed in ("2>&-", "0<&- 1>&- 2>&-"):
        command = f"{shlex.quote(sys.executable)} -m salun mask {options} --force {closed}"
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, closed
        (tmp_path / "m.safetensors").unlink()


def test_json_holds_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    """Names in a file may be a stranger's: a terminal obeys C1 controls, and U+202E turns what follows it around."""
    concept = "a\u202eb\x9b31mc\u2066"
    mask = Mask.from_dense({"conv_in.weight": torch.ones(2, 3, dtype=torch.bool)})
    Mask(mask.bits, mask.shapes, {"concept": concept}).save(tmp_path / "m.safetensors")
    done = salun("inspect", "m.safetensors", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(c.isprintable() for c in done.stdout.rstrip("\n"))
    assert json.loads(done.stdout)["concept"] == concept


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (41, "41 s"), (100, "2 min"), (3_599, "1 hour"), (12_000, "3 hours 20 min"), (86_400, "1 day"),
     (187_200, "2 days 4 hours"), (604_700, "7 days")],
)  # fmt: skip
def test_times_are_said_in_words(seconds: float, text: str) -> None:
    from cli.output import duration

    assert duration(seconds) == text


def test_hashes_are_shortened_except_in_paths() -> None:
    from cli.output import shortened

    digest = "0123456789ab" + "c" * 52
    path = f"/models/{digest}/unet"
    assert shortened(f"needs {digest}, not {path}.") == f"needs 0123456789ab…, not {path}."


def test_a_run_json_repeats_the_run(erased: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = erased
    done = salun("erase", "--config", "run/run.json", "--run-dir", "again", cwd=folder)
    assert done.returncode == 0, done.stderr
    for name in ("mask.safetensors", "delta.salun.safetensors", "before_after.png"):
        assert (folder / "again" / name).read_bytes() == (folder / "run" / name).read_bytes()


def test_resume_of_a_finished_run_says_so(erased: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = erased
    before = (folder / "run" / "run.json").read_bytes()
    done = salun("erase", "--concept", "circle", "--run-dir", "run", "--resume", "--steps", "3", cwd=folder)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        ["the run in run is finished", f"report: {Path('run', 'report.html')}"],
    ), done.stderr
    other = salun("erase", "--run-dir", "run", "--resume", "--steps", "4", cwd=folder)
    assert (other.returncode, "finished run with steps 3, not 4" in other.stderr) == (2, True)
    assert (folder / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["erase", "--model", "sd15", "--concept", "circle"], "a finished run with model 'shapes', not 'sd15'"),
        (["erase", "--model", "./other"], "a finished run with model 'shapes', not './other'"),
        (["erase", "--mask", "nofile.safetensors"], "finished run with mask 'saliency', not 'nofile.safetensors'"),
        (["erase", "--config", "other.yaml"], "a finished run with steps 3, not 4"),
        (
            ["erase", "--output", "new.safetensors"],
            "that has no output new.safetensors. Write it by "
            "`salun delta apply shapes run/delta.salun.safetensors --output new.safetensors`",
        ),
        (["erase", "--output", "other.yaml"], "that did not write other.yaml"),
        (["erase", "--output", "new.lora.safetensors"], "salun delta export run/delta.salun.safetensors --base shapes"),
        (["classify-unlearn"], "which contains a run of `salun erase`, not classify-unlearn"),
        (["classify-compare"], "which contains a run of `salun erase`, not classify-compare"),
    ],
)
def test_resume_of_a_finished_run_refuses_another_request(
    arguments: list[str], message: str, erased: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, _ = erased
    (folder / "other.yaml").write_text("steps: 4\n", encoding="utf-8")
    done = salun(*arguments, "--resume", "--run-dir", "run", cwd=folder)
    assert (done.returncode, done.stdout, message in done.stderr) == (2, "", True), done.stderr


@pytest.mark.parametrize("arguments", [["--config", "run/run.json"], ["--model", "shapes"], ["--output", "run/model/"]])
def test_resume_of_a_finished_run_accepts_the_same_request(
    arguments: list[str], erased: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    done = salun("erase", *arguments, "--resume", "--run-dir", "run", cwd=erased[0])
    assert (done.returncode, "the run in run is finished" in done.stdout) == (0, True), done.stderr


def foreign_run(folder: Path, **options: object) -> Path:
    """The folder of an unfinished run that somebody else made."""
    (folder / "run").mkdir()
    record = {"schema": 1, "status": "cancelled", "options": {"model": "shapes", "concept": ["circle"], **options}}
    (folder / "run" / "run.json").write_text(json.dumps({**record, "force": True}), encoding="utf-8")
    return folder / "run"


@pytest.mark.parametrize("there", [True, False])
def test_resume_writes_outside_the_run_folder_only_what_the_command_line_names(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "precious.safetensors"
    if there:
        target.write_bytes(b"the user's")
    foreign_run(tmp_path, output=[str(target)])
    done = salun("erase", "--resume", "--run-dir", "run", cwd=tmp_path)
    assert (done.returncode, f"--output {target}" in done.stderr) == (2, True), done.stderr
    assert (target.read_bytes() if there else target.exists()) == (b"the user's" if there else False)


def test_resume_reads_a_pickle_only_where_the_command_line_allows_it(tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    foreign_run(tmp_path, model=str(tmp_path / "m.ckpt"), allow_pickle=True)
    done = salun("erase", "--resume", "--run-dir", "run", cwd=tmp_path)
    assert (done.returncode, "--allow-pickle" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_resume_without_the_recorded_model_says_how_to_name_it(dry_run: list[str], tmp_path: Path) -> None:
    foreign_run(tmp_path, model="rel.safetensors")
    done = salun("erase", "--resume", "--run-dir", "run", *dry_run, cwd=tmp_path)
    assert done.returncode == 1
    assert "rel.safetensors does not exist" in done.stderr
    assert "give its new path by --model" in done.stderr


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("concept: circle\nsteps: 7\nbatch-size: 4\n", encoding="utf-8")
    done = salun("erase", "--config", "job.yaml", "--batch-size", "3", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    chosen = {name: found["options"][name] for name in ("steps", "batch_size", "lr", "density", "anchor")}
    assert chosen == {"steps": 7, "batch_size": 3, "lr": 3e-4, "density": 0.5, "anchor": []}
    where = {name: found["sources"][name] for name in chosen}
    assert where == {
        "steps": "job.yaml",
        "batch_size": "command line",
        "lr": "recipe",
        "density": "default",
        "anchor": "preset",
    }
    assert found["concepts"] == [{"name": "circle", "anchor": "square"}]
    assert found["memory"]["needed"] > 10e6
    assert found["disk"]["needed"] > 10e6
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"]
    shown = salun("erase", "--config", "job.yaml", "--steps", "1", "--dry-run", cwd=tmp_path).stdout
    assert re.search(r"--steps +1 +command line", shown) and re.search(r"--seed +0 ", shown)
    assert re.search(r"--deterministic +yes ", shown)
    assert not re.search(r"None|\[\]", shown)


def test_the_cache_is_shown_and_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALUN_CACHE", str(tmp_path / "kept"))
    Cache(tmp_path / "kept").put("ab" * 32, {"x": torch.ones(100)})
    shown = json.loads(salun("cache", "--json", cwd=tmp_path).stdout)
    assert (shown["entries"], shown["folder"]) == (1, str(tmp_path / "kept"))
    assert shown["bytes"] > 400
    assert "1 entry removed" in salun("cache", "--clear", cwd=tmp_path).stdout
    assert json.loads(salun("cache", "--json", cwd=tmp_path).stdout)["entries"] == 0


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = "import sys; sys.argv = ['salun', '--help']; from salun.__main__ import main\n"
    program += "try: main()\nexcept SystemExit: pass\n"
    program += "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip().endswith("[]")
