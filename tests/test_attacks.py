"""Attacks on erased models: their parts against known answers, and `salun attack` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import salun
from salun.attacks import ATTACKS
from salun.checkpoints import safetensors_io
from salun.delta.stock_formats import low_rank
from salun.diffusion.attack import attack
from salun.diffusion.attack_estimate import preview_attack
from salun.diffusion.attack_options import AttackOptions, attack_of
from salun.diffusion.attack_output import attack_grid, check_attack_folder, write_attack
from salun.diffusion.attacks.adversarial import made_for, read_adversarial, write_adversarial
from salun.diffusion.attacks.inversion import InversionOptions
from salun.diffusion.attacks.lora import lora_changes
from salun.diffusion.attacks.prompt_search import on_simplex
from salun.diffusion.attacks.quantize import fp8, int8, nf4, nf4_levels
from salun.diffusion.attacks.relearn import looks_of
from salun.diffusion.attacks.ring_a_bell import RingABellOptions, evolved
from salun.diffusion.attacks.soft_tokens import learn, nearest, replaced
from salun.diffusion.attacks.task import AdversarialPrompts, AttackTask, Best, Known
from salun.diffusion.attacks.trajectory import Trajectory, starting_noise
from salun.diffusion.data.latents import sample_latents
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions, Sampling
from salun.diffusion.plan import make_plan
from salun.diffusion.stages import attack_steps
from salun.errors import Cancelled, ConfigError, DataError, ModelError
from salun.evaluation.calibration import Calibration
from salun.evaluation.detector import DetectorInputs, load_detector
from salun.progress import Event, Stage, silent
from salun.report.attacks import attack_banner, attack_rows

QUICK: dict[str, Any] = {"n": 8, "images": 4, "sampling_steps": 8}


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sneaky", "must be one of seeds, noise"),
        ("seeds:5", "takes no argument"),
        ("seeds+tries=0", "must be at least 1"),
        ("seeds+colour=red", "unknown option"),
        ("quantize+bits=4", "has no options"),
        ("lora", "needs a file"),
        ("completion+first=30", "must be less than the number of steps"),
    ],
)
def test_an_attack_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attack_of(text)


def test_attacks_take_a_path_and_their_own_options_and_the_paper_has_other_numbers() -> None:
    chosen = attack_of("lora:my+lora=1.safetensors+strength=0.5")
    assert (chosen.argument, chosen.options.strength) == ("my+lora=1.safetensors", 0.5)
    assert attack_of("inversion").options.steps == 100 and attack_of("inversion", "paper").options.steps == 3000
    assert attack_of("inversion+steps=7", "paper").options.steps == 7
    names = [each.text for each in AttackOptions().attacks]
    assert names == [name for name in ATTACKS["diffusion"] if name not in ("lora", "prompts")]
    with pytest.raises(ConfigError, match="has seeds twice"):
        _ = AttackOptions(attack=["seeds", "seeds"]).attacks


@pytest.mark.parametrize("name", ATTACKS["diffusion"])
def test_every_attack_has_numbers_of_its_paper_that_fit_its_options(name: str) -> None:
    found = ATTACKS["diffusion"][name]
    assert found.options(**found.paper_budget) and found.paper and found.title


def test_an_attack_takes_as_many_passes_as_is_said_before_it_begins() -> None:
    """Searches stop where a prompt succeeds; with the passes of the benchmark's runs, and encodings left out."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "attacks"
    stored = json.loads((folder / "circle-0-SalUn-32.json").read_text(encoding="utf-8"))["attacks"]
    sampling = Sampling(steps=12, guidance=3.0, resolution=128)
    for text, each in stored.items():
        chosen = attack_of(text)
        passes = chosen.attack.passes(chosen.options, 32, sampling, 16)
        if chosen.attack.name in ("prompt-search", "embedding-search", "ring-a-bell"):
            assert passes is not None and each["passes"] <= passes < 1.3 * each["passes"], text
        else:
            assert passes == each["passes"], text
    assert attack_of("prompts:x.csv").attack.passes(None, 32, sampling, 16) is None


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_point_on_the_simplex_is_the_nearest_one() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nearest_points = on_simplex(x)
    assert (nearest_points >= 0).all() and torch.allclose(nearest_points.sum(1), torch.ones(50, dtype=torch.float64))
    others = torch.distributions.Dirichlet(torch.ones(6, dtype=torch.float64)).sample((2000,))
    distances = (x[:, None] - others).square().sum(2).amin(1)
    assert ((x - nearest_points).square().sum(1) <= distances + 1e-12).all()
    corner = torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.equal(on_simplex(corner), corner)


def test_nf4_has_the_levels_of_its_paper() -> None:
    """Table of Dettmers et al. 2023, appendix E."""
    levels = [
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ]  # fmt: skip
    assert torch.allclose(nf4_levels(), torch.tensor(levels), atol=2e-6)


@pytest.mark.parametrize(("rounded", "error"), [(fp8, 1 / 16), (int8, 0.5 / 127), (nf4, 0.153)])
def test_rounding_is_as_coarse_as_its_format_and_no_coarser(rounded: Callable[[Tensor], Tensor], error: float) -> None:
    weight = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    once = rounded(weight)
    scale = weight.abs() if rounded is fp8 else weight.abs().amax()
    assert ((once - weight).abs() <= error * scale + 2e-3).all() and not torch.equal(once, weight)
    assert torch.allclose(rounded(once), once, atol=1e-6)
    assert torch.equal(rounded(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_the_concepts_tokens_are_replaced_wherever_they_are() -> None:
    assert replaced([1, 2, 3, 2, 3, 4], [[2, 3]], [-1, -2]) == [1, -1, -2, -1, -2, 4]
    assert replaced([1, 2, 3], [[2], [2, 3]], [-1]) == [1, -1]
    assert replaced([1, 2], [[5]], [-1]) == [-1, 1, 2]


def test_embeddings_of_tokens_project_to_these_tokens(shapes: Model) -> None:
    choices = shapes.searchable_tokens
    ids = torch.tensor([choices[3], choices[50], choices[140]])
    vectors = [2.5 * matrix[ids] for matrix in shapes.token_embeddings]
    assert torch.equal(nearest(vectors, shapes.token_embeddings, choices), ids)


def test_looks_are_dense_at_first() -> None:
    assert looks_of(60) == [1, 2, 5, 10, 20, 50, 60] and looks_of(1) == [1]


def test_prompts_as_tokens_encode_as_text_does(shapes: Model) -> None:
    texts = ["one red circle, plain style", "blue star"]
    rows = [shapes.tokens(text) for text in texts]
    assert torch.equal(shapes.encode_tokens(rows).hidden, shapes.encode(texts).hidden)
    token = rows[0][1]
    slots = [[-1 if each == token else each for each in row] for row in rows]
    vectors = [matrix[[token]].clone().requires_grad_(True) for matrix in shapes.token_embeddings]
    encoded = shapes.encode_tokens(slots, vectors)
    assert torch.equal(encoded.hidden, shapes.encode(texts).hidden)
    assert torch.autograd.grad(encoded.hidden.square().sum(), vectors)[0].abs().sum() > 0
    assert shapes.tokens(shapes.text_of(rows[1])) == rows[1]


def test_a_trajectory_continues_where_it_stopped_and_holds_what_is_known(shapes: Model) -> None:
    prompts, empty = shapes.encode(["one red circle, plain style"] * 2), shapes.encode([""])
    noise, random = starting_noise(shapes, [1, 2]), torch.Generator()
    path = Trajectory(shapes, prompts, empty, 5, 3.0)
    half = path.run(noise, random, 0, 2)
    assert torch.equal(path.run(half, random, 2), path.run(noise, random))
    known, hole = torch.randn_like(noise), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    assert torch.equal(replace(path, known=known, hole=hole).run(noise, random), known)
    steps = iter(range(3))
    with pytest.raises(StopIteration):
        replace(path, on_step=lambda: next(steps)).run(noise, random)
    noisy = replace(path, eta=1.0)
    first, again = (noisy.run(noise, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(first, again)


def test_the_curve_counts_the_prompts_of_all_parts() -> None:
    best, image = Best(3), torch.zeros(2, 1)
    for rows, hits in (([0, 1], ([1, 0], [1, 1])), ([2], ([0], [1]))):
        for look, shown in enumerate(hits, 1):
            best.add(image[: len(rows)], np.array(shown, bool), rows)
            best.mark(look, rows)
    assert best.curve == [(1, pytest.approx(1 / 3)), (2, pytest.approx(1))]


# -- a task on the bundled model -------------------------------------------------------------------------------------


@pytest.fixture
def task(shapes: Model) -> AttackTask:
    """The bundled model itself as the attacked one."""
    plan = make_plan(shapes.settings, "shapes", "circle", EraseOptions())
    detector = load_detector("attribute", DetectorInputs(plan.subjects, shapes.settings.detector, shapes, "cpu"))
    target = detector.target(plan.subjects[0])
    assert target is not None
    calibration = Calibration(np.ones(4, bool), np.zeros(4, bool), 1.0)
    texts = [prompt.text for prompt in plan.prompts.concepts[0].forget[:8]]
    known = Known(texts, sample_latents(shapes, texts, list(range(8))))
    anchors = [prompt.text for prompt in plan.prompts.concepts[0].anchor[:4]]
    return AttackTask(
        shapes, shapes, None, plan, 0, detector, target, calibration, texts[:4], anchors, [0, 1, 2, 3],
        known.latents[:4], known, lambda n: known.some(n), lambda name: shapes,
    )  # fmt: skip


def test_weights_are_as_they_were_after_every_change_of_them(task: AttackTask) -> None:
    model = task.attacked
    before = {name: p.detach().clone() for name, p in model.parameters().items()}
    name = next(name for name, p in before.items() if p.ndim >= 2)
    erased = replace(task, change={name: before[name] + 1})
    with erased.victim() as victim:
        assert torch.equal(victim.parameters()[name], before[name] + 1)
        with erased.altered({name: before[name] + 5}), erased.unerased() as original:
            assert torch.equal(original.parameters()[name], before[name]), "the detector looks with the original's eyes"
        assert torch.equal(victim.parameters()[name], before[name] + 1)
    assert all(torch.equal(p, before[each]) for each, p in model.parameters().items())


def test_ring_a_bell_finds_a_prompt_that_is_known_to_be_there(task: AttackTask) -> None:
    row = task.tokens.tokens("red")
    wanted = task.tokens.encode_tokens([row]).hidden[0]
    options = RingABellOptions(length=1, population=256, generations=12, mutation=1.0)
    best, distance = evolved(task, wanted, options, torch.Generator().manual_seed(0))
    assert best == row and distance < 1e-6


class Lookup:
    """A network that predicts its prompt's embedding, and its text encoder: what a search must find is known."""

    device, dtype, name, low_vram, latent_shape = torch.device("cpu"), torch.float32, "lookup", True, (1, 1, 6)
    settings = SimpleNamespace(recipe=SimpleNamespace(batch_size=2, lr=1e-3))
    schedule = SimpleNamespace(
        t_at=lambda fraction: fraction, sample_t=lambda n, generator: torch.zeros(n),
        add_noise=lambda x_0, noise, t: x_0, target=lambda x_0, noise, t: x_0,
    )  # fmt: skip

    def __init__(self) -> None:
        table = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
        self.token_embeddings, self.searchable_tokens = [torch.nn.functional.normalize(table)], list(range(12))

    longest = 1

    def parameters(self) -> dict[str, Any]:
        return {}

    def load(self, tensors: Any) -> None: ...

    def tokens(self, prompt: str) -> list[int]:
        return []

    def text_of(self, tokens: Any) -> str:
        return "+".join(map(str, tokens))

    def encoding(self) -> Any:
        return nullcontext()

    def encode(self, prompts: Any) -> Conditioning:
        return self.encode_tokens([[int(prompt)] for prompt in prompts])

    def encode_tokens(self, rows: Any, vectors: Any = ()) -> Conditioning:
        table = torch.cat([self.token_embeddings[0], *(v.flip(0) for v in vectors)])  # −1 is the last row
        return Conditioning(torch.stack([table[list(row)].sum(0, keepdim=True) for row in rows]))

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return conditioning.hidden[:, :, None]


@pytest.mark.parametrize("text", ["prompt-search+length=1+iterations=30+timesteps=2", "embedding-search+length=1"])
def test_a_search_finds_the_tokens_that_are_known_to_be_best(task: AttackTask, text: str) -> None:
    """In parts of two prompts, whose images show the concept at the end of the second part's search alone."""
    model: Any = Lookup()
    wanted = [3, 7, 0]
    latents = model.token_embeddings[0][wanted][:, None, None]
    task = replace(
        task, original=model, attacked=model, prompts=list(map(str, wanted)), seeds=[0, 1, 2], latents=latents
    )

    def attempt(conditioning: Conditioning, seeds: Any) -> tuple[Tensor, np.ndarray]:
        return conditioning.hidden[:, :, None], np.zeros(len(seeds), bool)

    task.attempt = attempt  # type: ignore[method-assign]
    chosen = attack_of(text)
    result = chosen.attack.call(task, chosen.options)
    assert result.prompts is not None and [list(row) for row in result.prompts.rows] == [[token] for token in wanted]
    assert [rate for _, rate in result.curve] == [0, 0]


def test_inversion_lowers_the_networks_loss_on_the_images(task: AttackTask) -> None:
    """From a token of another shape: the loss with the learned vector is near that with the concept's own word."""
    start = task.tokens.tokens("crescent")[0]
    vectors = [matrix[[start]].clone().requires_grad_(True) for matrix in task.tokens.token_embeddings]
    circle = task.tokens.tokens("circle")
    rows = [replaced(task.tokens.tokens(prompt), [circle], [-1]) for prompt in task.known.prompts]

    def conditioning(chosen: Tensor) -> Conditioning:
        return task.tokens.encode_tokens([rows[i] for i in chosen.tolist()], vectors)

    def loss(prompts: Conditioning) -> float:
        t = torch.tensor([700]).expand(8)
        with torch.no_grad():
            losses = [
                task.noise_loss(task.attacked, task.known.latents, prompts, torch.Generator().manual_seed(i), t)
                for i in range(8)
            ]
        return float(torch.stack(losses).mean())

    plain = loss(task.encode(task.known.prompts))
    before = loss(conditioning(torch.arange(8)))
    learn(task, task.attacked, vectors, conditioning, range(25), 0.05)
    after = loss(conditioning(torch.arange(8)))
    assert after - plain < 0.5 * (before - plain) and before > plain


def test_relearning_counts_its_best_look_and_trains_as_the_original_was_whatever_the_erasure(task: AttackTask) -> None:
    erased = make_plan(task.original.settings, "shapes", "circle", EraseOptions(batch_size=2, lr=1e-9))
    task = replace(task, plan=erased)
    rates = iter(([0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0]))
    task.attempt = lambda conditioning, seeds: (task.latents, np.array(next(rates), bool))  # type: ignore[method-assign]
    result = ATTACKS["diffusion"]["relearn"].call(task, attack_of("relearn+steps=5").options)
    assert result.shown.tolist() == [True, True, False, True] and result.tries == 3
    assert [rate for _, rate in result.curve] == [0, 0.75, 0.25]
    assert result.facts == {"steps_to_half": 2, "batch_size": 16, "lr": 3e-4}
    assert result.passes == 5 * 16 * 3, "of the passes of a training, batches of the original's size"


def test_a_lora_file_adds_what_it_holds(task: AttackTask, tmp_path: Path) -> None:
    original = {name: tensor.float() for name, tensor in dict(task.original.original()).items()}
    name = next(name for name in original if name.endswith("attn2.to_v.weight"))
    conv = next(name for name in original if name.endswith("conv1.weight"))
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for each in (name, conv):
        rows, columns = len(original[each]), original[each][0].numel()
        product = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
        changed[each] = original[each] + 0.1 * product.view_as(original[each])
    made = low_rank(original, changed, rank=2)
    tensors = dict((made[0] if isinstance(made, tuple) else made).items())
    safetensors_io.write(tmp_path / "x.lora.safetensors", tensors, {})
    weights = {each: tensor for each, tensor in original.items() if tensor.ndim >= 2}
    changes = lora_changes(tmp_path / "x.lora.safetensors", weights, list(original))
    assert changes.keys() == changed.keys()
    for each, tensor in changes.items():
        assert torch.allclose(tensor, changed[each] - original[each], atol=2e-3)
    with pytest.raises(ModelError, match="another shape"):
        lora_changes(tmp_path / "x.lora.safetensors", {**weights, name: weights[name][:5]}, list(original))
    safetensors_io.write(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ModelError, match="no LoRA layer"):
        lora_changes(tmp_path / "other.safetensors", weights, list(original))


def test_adversarial_prompts_are_read_as_they_were_written(task: AttackTask, tmp_path: Path) -> None:
    width = task.tokens.token_embeddings[0].shape[1]
    made = AdversarialPrompts([[-1, 5], [7]], [3, 4], [torch.randn(1, width)], ["* a", "b"])
    plain = AdversarialPrompts([], [9], texts=["one red circle"])
    write_adversarial(tmp_path / "a.safetensors", [("inversion", made), ("seeds", plain)])
    (name, read), (_, other) = read_adversarial(tmp_path / "a.safetensors")
    assert (name, read.rows, read.seeds, read.texts) == ("inversion", made.rows, made.seeds, made.texts)
    assert torch.equal(read.vectors[0], made.vectors[0]) and other.texts == ["one red circle"]
    result = ATTACKS["diffusion"]["prompts"].call(replace(task, argument=str(tmp_path / "a.safetensors")), None)
    assert len(result.shown) == 3 and set(result.facts["asr_by_attack"]) == {"inversion", "seeds"}
    wide = replace(made, vectors=[torch.randn(1, width + 1)])
    write_adversarial(tmp_path / "wide.safetensors", [("inversion", wide)])
    with pytest.raises(DataError, match="another text encoder"):
        ATTACKS["diffusion"]["prompts"].call(replace(task, argument=str(tmp_path / "wide.safetensors")), None)


def test_numbers_of_an_attack_are_shown_in_words_and_what_was_left_around_a_hole_is_no_success() -> None:
    rate = {"value": 50.0, "n": 4, "low": 15.0, "high": 85.0}
    base = {"concept": "red", "side": "erased", "asr": rate, "by_chance": 0.0, "passes": 1, "seconds": 0.0, "error": ""}
    facts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "relearn": ({"steps_to_half": 1, "batch_size": 16, "lr": 3e-4}, {"steps": 60}),
        "relearn+data=unrelated": ({"steps_to_half": None}, {"steps": 60}),
        "inpaint": ({"asr_of_anchor": 83.3}, {}),
        "inversion": ({"batch_size": 16}, {}),
        "prompts:a": ({"asr_by_attack": {"inversion red": rate}}, {}),
    }
    made = [{**base, "attack": name, "title": name, "facts": of, "options": o} for name, (of, o) in facts.items()]
    rows = attack_rows({"plain": {"red": {"asr": rate}}, "attacks": made})
    assert [row[-1] for row in rows[2:]] == [
        "half as often as in the original after 1 step; batches of 16, learning rate 0.0003",
        "not half as often as in the original within 60 steps", "original under the anchor's prompt: 83 %",
        "batches of 16", "", "",
    ]  # fmt: skip
    assert rows[-1][1:3] == ("prompts:a, made by inversion red", "50.0 % (15.0–85.0, n = 4)")
    assert attack_banner({"attacks": made[2:3]}).outcome == "Withstands these attacks"


def test_the_banner_counts_only_attacks_that_were_made_and_work_on_the_original() -> None:
    def made(title: str, percent: float | None, side: str = "erased", error: str = "") -> dict[str, Any]:
        asr = None if percent is None else {"value": percent, "n": 32, "low": 0.0, "high": percent + 11.0}
        return {"attack": title, "title": title, "concept": "red", "side": side, "asr": asr, "by_chance": 0.0,
                "facts": {}, "error": error}  # fmt: skip

    def banner(*attacks: dict[str, Any], plain: float = 94.0) -> tuple[str, str]:
        metrics = {"per_concept": {"red": {"calibration": {"detected": {"value": plain}}}}}
        shown = attack_banner({"attacks": list(attacks), "metrics": metrics})
        return shown.outcome, shown.text

    seeds, works = made("seeds", 0.0), made("seeds", 94.0, "original")
    weak, failed = made("seeds", 60.0, "original"), made("lora", None, error="no such file")
    assert banner(seeds)[0] == banner(seeds, works)[0] == "Withstands these attacks"
    assert banner(seeds, works, plain=99.0)[0] == banner(seeds, weak)[0] == "Can't tell"
    assert banner(seeds, made("merge", 0.0), weak)[0] == "Withstands 1 of 2 attacks"
    outcome, text = banner(seeds, works, failed)
    assert outcome == "Withstands 1 of 2 attacks" and "“lora” could not be made: no such file." in text
    assert banner(made("seeds", 60.0), weak, failed)[0] == "Brought back", "a weak attack that succeeds does count"


def test_prompts_that_were_made_for_another_concept_of_the_run_are_not_replayed() -> None:
    concepts = ["red", "dark red"]
    names = ["inversion red", "inversion dark red", "inversion blue"]
    assert [made_for(name, concepts) for name in names] == ["red", "dark red", None]


@pytest.mark.parametrize(
    "entry",
    [
        {"rows": [[-3]]}, {"rows": [["x"]]}, {"seeds": [-1]}, {"seeds": []}, {"encoders": 99},
        {"rows": None}, {"texts": 5},
    ],
)  # fmt: skip
def test_a_malformed_file_of_prompts_is_an_error(entry: dict[str, Any], tmp_path: Path) -> None:
    good = {"attack": "a", "rows": [[1]], "seeds": [0], "texts": ["x"], "encoders": 0, "exact": True}
    metadata = {"format": "salun-adversarial-1", "prompts": json.dumps({"prompts": [{**good, **entry}]})}
    safetensors_io.write(tmp_path / "a.safetensors", {"none": torch.zeros(1)}, metadata)
    with pytest.raises(DataError, match="cannot be read"):
        read_adversarial(tmp_path / "a.safetensors")
    safetensors_io.write(tmp_path / "b.safetensors", {"none": torch.zeros(1)}, {})
    with pytest.raises(DataError, match="no adversarial prompts"):
        read_adversarial(tmp_path / "b.safetensors")


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def erased(shapes: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a closed form, which erases in a second."""
    folder = tmp_path_factory.mktemp("attacked")
    few = {"eval_images": 2, "method": "uce", "sampling_steps": 8}
    salun.erase(shapes, "circle", run_dir=folder / "run", progress=silent, **few)
    return folder


def test_an_attack_on_a_run_writes_a_page_and_prompts_to_replay(erased: Path, tmp_path: Path) -> None:
    """A merge that is all of the original is the original; every attack is also made on the original itself."""
    names = ["seeds+tries=2", "completion+steps=4+first=2", "concept-vector+strengths=1", "merge+fraction=1"]
    options = AttackOptions(attack=names, control=True, **QUICK)
    report = attack(str(erased / "run"), options, command="salun attack run")
    data = report.as_json()
    by_side = {(each["attack"], each["side"]): each for each in data["attacks"]}
    assert len(by_side) == 8 and not any(each["error"] for each in by_side.values())
    merged, plain = by_side["merge+fraction=1", "erased"], by_side["merge+fraction=1", "original"]
    assert merged["asr"] == plain["asr"] and merged["curve"][-1][0] == 1
    assert by_side["seeds+tries=2", "erased"]["passes"] == 2 * 8 * report.plan.sampling.passes
    assert data["plain"]["circle"]["asr"]["n"] == 8 and data["command"] == "salun attack run"
    files = write_attack(report, tmp_path / "out")
    assert [path.name for path in files] == ["attack.json", "attack.html", "adversarial.safetensors"]
    page = files[1].read_text(encoding="utf-8")
    grid = attack_grid(report)
    assert grid.ndim == 3 and len(np.unique(grid)) > 50
    before = (erased / "run" / "report.html").read_text(encoding="utf-8")
    again = [write_attack(report, erased / "run") for _ in range(2)]
    whole = (erased / "run" / "report.html").read_text(encoding="utf-8")
    assert again[0][-1].name == "report.html" and "Does it come back?" not in before
    assert whole.count("Does it come back?") == 1 and len(whole) > len(before), "a chapter, however often it is written"
    start, end = before.split("<!--chapter--><!--/chapter-->")
    assert whole.startswith(start) and whole.endswith(end)
    (tmp_path / "out" / "report.html").write_bytes(b"\xff<!--chapter--><!--/chapter-->")
    assert len(write_attack(report, tmp_path / "out")) == 3, "a report that cannot be read stays as it is"
    assert "Does it come back?" in page and "Concept vector" in page and "success against budget" in page
    assert json.loads(files[0].read_text(encoding="utf-8")) == json.loads(json.dumps(data))
    rows = attack_rows(data)
    assert rows[1][:2] == ("circle", "none: the plain prompts") and len(rows) == 6
    replay = AttackOptions(attack=[f"prompts:{files[2]}"], **QUICK)
    again_made = attack(str(erased / "run"), replay)
    replayed = again_made.attacked[0].result
    assert replayed is not None and len(replayed.shown) == 8
    assert list(replayed.texts) == read_adversarial(files[2])[0][1].texts, "captions of images are the file's prompts"
    assert "adversarial.safetensors</a>" in page and "+ η·v" in page
    shown = write_attack(again_made, tmp_path / "replay")[1].read_text(encoding="utf-8")
    assert "adversarial.safetensors</a>" not in shown, "which this call did not write"
    kept = json.loads(files[0].read_text(encoding="utf-8"))
    kept["attacks"] += [{"attack": "odd"}, {**kept["attacks"][0], "attack": "other", "concept": "none"}, 3]
    files[0].write_text(json.dumps(kept), encoding="utf-8")
    write_attack(again_made, tmp_path / "out")
    both = json.loads(files[0].read_text(encoding="utf-8"))["attacks"]
    assert [each["attack"] for each in both] == [*(each["attack"] for each in data["attacks"]), replay.attack[0]]
    assert len(read_adversarial(files[2])) == 1 and "Concept vector" in files[1].read_text(encoding="utf-8")
    files[0].write_text(json.dumps({**kept, "n": 9}), encoding="utf-8")
    write_attack(again_made, tmp_path / "out")
    assert len(json.loads(files[0].read_text(encoding="utf-8"))["attacks"]) == 1, "on other prompts"


def test_a_models_own_files_are_attacked_as_its_run_is(erased: Path) -> None:
    few = {"attack": ["seeds+tries=1", "quantize"], **QUICK}
    of_run = attack(str(erased / "run"), AttackOptions(**few))
    named = {"concept": ["circle"], "against": "shapes"}
    of_files = attack(str(erased / "run" / "model"), AttackOptions(**few, **named))
    for mine, other in zip(of_run.attacked, of_files.attacked, strict=True):
        assert mine.result is not None and other.result is not None
        assert (mine.result.shown == other.result.shown).all()
        assert torch.allclose(mine.result.latents, other.result.latents, atol=1e-4)


def test_a_repeated_attack_takes_finished_ones_from_the_cache(
    erased: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SALUN_CACHE", str(tmp_path))

    def stop(event: Event, /) -> None:
        if event.stage is Stage.ATTACKING and "Concept vector" in event.message:
            raise Cancelled("stopped")

    options = AttackOptions(attack=["seeds+tries=1", "concept-vector+strengths=1"], **QUICK)
    with pytest.raises(Cancelled):
        attack(str(erased / "run"), options, stop)
    events: list[Event] = []
    first = attack(str(erased / "run"), options, events.append)
    again = attack(str(erased / "run"), options)
    assert first.compared.original is not None
    sizes = attack_steps(first.plan, options, first.compared.original.settings.recipe.batch_size)
    assert (events[-1].step, events[-1].restored) == (sum(sizes), sizes[0]), "of the two only the second was made"
    for one, two in zip(first.attacked, again.attacked, strict=True):
        assert one.result is not None and two.result is not None
        assert torch.equal(one.result.latents, two.result.latents) and one.as_json() == two.as_json()


def test_a_dry_run_of_attacks_says_what_they_cost_and_writes_nothing(erased: Path) -> None:
    before = sorted(path for path in erased.rglob("*"))
    options = AttackOptions(attack=["seeds+tries=2", "relearn+steps=2"], control=True, n=8, sampling_steps=8)
    found = preview_attack(str(erased / "run"), options)
    of_image = 8 * 2
    assert [each["passes"] for each in found["attacks"]] == [2 * 2 * 8 * of_image, 2 * (2 * 16 * 3 + 2 * 8 * of_image)]
    assert all(0 < each["least"] <= each["most"] for each in found["attacks"])
    assert found["most"] > sum(each["most"] for each in found["attacks"]) and found["original"] == "shapes"
    assert sorted(path for path in erased.rglob("*")) == before
    with pytest.raises(ConfigError, match="without its original"):
        preview_attack(str(erased / "run" / "model"), AttackOptions(concept=["circle"], attack=["seeds"]))


def test_token_attacks_run_on_the_embedded_model(erased: Path) -> None:
    names = [
        "ring-a-bell+population=8+generations=2+searches=1", "prompt-search+timesteps=1+iterations=2",
        "embedding-search+steps=2+every=1", "inversion+steps=2+start=anchor", "noise+steps=3", "inpaint+steps=3",
        "relearn+steps=2+images=4", "relearn+steps=2+images=4+rank=2", "relearn+steps=1+data=unrelated",
    ]  # fmt: skip
    report = attack(str(erased / "run"), AttackOptions(attack=names, **QUICK))
    for each in report.attacked:
        assert each.result is not None and len(each.result.shown) == 8 and each.result.passes > 0, each.error
    made = [each.result.prompts for each in report.attacked[:4] if each.result is not None]
    assert all(prompts is not None and len(prompts.rows) == 8 for prompts in made)
    searched, of_inversion = made[1], made[3]
    assert searched is not None and {len(row) - 5 for row in searched.rows} == {6, 8}
    assert of_inversion is not None and all(-1 in row for row in of_inversion.rows) and of_inversion.vectors


def test_errors_of_an_attack_say_what_to_do(erased: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without its original"):
        attack(str(erased / "run" / "model"), AttackOptions(concept=["circle"], attack=["seeds"]))
    with pytest.raises(ConfigError, match="is named by the run folder already"):
        attack(str(erased / "run"), AttackOptions(concept=["circle"], attack=["seeds"]))
    with pytest.raises(ConfigError, match="no attack can be judged: the detector cannot tell"):
        backwards = {"concept": ["circle"], "against": str(erased / "run" / "model"), "attack": ["seeds"]}
        attack("shapes", AttackOptions(**backwards, **QUICK))
    with pytest.raises(ConfigError, match="must be at least 2"):
        AttackOptions(n=0)
    failed = attack(str(erased / "run"), AttackOptions(attack=["lora:missing.safetensors"], **QUICK))
    assert "missing.safetensors" in failed.attacked[0].error
    assert attack_banner(failed.as_json()).outcome == "Can't tell"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="which is not a folder"):
        check_attack_folder(tmp_path / "file")


def test_inversion_options_name_what_they_take() -> None:
    with pytest.raises(ConfigError, match="start"):
        InversionOptions(start="nowhere")
