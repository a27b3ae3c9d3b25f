"""Files that are not what they should be: one clear line that names the file, nothing changed and nothing left behind.

Through the command line's own `main`, in this process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import salun
from salun.__main__ import main
from salun.checkpoints import keymap, safetensors_io
from salun.delta.delta import Delta
from salun.errors import ModelError
from salun.masking.mask import Mask
from salun.progress import Event
from tools import checkpoints

FILE = "x.safetensors"
SHORT = {"steps": 1, "batch_size": 2, "forget_latents": 2, "retain_latents": 2, "eval_images": 0, "resolution": 64}
ERASE = [
    "erase",
    "--concept",
    "a cat",
    "--model",
    FILE,
    "--run-dir",
    "run",
    "--device",
    "cpu",
    "--output",
    "out.safetensors",
]
ERASE += [word for name, value in SHORT.items() for word in (f"--{name.replace('_', '-')}", str(value))]
INSPECT = ["inspect", FILE]
Damage = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that can be erased from."""
    return checkpoints.make(tmp_path_factory.mktemp("whole") / "whole.safetensors", "sd1")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small files of each kind: a checkpoint (without VAE and text encoder), a mask and a delta."""
    folder = tmp_path_factory.mktemp("sound")
    checkpoints.make(folder / "checkpoint", "sd1", vae=False, text=False)
    weights = {f"down_blocks.{i}.w": torch.rand(9, 70) for i in range(5)}
    Mask.from_scores(weights, 0.5).save(folder / "mask")
    Delta.between(weights, {name: weight + 1 for name, weight in weights.items()}).save(folder / "delta")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs: an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    before, sys.argv = sys.argv, ["salun", *arguments]
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    said = capsys.readouterr()
    assert isinstance(code, int)
    return code, said.out, said.err


def snapshot(folder: Path) -> dict[str, Any]:
    """All that lies in a folder: links by where they go, files by size, time and content where that is not vast."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        seen = path.lstat()
        held = path.read_bytes() if path.is_file() and not path.is_symlink() and seen.st_size < 1 << 28 else None
        link = os.readlink(path) if path.is_symlink() else None
        found[path.relative_to(folder).as_posix()] = (seen.st_size, seen.st_mtime_ns * path.is_file(), link, held)
    return found


def refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], code: int | None = None, name: str = FILE
) -> None:
    """The command ends in one line that names the file, and changes nothing in its folder."""
    before = snapshot(Path())
    ended, out, err = call(arguments, capsys)
    assert ended == code if code is not None else ended in (1, 2), err
    (line,) = err.splitlines()
    assert line.startswith("salun: ")
    assert name in line
    assert message in line
    assert len(line) < 1000
    assert line.isprintable()
    assert not out
    assert snapshot(Path()) == before


# -- files that are not sound -----------------------------------------------------------------------------------------


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a sound file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def packed(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def length(of: int) -> Damage:
    return lambda content: of.to_bytes(8, "little") + content[8:]


def with_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The header says something else; the body stays."""

    def damage(content: bytes) -> bytes:
        header, body = parts(content)
        change(header)
        return packed(header, body)

    return damage


def first(header: dict[str, Any]) -> dict[str, Any]:
    """What the header says of some tensor of a few bytes, with others before it."""
    held = ((entry, *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
    return next(entry for entry, start, end in held if start > 8 and end - start > 16)


def shift(by: int, side: slice) -> Damage:
    def change(header: dict[str, Any]) -> None:
        entry = first(header)
        entry["data_offsets"][side] = [end + by for end in entry["data_offsets"][side]]

    return with_header(change)


def twice(content: bytes) -> bytes:
    header, body = parts(content)
    again = json.dumps({name: entry for name, entry in header.items() if entry is first(header)})
    return packed((json.dumps(header)[:-1] + "," + again[1:]).encode(), body)


def entry(**changes: Any) -> Damage:
    return with_header(lambda header: first(header).update(changes))


ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
UNSOUND: dict[str, tuple[Damage, str]] = {
    "of no bytes": (lambda content: b"", "it is empty"),
    "of seven bytes": (lambda content: content[:7], "in a file of 7"),
    "of a length alone": (lambda content: content[:8], "in a file of 8"),
    "with a truncated header": (lambda content: content[:300], "in a file of 300"),
    "truncated": (lambda content: content[:-10], "truncated?"),
    "with something behind": (lambda content: content + b"\0", "truncated?"),
    "with a header longer than the file": (lambda content: length(len(content))(content), "a header of"),
    "with a header of no bytes": (length(0), "a header of 0 bytes"),
    "with a header of 2^64 bytes": (length(2**64 - 1), f"a header of {2**64 - 1} bytes"),
    "with a header cut by its length": (length(200), "its header is not JSON"),
    "with overlapping offsets": (shift(-8, slice(0, 2)), "begins at byte"),
    "with a gap": (shift(8, slice(0, 2)), "begins at byte"),
    "with an offset too far": (shift(8, slice(1, 2)), "but its shape"),
    "with offsets backwards": (with_header(lambda h: first(h)["data_offsets"].reverse()), "but its shape"),
    "with a name twice": (twice, "a name occurs twice"),
    "without offsets": (with_header(lambda h: first(h).pop("data_offsets")), "lacks dtype, shape or offsets"),
    "without a shape": (with_header(lambda h: first(h).pop("shape")), "lacks dtype, shape or offsets"),
    "with a shape too large for its bytes": (entry(shape=[10**9, 10**9]), "but its shape"),
    "with a shape too large for anything": (entry(shape=[10**4000] * 16), "an invalid shape"),
    "with a shape of nothing, but far too large": (
        entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
        "an invalid shape",
    ),
    "with a shape of too many sides": (entry(shape=[1] * 10_000), "an invalid shape"),
    "with a negative shape": (entry(shape=[-2, -2]), "an invalid shape"),
    "with a fraction in a shape": (entry(shape=[2.0, 2.0]), "an invalid shape"),
    "with a truth in a shape": (entry(shape=[True, 2]), "an invalid shape"),
    "with a text as shape": (entry(shape="22"), "an invalid shape"),
    "of an unknown dtype": (entry(dtype="F99"), "unknown dtype 'F99'"),
    "of a list of dtypes": (entry(dtype=["F32"]), "unknown dtype"),
    "of another dtype than its bytes": (entry(dtype="F64"), "but its shape"),
    "with a list as header": (lambda content: packed([]), "not a JSON object"),
    "with lists in lists": (lambda content: packed(b"[" * 100_000), "not JSON"),
    "with a header in no encoding": (lambda content: packed(b'{"\xff\xfe":0}'), "not JSON"),
    "with half a character": (
        lambda content: packed(b'{"\\ud800":' + json.dumps(ONE).encode() + b"}", b"\0"),
        "Unicode",
    ),
    "with numbers as metadata": (with_header(lambda h: h.update(__metadata__={"a": 1})), "metadata are not strings"),
    "with a list as metadata": (with_header(lambda h: h.update(__metadata__=[])), "metadata are not strings"),
    "with a name that a terminal obeys": (
        lambda content: packed({"\x1b[31m\r\n\u202e": {**ONE, "dtype": "X"}}, b"\0"),
        "\\x1b[31m \\u202e has the unknown dtype",
    ),
    "with a name of a megabyte": (lambda content: packed({"x" * 2**20: {**ONE, "dtype": "X"}}, b"\0"), "xxx… has"),
    "that is a web page": (lambda content: b"<!DOCTYPE html><html><head><title>Not found</title>" * 9, "an HTML page"),
    "that is a pointer of git-lfs": (
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid x",
        "it is a Git LFS pointer. Download the file that it stands for",
    ),
    "of zero bytes": (lambda content: bytes(len(content)), "filled with zero bytes"),
}


@pytest.mark.parametrize("what", UNSOUND)
@pytest.mark.parametrize("kind", ["checkpoint", "mask", "delta"])
def test_a_file_that_is_invalid_is_reported(
    kind: str, what: str, sound: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = UNSOUND[what]
    Path(FILE).write_bytes(damage(sound[kind]))
    for arguments in (INSPECT, ERASE) if kind == "checkpoint" else (INSPECT,):
        refused(arguments, message, capsys, code=1)


def test_a_header_of_a_gigabyte_is_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    size = 1 << 30
    with open(FILE, "wb") as file:
        file.write(size.to_bytes(8, "little") + b'{"x":')
        file.truncate(size + 100)  # most of it is no bytes on the disk
    for arguments in (INSPECT, ERASE):
        refused(arguments, f"a header of {size} bytes", capsys, code=1)


class Trap:
    """Pickled, it leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_another_name_is_never_unpickled(zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"x": torch.ones(3)}, "trap": Trap()}, FILE, _use_new_zipfile_serialization=zipped)
    for arguments in (INSPECT, ERASE, [*ERASE, "--allow-pickle"]):
        refused(arguments, "is a pickle", capsys, code=1)
    assert not Path("trapped").exists()


def test_what_is_not_a_file_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    for make, message in (
        (lambda: Path(FILE).mkdir(), "not a diffusers model"),
        (lambda: Path(FILE).symlink_to(FILE), FILE),  # a loop
        (lambda: Path(FILE).symlink_to("nowhere"), "does not exist"),
        (lambda: os.mkfifo(FILE), "is not a file"),
        (lambda: None, "does not exist"),
    ):
        make()
        for arguments in (INSPECT, ERASE):
            refused(arguments, message, capsys)
        if os.path.lexists(FILE):
            Path(FILE).rmdir() if Path(FILE).is_dir() else Path(FILE).unlink()


# -- sound files that hold no whole model -----------------------------------------------------------------------------

UNET = f"{keymap.UNET}middle_block.0.in_layers.2.weight"
VAE = "first_stage_model.decoder.mid.block_1.conv1.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
Change = Callable[[dict[str, torch.Tensor]], object]


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def spoilt(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One entry is this value."""
    return lambda tensor: tensor.index_put((torch.tensor(1),) * tensor.dim(), torch.tensor(value, dtype=tensor.dtype))


BROKEN: dict[str, tuple[Change, str]] = {
    "a missing weight": (lambda t: t.pop(UNET), "lacks mid_block.resnets.0.conv1.weight"),
    "a missing end": (lambda t: t.pop(f"{keymap.UNET}out.2.weight"), f"lacks {keymap.UNET}out.2.weight"),
    "a missing weight of the VAE": (lambda t: t.pop(VAE), "lacks decoder.mid_block.resnets.0.conv1.weight"),
    "a missing weight of the text encoder": (lambda t: t.pop(TEXT), "lacks cond_stage_model"),
    "a strange weight": (lambda t: t.update({f"{keymap.UNET}strange": t[UNET]}), "that no Stable Diffusion UNet has"),
    "a weight too many": (
        lambda t: t.update({f"{keymap.UNET}middle_block.0.skip_connection.weight": t[UNET]}),
        "unexpected tensors: model.diffusion_model.middle_block.0.skip_connection.weight",
    ),
    "a weight of the VAE too many": (
        lambda t: t.update({"first_stage_model.decoder.mid.block_1.nin_shortcut.weight": t[VAE]}),
        "nin_shortcut.weight",
    ),
    "a misshapen weight": (put(UNET, lambda w: w[:, :32]), f"{UNET} has the shape [64, 32, 3, 3]"),
    "a flat weight": (put(UNET, torch.flatten), f"{UNET} has the shape [36864]"),
    "a misshapen weight of the VAE": (put(VAE, lambda w: w[:, :16]), f"{VAE} has the shape [32, 16, 3, 3]"),
    "a misshapen weight of the text encoder": (put(TEXT, torch.t), f"{TEXT} has the shape [64, 256]"),
    "whole numbers as a weight": (put(UNET, torch.Tensor.long), f"{UNET} has the unsupported weight dtype I64"),
    "truths as a weight": (put(UNET, torch.Tensor.bool), f"{UNET} has the unsupported weight dtype BOOL"),
    "bytes as a weight of the VAE": (put(VAE, torch.Tensor.byte), VAE),
    "whole numbers as a weight of the text encoder": (put(TEXT, torch.Tensor.int), TEXT),
    "NaN": (put(UNET, spoilt(float("nan"))), "is not finite"),
    "infinity": (put(UNET, spoilt(float("-inf"))), "is not finite"),
    "NaN in the VAE": (put(VAE, spoilt(float("nan"))), "is not finite"),
    "infinity in the text encoder": (put(TEXT, spoilt(float("inf"))), "is not finite"),
}
SEEN = ["a strange weight", "a missing end", "whole numbers as a weight", "truths as a weight"]
UNREAD = ["NaN in the VAE", "infinity in the text encoder"]
TOLD = [what for what in BROKEN if what not in (*SEEN, *UNREAD)]  # values of the UNet alone are read, for its hash


def broken(what: str, whole: Path) -> str:
    """Writes the file; gives what its refusal says."""
    change, message = BROKEN[what]
    tensors = load_file(whole)
    change(tensors)
    safetensors_io.write(Path(FILE), {name: tensor.contiguous() for name, tensor in tensors.items()})
    return message


@pytest.mark.parametrize("what", BROKEN)
def test_file_without_a_complete_model_is_rejected(what: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(ERASE, broken(what, whole), capsys, code=1)


@pytest.mark.parametrize("what", [*SEEN, *TOLD])
def test_inspect_says_what_is_in_the_way(what: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = broken(what, whole)
    if what in SEEN:
        refused(INSPECT, message, capsys, code=1)
        return
    code, out, err = call([*INSPECT, "--json"], capsys)
    assert (code, err) == (0, "")
    assert message in json.loads(out)["verdict"]


def test_a_file_without_vae_and_text_encoder_says_what_to_add(
    sound: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(FILE).write_bytes(sound["checkpoint"])
    refused(ERASE, "components", capsys, code=1)


@pytest.mark.parametrize(
    "metadata", [{"a": "\x1b[31m\n"}, {"": ""}, {"salun.x": "y" * 2**20}, {"modelspec.prediction_type": "x"}]
)
def test_odd_metadata_do_no_harm(metadata: dict[str, str], whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    safetensors_io.rewrite(whole, Path(FILE), {}, metadata)
    code, out, err = call(INSPECT, capsys)
    assert (code, err) == (0, "")
    assert "verdict:         salun can erase from it" in out
    assert "\x1b" not in out


# -- bad luck on the way ----------------------------------------------------------------------------------------------


@pytest.fixture
def model(whole: Path) -> Path:
    return Path(shutil.copy(whole, FILE))


def test_a_checkpoint_can_be_erased_from(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What all the refusals are measured by."""
    before = snapshot(Path())
    code, _, err = call(ERASE, capsys)
    assert code == 0, err
    assert snapshot(Path())[FILE] == before[FILE]
    assert set(load_file("out.safetensors")) == set(load_file(FILE))


@pytest.mark.parametrize("way", [FILE, f"./sub/../{FILE}", "symlink.safetensors", "hard.safetensors"])
def test_the_output_is_never_the_input(way: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub").mkdir()
    Path("symlink.safetensors").symlink_to(FILE)
    Path("hard.safetensors").hardlink_to(FILE)
    for force in ([], ["--force"]):
        refused([*ERASE, "--output", way, *force], "output", capsys, name=Path(way).name)
        mask = ["mask", "--concept", "golf ball", "--device", "cpu", "--model", FILE]
        refused([*mask, "--output", way, *force], "output", capsys, name=Path(way).name)


def test_a_run_folder_in_the_way_is_reported(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").write_text("in the way", encoding="utf-8")
    refused(ERASE, "cannot be", capsys, name="run")
    refused([*ERASE, "--run-dir", FILE], "", capsys)


def test_a_disk_without_room_is_reported_before_the_work(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(100, 90, 10))
    refused(ERASE, "free", capsys, name="out.safetensors")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 60 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(place)]
    if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_leaves_no_half_file(model: Path, small_disk: Path) -> None:
    before = model.read_bytes()

    def fill(event: Event, /) -> None:
        if event.stage == "saving" and not (small_disk / "ballast").exists():
            free = shutil.disk_usage(small_disk).free
            (small_disk / "ballast").write_bytes(b"\0" * (free - 1_000_000))

    with pytest.raises(ModelError, match="Free disk space"):
        salun.erase(
            FILE,
            "a cat",
            outputs=[str(small_disk / "out.safetensors")],
            run_dir="run",
            progress=fill,
            device="cpu",
            **SHORT,
        )
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    assert model.read_bytes() == before


def write_to(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    later(path)


def later(path: Path) -> None:
    seen = path.stat()
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1_000_000_000))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("meddle", [write_to, cut, Path.unlink])
@pytest.mark.parametrize("stage", ["saliency", "training", "saving"])
def test_a_file_that_changes_during_a_run_is_reported(stage: str, meddle: Callable[[Path], None], model: Path) -> None:
    done: list[str] = []

    def interfere(event: Event, /) -> None:
        if event.stage == stage and not done:
            done.append(stage)
            meddle(model)

    with pytest.raises(ModelError, match=r"x\.safetensors (was modified|cannot be read)"):
        salun.erase(
            FILE, "a cat", outputs=["out.safetensors"], run_dir="run", progress=interfere, device="cpu", **SHORT
        )
    assert done
    assert not list(Path().glob("*out.safetensors*"))
    assert json.loads(Path("run/run.json").read_text(encoding="utf-8"))["status"] == "failed"


def test_the_real_command_says_the_same(sound: dict[str, bytes]) -> None:
    Path(FILE).write_bytes(sound["checkpoint"][:-10])
    root = Path(salun.__file__).parents[1]
    command = [sys.executable, "-m", "salun", *ERASE]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"salun: {FILE} is not a valid safetensors file")
    assert [path.name for path in Path().iterdir()] == [FILE]
