"""Resumable training: one file of state per stage, written under a temporary name and renamed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Stage:
    """A training stage with `total` steps that saves itself every two minutes and takes up where it was killed."""

    def __init__(self, path: Path, total: int, optimizer: Optimizer, *modules: nn.Module) -> None:
        self.path, self.total, self.optimizer, self.modules = path, total, optimizer, modules
        self.generator = torch.Generator().manual_seed(0)
        self.peak_lr = optimizer.param_groups[0]["lr"]
        self.step, self.seconds = 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            for module, weights in zip(modules, state["modules"], strict=True):
                module.load_state_dict(weights)
            optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save(
            {
                "modules": [module.state_dict() for module in self.modules],
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "step": self.step,
                "seconds": self.seconds,
            },
            temporary,
        )
        os.replace(temporary, self.path)

    def run(self, loss_of_step: Callable[[torch.Generator], Tensor], after: Callable[[], None] = lambda: None) -> None:
        """Adam steps under a cosine schedule with 100 steps of warm-up, up to `total`."""
        began = saved = time.monotonic()
        before, running = self.seconds, 0.0
        while self.step < self.total:
            warm = min(1.0, (self.step + 1) / 100)
            cosine = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * self.step / self.total))))
            for group in self.optimizer.param_groups:
                group["lr"] = self.peak_lr * warm * max(cosine, 0.01)
            loss = loss_of_step(self.generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
            self.optimizer.step()
            after()
            self.step += 1
            running += 0.02 * (loss.item() - running) if running else loss.item()
            self.seconds = before + time.monotonic() - began
            if self.step % 50 == 0:
                print(f"{self.path.stem} {self.step}/{self.total} loss {running:.4f} {self.seconds:.0f} s", flush=True)
            if time.monotonic() - saved > 120:
                self.save()
                saved = time.monotonic()
        self.save()


def to_tensor(images) -> Tensor:  # type: ignore[no-untyped-def]
    """uint8 (n, h, w, 3) → float (n, 3, h, w) in −1…1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
