"""The sparse delta: exact in both directions, dialled by a strength, and refused where it does not belong."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from salun.checkpoints import safetensors_io
from salun.checkpoints.hashing import Hasher, base_hash
from salun.delta.delta import Delta, applied_metadata
from salun.delta.provenance import applied_in, with_removed
from salun.delta.stacking import overlaps, stack
from salun.delta.xor import Change
from salun.errors import ConfigError, ModelError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = {4: torch.int32, 2: torch.int16}


def rounded_hash(tensors: dict[str, torch.Tensor]) -> str:
    """The base hash over the tensors rounded to fp16."""
    hasher = Hasher(rounded=True)
    for name, tensor in sorted(tensors.items()):
        hasher.add(name, tensor)
    return hasher.fp16


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def any_bits(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bit patterns: NaN, infinities, −0 and subnormals among them."""
    width = dtype.itemsize
    planes = torch.randint(0, 256, (*shape, width), generator=generator, dtype=torch.uint8)
    return planes.view(-1).view(dtype).view(shape)


def pair(seed: int, dtype: torch.dtype, share: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = {"w": any_bits(generator, (7, 13), dtype), "same": any_bits(generator, (5,), dtype)}
    other = any_bits(generator, (7, 13), dtype)
    chosen = torch.rand(7, 13, generator=generator) < share
    return base, {"w": torch.where(chosen, bits(other), bits(base["w"])).view(dtype), "same": base["same"].clone()}


@given(seed=st.integers(0, 10_000), dtype=st.sampled_from(DTYPES), share=st.sampled_from([0.0, 0.01, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_apply_and_undo_are_bit_exact(
    seed: int, dtype: torch.dtype, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, new = pair(seed, dtype, share)
    path = tmp_path_factory.mktemp("delta") / "x.salun.safetensors"
    Delta.between(base, new, {"concept": "circle"}).save(path)
    delta = Delta.load(path)
    assert delta.metadata == {"concept": "circle"}
    applied = {**base, **delta.apply(base)}
    undone = {**new, **delta.undo(new)}
    for name in base:
        assert torch.equal(bits(applied[name]), bits(new[name]))
        assert torch.equal(bits(undone[name]), bits(base[name]))
    assert delta.changed == int((bits(base["w"]) != bits(new["w"])).sum())


def test_minus_zero_is_a_change() -> None:
    base, new = {"w": torch.zeros(3)}, {"w": torch.tensor([0.0, -0.0, 0.0])}
    delta = Delta.between(base, new)
    assert delta.changed == 1
    assert torch.signbit(delta.apply(base)["w"]).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_strengths_go_part_of_the_way(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(200, generator=generator).to(dtype)}
    new = {"w": base["w"].clone()}
    new["w"][::3] += 1
    delta = Delta.between(base, new)
    for strength in (-0.5, 0.25, 0.5, 1.5):
        expected = (base["w"].float() + strength * (new["w"].float() - base["w"].float())).to(dtype)
        expected = torch.where(base["w"] == new["w"], base["w"], expected)
        assert torch.equal(delta.apply(base, strength)["w"], expected)
    assert torch.equal(delta.apply(base, 0.0)["w"], base["w"])
    assert torch.equal(delta.apply(base, 1.0)["w"], new["w"])


@pytest.mark.parametrize("strength", [-0.6, 1.6, float("nan")])
def test_strengths_out_of_range_are_rejected(strength: float) -> None:
    base = {"w": torch.zeros(3)}
    with pytest.raises(ConfigError, match="strength"):
        Delta.between(base, {"w": torch.ones(3)}).apply(base, strength)


def test_another_base_is_rejected_with_both_hashes() -> None:
    base, new, other = {"w": torch.zeros(3)}, {"w": torch.ones(3)}, {"w": torch.full((3,), 2.0)}
    delta = Delta.between(base, new)
    with pytest.raises(ModelError) as error:
        delta.apply(other)
    assert base_hash(base)[:12] in str(error.value)
    assert base_hash(other)[:12] in str(error.value)
    with pytest.raises(ModelError, match="the delta's erased model is"):
        delta.undo(base)


def test_inputs_are_not_touched() -> None:
    base, new = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    Delta.between(base, new).apply(base)
    assert base["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("other", [{"v": torch.ones(3)}, {"w": torch.ones(4)}, {"w": torch.ones(3).half()}])
def test_models_that_do_not_pair_up_are_rejected(other: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match=r"[vw]"):
        Delta.between({"w": torch.zeros(3)}, other)


def test_equal_deltas_are_equal_files_and_few_changes_are_small(tmp_path: Path) -> None:
    base = {"w": torch.zeros(100_000)}
    few = {"w": base["w"].clone()}
    few["w"][[3, 777, 99_999]] = 1
    for name in ("one", "two"):
        Delta.between(base, few).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").stat().st_size < 2_000


class Read(Mapping[str, torch.Tensor]):
    """Tensors that count how often each is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors, self.times = tensors, Counter[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.times[name] += 1
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_each_tensor_is_read_once_to_make_a_delta() -> None:
    base, new = pair(1, torch.float16, 0.3)
    one, other = Read(base), Read(new)
    delta = Delta.between(one, other)
    assert one.times == other.times == {"w": 1, "same": 1}
    assert (delta.base_hash, delta.result_hash) == (base_hash(base), base_hash(new))
    assert delta.base_hash_fp16 == rounded_hash(base) == base_hash(base)


@given(seed=st.integers(0, 100), dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_the_hashes_are_those_of_the_whole_models(seed: int, dtypes: list[torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = {f"w{i}": torch.randn(5, 3, generator=generator).to(dtype) for i, dtype in enumerate(dtypes)}
    new = {**base, "w1": base["w1"] + 1}
    delta = Delta.between(base, new)
    assert (delta.base_hash, delta.result_hash) == (base_hash(base), base_hash(new))
    assert delta.base_hash_fp16 == rounded_hash(base)
    assert {name: delta.dtype_of(name) for name in base} == {name: tensor.dtype for name, tensor in base.items()}


def test_a_part_of_the_tensors_makes_the_same_delta() -> None:
    base, new = pair(1, torch.float16, 0.3)
    one, other = Delta.between(base, new), Delta.of_changed(base, {"w": new["w"]})
    assert (one.id, one.changed) == (other.id, other.changed)


def test_in_memory_a_delta_takes_what_its_file_takes(tmp_path: Path) -> None:
    base = {"w": torch.zeros(1_000_000, dtype=torch.float16)}
    new = {"w": (torch.arange(1_000_000) % 2).half()}
    delta = Delta.between(base, new)
    delta.save(tmp_path / "x.salun.safetensors")
    held = sum(change.indices.nbytes + change.planes.nbytes for change in delta.changes.values())
    assert held == 1_000_000 // 8 + 500_000 * 2
    assert 0 <= (tmp_path / "x.salun.safetensors").stat().st_size - held < 2_000  # the header


@given(seed=st.integers(0, 1_000), share=st.sampled_from([0.001, 0.1, 0.9]), other=st.sampled_from([0.001, 0.1, 0.9]))
@settings(max_examples=40, deadline=None)
def test_entries_in_common_are_counted_however_places_are_kept(seed: int, share: float, other: float) -> None:
    generator = np.random.default_rng(seed)
    one, two = (generator.random(3_001) < part for part in (share, other))
    old = torch.zeros(3_001)
    changes = [Change.between(old, torch.from_numpy(chosen.astype(np.float32))) for chosen in (one, two)]
    if all(changes):
        first, second = changes
        assert first.overlap_count(second) == second.overlap_count(first) == np.count_nonzero(one & two)


# -- the same model in another dtype, and other models ----------------------------------------------------------------


@given(seed=st.integers(0, 1_000), strength=st.sampled_from([-0.5, 0.5, 1.0, 1.5]))
@settings(max_examples=30, deadline=None)
def test_an_fp32_copy_of_an_fp16_base_gets_the_differences(seed: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(50, generator=generator).half() for name in ("w", "same")}
    new = {**base, "w": base["w"] + (torch.rand(50, generator=generator) < 0.5) * torch.tensor(0.1).half()}
    delta = Delta.between(base, new)
    copy = {name: tensor.float() for name, tensor in base.items()}
    made = stack(copy, [(delta, strength)])
    assert "another dtype" in made.note
    old, now = base["w"].float(), new["w"].float()
    assert torch.equal(made["w"], old + strength * (now - old))
    assert list(made) == ["w"]
    assert made.result_hash == base_hash({**copy, **made})


def test_the_fp32_original_of_an_fp16_base_keeps_what_it_has_beyond_fp16() -> None:
    original = {"w": torch.tensor([0.1, 0.2, 0.3])}
    base = {"w": original["w"].half()}
    new = {"w": base["w"] * torch.tensor([1, 2, 1]).half()}
    made = Delta.between(base, new).apply(original)
    assert torch.equal(made["w"][[0, 2]], original["w"][[0, 2]])
    assert made["w"][1].item() == pytest.approx(0.2 + base["w"][1].item(), abs=1e-7)


def test_an_fp16_copy_of_an_fp32_base_is_recognised_and_the_way_out_named() -> None:
    base = {"w": torch.tensor([0.1, 0.2, 0.3])}
    delta = Delta.between(base, {"w": base["w"] + 1})
    copy = {"w": base["w"].half()}
    with pytest.raises(ModelError, match=r"a dtype of less precision.*fine_tune_of_base") as error:
        delta.apply(copy)
    assert base_hash(base)[:12] in str(error.value)
    assert base_hash(copy)[:12] in str(error.value)
    made = stack(copy, [(delta, 1.0)], fine_tune_of_base=base)
    assert torch.equal(made["w"], (copy["w"].float() + (base["w"] + 1 - base["w"])).half())


def test_unchanged_tensors_in_several_dtypes_are_cast_each_to_its_own() -> None:
    base = {"w": torch.ones(3).half(), "norm": torch.tensor([0.1]), "same": torch.ones(2).half()}
    delta = Delta.between(base, {**base, "w": torch.zeros(3).half()})
    copy = {name: tensor.float() for name, tensor in base.items()}
    assert torch.equal(delta.apply(copy)["w"], torch.zeros(3))


@given(seed=st.integers(0, 1_000), dtype=st.sampled_from(DTYPES), strength=st.sampled_from([-0.5, 0.5, 1.0, 1.5]))
@settings(max_examples=30, deadline=None)
def test_a_fine_tune_gets_new_minus_old_and_keeps_its_other_entries(
    seed: int, dtype: torch.dtype, strength: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(40, generator=generator).half()}
    chosen = torch.rand(40, generator=generator) < 0.5
    new = {"w": torch.where(chosen, torch.randn(40, generator=generator).half(), base["w"])}
    tuned = {"w": torch.randn(40, generator=generator).to(dtype)}
    made = stack(tuned, [(Delta.between(base, new), strength)], fine_tune_of_base=base)
    expected = (tuned["w"].float() + strength * (new["w"].float() - base["w"].float())).to(dtype)
    assert torch.equal(bits(made["w"]), bits(torch.where(new["w"] != base["w"], expected, tuned["w"])))
    assert "differences" in made.note


def test_a_fine_tune_of_other_names_or_shapes_is_rejected_by_name() -> None:
    base = {"w": torch.zeros(3), "v": torch.zeros(2)}
    delta = Delta.between(base, {**base, "w": torch.ones(3)})
    with pytest.raises(ModelError, match="only one of them has u, v"):
        stack({"w": torch.ones(3), "u": torch.zeros(2)}, [(delta, 1.0)], fine_tune_of_base=base)
    with pytest.raises(ModelError, match="w are missing or have other shapes"):
        stack({"w": torch.ones(4), "v": torch.zeros(2)}, [(delta, 1.0)], fine_tune_of_base=base)
    with pytest.raises(ModelError, match="Give the base that the delta was made from"):
        stack({"w": torch.ones(3), "v": torch.ones(2)}, [(delta, 1.0)], fine_tune_of_base={**base, "v": torch.ones(2)})


# -- several at once --------------------------------------------------------------------------------------------------


def several(seed: int, dtype: torch.dtype, share: float, count: int = 3) -> tuple[dict[str, torch.Tensor], list[Delta]]:
    """A base and deltas of it that change entries of two tensors, here and there the same ones."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(9, 7, generator=generator).to(dtype) for name in ("v", "w")}
    deltas = []
    for _ in range(count):
        chosen = {name: torch.rand(9, 7, generator=generator) < share for name in base}
        new = {n: torch.where(chosen[n], torch.randn(9, 7, generator=generator).to(dtype), base[n]) for n in base}
        deltas.append(Delta.between(base, new))
    return base, deltas


@given(
    seed=st.integers(0, 1_000),
    dtype=st.sampled_from(DTYPES),
    strengths=st.lists(st.sampled_from([-0.5, 0.0, 0.7, 1.0, 1.5]), min_size=3, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_a_stack_does_not_depend_on_the_order(seed: int, dtype: torch.dtype, strengths: list[float]) -> None:
    base, deltas = several(seed, dtype, 0.4)
    layers = list(zip(deltas, strengths, strict=True))
    results = {stack(base, order).result_hash for order in permutations(layers)}
    assert len(results) == 1


@given(seed=st.integers(0, 1_000), dtype=st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_in_a_stack_lone_changes_are_exact_and_shared_ones_are_summed(seed: int, dtype: torch.dtype) -> None:
    base, deltas = several(seed, dtype, 0.3, count=2)
    one, two = sorted(deltas, key=lambda delta: delta.id)
    made, first, second = stack(base, [(one, 1.0), (two, 1.0)]), one.apply(base), two.apply(base)
    shared = 0
    for name in made:
        a, b = bits(first[name]) != bits(base[name]), bits(second[name]) != bits(base[name])
        shared += int((a & b).sum())
        assert torch.equal(bits(made[name])[a & ~b], bits(first[name])[a & ~b])
        assert torch.equal(bits(made[name])[b & ~a], bits(second[name])[b & ~a])
        assert torch.equal(bits(made[name])[~a & ~b], bits(base[name])[~a & ~b])
        old = base[name].float()
        total = old + ((first[name].float() - old) + (second[name].float() - old))
        assert torch.equal(made[name][a & b], total.to(dtype)[a & b])
    assert overlaps(deltas) == {(one.id, two.id): shared}


def test_what_cannot_be_stacked_is_rejected() -> None:
    base, (one, *_) = several(0, torch.float16, 0.3)
    other, (foreign, *_) = several(1, torch.float16, 0.3)
    with pytest.raises(ConfigError, match="is given twice"):
        stack(base, [(one, 1.0), (one, 0.5)])
    with pytest.raises(ModelError, match="different bases") as error:
        stack(base, [(one, 1.0), (foreign, 1.0)])
    assert base_hash(base)[:12] in str(error.value)
    assert base_hash(other)[:12] in str(error.value)


# -- what was applied -------------------------------------------------------------------------------------------------


def test_the_metadata_of_an_erased_model_name_the_delta() -> None:
    base, new = pair(3, torch.float16, 0.3)
    delta = Delta.between(base, new)
    found = applied_metadata(delta)
    assert json.loads(found["salun.applied"]) == [{"id": delta.id, "strength": 1.0, "overlaps": []}]
    assert (found["salun.base_hash"], found["salun.result_hash"]) == (base_hash(base), base_hash(new))
    assert applied_in(found, base_hash(base)) == []  # copied to other weights, the list says nothing


def test_a_delta_on_an_erased_model_extends_its_list() -> None:
    base, new = pair(3, torch.float16, 0.3)
    last = {**new, "same": new["same"].flip(0)}
    one = Delta.between(base, new, {"salun.concept": "circle", "salun.seed": "0"})
    two = Delta.between(new, last, {"salun.concept": "square", "salun.seed": "0"})
    found = applied_metadata(two, applied_metadata(one))
    assert (found["salun.concept"], found["salun.seed"]) == ("circle, square", "0")
    back = {
        key: text
        for key, text in with_removed(two.id, applied_in(found, base_hash(last)), found, base_hash(new)).items()
        if text
    }
    assert back["salun.concept"] == "circle"  # what the first says of itself comes back with it
    assert found["salun.base_hash"] == base_hash(base)
    under, top = applied_in(found, base_hash(last))
    assert (under.id, under.overlaps) == (one.id, (two.id,))  # it may be overlapped by what came on top
    assert (top.id, top.overlaps) == (two.id, ())


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"id":1}]', '[{"id":"a","strength":"x","overlaps":[]}]'])
def test_a_list_that_cannot_be_read_says_nothing(text: str) -> None:
    metadata = {"salun.applied": text, "salun.base_hash": "b", "salun.result_hash": "r"}
    assert applied_in(metadata, "r") == []


# -- damaged and hostile files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    ["format", "index", "order", "bits", "xor", "content", "hash", "dtype", "dtypes", "shape", "missing", "further"],
)
def test_damaged_files_are_rejected(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "x.salun.safetensors"
    base = {"w": torch.zeros(500)}
    new = {"w": base["w"].clone()}
    new["w"][: 400 if fault == "bits" else 2] = 1
    Delta.between(base, new).save(path)
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = dict(file.metadata())
    items = load_file(path)
    if fault == "format":
        del metadata["format"]
    elif fault == "index":
        items["w.where"] = torch.tensor([0, 0, 0, 0, 244, 1, 0, 0], dtype=torch.uint8)  # entry 500 of 500
    elif fault == "order":
        items["w.where"] = items["w.where"].view(2, 4).flip(0).reshape(-1).contiguous()
    elif fault == "bits":
        items["w.where"] = items["w.where"][:-1].clone()
    elif fault == "xor":
        items["w.xor"] = items["w.xor"][:-1].clone()
    elif fault == "content":
        items["w.xor"][0] ^= 1
    elif fault == "hash":
        metadata["base_hash"] = "x"
    elif fault == "dtypes":
        metadata["dtypes"] = "{}"
    elif fault == "further":
        items["v.xor"] = items["w.xor"].clone()
    elif fault == "dtype":
        metadata["tensors"] = metadata["tensors"].replace("F32", "F33")
    elif fault == "shape":
        metadata["tensors"] = metadata["tensors"].replace("500", "-5")
    else:
        del items["w.xor"]
    save_file(items, path, metadata)
    with pytest.raises(ModelError, match="delta"):
        Delta.load(path)


HOSTILE = {
    "bits of 2^40 entries": ["F16", [1 << 40], "bits"],
    "indices among 2^40 entries": ["F16", [1 << 20, 1 << 20], "index"],
    "a shape of astronomic size": ["F16", [10**4000] * 20, "index"],
    "very many sides": ["F16", [1 << 39] * 100_000, "index"],
    "negative sides": ["F16", [-1, -4], "index"],
    "no list": "F16",
    "no shape": ["F16", 7, "index"],
    "an unknown kind": ["F16", [4], "all"],
    "a dtype that is no name": [["F16"], [4], "index"],
}


@pytest.mark.parametrize("claim", HOSTILE)
def test_a_small_file_cannot_claim_much_memory(claim: str, tmp_path: Path) -> None:
    path = tmp_path / "x.salun.safetensors"
    base = {"w": torch.zeros(4).half()}
    delta = Delta.between(base, {"w": torch.tensor([0, 0, 1, 0]).half()})
    delta.save(path)
    header = safetensors_io.read_header(path)
    items = dict(safetensors_io.tensors(path))
    if "index" in str(HOSTILE[claim]):
        items["w.where"] = torch.tensor([2, 0, 0, 0], dtype=torch.uint8)
    safetensors_io.write(path, items, {**header.metadata, "tensors": json.dumps({"w": HOSTILE[claim]})})
    tracemalloc.start()
    try:
        if claim.startswith("indices"):  # not false in itself: it changes one entry of a large tensor
            with pytest.raises(ModelError):
                Delta.load(path).apply(base)
        else:
            with pytest.raises(ModelError, match="damaged"):
                Delta.load(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [[2, 2], [5], [4, 1]])
def test_a_delta_that_names_a_base_and_does_not_fit_it_is_rejected(shape: list[int], tmp_path: Path) -> None:
    path = tmp_path / "x.salun.safetensors"
    base = {"w": torch.zeros(4).half()}
    Delta.between(base, {"w": torch.tensor([0, 0, 1, 0]).half()}).save(path)
    header, items = safetensors_io.read_header(path), dict(safetensors_io.tensors(path))
    safetensors_io.write(path, items, {**header.metadata, "tensors": json.dumps({"w": ["F16", shape, "bits"]})})
    for known in (None, base_hash(base)):
        with pytest.raises(ModelError, match="other shapes"):
            Delta.load(path).apply(base, known_hash=known)


def test_a_result_that_is_not_the_erased_model_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.salun.safetensors"
    base, new = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    Delta.between(base, new).save(path)
    header, items = safetensors_io.read_header(path), dict(safetensors_io.tensors(path))
    safetensors_io.write(path, items, {**header.metadata, "result_hash": "0" * 64})
    with pytest.raises(ModelError, match="not its erased model"):
        Delta.load(path).apply(base)
