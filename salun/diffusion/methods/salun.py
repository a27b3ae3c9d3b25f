"""SalUn (Fan et al. 2024): fine-tuning of only the selected weights towards the anchor; and its soft variant."""

from __future__ import annotations

from torch import Tensor

from salun.compute.device import to_device
from salun.diffusion.harden import Pool
from salun.diffusion.losses import Draw, draw, frozen_predictions, training_losses
from salun.diffusion.options import schedule_part
from salun.diffusion.output import changed_entries, mask_of_changed
from salun.diffusion.task import ErasureTask, Unlearned
from salun.options import NoOptions
from salun.progress import Event, Stage


def salun(task: ErasureTask, options: NoOptions) -> Unlearned:
    """SalUn, eq. 5: min over m⊙θ of MSE(ε_θ(x_t, c_f), ε_θ₀(x_t, c_a)) + α·L_r, m the saliency mask of eq. 3 and 4."""
    losses = _Losses(task)
    trained = task.train(losses, _weights(task), alongside=losses.pool)
    return Unlearned(task.mask, trained.masters, trained.history)


def salun_soft(task: ErasureTask, options: NoOptions) -> Unlearned:
    """SalUn-soft, appendix B: no mask; Δ = θ − θ₀ is soft-thresholded after each step, down to `density`."""
    losses = _Losses(task)
    density = task.plan.options.density
    trained = task.train(losses, _weights(task), soft_density=density, alongside=losses.pool)
    original = task.model.original()
    mask = mask_of_changed({name: original[name] for name in task.parameters}, trained.masters)
    return Unlearned(mask, changed_entries(trained.masters, mask), trained.history)


def _weights(task: ErasureTask) -> dict[str, float]:
    return {"retain": task.plan.recipe.retain_weight, "adversarial": task.plan.options.harden_weight}


class _Losses:
    """Step → forget and retain losses. Frozen targets are computed ahead, so that no second network is held: for all
    steps, or with a goal, which may be reached early, for those to the next probe.
    """

    def __init__(self, task: ErasureTask) -> None:
        self._task, self._targets = task, dict[int, Tensor]()
        self._ahead_of = -1  # the step of the decision that the targets follow from
        self.pool = task.pool = Pool(task, task.plan.options.harden) if task.plan.options.harden else None
        if task.until is None:
            self._look_ahead(task.steps_done, task.plan.budget)

    def _look_ahead(self, start: int, end: int) -> None:
        """Compute the frozen targets of these steps; the live network must hold the original weights."""
        task = self._task
        self._targets.clear()
        guidance = task.plan.options.target_guidance
        if task.until is not None:
            self._ahead_of = task.until.now.start
            guidance += task.until.now.guidance
        for step in range(start, end if task.plan.needs_frozen else start):
            self._targets[step] = frozen_predictions(task.model, self._batch(step), guidance).cpu()
            if task.until is None:
                task.progress(Event(Stage.FROZEN_TARGETS, step + 1, task.plan.budget, restored=start))

    def __call__(self, step: int) -> dict[str, Tensor]:
        task, recipe = self._task, self._task.plan.recipe
        if task.until is not None and task.until.now.grown:
            task.grow()
        if task.until is not None and task.until.now.harmed:
            task.grow_retain()
        known = step in self._targets and (task.until is None or task.until.now.start == self._ahead_of)
        if task.until is not None and task.plan.needs_frozen and not known:
            with task.original_weights():
                self._look_ahead(step, max(step + 1, task.until.unchanged_until(step)))
        targets = to_device(self._targets[step], task.model.device) if self._targets else None
        if task.until is None:
            self._targets.pop(step - 1, None)  # this step's stay, in case it is repeated with another loss scale
        batch = self._batch(step)
        losses = {}
        if self.pool is not None:  # first, since it takes a gradient of its own
            assert targets is not None
            losses["adversarial"] = self.pool.loss(step, batch, targets[: len(batch.picked)])
        apart = task.plan.options.gradient_surgery
        forget, retain = training_losses(task.model, batch, targets, recipe.target, recipe.retain_target, apart)
        return {"forget": forget, "retain": retain, **losses}

    def _batch(self, step: int) -> Draw:
        task, recipe = self._task, self._task.plan.recipe
        until, options = task.until, task.plan.options
        batch = draw(
            task.model,
            task.training_set,
            recipe.batch_size,
            recipe.anchor_share,
            options.seed,
            step,
            until.frequencies if until is not None else None,
            until.retain_frequencies if until is not None else None,
            schedule_part(options.forget_timesteps),
        )
        return batch.shard(task.processes.rank, task.processes.count)
