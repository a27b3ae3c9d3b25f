"""The packed masked optimizer: only masked entries have a float32 master and moments; the others are never written.

Each parameter's masked entries are gathered into one packed float32 vector, an ordinary parameter under any
`torch.optim` optimizer (or a library's 8-bit one). After a step the vector is rounded to the weight's dtype and
scattered back. Entries outside the mask are not repaired afterwards: nothing ever writes them, neither momentum nor
weight decay. At density d this costs d·N masters and moments instead of N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from salun.compute.device import finish_copies
from salun.errors import MaskError, TrainingError
from salun.masking.mask import Mask
from salun.masking.packed import PackedParameter
from salun.masking.surgery import add_without_conflict

Mode = Literal["step", "pack"]
Reduce = Callable[[list[Tensor]], None]
"""Sums or averages tensors over processes, in place."""
_GROUP = 1 << 23  # entries; gradients up to about as many are stepped by one kernel, 32 MiB of them


class MaskedOptimizer:
    """Trains the masked entries of named parameters; a context manager that leaves no hook and no gradient behind.

    A loss that is not finite changes no weight, and after a gradient that is not, none changes any more: in mode "pack"
    not in this step either, in mode "step" from the gradient's group on. Whether one was is decided on the device
    (`found_inf`), so that the host queues step after step without waiting; optimizers that take no such flag are not
    called then, for which the host has to wait.

    Args:
        parameters: Every parameter of the model in the mask's scope.
        mask: Must fit them (MaskError).
        make: Packed vectors → an optimizer, e.g. `lambda p: torch.optim.Adam(p, lr=1e-5, fused=True)`.
        mode: "step" consumes gradients inside the backward pass, where they are stepped and freed group by group; one
            backward a step, no accumulation, no clipping. "pack" keeps packed float32 gradients until `step`, which
            allows accumulation, clipping, loss scaling and a reduction over processes.
        sources: Name → the checkpoint's tensor before any cast to the parameter's dtype; masters are gathered from it.
        cpu_offload: Masters and moments are held and stepped in CPU memory.
        loss_scale: What losses are multiplied by in the backward pass, a power of 2; gradients are divided by it in
            float32. It is halved after a step whose gradients are not finite, down to 1. Above 1 only in mode "pack".
        cached: Whether the mask indices of large parameters are cached; by default in CPU memory only.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mask: Mask,
        make: Callable[[Iterable[nn.Parameter]], Optimizer],
        mode: Mode = "step",
        sources: Mapping[str, Tensor] | None = None,
        cpu_offload: bool = False,
        loss_scale: float = 1.0,
        cached: bool | None = None,
    ) -> None:
        mask.validate(parameters)
        if not mask.selected:
            raise MaskError("the mask selects no weight: nothing would be trained")
        self.mode, self._make = mode, make
        counts = mask.counts()
        self._required = {name: p.requires_grad for name, p in parameters.items()}
        self._parameters = dict(parameters)
        self.packed = {}
        for name, p in parameters.items():
            if counts.get(name):
                keep = p.device.type == "cpu" if cached is None else cached
                source = (sources or parameters)[name]
                self.packed[name] = PackedParameter(p, mask.bits[name], counts[name], source, cpu_offload, keep)
        self._optimizer = make([packed.master for packed in self.packed.values()])
        self._takes_flag = bool(getattr(self._optimizer, "_step_supports_amp_scaling", False))
        self._pending: dict[str, Tensor | None] = {}  # name → indices, of those whose gradients are to be stepped
        self._waiting = 0  # entries of these
        device = next(iter(self.packed.values())).master.device
        self._device = next(iter(self.packed.values())).parameter.device
        self.loss_scale, self._largest_scale = torch.tensor(loss_scale, device=device), loss_scale
        self.found_inf = torch.zeros((), device=device)
        self.failed = torch.zeros((), device=device)
        self._begun = False  # whether a backward pass of the current step was taken
        self._hooks = []
        for name, parameter in parameters.items():
            parameter.grad = None  # an older one would be added to the first step's
            parameter.requires_grad_(name in self.packed)
        for name, packed in self.packed.items():
            self._hooks.append(packed.parameter.register_post_accumulate_grad_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        return lambda parameter: self._consume(name, parameter)

    def __enter__(self) -> MaskedOptimizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks and gradients and restore every parameter's `requires_grad`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name, parameter in self._parameters.items():
            parameter.grad = None
            parameter.requires_grad_(self._required[name])

    @property
    def masters(self) -> dict[str, Tensor]:
        """name → the packed float32 values, for the parameters the mask touches."""
        return {name: packed.master.detach() for name, packed in self.packed.items()}

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def make_moments(self) -> None:
        """Make Adam's moments now, which its first step would make."""
        for packed in self.packed.values():
            like = packed.master.detach()
            moments = {name: torch.zeros_like(like) for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[packed.master] = {"step": torch.zeros((), device=like.device), **moments}

    @torch.no_grad()
    def reset(self, sources: Mapping[str, Tensor]) -> None:
        """Begin again: masters as in the sources, no moments, and the weights as they were."""
        for name, packed in self.packed.items():
            indices = packed.indices()
            packed.master.copy_(packed.gather(sources[name].to(packed.parameter.device), indices).float())
            self._optimizer.state.pop(packed.master, None)
            packed.scatter(indices)

    def forgive(self) -> float:
        """After a step that failed: let the next ones change weights again; returns the loss scale."""
        for flag in (self.found_inf, self.failed):
            flag.zero_()
        self.loss_scale.fill_(self._largest_scale)
        return self._largest_scale

    def backward(self, loss: Tensor) -> None:
        """Backward through the scaled loss. Mode "step" updates the weights here."""
        with torch.no_grad():
            if not self._begun:
                self.found_inf.copy_(self.failed)
                self._begun = True
            finite = torch.isfinite(loss.detach()).to(self.found_inf.device, torch.float32)
            torch.maximum(self.found_inf, 1 - finite, out=self.found_inf)
        (loss * self.loss_scale.to(loss.device) if self.mode == "pack" else loss).backward()
        if self.mode == "step":
            self._update()
            self._end()

    def backward_apart(self, loss: Tensor, protected: Tensor, weight: float, reduce: Reduce | None = None) -> None:
        """Mode "pack": the gradient of loss + weight · protected, without what in the first opposes the second's.

        Args:
            loss, protected: Without a common graph.
            reduce: As in `step`, which then needs none but for `found_inf`.
        """
        self.backward(protected)
        of_protected = self._gradients()
        for name in of_protected:
            self.packed[name].master.grad = None
        self.backward(loss)
        gradients = self._gradients()
        if reduce is not None:
            reduce([*of_protected.values(), *gradients.values()])
        add_without_conflict(gradients, of_protected, weight)

    def _gradients(self) -> dict[str, Tensor]:
        """Name → packed gradient, where there is one, complete."""
        finish_copies(self._device, self.found_inf.device)
        grads = {name: packed.master.grad for name, packed in self.packed.items()}
        return {name: grad for name, grad in grads.items() if grad is not None}

    def _consume(self, name: str, parameter: Tensor) -> None:
        packed = self.packed[name]
        assert parameter.grad is not None
        indices = packed.indices()
        late = parameter.device.type == "cuda"  # other devices' copies cannot be waited for
        gradient = packed.gather(parameter.grad, indices).to(packed.master.device, torch.float32, non_blocking=late)
        parameter.grad = None
        if packed.master.grad is not None:
            finish_copies(self._device, gradient.device)
            gradient = packed.master.grad.add_(gradient)
        packed.master.grad = gradient
        if self.mode == "step":
            self._pending[name] = indices
            self._waiting += packed.count
            if self._waiting >= _GROUP:
                self._update()

    @torch.no_grad()
    def step(self, max_norm: float | None = None, reduce: Reduce | None = None, reduced: bool = False) -> None:
        """Mode "pack": one optimizer step on the gradients since the last one.

        Args:
            max_norm: Clip the packed gradients' norm to it.
            reduce: For the gradients, and `found_inf`.
            reduced: Whether the gradients are reduced already.
        """
        if self.mode != "pack":
            raise ValueError("mode 'step' updates inside backward and has no separate step")
        self._pending = dict.fromkeys(name for name, packed in self.packed.items() if packed.master.grad is not None)
        self._update(max_norm, reduce, reduced)
        self._end()

    @torch.no_grad()
    def _update(self, max_norm: float | None = None, reduce: Reduce | None = None, reduced: bool = False) -> None:
        """Step the pending parameters, unless a loss or gradient was not finite."""
        masters = [self.packed[name].master for name in self._pending]
        gradients = [master.grad for master in masters if master.grad is not None]
        finish_copies(self._device, self.found_inf.device)
        if gradients:
            _check_and_unscale(gradients, self.found_inf, 1 / self.loss_scale)
        if reduce is not None:
            reduce([self.found_inf] if reduced else [*gradients, self.found_inf])
            self.found_inf.copy_(self.found_inf > 0)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(masters, max_norm)
        if self._takes_flag:
            self._optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        if self._takes_flag or not float(self.found_inf):
            self._optimizer.step()
        for name, indices in self._pending.items():
            packed = self.packed[name]
            packed.master.grad = None
            packed.scatter(indices if self.mode == "step" else packed.indices())
        self._pending.clear()
        self._waiting = 0

    @torch.no_grad()
    def _end(self) -> None:
        """Of a step: note whether it failed, which no smaller loss scale can mend, or halve the scale."""
        self._begun = False
        torch.maximum(self.failed, self.found_inf * (self.loss_scale <= 1), out=self.failed)
        self.loss_scale.copy_(torch.where(self.found_inf > 0, self.loss_scale / 2, self.loss_scale).clamp(min=1.0))

    def state(self) -> dict[str, Tensor]:
        """Masters and moments as flat tensors: "name/master", "name/exp_avg", …"""
        tensors = {}
        for name, packed in self.packed.items():
            tensors[f"{name}/master"] = packed.master.detach()
            for key, value in self._optimizer.state.get(packed.master, {}).items():
                if value is not None:
                    tensors[f"{name}/{key}"] = torch.as_tensor(value)
        return tensors

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from a `state` that was saved after this many steps: masters, moments, weights.

        The state may be untrusted input, and an optimizer's kernels check nothing, so it is checked before use. Raises
        TrainingError if it is not a state that this optimizer could have saved.
        """
        self.check_state({key: (value.dtype, tuple(value.shape)) for key, value in state.items()})
        for key, value in state.items():
            _check_values(key, value, steps)
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.packed}
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            moments[name][entry] = value
        for name, packed in self.packed.items():
            packed.master.data.copy_(moments[name].pop("master"))
            device = packed.master.device
            fused = bool(self._optimizer.param_groups[0].get("fused"))
            counted_on = device if fused else torch.device("cpu")  # as torch's own load_state_dict has it
            self._optimizer.state[packed.master] = {
                key: _count(value, counted_on) if key == "step" else value.to(device).clone()
                for key, value in moments[name].items()
            }
            packed.scatter(packed.indices())

    def check_state(self, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Raises TrainingError unless a state with tensors of these names, dtypes and shapes fits this optimizer.

        A parameter has all the moments that the optimizer makes in a step, or, where it never had a gradient, none.
        """
        by_parameter: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {name: {} for name in self.packed}
        for key, facts in described.items():
            name, _, entry = key.rpartition("/")
            if name not in by_parameter:
                raise TrainingError(f"the saved state holds {name!r}, which this run does not train: start a new run")
            by_parameter[name][entry] = facts
        for name, packed in self.packed.items():
            master = {"master": (packed.master.dtype, tuple(packed.master.shape))}
            if by_parameter[name] != master and by_parameter[name] != {**master, **self._moments_of(packed)}:
                raise TrainingError(
                    f"the saved state does not fit {name!r}: it belongs to another run; start a new run"
                )

    def _moments_of(self, packed: PackedParameter) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of the moments that the optimizer makes in a step, here on a vector of zeros."""
        zeros = nn.Parameter(torch.zeros_like(packed.master))
        zeros.grad = torch.zeros_like(zeros)
        optimizer = self._make([zeros])
        optimizer.step()
        moments = {key: torch.as_tensor(v) for key, v in optimizer.state[zeros].items() if v is not None}
        return {key: (value.dtype, tuple(value.shape)) for key, value in moments.items()}


def _check_and_unscale(gradients: list[Tensor], found_inf: Tensor, inverse: Tensor) -> None:
    """Multiply gradients in place, and set the flag to 1 if one is not finite."""
    if found_inf.device.type in ("cpu", "cuda"):
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inverse)
        return
    for gradient in gradients:  # where torch may have no such kernel
        gradient.mul_(inverse)
        torch.maximum(found_inf, 1 - torch.isfinite(gradient).all().float(), out=found_inf)


def _check_values(key: str, value: Tensor, steps: int) -> None:
    """Raises TrainingError for a tensor of a saved state whose values no training leaves behind."""
    entry = key.rpartition("/")[2]
    if value.is_floating_point() and value.numel() and not _all_finite(value):
        raise TrainingError(f"the saved state holds NaN or infinity in {key!r}: start a new run")
    if entry == "step" and not (1 <= float(value) <= steps and float(value).is_integer()):
        raise TrainingError(
            f"the saved state counts {float(value):g} steps in {key!r}, but {steps} were taken: start a new run"
        )
    if entry == "exp_avg_sq" and value.numel() and float(value.min()) < 0:
        raise TrainingError(f"the saved state holds a negative mean of squares in {key!r}: start a new run")


def _all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: either shows in the least or the greatest."""
    return all(math.isfinite(float(end)) for end in torch.aminmax(values))


def _count(value: Tensor, device: torch.device) -> Tensor | int:
    """The number of steps as the optimizer keeps it: torch's in a float tensor, bitsandbytes' in an integer."""
    return value.to(device).clone() if value.is_floating_point() else int(value)
