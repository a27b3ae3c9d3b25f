"""A mask that is there before the run, from a file or another run: whether it fits this model and this plan."""

from __future__ import annotations

from pathlib import Path

from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.scopes import parameters_in_scope
from salun.diffusion.plan import Plan
from salun.errors import ConfigError, MaskError, literal
from salun.masking.mask import Mask
from salun.user_text import as_spelled


def load_mask_file(model: DiffusionModel, plan: Plan) -> Mask:
    """The mask file that the options name. Raises as `check_mask`, ModelError if it cannot be read."""
    assert plan.options.mask is not None
    mask = Mask.load(as_spelled(Path(plan.options.mask).expanduser()))
    check_mask(mask, model, plan, plan.options.mask)
    return mask


def check_given_mask(mask: Mask, model: DiffusionModel, plan: Plan) -> None:
    """`check_mask` for a mask that a host hands over, and ConfigError for a method that uses none.

    To be called before hours of sampling, on a model in a `training_session`.
    """
    if not plan.method.takes_mask:
        raise ConfigError(
            f"is {plan.method.name}, which does not use a given mask",
            option="method",
            advice="Give no mask, or choose {method} salun",
        )
    check_mask(mask, model, plan, "given")


def check_mask(mask: Mask, model: DiffusionModel, plan: Plan, what: str) -> None:
    """Raises MaskError for a mask of another scope, of other parameters, of another model, or that selects nothing."""
    scope, base_hash = mask.metadata.get("scope", "full"), model.base_hash
    if scope != plan.scope:
        raise MaskError(
            f"the mask {what} was made with scope {scope}", advice=f"Use {{scope}} {literal(scope)}, or make another"
        )
    mask.validate(parameters_in_scope(model, plan.scope), model.name)
    if mask.metadata.get("base_hash", base_hash) != base_hash:
        raise MaskError(
            f"the mask {what} was made from another model (its hash {mask.metadata['base_hash'][:12]}…, "
            f"this model's {base_hash[:12]}…)",
            advice=f"Make one by `salun mask --model {literal(model.name)}`",
            code="other-model-mask",
        )
    if not mask.selected:
        raise MaskError(f"the mask {what} selects no weight: nothing could be trained")
