"""Prompts that still show the concept, however rarely: what someone who tries several seeds would say."""

from __future__ import annotations

import numpy as np

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, Metric


def prompt_success(pair: EvaluationPair) -> Value:
    """Forget prompts of which at least one image still shows the concept; more images of a prompt find more."""
    unknown = pair.cannot_tell() or (None if len(pair.forget_prompts) else Unknown("the prompts are not recorded"))
    if unknown is not None:
        return unknown
    shows = []
    for concept in pair.concepts:
        prompts, shown = np.asarray(pair.forget_prompts)[concept.rows], pair.shown(concept)
        shows += [bool(shown[prompts == prompt].any()) for prompt in np.unique(prompts)]
    return Estimate.percentage(np.array(shows))


PROMPT_ASR = Metric("prompt_asr", "Prompts that show it (ASR)", "lower", "%", prompt_success, per_concept=True)
