"""The loop: it minimises, stops where told, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salun.checkpoints import safetensors_io
from salun.errors import Cancelled, TrainingError
from salun.masking.mask import Mask
from salun.masking.training import Trained, TrainingSettings, fine_tune, step_generator
from salun.progress import Event, silent

SETTINGS = TrainingSettings(steps=9, lr=1e-2, retain_weight=0.5, fingerprint="this run")


def losses(module: nn.Module) -> Callable[[int], tuple[Tensor, Tensor]]:
    def of_step(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 6, generator=step_generator(3, step))
        y = module(x.to(next(module.parameters()).dtype)).float()
        return F.mse_loss(y, torch.ones_like(y)), F.mse_loss(y, torch.zeros_like(y))

    return of_step


def run(module: nn.Module, settings: TrainingSettings = SETTINGS, **options: object) -> Trained:
    parameters = dict(module.named_parameters())
    return fine_tune(parameters, Mask.random(parameters, 0.5, 0), losses(module), settings, **options)  # type: ignore[arg-type]


def test_every_step_is_reported_once_with_its_losses(little: nn.Module) -> None:
    events: list[Event] = []
    trained = run(little, progress=events.append)
    assert [(e.stage, e.step, e.total) for e in events] == [("training", i, 9) for i in range(1, 10)]
    assert [(e.step, e.metrics["forget"], e.metrics["retain"]) for e in events] == trained.history
    total = [f + 0.5 * r for _, f, r in trained.history]
    assert sum(total[-3:]) < sum(total[:3])


def test_random_numbers_of_a_step_depend_on_seed_and_step_alone() -> None:
    def draw(seed: int, step: int) -> float:
        return float(torch.rand(1, generator=step_generator(seed, step)))

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(seed, step) for seed in range(20) for step in range(-20, 20)}) == 800


def test_the_rate_can_fall_to_zero_at_the_end(little: nn.Module) -> None:
    """Adam's first steps move each weight by about the rate itself, so the moves show the schedule."""
    places: list[Tensor] = []

    def watch(event: Event) -> None:
        places.append(torch.cat([p.detach().flatten() for p in little.parameters()]))

    constant = TrainingSettings(steps=10, lr=1e-3, retain_weight=0.0, lr_decay=0.5)
    run(little, constant, progress=watch)
    moves = [float((b - a).abs().max()) for a, b in itertools.pairwise(places)]
    assert moves[-1] < 0.4 * max(moves[:4])  # the last of five falling steps has a fifth of the rate


def stopped_state(module: nn.Module, folder: Path, step: int = 4) -> Path:
    """The state of a run that was stopped after a step."""

    def stop(event: Event) -> None:
        if event.step == step:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(module, progress=stop, state_path=folder / "state.safetensors")
    return folder / "state.safetensors"


@pytest.mark.parametrize("soft", [None, 0.3])
def test_a_cancelled_run_resumes_to_the_same_bits(soft: float | None, little: nn.Module, tmp_path: Path) -> None:
    settings = TrainingSettings(
        steps=9, lr=1e-2, retain_weight=0.5, soft_density=soft, lr_decay=0.5, fingerprint="this run"
    )
    start = {name: p.detach().clone() for name, p in little.named_parameters()}

    def fresh() -> nn.Module:
        little.load_state_dict(start)
        return little

    def execute(**options: object) -> Trained:
        parameters = dict(fresh().named_parameters())
        mask = Mask.full(parameters) if soft else Mask.random(parameters, 0.5, 0)
        return fine_tune(parameters, mask, losses(little), settings, **options)  # type: ignore[arg-type]

    whole = execute()
    state = tmp_path / "state.safetensors"

    def stop(event: Event) -> None:
        if event.step == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        execute(progress=stop, state_path=state)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    resumed = execute(state_path=state, resume=True)
    assert resumed.history == whole.history
    assert resumed.final_density == whole.final_density
    for name, master in whole.masters.items():
        assert torch.equal(resumed.masters[name], master)


def test_a_state_of_other_options_is_refused(little: nn.Module, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"

    def stop(event: Event) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        run(little, progress=stop, state_path=state)
    other = TrainingSettings(steps=9, lr=2e-2, retain_weight=0.5, fingerprint="another run")
    with pytest.raises(TrainingError, match="belongs to other options"):
        run(little, other, state_path=state, resume=True)
    state.write_bytes(b"half a file")
    with pytest.raises(TrainingError, match="cannot be read"):
        run(little, state_path=state, resume=True)


def first(entry: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    """Puts another tensor in the place of the first parameter's, or none."""

    def apply(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(f"/{entry}"))
        other = change(tensors.pop(name))
        if other is not None:
            tensors[name] = other

    return apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "tamper",
    [
        first("exp_avg", lambda t: t[:1].clone()),
        first("exp_avg", lambda t: torch.zeros(len(t) + 1000)),
        first("exp_avg_sq", lambda t: torch.zeros(0)),
        first("exp_avg", lambda t: t.double()),
        first("exp_avg", lambda t: None),
        first("exp_avg", lambda t: torch.full_like(t, float("nan"))),
        first("exp_avg_sq", lambda t: -torch.ones_like(t)),
        first("step", lambda t: torch.tensor(0.0)),
        first("step", lambda t: torch.tensor(float("nan"))),
        first("step", lambda t: torch.ones(3)),
        first("master", lambda t: torch.full_like(t, float("inf"))),
        first("master", lambda t: None),
        lambda tensors: tensors.update({"0.weight/more": torch.zeros(3)}),
        lambda tensors: tensors.update({"more/master": torch.zeros(3)}),
    ],
    ids=[
        "shorter",
        "longer",
        "empty",
        "double",
        "missing",
        "nan",
        "negative",
        "step-0",
        "step-nan",
        "steps",
        "inf",
        "no-master",
        "more",
        "other",
    ],
)
def test_a_state_with_other_tensors_is_rejected_before_any_use(
    tamper: Callable[[dict[str, Tensor]], None], dtype: torch.dtype, little: nn.Module, tmp_path: Path
) -> None:
    """A fused Adam writes moments of any size as if they were the master's: the process would abort."""
    path = stopped_state(little.to(dtype), tmp_path)
    tensors, metadata = dict(safetensors_io.tensors(path)), safetensors_io.read_header(path).metadata
    tamper(tensors)
    safetensors_io.write(path, tensors, metadata)
    before = {name: p.detach().clone() for name, p in little.named_parameters()}
    with pytest.raises(TrainingError, match="saved state"):
        run(little, state_path=path, resume=True)
    assert all(torch.equal(p, before[name]) for name, p in little.named_parameters())


@pytest.mark.parametrize(
    "metadata",
    [
        *({"scale": text} for text in ("nan", "0", "inf", "-1", "3", "131072", "0.5", "x", "")),
        *({"history": text} for text in ("[[1, NaN, 0.0]]", "[[2, 0.0, 0.0]]", "[[1, 0.0, 0.0], [1, 0.0, 0.0]]", "7")),
        *({"history": text} for text in ('[["1", 0.0, 0.0]]', "[[true, 0.0, 0.0]]", "[" * 9_000, "[[1, 0.0]]", "{}x")),
        {"history": str([[i, 0.0, 0.0] for i in range(1, 11)])},
    ],
    ids=lambda m: str(m)[:40],
)
def test_a_state_with_another_scale_or_history_is_rejected(
    metadata: dict[str, str], little: nn.Module, tmp_path: Path
) -> None:
    """A scale of NaN would train for ever."""
    path = stopped_state(little.half(), tmp_path)
    kept = safetensors_io.read_header(path).metadata
    safetensors_io.write(path, dict(safetensors_io.tensors(path)), {**kept, **metadata})
    with pytest.raises(TrainingError, match=r"saved state.*(cannot be read|scale|has taken 10 steps)"):
        run(little, state_path=path, resume=True)


@pytest.mark.parametrize("soft", [None, 0.5])
def test_training_that_diverges_stops_with_advice(soft: float | None, little: nn.Module) -> None:
    parameters = dict(little.named_parameters())

    def explode(step: int) -> tuple[Tensor, Tensor]:
        loss = next(little.parameters()).sum()
        return (loss * (float("inf") if step == 2 else 1.0)), loss * 0

    settings = TrainingSettings(steps=9, lr=1e-2, retain_weight=0.5, soft_density=soft)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        fine_tune(parameters, Mask.full(parameters), explode, settings, silent)
    assert not any(p.grad is not None for p in little.parameters())
