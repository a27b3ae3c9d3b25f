"""The mask: exact selection, bits on disk, set operations, and refusing what does not fit."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from salun.errors import MaskError
from salun.masking.find import find_mask
from salun.masking.mask import Mask, entries, entries_each
from salun.masking.threshold import select_largest


def dense(mask: Mask) -> torch.Tensor:
    return torch.cat([mask.dense(name).flatten() for name in mask])


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    density=st.floats(0.01, 1.0),
    values=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_the_largest_scores_are_selected_and_ties_go_to_the_earlier(
    sizes: list[int], density: float, values: int, seed: int
) -> None:
    """Against a stable sort of all scores together; few distinct values make ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = {f"p{i}": torch.randint(values, (n,), generator=generator) / 7 for i, n in enumerate(sizes)}
    everything = torch.cat(list(scores.values()))
    k = int(np.floor(density * len(everything)))
    if not k:
        with pytest.raises(MaskError, match="selects none"):
            Mask.from_scores(scores, density)
        return
    expected = torch.zeros(len(everything), dtype=torch.bool)
    expected[torch.argsort(everything, descending=True, stable=True)[: entries(len(everything), density)]] = True
    assert torch.equal(dense(Mask.from_scores(scores, density)), expected)


def test_selection_is_exact_across_the_chunks_it_reads_in() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(3, 50_001, generator=generator), "b": torch.rand(70_003, generator=generator)}
    scores["b"][100:40_000] = scores["a"][0, 0]  # a tie across several chunks
    everything = torch.cat([s.flatten() for s in scores.values()])
    for density in (0.001, 0.3, 0.5, 0.77):
        expected = torch.zeros(len(everything), dtype=torch.bool)
        k = entries(len(everything), density)
        expected[torch.argsort(everything, descending=True, stable=True)[:k]] = True
        assert torch.equal(dense(Mask.from_scores(scores, density)), expected)


@pytest.mark.parametrize(("total", "density", "count"), [(100, 0.29, 29), (10, "0.7", 7), (3, 0.5, 1), (7, 1, 7)])
def test_counts_are_floors_in_decimal_arithmetic(total: int, density: float, count: int) -> None:
    """0.29·100 in binary is 28.999…, which must not lose an entry."""
    assert entries(total, density) == count


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, 2, float("nan"), float("inf")])
def test_densities_out_of_range_are_refused(density: float) -> None:
    with pytest.raises(MaskError, match="density"):
        Mask.from_scores({"a": torch.rand(10)}, density)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_cannot_be_ranked_are_refused(bad: float) -> None:
    scores = torch.rand(10)
    scores[3] = bad
    with pytest.raises(MaskError, match="finite and not negative"):
        Mask.from_scores({"a": scores}, 0.5)


def test_threshold_zeros_and_ties_are_reported() -> None:
    scores = {"a": torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 3.0, 4.0])}
    found = select_largest(scores, 4)
    assert (found.threshold, found.zeros, found.ties) == (2.0, 2 / 8, 3 / 8)
    assert len(found.warnings()) == 2


def test_by_layer_the_density_applies_to_each_parameter_and_the_count_is_exact() -> None:
    """0.3 of 7, 5, 1 and 11: 2.1, 1.5, 0.3 and 3.3; of 24 that is 7, so the largest remainder gets one more."""
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(n, generator=generator) for name, n in (("a", 7), ("b", 5), ("c", 1), ("d", 11))}
    scores["d"] = torch.tensor([9.0, 2, 9, 9, 9, 1, 1, 1, 1, 1, 1])
    counts = {"a": 2, "b": 2, "c": 0, "d": 3}
    parameters = {name: torch.nn.Parameter(each) for name, each in scores.items()}
    found = find_mask(parameters, "saliency-by-layer", 0.3, 0, lambda: [scores], {})
    assert found.mask.counts() == counts
    for name, k in counts.items():
        order = sorted(range(len(scores[name])), key=lambda i: -float(scores[name][i]))  # stable: earlier ties first
        assert found.mask.dense(name).nonzero().flatten().tolist() == sorted(order[:k])
    assert found.threshold == min(float(scores[name].sort(descending=True)[0][counts[name] - 1]) for name in "abd")
    twice = find_mask(
        parameters, "saliency-by-layer", 0.3, 0, lambda: [scores, {n: -s + 9 for n, s in scores.items()}], {}
    )
    assert (twice.mask & found.mask) == found.mask and twice.mask.selected > found.mask.selected


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    density=st.sampled_from(["0.01", "0.1", "0.29", "0.5", "0.999", "1"]),
)
def test_counts_by_layer_add_up(sizes: list[int], density: str) -> None:
    named = {str(i): n for i, n in enumerate(sizes)}
    assume(int(Decimal(density) * sum(sizes)))
    counts = entries_each(named, density)
    assert sum(counts.values()) == entries(sum(sizes), density)
    assert all(abs(counts[name] - Decimal(density) * n) < 1 for name, n in named.items())


@given(shape=st.lists(st.integers(1, 9), min_size=0, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_a_saved_mask_comes_back_bit_for_bit(
    shape: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("mask") / "m.safetensors"
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = Mask.from_dense({"x.weight": chosen})
    mask.metadata["concept"] = "circle"
    mask.save(path)
    again = Mask.load(path)
    assert again == mask
    assert again.metadata == {"concept": "circle"}
    assert torch.equal(again.dense("x.weight"), chosen)


def test_the_file_is_what_the_format_says(tmp_path: Path) -> None:
    """Other programs read it: one uint8 tensor a parameter, numpy.packbits little, shapes as JSON."""
    chosen = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    Mask.from_dense({"conv.weight": chosen}).save(tmp_path / "m.safetensors")
    with safe_open(str(tmp_path / "m.safetensors"), "np") as file:
        bits = file.get_tensor("conv.weight")
        assert file.metadata()["shapes"] == '{"conv.weight":[2,5]}'
    assert bits.dtype == np.uint8
    assert bits.tolist() == np.packbits(chosen.numpy().ravel(), bitorder="little").tolist()


def test_equal_masks_are_equal_files(tmp_path: Path) -> None:
    scores = {"a": torch.rand(40), "b": torch.rand(3, 3)}
    for name in ("one", "two"):
        mask = Mask.from_scores(scores, 0.5)
        Mask(mask.bits, mask.shapes, {"z": "1", "a": "2"}).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("fault", ["text", "no format", "short bits", "spare bits", "other names"])
def test_damaged_files_are_refused(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    metadata = {"format": "salun-mask-1", "shapes": '{"a":[10]}'}
    row = torch.tensor([255, 3], dtype=torch.uint8)
    if fault == "text":
        path.write_text("not a mask", encoding="utf-8")
    elif fault == "no format":
        save_file({"a": row}, path, {"shapes": '{"a":[10]}'})
    elif fault == "short bits":
        save_file({"a": row[:1].clone()}, path, metadata)
    elif fault == "spare bits":
        save_file({"a": torch.tensor([255, 7], dtype=torch.uint8)}, path, metadata)
    else:
        save_file({"b": row}, path, metadata)
    with pytest.raises(MaskError, match=r"m\.safetensors"):
        Mask.load(path)


def test_set_operations_and_jaccard() -> None:
    a = Mask.from_dense({"x": torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 1], dtype=torch.bool)})
    b = Mask.from_dense({"x": torch.tensor([1, 0, 1, 0, 1, 0, 0, 0, 0], dtype=torch.bool)})
    assert (a | b).dense("x").tolist() == [True, True, True, False, True, False, False, False, True]
    assert (a & b).dense("x").tolist() == [True, False, False, False, True, False, False, False, False]
    assert (a - b).dense("x").tolist() == [False, True, False, False, False, False, False, False, True]
    assert a.jaccard(b) == 2 / 5
    assert (a.selected, a.total, a.density) == (4, 9, 4 / 9)


def test_full_random_and_shuffled_have_the_counts_they_promise() -> None:
    parameters = {"a": torch.zeros(13, 7), "b": torch.zeros(30)}
    assert Mask.full(parameters).selected == 121
    random = Mask.random(parameters, 0.3, seed=1)
    assert random.selected == 36
    assert random == Mask.random(parameters, 0.3, seed=1)
    assert random != Mask.random(parameters, 0.3, seed=2)
    uneven = Mask.from_scores({"a": torch.rand(13, 7), "b": 2 + torch.rand(30)}, 0.3)
    shuffled = uneven.shuffled(seed=1)
    assert shuffled.counts() == uneven.counts() == {"a": 6, "b": 30}
    assert shuffled != uneven


def test_a_mask_of_another_model_is_refused_by_name() -> None:
    mask = Mask.full({"a": torch.zeros(3), "b": torch.zeros(4), "gone": torch.zeros(1)})
    with pytest.raises(MaskError) as error:
        mask.validate({"a": torch.zeros(3), "b": torch.zeros(5), "extra": torch.zeros(2)})
    for part in ("gone", "extra", "b is [5], the mask has [4]"):
        assert part in str(error.value)
