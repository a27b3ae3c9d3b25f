"""Names of detectors and metrics in results hold no path."""

from __future__ import annotations

from pathlib import Path

import pytest

from salun.evaluation.result_names import result_names


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ("self, attribute, nudenet:mace", "self, attribute, nudenet:mace"),
        ("clip:{tmp}/a/ViT-L, clip:a/ViT-L/, clip:./b/../b/ViT-L", "clip:ViT-L, clip:ViT-L 2, clip:ViT-L 3"),
        ("images:a/ViT-L 2, images:a/ViT-L, images:b/ViT-L", "images:ViT-L 2, images:ViT-L, images:ViT-L 3"),
        ("imagenet:timm/resnet50.tv2_in1k, clip:openai/clip", "imagenet:timm/resnet50.tv2_in1k, clip:openai/clip"),
        ("clip:owner/model", "clip:model"),  # a folder by that name is what is loaded
        ("nudenet:mace:a/320n.onnx, nudenet:strict:a/320n.onnx", "nudenet:mace:320n.onnx, nudenet:strict:320n.onnx"),
        ("q16:'a/320n.onnx'", "q16:320n.onnx"),
    ],
)
def test_results_name_folders_and_files_without_their_path(
    names: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a/ViT-L", "a/ViT-L 2", "b/ViT-L", "owner/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a/320n.onnx").write_bytes(b"")
    assert result_names(names.format(tmp=tmp_path).split(", ")) == shown.split(", ")
