"""SalUn (Fan et al. 2024): fine-tuning of only the selected weights towards the anchor; and its soft variant."""

from __future__ import annotations

from torch import Tensor

from salun.diffusion.losses import Draw, draw, frozen_predictions, training_losses
from salun.diffusion.output import changed_entries, mask_of_changed
from salun.diffusion.task import ErasureTask, Unlearned
from salun.options import NoOptions
from salun.progress import Event, Stage


def salun(task: ErasureTask, options: NoOptions) -> Unlearned:
    """SalUn, eq. 5: min over m⊙θ of MSE(ε_θ(x_t, c_f), ε_θ₀(x_t, c_a)) + α·L_r, m the saliency mask of eq. 3 and 4."""
    trained = task.train(_Losses(task), _weights(task))
    return Unlearned(task.mask, trained.masters, trained.history)


def salun_soft(task: ErasureTask, options: NoOptions) -> Unlearned:
    """SalUn-soft, appendix B: no mask; Δ = θ − θ₀ is soft-thresholded after each step, down to `density`."""
    trained = task.train(_Losses(task), _weights(task), soft_density=task.plan.options.density)
    original = task.model.original()
    mask = mask_of_changed({name: original[name] for name in task.parameters}, trained.masters)
    return Unlearned(mask, changed_entries(trained.masters, mask), trained.history)


def _weights(task: ErasureTask) -> dict[str, float]:
    return {"retain": task.plan.recipe.retain_weight}


class _Losses:
    """Step → forget and retain losses. Frozen targets are computed for all steps first: no second network is held."""

    def __init__(self, task: ErasureTask) -> None:
        self._task, self._targets = task, dict[int, Tensor]()
        steps = task.plan.recipe.steps
        for step in range(task.steps_done, steps if task.plan.needs_frozen else task.steps_done):
            self._targets[step] = frozen_predictions(task.model, self._batch(step)).cpu()
            task.progress(Event(Stage.FROZEN_TARGETS, step + 1, steps))

    def __call__(self, step: int) -> dict[str, Tensor]:
        task, recipe = self._task, self._task.plan.recipe
        targets = self._targets[step].to(task.model.device) if self._targets else None
        self._targets.pop(step - 1, None)  # this step's stay, in case it is repeated with another loss scale
        forget, retain = training_losses(task.model, self._batch(step), targets, recipe.target, recipe.retain_target)
        return {"forget": forget, "retain": retain}

    def _batch(self, step: int) -> Draw:
        task, recipe = self._task, self._task.plan.recipe
        batch = draw(
            task.model, task.training_set, recipe.batch_size, recipe.anchor_share, task.plan.options.seed, step
        )
        return batch.shard(task.processes.rank, task.processes.count)
