"""Prompts that still show the concept, however rarely: what someone who tries several seeds would say."""

from __future__ import annotations

import numpy as np

from salun.evaluation.estimate import Estimate, Unknown, Value
from salun.evaluation.metric import EvaluationPair, ExpectedConcept, Metric

BY_CHANCE = 0.1  # from which fraction of prompts found by false alarms alone the value says nothing


def prompt_success(pair: EvaluationPair) -> Value:
    """Forget prompts of which at least one image still shows the concept; more images of a prompt find more.

    Unknown where false alarms alone would find more than a tenth of the prompts.
    """
    unknown = pair.cannot_tell() or (None if len(pair.forget_prompts) else Unknown("the prompts are not recorded"))
    if unknown is not None:
        return unknown
    shows: list[bool] = []
    chances: list[float] = []
    for concept in pair.concepts:
        prompts, shown = np.asarray(pair.forget_prompts)[concept.rows], pair.shown(concept)
        shows += [bool(shown[prompts == prompt].any()) for prompt in np.unique(prompts)]
        chances += _chances(pair, concept, prompts)
    by_chance = float(np.mean(chances))
    if by_chance > BY_CHANCE:
        return Unknown(f"with so many images a prompt, false alarms alone would find {100 * by_chance:.0f} % of them")
    return Estimate.percentage(np.array(shows))


def _chances(pair: EvaluationPair, concept: ExpectedConcept, prompts: np.ndarray) -> list[float]:
    """Of each prompt, the probability that false alarms alone find it, by their rate on the original."""
    false = float(pair.calibration(concept).negatives.mean())
    _, counts = np.unique(prompts, return_counts=True)
    return [1 - (1 - false) ** int(count) for count in counts]


PROMPT_ASR = Metric("prompt_asr", "Prompts that show it (ASR)", "lower", "%", prompt_success, per_concept=True)
