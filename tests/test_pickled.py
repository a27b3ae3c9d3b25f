"""Pickled checkpoints: what a `.ckpt` is, what may lie in it beside weights, and what its converted copy is worth."""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from salun.checkpoints.pickled import convert_pickle
from salun.diagnostics.inspect import inspect
from salun.errors import ModelError

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SALUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.ckpt"


def same(converted_file: Path) -> bool:
    found = load_file(converted_file)
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


# -- files that are no pickle -----------------------------------------------------------------------------------------


def a_zip_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", b"x")


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "safetensors": (lambda p: save_file(WEIGHTS, p), "is a safetensors file, not a pickle.* Rename it to end in"),
    "HTML": (
        lambda p: p.write_text("\n <!DOCTYPE html><html>Sign in</html>"),
        "is an HTML page.*Download or write it again",
    ),
    "LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "a Git LFS pointer"),
    "zeros": (lambda p: p.write_bytes(bytes(10_000)), "is filled with zero bytes"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "zip": (a_zip_archive, "is a zip archive.*Unpack it"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x")), "is a gzip archive"),
    "GGUF": (lambda p: p.write_bytes(b"GGUF" + bytes(90)), "is a GGUF file"),
    "noise": (lambda p: p.write_bytes(b"\x13\x37" * 99), "is not a readable checkpoint"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("allowed", [False, True])
def test_ckpt_that_is_not_a_pickle_is_named(kind: str, allowed: bool, path: Path) -> None:
    """Nor is --allow-pickle advised, which would not help."""
    make, message = OTHERS[kind]
    make(path)
    with pytest.raises(ModelError, match=message) as refused:
        convert_pickle(path, allowed)
    assert "allow_pickle" not in str(refused.value)


def test_ckpt_that_is_cut_short_is_called_damaged(path: Path) -> None:
    torch.save(WEIGHTS, path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ModelError, match="damaged or truncated"):
        convert_pickle(path, allowed=True)


# -- what lies beside weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_numbers_as_well_weights_are_passed_over(zipped: bool, path: Path) -> None:
    """Old trainers recorded their best score and step as numpy's scalars."""
    state = {"best": np.float64(0.5), "step": np.int64(3), "curve": np.arange(3), "flag": np.bool_(True)}
    torch.save({"state_dict": WEIGHTS, **state}, path, _use_new_zipfile_serialization=zipped)
    assert same(convert_pickle(path, allowed=True))


def test_options_and_paths_as_well_weights_are_passed_over(path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "args": argparse.Namespace(lr=1e-4), "from": PurePosixPath("a/b")}, path)
    assert same(convert_pickle(path, allowed=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_numbers_under_the_names_of_numpy_1_are_passed_over(zipped: bool, path: Path) -> None:
    for old in ("numpy.core.multiarray", "numpy._core.multiarray"):
        module = types.ModuleType(old)

        class Number:
            def __reduce__(self, module: types.ModuleType = module) -> tuple[Any, ...]:
                return module.scalar, (np.dtype("f8"), b"\0" * 8)

        def scalar(*_: Any) -> None: ...

        scalar.__module__, scalar.__qualname__, module.scalar = old, "scalar", scalar  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(sys.modules, old, module)
            torch.save({"state_dict": WEIGHTS, "loss": Number()}, path, _use_new_zipfile_serialization=zipped)
        assert same(convert_pickle(path, allowed=True))


class Trap:
    """Pickled, it runs a function when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "numpy.load", "torch.load"])
def test_code_in_a_pickle_is_rejected_without_advice_to_run_it(function: str, zipped: bool, path: Path) -> None:
    module, name = function.split(".")
    call = getattr(sys.modules[module], name)
    torch.save({"state_dict": WEIGHTS, "x": Trap(call, "true")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError) as refused:
        convert_pickle(path, allowed=True)
    said = str(refused.value)
    assert "\n" not in said and len(said) < 400
    assert not any(word in said for word in ("weights_only", "torch.load(", "safe_globals", "trust"))


# -- hostile sizes and kinds of tensors -------------------------------------------------------------------------------


def compressed(path: Path) -> None:
    """Its pickle is followed by 50 MB of zeros, which take 50 KB."""
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        parts = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content + bytes(50_000_000) if name.endswith("data.pkl") else content)


def saved(content: Any, zipped: bool = True) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=zipped)


HUGE = torch.zeros(1).expand(2**14, 2**15)  # 2 GB of one number
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "stride 0": (saved({"state_dict": {"x": HUGE}}), "its tensors would take 2,147,483,648"),
    "stride 0, older format": (saved({"x": HUGE}, zipped=False), "its tensors would take 2,147,483,648"),
    "shared": (saved({f"x{i}": WEIGHTS["a"].expand(9, 2, 3) for i in range(999)}), "its tensors would take"),
    "compressed": (compressed, "is compressed"),
    "sparse": (saved({"x": torch.ones(3).to_sparse()}), "is not a dense tensor"),
    "without values": (saved({"x": torch.empty(2**31, device="meta")}), "is not a dense tensor"),
    "complex": (saved({"x": torch.ones(3, dtype=torch.complex64)}), "has the unsupported dtype"),
    "a state of another kind": (saved({"state_dict": 5}), "has no tensors"),
    "a list": (saved([WEIGHTS]), "has no tensors"),
    "half a character": (saved({"\ud800": torch.ones(2)}), r"invalid name '\\ud800'"),
    "metadata": (saved({"__metadata__": torch.ones(2)}), "invalid name '__metadata__'"),
    "one name twice": (saved({1: torch.ones(2), "1": torch.ones(2)}), "two tensors named '1'"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tensors_are_rejected_before_they_take_memory(what: str, path: Path, cache: Path) -> None:
    make, message = HOSTILE[what]
    make(path)
    with pytest.raises(ModelError, match=message):
        convert_pickle(path, allowed=True)
    assert not list(cache.rglob("*.safetensors"))


# -- the converted copy -----------------------------------------------------------------------------------------------


def test_converted_checkpoint_is_made_once(path: Path) -> None:
    torch.save(WEIGHTS, path)
    first = convert_pickle(path, allowed=True)
    made = first.stat().st_mtime_ns
    assert convert_pickle(path, allowed=True) == first and first.stat().st_mtime_ns == made


@pytest.mark.parametrize("what", ["altered", "without a record", "with another's record"])
def test_converted_checkpoint_that_was_altered_is_made_again(
    what: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The name in the cache tells what it was made of, not what it holds."""
    torch.save(WEIGHTS, path)
    made = convert_pickle(path, allowed=True)
    record = made.with_name(f"{made.name}.sha256")
    if what == "altered":
        save_file({**WEIGHTS, "a": WEIGHTS["a"] + 1}, made)
    elif what == "without a record":
        record.unlink()
    else:
        record.write_text("0" * 64, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="salun"):
        again = convert_pickle(path, allowed=True)
    assert again == made and same(again)
    assert "will be converted again" in caplog.text


def test_inspect_names_a_ckpt_that_is_not_a_pickle(path: Path) -> None:
    path.write_text("<html></html>", encoding="utf-8")
    with pytest.raises(ModelError, match="is an HTML page"):
        inspect(str(path))
