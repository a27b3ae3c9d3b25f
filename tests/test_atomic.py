"""Files and folders that appear whole: their temporary names cannot be guessed, and what is being written stays."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from salun.checkpoints import safetensors_io
from salun.errors import ModelError
from salun.files import (
    abandoned,
    atomic,
    new_folder,
    placed,
    recover_interrupted_write,
    remove_leftovers,
    temporary_folder,
)
from salun.runs.cache import Cache

posix = pytest.mark.skipif(sys.platform == "win32", reason="links and locks of POSIX")
WRITER = """
import sys
from pathlib import Path
from salun.files import atomic, temporary_folder
from salun.files import recover_interrupted_write

path = Path(sys.argv[2])
with atomic(path, 1) if sys.argv[1] == "file" else temporary_folder(path) as made:
    print("ready", flush=True)
    sys.stdin.readline()
"""


def writer(kind: str, path: Path) -> subprocess.Popen[str]:
    """Another process, in the middle of writing."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    made = subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert made.stdout is not None and made.stdout.readline() == "ready\n"
    return made


def temporaries(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.tmp"))


@posix
def test_temporary_name_follows_no_link(tmp_path: Path) -> None:
    """Links under every name that the process number gives, and a file that they lead to."""
    precious, path = tmp_path / "precious", tmp_path / "x"
    precious.write_text("the user's")
    for number in (os.getpid(), os.getppid(), 1):
        (tmp_path / f".x.{number}.tmp").symlink_to(precious)
    with atomic(path, 4) as file:
        assert not Path(file.name).is_symlink()
        file.write(b"mine")
    assert precious.read_text() == "the user's" and path.read_text() == "mine"
    assert {p.name for p in temporaries(tmp_path)} == {p.name for p in tmp_path.iterdir() if p.is_symlink()}


def test_temporary_names_differ_each_time(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with atomic(tmp_path / "x", 1) as file, temporary_folder(tmp_path / "y") as folder:
            names |= {Path(file.name).name, folder.name}
            assert str(os.getpid()) not in Path(file.name).name.split(".")
    assert len(names) == 6


@posix
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_process_writes_is_left_alone_until_it_ends(tmp_path: Path, kind: str) -> None:
    """Whatever its number: in another container this process would see no such number, or another's."""
    path = tmp_path / "x"
    other = writer(kind, path)
    try:
        (held,) = temporaries(tmp_path)
        assert not abandoned(held)
        remove_leftovers(path)
        recover_interrupted_write(path)
        with atomic(path, 1) as file:
            file.write(b"1")
        assert held.exists() and path.read_bytes() == b"1"
    finally:
        other.kill()
        other.wait()
    assert held.exists() and abandoned(held)
    remove_leftovers(path)
    assert temporaries(tmp_path) == []


@posix
def test_own_unfinished_file_is_no_leftover(tmp_path: Path) -> None:
    """Two threads write one name: the last one wins, and neither loses what it has begun."""
    path = tmp_path / "x"
    with atomic(path, 1) as first:
        first.write(b"1")
        with atomic(path, 1) as second:
            second.write(b"2")
        assert path.read_bytes() == b"2" and Path(first.name).exists()
    assert path.read_bytes() == b"1" and not temporaries(tmp_path)


@posix
def test_leftovers_of_the_dead_go_whatever_they_are(tmp_path: Path) -> None:
    token = "0123456789abcde"
    (tmp_path / f".x.{token}0.tmp").write_text("half")
    (tmp_path / f".x.{token}1.tmp").mkdir()
    (tmp_path / f".x.{token}1.tmp" / "part").touch()
    os.mkfifo(tmp_path / f".x.{token}2.tmp")  # opening it must not wait
    (tmp_path / f".y.{token}3.tmp").touch()  # of another file
    remove_leftovers(tmp_path / "x")
    assert [p.name for p in temporaries(tmp_path)] == [f".y.{token}3.tmp"]


def test_hidden_files_of_the_user_are_no_leftovers(tmp_path: Path) -> None:
    for name in (".x.mine.tmp", ".x.2024-backup.old", ".x.1.tmp"):
        (tmp_path / name).write_text("precious")
    recover_interrupted_write(tmp_path / "x")
    assert len(list(tmp_path.iterdir())) == 3


@posix
def test_many_writers_of_one_name_leave_one_complete_file(tmp_path: Path) -> None:
    path, failed = tmp_path / "x", []

    def write(value: int) -> None:
        for _ in range(40):
            try:
                safetensors_io.write(path, {"a": torch.full((100,), float(value))})
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(dict(safetensors_io.tensors(path))["a"].unique()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@posix
def test_folder_that_is_moved_aside_by_a_live_process_stays(tmp_path: Path) -> None:
    """In the moment between its two renames, another process must not put the old folder back."""
    target = tmp_path / "model"
    with temporary_folder(target) as temporary:
        aside = temporary.with_suffix(".old")
        aside.mkdir()
        recover_interrupted_write(target)
        assert aside.is_dir() and not target.exists()
    recover_interrupted_write(target)
    assert target.is_dir() and not aside.exists()


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError), new_folder(tmp_path / "model") as folder:
        (folder / "part").touch()
        raise OSError("the disk is full")
    with pytest.raises(RuntimeError), placed(tmp_path / "x") as place:
        place.touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@posix
def test_clearing_the_cache_leaves_what_is_being_written(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / ".dead.safetensors.0123456789abcdef.tmp").touch()
    other = writer("file", tmp_path / "ab" / "entry.safetensors")
    try:
        (dead, live) = temporaries(tmp_path / "ab")
        cache.clear()
        assert live.exists() and not dead.exists()
    finally:
        other.kill()
        other.wait()
    cache.put("ab" + "0" * 62, {"x": torch.ones(2)})
    assert not temporaries(tmp_path / "ab")


def test_errors_in_a_temporary_folder_name_the_final_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: namedtuple("usage", "total used free")(9, 8, 1))
    with temporary_folder(tmp_path / "model") as folder, temporary_folder(tmp_path / "x.bin") as single:
        for inside, shown in ((folder / "unet" / "x.bin", "model/unet/x.bin"), (single / "x.bin", "x.bin")):
            with (
                pytest.raises(ModelError, match=f"^{re.escape(str(tmp_path / shown))} needs 5 bytes"),
                atomic(inside, 5),
            ):
                pass
