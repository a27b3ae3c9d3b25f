"""Configs of foreign models: values out of bounds end in one line, before anything is built."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import salun
from salun.diagnostics.inspect import inspect
from salun.diffusion.options import Recipe
from salun.diffusion.prompts.vocabulary import Vocabulary
from salun.errors import ConfigError, DataError, ModelError
from salun.evaluation.detectors.attribute import load_classifier
from salun.options import from_mapping

from .test_families import make

CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("unet/config.json", {"layers_per_block": 10**6}, "modules and parameters"),
    ("unet/config.json", {"cross_attention_dim": 10**6}, "do not belong together"),
    ("unet/config.json", {"block_out_channels": "wide"}, "block_out_channels is 'wide'"),
    ("unet/config.json", {"norm_num_groups": 0}, "no model can be built"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "more inputs are unsupported"),
    ("unet/config.json", {"_class_name": ["evil", "Pipeline"]}, "_class_name is"),
    ("unet/config.json", {"quantization_config": {"quant_method": "gguf"}}, "code from elsewhere"),
    ("unet/config.json", {"downsample_padding": 10**6}, "downsample_padding is 1000000"),
    ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor is 'x'"),
    ("vae/config.json", {"block_out_channels": [10**6] * 4}, "do not belong together"),
    ("text_encoder/config.json", {"num_hidden_layers": 10**6}, "modules and parameters"),
    ("text_encoder/config.json", {"hidden_size": [1]}, r"hidden_size is \[1\]"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "1000000000 as num_train_timesteps"),
    ("scheduler/scheduler_config.json", {"beta_start": "x"}, "beta_start"),
    ("salun.yaml", {"recipe": {"forget_latents": 10**12}}, "forget_latents is 1000000000000"),
    ("salun.yaml", {"recipes_paper": {"object": 3}}, "expected a mapping of names to values"),
    ("salun.yaml", {"detector": "/etc"}, "detector must be a folder inside"),
]


@pytest.mark.parametrize(("name", "values", "message"), CHANGES, ids=[f"{n}-{next(iter(v))}" for n, v, _ in CHANGES])
def test_load_rejects_configs_out_of_bounds_at_once(
    name: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", "StableDiffusionPipeline", "epsilon", torch.float32)
    stored = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**stored, **values}), encoding="utf-8")
    began = time.monotonic()
    with pytest.raises((ModelError, ConfigError), match=message) as caught:
        salun.load(str(folder), device="cpu")
    assert "\n" not in str(caught.value) and time.monotonic() - began < 5


def test_load_takes_a_tokenizer_without_a_length(tmp_path: Path) -> None:
    """Where its files name none, the library has it without limit; the text encoder has 77 positions."""
    folder = make(tmp_path / "model", "StableDiffusionPipeline", "epsilon", torch.float32)
    path = folder / "tokenizer" / "tokenizer_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored.pop("model_max_length", None)
    path.write_text(json.dumps(stored), encoding="utf-8")
    model = salun.load(str(folder), device="cpu")
    places = model.text_encoders[0].config.max_position_embeddings
    assert model.encode(["a"]).hidden.shape[1] == places


def test_load_rejects_a_tokenizers_length_that_is_no_number(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "StableDiffusionPipeline", "epsilon", torch.float32)
    path = folder / "tokenizer" / "tokenizer_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stored, "model_max_length": "x"}), encoding="utf-8")
    with pytest.raises(ModelError, match="model_max_length is 'x', but must be a number"):
        salun.load(str(folder), device="cpu")


def test_inspect_says_what_is_wrong_with_the_text_encoders_config(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "StableDiffusionPipeline", "epsilon", torch.float32)
    path = folder / "text_encoder" / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stored, "vocab_size": 900_000}), encoding="utf-8")
    assert "do not belong together" in inspect(str(folder))["verdict"]


VOCABULARY = {
    "attributes": {"shape": ["circle", "square"]},
    "templates": {"train": ["one {shape}"], "eval": ["a {shape}"]},
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"templates": {"train": ["{shape:1000000000}"], "eval": ["{shape}"]}}, "bare name"),
        ({"templates": {"train": ["{shape.__class__}"], "eval": ["{shape}"]}}, "bare name"),
        ({"templates": {"train": ["{shape!r:>9}"], "eval": ["{shape}"]}}, "bare name"),
        ({"templates": {"train": "{shape}", "eval": ["{shape}"]}}, "list of texts"),
        ({"templates": {"train": ["{shape}" * 60], "eval": ["{shape}"]}}, "slots"),
        ({"attributes": {"shape": "circle"}}, "list of texts"),
        ({"attributes": {f"a{i}": [str(j) for j in range(100)] for i in range(8)}}, "the limit is 20,000"),
    ],
)
def test_vocabulary_rejects_formats_and_products(values: dict[str, Any], message: str) -> None:
    assert len(list(Vocabulary.from_mapping(VOCABULARY, "x").prompts(["{shape}"]))) == 2
    with pytest.raises(DataError, match=message):
        Vocabulary.from_mapping({**VOCABULARY, **values}, "x")


@pytest.mark.parametrize("value", [10**400, float("nan"), [1], "1", True], ids=lambda value: str(value)[:5])
def test_from_mapping_rejects_invalid_numbers(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"here: lr is .* but must be a number"):
        from_mapping(Recipe, {"lr": value}, "here")


def test_from_mapping_names_the_file_of_a_value_out_of_range() -> None:
    with pytest.raises(ConfigError, match="here: steps is 0, but must be at least 1"):
        from_mapping(Recipe, {"steps": 0}, "here")
    with pytest.raises(ConfigError) as caught:
        from_mapping(Recipe, {"x" * 100_000: 0}, "here")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "values",
    [
        {"channels": [4096] * 10},
        {"channels": [7]},
        {"resolution": 10**9},
        {"attributes": {"a.b": ["x"]}},
        {"attributes": 3},
    ],
    ids=str,
)
def test_load_classifier_rejects_descriptions_out_of_bounds(values: dict[str, Any], tmp_path: Path) -> None:
    from salun.evaluation.detectors.attribute import AttributeClassifier

    AttributeClassifier({"shape": ["circle", "square"]}, 32, (8, 8)).save(tmp_path)
    load_classifier(tmp_path)
    path = tmp_path / "detector.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")
    with pytest.raises(DataError, match="cannot be used"):
        load_classifier(tmp_path)
