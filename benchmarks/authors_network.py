"""What comparisons with authors' code share: a small network, and the first step of a method of salun on it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from salun.diffusion.losses import ErasureData
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.schedule import schedule_of
from salun.diffusion.negative_guidance import Denoised
from salun.diffusion.task import ErasureTask

N, CHANNELS, SIZE, TOKENS, WIDTH, HIDDEN = 2, 4, 6, 5, 8, 12  # samples; of a latent; of a prompt; of the network
CONCEPT, ANCHOR, RETAINED = "a circle", "a square", ["a house", "a tree", "a dog"]


class Transformer2DModel(nn.Module):
    """A block of linear layers, which LECO's and SPM's code chooses by the name of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x = nn.Linear(CHANNELS, HIDDEN)
        self.of_prompt = nn.Linear(WIDTH, HIDDEN)
        self.out = nn.Linear(HIDDEN, CHANNELS)

    def forward(self, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        prompt = self.of_prompt(hidden).tanh().mean(1)[:, None, None]
        mixed = self.of_x(x.movedim(1, -1)) + prompt + torch.as_tensor(t).view(-1, 1, 1, 1) / 1000
        made: Tensor = self.out(mixed.tanh()).movedim(-1, 1)
        return made


class Network(nn.Module):
    """A small denoiser that is called as diffusers' UNet is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Transformer2DModel(), Transformer2DModel()])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.float())  # salun's low-rank changes are added in float32

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True, **_: Any) -> Any:
        for block in self.blocks:
            x = x + block(x, t, encoder_hidden_states)
        return SimpleNamespace(sample=x) if return_dict else (x,)


class Model:
    """What the methods of salun use of a model, around a small network.

    Args:
        moved: Whether the live network is another one than the original, as after some steps of a training.
    """

    device, dtype, latent_shape = torch.device("cpu"), torch.float64, (CHANNELS, SIZE, SIZE)

    def __init__(self, moved: bool = True) -> None:
        torch.manual_seed(0)
        self.schedule = schedule_of({}, "the small network")
        self.frozen = Network()
        self.network = Network() if moved else deepcopy(self.frozen)
        self.embeddings = {text: torch.randn(TOKENS, WIDTH) for text in ["", CONCEPT, ANCHOR, *RETAINED]}

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def original(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.frozen.named_parameters()}

    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning(torch.stack([self.embeddings[text] for text in prompts]))

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        made: Tensor = self.network(x_t, t, conditioning.hidden).sample
        return made


class StepTaken(Exception):
    """Ends a method after its first losses."""


class FirstStep(ErasureTask):
    """A task that computes the loss of a method's first step and its gradient, in place of a training."""

    loss: Tensor
    gradients: dict[str, Tensor]
    trained: dict[str, Tensor]

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.parameters().items() if p.requires_grad}

    def train(  # type: ignore[override]
        self,
        losses: Callable[[int], Mapping[str, Tensor]],
        weights: Mapping[str, float] | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        alongside: object = None,
    ) -> None:
        parameters = parameters or self.parameters
        for name, parameter in parameters.items():
            if name.endswith(".B"):  # of a low-rank change, which is 0 at first and then has no gradient of A
                nn.init.normal_(parameter, std=0.3)
        named = losses(0)
        loss = torch.stack([(weights or {}).get(name, 1.0) * loss for name, loss in named.items()]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        self.loss = loss.detach()
        self.gradients = dict(zip(parameters, gradients, strict=True))
        self.trained = {name: parameter.detach() for name, parameter in parameters.items()}
        raise StepTaken


def first_step(
    model: Any, method: Callable[..., object], options: object, run: Mapping[str, Any] | None = None, **recipe: Any
) -> tuple[FirstStep, list[Denoised]]:
    """A method's first step, and the partly denoised samples that it made.

    Args:
        run: Options of the run. recipe: Numbers of its recipe.
    """
    torch.manual_seed(1)
    concept = SimpleNamespace(forget=[SimpleNamespace(text=CONCEPT)], anchor=[SimpleNamespace(text=ANCHOR)])
    plan = SimpleNamespace(
        options=SimpleNamespace(seed=0, **(run or {})),
        recipe=SimpleNamespace(**{"batch_size": N, "anchor_share": 1.0, **recipe}),
        needs_frozen=False,
        budget=1,
        prompts=SimpleNamespace(concepts=[concept], retain=[SimpleNamespace(text=text) for text in RETAINED]),
    )
    latents = torch.randn(3, 3, *model.latent_shape)
    texts = [CONCEPT] * 3, [ANCHOR] * 3, RETAINED, [""]
    data = ErasureData(*latents, *(model.encode(each) for each in texts))
    task = FirstStep(model, plan, data, None)  # type: ignore[arg-type]
    module, samples = importlib.import_module(method.__module__), list[Denoised]()
    with contextlib.ExitStack() as stack:
        if hasattr(module, "partly_denoised"):
            make = module.partly_denoised

            def recorded(*args: Any, **named: Any) -> Denoised:
                samples.append(make(*args, **named))
                return samples[-1]

            stack.enter_context(patch.object(module, "partly_denoised", recorded))
        with contextlib.suppress(StepTaken):
            method(task, options)
    return task, samples


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    """The gradients that their code left."""
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def show(name: str, task: FirstStep, loss: Tensor, gradients: Mapping[str, Tensor], factor: float = 1.0) -> None:
    """Print how far apart the losses and gradients are, theirs multiplied by a factor."""
    assert task.gradients.keys() == gradients.keys()
    of_loss = float((task.loss - factor * loss.detach()).abs() / task.loss.abs())
    largest = max(float(each.abs().max()) for each in task.gradients.values())
    most = max(float((each - factor * gradients[key]).abs().max()) for key, each in task.gradients.items()) / largest
    print(f"{name}: losses apart by {of_loss:.1e}, gradients by {most:.1e} (loss {float(task.loss):.4f})")


def network_of(network: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The network as a function of x_t, t and embeddings."""
    return lambda x_t, t, hidden: network(x_t, t, hidden).sample
