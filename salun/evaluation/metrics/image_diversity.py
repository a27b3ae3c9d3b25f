"""Whether images of other prompts still differ from each other, which needs no detector."""

from __future__ import annotations

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric


def image_diversity(pair: EvaluationPair) -> Value:
    """Variance of the latents of other prompts, relative to the original's; 0 where all images are the same.

    A model that draws one blurred image for everything drifts no further than half of the way to unrelated images.
    """
    before, after = pair.before.retain_latents, pair.after.retain_latents
    if before is None or after is None:
        return Unknown("there are no images of other prompts")
    if len(before) < 2:
        return Unknown("fewer than two images")
    usual, now = (float(each.double().flatten(1).var(0).sum()) for each in (before, after))
    if not usual > 0:
        return Unknown("the original model's images do not differ")
    return Estimate(now / usual, len(after))


IMAGE_DIVERSITY = Metric("image_diversity", "Diversity of other images", "higher", "", image_diversity, needs="latents")
