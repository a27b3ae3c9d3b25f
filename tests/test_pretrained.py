"""Image classifiers of transformers from foreign folders: none of their code runs, and no pickle is read unasked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from salun.checkpoints import pickled
from salun.classification.models import Preprocessing, new_model, stock_model
from salun.errors import ModelError

from .conftest import change_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Vision Transformer of ten classes, as transformers saves it."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def vit(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "vit"))


def with_code(folder: Path) -> Path:
    """A model whose config names code of its own; returns the file that this code would write."""
    proof = folder.parent / "ran"
    code = (
        f"open({str(proof)!r}, 'w').close()\nfrom transformers import ViTConfig as C, ViTForImageClassification as M\n"
    )
    (folder / "evil.py").write_text(code, encoding="utf-8")
    names = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"}
    change_config(folder, model_type="evil", auto_map=names)
    return proof


def test_a_models_own_code_does_not_run_whatever_standard_input_says(vit: Path) -> None:
    from salun_cli.main import app

    proof = with_code(vit)
    command = ["classify-train", "--model", str(vit), "--device", "cpu", "--run-dir", str(vit.parent / "run")]
    done = CliRunner().invoke(app, command, input="y\n" * 20)
    assert done.exit_code != 0 and not proof.exists()
    for load in (lambda: stock_model(str(vit)), lambda: new_model(str(vit), 3, 10, 0)):
        with pytest.raises(ModelError, match=r"its auto_map is .* which is not allowed in a file"):
            load()


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "someone/kernels"},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": {"": "someone/kernels"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"backbone": "microsoft/resnet-50"},
        {"backbone_config": {"use_pretrained_backbone": True}},
        {"model_args": {"checkpoint_path": "/tmp/x.pth"}},
        {"use_kernels": True},
    ],
    ids=str,
)
def test_stock_model_rejects_configs_that_lead_elsewhere(values: dict[str, Any], vit: Path) -> None:
    change_config(vit, **values)
    with pytest.raises(ModelError, match="which is not allowed in a file"):
        stock_model(str(vit))


def test_stock_model_rejects_adapters_of_other_models(vit: Path) -> None:
    (vit / "adapter_config.json").write_text('{"base_model_name_or_path": "them/model"}', encoding="utf-8")
    with pytest.raises(ModelError, match="adapter"):
        stock_model(str(vit))


@pytest.mark.parametrize(
    "values",
    [{"num_hidden_layers": 10**6}, {"intermediate_size": 10**6, "hidden_size": 10**6}, {"num_labels": 10**9}],
    ids=str,
)
def test_stock_model_builds_nothing_larger_than_its_files(values: dict[str, Any], vit: Path) -> None:
    change_config(vit, **values)
    with pytest.raises(ModelError, match=r"modules and parameters|do not belong together|the limit is"):
        stock_model(str(vit))


def test_stock_model_follows_no_link_out_of_the_folder(vit: Path) -> None:
    (vit / "config.json").rename(vit.parent / "private.json")
    (vit / "config.json").symlink_to(vit.parent / "private.json")
    with pytest.raises(ModelError, match="is a link out of the model's folder"):
        stock_model(str(vit))


def as_pickle(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_pickled_classifier_is_read_only_when_allowed(vit: Path) -> None:
    wanted, _ = stock_model(str(vit))
    as_pickle(vit)
    for load in (lambda: stock_model(str(vit)), lambda: new_model(str(vit), 3, 10, 0)):
        with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle.*allow_pickle"):
            load()
    found, _ = stock_model(str(vit), allow_pickle=True)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())


def test_a_pickle_that_would_run_code_runs_none_when_allowed(vit: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(vit.parent / "ran"), "w"))

    as_pickle(vit)
    torch.save({"x": Evil()}, vit / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        stock_model(str(vit), allow_pickle=True)
    assert not (vit.parent / "ran").exists()


@pytest.mark.parametrize(("version", "warned"), [("2.9.1+cu128", True), ("2.10.0", False)])
def test_pickles_are_warned_of_where_torch_can_be_corrupted(
    version: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    pickled.check_torch()
    assert ("CVE-2026-24747" in caplog.text) is warned


@pytest.mark.parametrize("version", ["2.5.1+cu124", "2.1.2"])
def test_pickles_need_a_torch_whose_safe_unpickler_is_safe(
    version: str, vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_pickle(vit)
    checkpoint = vit.parent / "x.ckpt"
    torch.save({"state_dict": {"w": torch.tensor([ord(c) for c in version])}}, checkpoint)  # none in the cache
    monkeypatch.setattr(torch, "__version__", version)
    for load in (lambda: stock_model(str(vit), allow_pickle=True), lambda: pickled.convert_pickle(checkpoint, True)):
        with pytest.raises(ModelError, match=r"need torch 2\.6 or later, but this is 2\.\d\.\d: .*update torch"):
            load()


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 10**9, "width": 1}}, {"size": 0}, {"image_mean": [float("nan")] * 3, "image_std": [1] * 3},
        {"image_mean": [0.5] * 3, "image_std": [0, 1, 1]}, {"image_mean": [0.5] * 7, "image_std": [1] * 7},
        {"size": {"shortest_edge": 224}, "crop_pct": 1e-300},
    ],
    ids=str,
)  # fmt: skip
def test_an_image_processor_out_of_bounds_is_rejected(config: dict[str, Any]) -> None:
    with pytest.raises((ValueError, ArithmeticError)):
        Preprocessing.of(config)
