"""The loop: it minimises, stops where asked to, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salun.checkpoints import safetensors_io
from salun.errors import Cancelled, TrainingError
from salun.masking.mask import Mask
from salun.masking.optimizers import adam
from salun.masking.training import Trained, TrainingSettings, constant, linear_decay, train
from salun.masking.training_state import StateFile
from salun.progress import Event
from salun.randomness import step_generator


def losses(module: nn.Module) -> Callable[[int], dict[str, Tensor]]:
    def of_step(step: int) -> dict[str, Tensor]:
        x = torch.randn(8, 6, generator=step_generator(3, step))
        y = module(x.to(next(module.parameters()).dtype)).float()
        return {"forget": F.mse_loss(y, torch.ones_like(y)), "retain": F.mse_loss(y, torch.zeros_like(y))}

    return of_step


def settings(module: nn.Module, **changes: Any) -> TrainingSettings:
    make = adam("adam", 1e-2, dict(module.named_parameters()))
    weights = {"retain": 0.5}
    return TrainingSettings(**{"steps": 9, "lr": constant(1e-2), "optimizer": make, "weights": weights, **changes})


def run(module: nn.Module, changes: Any = {}, path: Path | None = None, **options: Any) -> Trained:  # noqa: B006
    parameters = dict(module.named_parameters())
    mask = Mask.full(parameters) if "soft_density" in changes else Mask.random(parameters, 0.5, 0)
    state = StateFile(path, "this run") if path is not None else None
    return train(parameters, mask, losses(module), settings(module, **changes), state=state, **options)


def test_every_step_is_reported_once_with_its_losses(little: nn.Module) -> None:
    events: list[Event] = []
    trained = run(little, progress=events.append)
    assert [(e.stage, e.step, e.total) for e in events] == [("training", i, 9) for i in range(1, 10)]
    assert [{"step": e.step, **e.metrics} for e in events] == trained.history
    total = [row["forget"] + 0.5 * row["retain"] for row in trained.history]
    assert sum(total[-3:]) < sum(total[:3])


def test_the_weights_of_losses_default_to_one(little: nn.Module) -> None:
    """Named weights scale what is minimized, not what is reported."""
    start = {name: p.detach().clone() for name, p in little.named_parameters()}
    results = []
    for weights in ({}, {"forget": 1.0, "retain": 1.0}, {"retain": 0.0}):
        little.load_state_dict(start)
        results.append(run(little, {"weights": weights}))
    plain, ones, forget_only = results
    assert all(torch.equal(master, ones.masters[name]) for name, master in plain.masters.items())
    assert plain.history[0] == forget_only.history[0]
    assert forget_only.history[-1]["forget"] < plain.history[-1]["forget"]


def test_a_steps_gradient_is_clipped_to_the_norm(little: nn.Module) -> None:
    """One step of plain gradient descent moves the weights by rate · norm."""
    before = {name: p.detach().clone() for name, p in little.named_parameters()}
    changes = {"steps": 1, "lr": constant(0.5), "optimizer": lambda packed: torch.optim.SGD(packed, lr=0.5)}
    run(little, {**changes, "max_norm": 0.01})
    moved = [(p.detach() - before[name]).flatten() for name, p in little.named_parameters()]
    assert torch.cat(moved).norm() == pytest.approx(0.5 * 0.01, rel=1e-3)


@pytest.mark.parametrize("opposed", [True, False])
def test_gradient_surgery_takes_out_only_what_opposes_the_protected_loss(little: nn.Module, opposed: bool) -> None:
    """PCGrad's projection, over the selected weights alone: the step does not raise the retain loss to first order."""
    parameters, make = dict(little.named_parameters()), lambda p: torch.optim.SGD(p, lr=1.0)
    mask, named = Mask.random(parameters, 0.5, 0), losses(little)(0)
    named["retain"] = losses(little)(0)["retain" if opposed else "forget"]

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        return torch.cat([g[mask.dense(name)] for name, g in zip(parameters, found, strict=True)])

    forget, retain = gradient(named["forget"]), gradient(named["retain"])
    assert bool(forget @ retain < 0) == opposed
    projected = forget - (forget @ retain) / (retain @ retain) * retain if opposed else forget
    before = torch.cat([p.detach()[mask.dense(name)] for name, p in parameters.items()])
    changes = {"steps": 1, "lr": constant(1.0), "optimizer": make, "protected": "retain"}
    trained = train(parameters, mask, lambda step: named, settings(little, **changes))
    torch.testing.assert_close(before - torch.cat([*trained.masters.values()]), projected + 0.5 * retain)


def test_training_can_be_stopped_early(little: nn.Module) -> None:
    assert [row["step"] for row in run(little, stop=lambda step: step == 3).history] == [1, 2, 3]


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

    run(little, {"steps": 10, "lr": linear_decay(1e-3, 10, 0.5)}, progress=watch)
    moves = [float((b - a).abs().max()) for a, b in itertools.pairwise(places)]
    assert moves[-1] < 0.4 * max(moves[:4])  # the last of five falling steps has a fifth of the rate


def stopped_state(module: nn.Module, folder: Path, step: int = 4) -> Path:
    """The state of a run that was stopped after a step."""

    def stop(event: Event) -> None:
        if event.step == step:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(module, progress=stop, path=folder / "state.safetensors")
    return folder / "state.safetensors"


@pytest.mark.parametrize("soft", [None, 0.3])
def test_a_cancelled_run_resumes_to_the_same_bits(soft: float | None, little: nn.Module, tmp_path: Path) -> None:
    changes = {"lr": linear_decay(1e-2, 9, 0.5), **({"soft_density": soft} if soft else {})}
    start = {name: p.detach().clone() for name, p in little.named_parameters()}

    def execute(**options: Any) -> Trained:
        little.load_state_dict(start)
        return run(little, changes, **options)

    whole = execute()
    state = tmp_path / "state.safetensors"

    def stop(event: Event) -> None:
        if event.step == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        execute(progress=stop, path=state)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    resumed = execute(path=state)
    assert resumed.history == whole.history
    assert resumed.final_density == whole.final_density
    for name, master in whole.masters.items():
        assert torch.equal(resumed.masters[name], master)


def test_a_state_of_other_options_is_refused(little: nn.Module, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"

    def stop(event: Event) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        run(little, progress=stop, path=state)
    parameters = dict(little.named_parameters())
    with pytest.raises(TrainingError, match="of a run with other options"):
        train(parameters, Mask.full(parameters), losses(little), settings(little), state=StateFile(state, "another"))
    state.write_bytes(b"half a file")
    with pytest.raises(TrainingError, match="cannot be read"):
        run(little, path=state)


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
        run(little, path=path)
    assert all(torch.equal(p, before[name]) for name, p in little.named_parameters())


def row(step: str, loss: str = "0.0") -> str:
    return f'{{"step": {step}, "forget": {loss}}}'


@pytest.mark.parametrize(
    "metadata",
    [
        *({"scale": text} for text in ("nan", "0", "inf", "-1", "3", "131072", "0.5", "x", "")),
        *({"history": text} for text in ("7", "{}x", "[" * 9_000, '[{"step": 1}]', "[[1, 0.0]]", '{"step": 1}')),
        *({"history": f"[{rows}]"} for rows in (row("1", "NaN"), row("2"), row("1") + ", " + row("1"))),
        *({"history": f"[{rows}]"} for rows in (row('"1"'), row("true"), row("1.0"), row("1", '"0"'))),
        {"history": "[" + ", ".join(row(str(i)) for i in range(1, 11)) + "]"},
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
        run(little, path=path)


@pytest.mark.parametrize("soft", [None, 0.5])
def test_training_that_diverges_stops_with_advice(soft: float | None, little: nn.Module) -> None:
    parameters = dict(little.named_parameters())

    def explode(step: int) -> dict[str, Tensor]:
        loss = next(little.parameters()).sum()
        return {"forget": loss * (float("inf") if step == 2 else 1.0), "retain": loss * 0}

    with pytest.raises(TrainingError, match="the loss is"):
        train(parameters, Mask.full(parameters), explode, settings(little, soft_density=soft))
    assert not any(p.grad is not None for p in little.parameters())
