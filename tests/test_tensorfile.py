"""Safetensors files: equal content is equal bytes, strangers' headers are checked, nothing half-written stays."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from salun.checkpoints import safetensors_io
from salun.checkpoints.hashing import Hasher, base_hash
from salun.errors import ModelError


@pytest.fixture
def content() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b": torch.rand(3, 4),
        "a": torch.rand(5).half(),
        "odd": torch.randint(0, 255, (3,), dtype=torch.uint8),
        "c": torch.rand(2, 2).bfloat16(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
    }


def test_the_library_reads_what_we_write(content: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors_io.write(tmp_path / "x.safetensors", content, {"z": "1", "a": "2"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(content)
    for name, tensor in content.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


def test_a_file_as_large_as_sdxl_is_read(tmp_path: Path) -> None:
    """Seven gigabytes, most of them a hole in the file, which takes no room on the disk."""
    half, path = 3_470_000_000, tmp_path / "large.safetensors"
    places = {"a": (0, half), "b": (half, 2 * half), "c": (2 * half, 2 * half + 2)}
    entries = {name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for name, (a, b) in places.items()}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(2 * half, 1)
        file.write(bytes([3, 4]))
    assert safetensors_io.read_header(path).names == ["a", "b", "c"]
    assert dict(safetensors_io.tensors(path, ["c"]))["c"].tolist() == [3, 4]


def test_equal_content_is_equal_bytes(content: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors_io.write(tmp_path / "x", content, {"z": "1", "a": "2"})
    safetensors_io.write(tmp_path / "y", dict(content), {"a": "2", "z": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_rewriting_changes_the_named_tensors_and_no_other_byte(
    content: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(content, source, {"made by": "a stranger"})
    safetensors_io.rewrite(source, target, {"b": content["b"] + 1}, {"salun.concept": "circle"})
    before, after = safetensors_io.read_header(source), safetensors_io.read_header(target)
    assert after.metadata == {"made by": "a stranger", "salun.concept": "circle"}
    assert after.names == before.names
    old, new = source.read_bytes(), target.read_bytes()
    for name, entry in before.entries.items():
        moved = after.entries[name]
        assert (moved.dtype, moved.shape) == (entry.dtype, entry.shape)
        assert (old[entry.start : entry.end] == new[moved.start : moved.end]) == (name != "b")
    assert torch.equal(load_file(target)["b"], content["b"] + 1)


def test_replacing_all_with_themselves_gives_the_same_tensor_bytes(
    content: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    safetensors_io.write(tmp_path / "x", content, {"k": "v"})
    safetensors_io.rewrite(tmp_path / "x", tmp_path / "y", content, {})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_what_does_not_fit_is_rejected_and_leaves_no_file(content: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    safetensors_io.write(source, content)
    for replaced, message in (
        ({"nowhere": torch.ones(1)}, "has no tensor nowhere"),
        ({"b": torch.ones(3, 5)}, r"b is F32 \[3, 4\]"),
        ({"b": torch.ones(3, 4).half()}, r"not F16 \[3, 4\]"),
    ):
        with pytest.raises(ModelError, match=message):
            safetensors_io.rewrite(source, target, replaced, {})
    with pytest.raises(ModelError, match="is the source itself"):
        safetensors_io.rewrite(source, source, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_writer_that_fails_halfway_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="lights out"), safetensors_io.atomic(path, 10) as file:
        file.write(b"half")
        raise RuntimeError("lights out")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_reported_before_writing(
    content: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(ModelError, match="10 free"):
        safetensors_io.write(tmp_path / "x", content)
    assert not list(tmp_path.iterdir())


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        (1 << 62).to_bytes(8, "little") + b"{}",
        raw(b"{not json"),
        raw(b"[]"),
        raw({"x": ONE}, b"\0" * 7),
        raw({"x": ONE}, b"\0" * 9),
        raw({"x": {**ONE, "data_offsets": [8, 0]}}, b"\0" * 8),
        raw({"x": {**ONE, "data_offsets": [4, 12]}}, b"\0" * 12),
        raw({"x": ONE, "y": ONE}, b"\0" * 8),
        raw({"x": {**ONE, "shape": [3]}}, b"\0" * 8),
        raw({"x": {**ONE, "shape": [-2]}}, b"\0" * 8),
        raw({"x": {**ONE, "shape": [2.0]}}, b"\0" * 8),
        raw({"x": {**ONE, "dtype": "F99"}}, b"\0" * 8),
        raw({"x": {"dtype": "F32"}}, b"\0" * 8),
        raw({"__metadata__": {"a": 1}, "x": ONE}, b"\0" * 8),
        raw(b'{"x":' + json.dumps(ONE).encode() + b',"x":' + json.dumps(ONE).encode() + b"}", b"\0" * 8),
        raw(b"[" * 100_000),
    ],
)
def test_unsound_headers_are_rejected_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stranger.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"stranger\.safetensors is not a valid"):
        safetensors_io.read_header(path)


def test_the_base_hash_knows_names_dtypes_shapes_and_bits() -> None:
    base = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    assert base_hash(base) == base_hash(dict(reversed(base.items())))
    for other in (
        {"a": torch.ones(3, 2), "b": torch.zeros(4)},
        {"a": torch.ones(2, 3).half(), "b": torch.zeros(4)},
        {"a": torch.ones(2, 3), "c": torch.zeros(4)},
        {"a": torch.ones(2, 3), "b": -torch.zeros(4)},
    ):
        assert base_hash(base) != base_hash(other)


def test_the_fp16_hash_recognises_a_model_in_another_dtype() -> None:
    base = {"a": torch.rand(50)}
    half = {"a": base["a"].half()}
    assert base_hash(base) != base_hash(half)

    def rounded(tensors: dict[str, torch.Tensor]) -> str:
        hasher = Hasher(rounded=True)
        for name, tensor in sorted(tensors.items()):
            hasher.add(name, tensor)
        assert hasher.hash == base_hash(tensors)
        return hasher.fp16

    assert rounded(base) == rounded(half) == rounded({"a": half["a"].float()})
