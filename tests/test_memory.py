"""The ways to take less memory give the erasure that the plain way gives."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import salun
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.result import Run
from salun.errors import ConfigError

from . import conftest

SHORT = {**conftest.SHORT, "eval_images": 0, "sampling_steps": 4}


@pytest.fixture(scope="module")
def plain(shapes: Model) -> Run:
    """The erasure to compare with."""
    return salun.erase(shapes, "circle", **SHORT)


def difference(one: Run, other: Run) -> float:
    """The largest difference of a weight, over the largest change of one."""
    base = one.model.original()
    change = max(float((one.erased[n].float() - base[n].float()).abs().max()) for n in one.erased)
    return max(float((one.erased[n].float() - other.erased[n].float()).abs().max()) for n in one.erased) / change


def test_gradient_checkpointing_computes_the_same(shapes: Model, plain: Run) -> None:
    other = salun.erase(shapes, "circle", gradient_checkpointing=True, **SHORT)
    assert plain.mask == other.mask
    assert difference(plain, other) < 1e-3  # the same sums, maybe in another order
    assert not shapes.unet.is_gradient_checkpointing
    assert not shapes.unet.training


def test_gradient_checkpointing_keeps_less(shapes: Model) -> None:
    """Bytes that the forward pass keeps for the backward pass, counted."""
    x, t = torch.randn(8, *shapes.latent_shape), torch.full((8,), 500)
    said = shapes.encode(["one red circle"]).expand(8)
    kept = {}
    for wish in (False, True):
        from salun.diffusion.options import EraseOptions

        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with shapes.temporarily_trainable(), shapes.configured(EraseOptions(gradient_checkpointing=wish)):
            for parameter in shapes.parameters().values():
                parameter.requires_grad_(True)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                shapes.predict(x, t, said)
            shapes.unet.requires_grad_(False)
        weights = {p.untyped_storage().data_ptr() for p in shapes.parameters().values()}
        kept[wish] = sum(size for place, size in seen.items() if place not in weights)
    assert kept[True] < kept[False] / 2


def test_low_vram_finds_the_same_mask_but_for_rounding(shapes: Model, plain: Run) -> None:
    other = salun.erase(shapes, "circle", low_vram=True, **SHORT)
    assert other.mask.selected == plain.mask.selected
    assert other.mask.jaccard(plain.mask) > 0.99  # samples made one at a time round otherwise
    assert not shapes.low_vram


@pytest.mark.parametrize(("dtype", "agree"), [("bf16", 0.93), ("fp16", 0.98)])  # seen: 0.963 and 0.995
def test_a_model_in_half_precision_is_erased_too(dtype: str, agree: float, plain: Run) -> None:
    run = salun.erase("shapes", "circle", dtype=dtype, device="cpu", **{**SHORT, "steps": 1, "eval_images": 2})
    assert run.mask.jaccard(plain.mask) > agree
    original = run.model.original()
    for name, tensor in run.erased.items():
        assert tensor.dtype == original[name].dtype
        outside = ~run.mask.dense(name)
        assert torch.equal(tensor[outside], original[name][outside])


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_xformers_that_is_not_there_names_the_extra(shapes: Model) -> None:
    with pytest.raises(ConfigError, match=r'pip install "xformers" \(the extra xformers\)'):
        salun.erase(shapes, "circle", attention="xformers", **SHORT)


@pytest.mark.parametrize("there", [True, False])
def test_8_bit_moments(there: bool, shapes: Model, plain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {**SHORT, "optimizer": "adam8bit"}
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if there and not installed:
        pytest.skip("bitsandbytes is not installed")
    if not there:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name)
        )
        with pytest.raises(ConfigError, match=r'pip install "bitsandbytes>=0\.45" \(the extra bitsandbytes\)'):
            salun.erase(shapes, "circle", **arguments)
        return
    run = salun.erase(shapes, "circle", **arguments)
    assert run.mask == plain.mask
    assert difference(plain, run) < 0.5  # Adam's step of the same sign and size, from coarser moments
