"""What a metric of an erasure is, and the evaluations before and after that it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from salun.evaluation.calibration import Calibration
from salun.evaluation.detector import Detection
from salun.evaluation.estimate import Estimate, Unknown, Value

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["detections", "predictions", "latents"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of the network on the same noisy latents, float32 (n, c, h, w), under prompts of each kind."""

    forget: Tensor
    anchor: Tensor
    retain: Tensor


@dataclass(frozen=True, eq=False)
class ModelEvaluation:
    """What was measured on one model.

    Args:
        forget, retain, anchor: Detections in images of the concepts' prompts, of other prompts and, of the original
            only, of the anchors' prompts.
        retain_latents: float32 (n, c, h, w), the samples behind the retain images.
    """

    forget: Detection
    retain: Detection
    predictions: Predictions
    anchor: Detection | None = None
    retain_latents: Tensor | None = None


@dataclass(frozen=True)
class ExpectedConcept:
    """A concept in the detector's terms.

    Args:
        label, anchor: Indices among the labels of `attribute`; an anchor of None is the empty prompt.
        rows: Its forget images.
        anchor_rows: Its anchor images, of the original.
    """

    name: str
    attribute: str
    label: int
    anchor: int | None
    rows: slice
    anchor_rows: slice = field(default_factory=lambda: slice(0))


@dataclass(frozen=True, eq=False)
class FittedOn:
    """The original's images that the detector was fitted on, which say nothing of how well it detects.

    Args:
        forget: bool (n,), which of the forget images.
        others: bool (m,), which of the retain images and then of the anchor images.
    """

    forget: np.ndarray
    others: np.ndarray


@dataclass(frozen=True, eq=False)
class EvaluationPair:
    """Original and unlearned model, evaluated on the same prompts and seeds.

    Args:
        labels: Attribute → the detector's labels.
        expected_forget, expected_retain: Attribute → int64 (n,), the label that each image should show (forget images:
            once the concepts are erased); −1 where none is expected. Attributes without expectations are absent.
        unknown: Source → the reason why there is nothing of it; metrics that need it are not computed.
        forget_prompts: Of each forget image.
        fitted: Not counted in the calibration; None for a detector that is not fitted.
    """

    concepts: Sequence[ExpectedConcept]
    labels: Mapping[str, Sequence[str]]
    expected_forget: Mapping[str, np.ndarray]
    expected_retain: Mapping[str, np.ndarray]
    before: ModelEvaluation
    after: ModelEvaluation
    unknown: Mapping[Source, str]
    forget_prompts: Sequence[str] = ()
    fitted: FittedOn | None = None

    def of(self, concept: ExpectedConcept) -> EvaluationPair:
        """The same of a single concept."""
        return replace(self, concepts=[concept])

    def unchanged(self) -> EvaluationPair:
        """The original compared with itself, for the value of a metric before the erasure."""
        return replace(self, after=self.before)

    def calibration(self, concept: ExpectedConcept) -> Calibration:
        """How the detector does on the original's images: of the concept, and of its anchor and other prompts.

        Those that it was fitted on are not counted; an adjustable threshold is chosen on them.
        """
        attribute, before, rows, label = concept.attribute, self.before, concept.rows, concept.label
        forget, threshold = before.forget.scores[attribute][rows, label], before.forget.threshold
        others = before.retain.scores[attribute][:, label]
        anchors = np.empty(0, others.dtype) if before.anchor is None else before.anchor.scores[attribute][:, label]
        prompts = self.prompts_of(concept)
        if self.fitted is None:
            negatives = np.concatenate([others, anchors[concept.anchor_rows]])
            return Calibration.of_scores(forget, negatives, threshold, prompts=prompts)
        on, of_others = self.fitted.forget[rows], self.fitted.others
        of_retain, of_anchors = np.split(of_others, [len(others)])
        own_anchors = anchors[concept.anchor_rows][~of_anchors[concept.anchor_rows]]
        chosen_on = (forget[on], np.concatenate([others, anchors])[of_others]) if before.forget.adjustable else None
        negatives = np.concatenate([others[~of_retain], own_anchors])
        of_known = prompts[~on] if prompts is not None else None
        return Calibration.of_scores(forget[~on], negatives, threshold, chosen_on, of_known)

    def prompts_of(self, concept: ExpectedConcept) -> np.ndarray | None:
        """The prompt of each of its forget images, (n,); None where the prompts are not recorded."""
        return np.asarray(self.forget_prompts)[concept.rows] if len(self.forget_prompts) else None

    def shown(self, concept: ExpectedConcept) -> np.ndarray:
        """Whether each of its forget images shows the concept after the erasure, bool (n,), by the calibration."""
        scores = self.after.forget.scores[concept.attribute][concept.rows, concept.label]
        shown: np.ndarray = scores >= self.calibration(concept).threshold
        return shown

    def cannot_tell(self) -> Unknown | None:
        """Why the detector measures nothing here, or None where it does."""
        for concept in self.concepts:
            reason = self.calibration(concept).reason
            if reason is not None:
                return Unknown(f"“{concept.name}”: {reason}" if len(self.concepts) > 1 else reason)
        return None

    def forget_images(self, hits: Callable[[ExpectedConcept], np.ndarray]) -> np.ndarray:
        """`hits` of each concept's forget images, bool (n,), one concept after the other."""
        return np.concatenate([hits(concept) for concept in self.concepts])

    def prompts_of_images(self) -> np.ndarray | None:
        """The prompt of each of the `forget_images`, (n,); None where the prompts are not recorded."""
        prompts = [of for concept in self.concepts if (of := self.prompts_of(concept)) is not None]
        return np.concatenate(prompts) if prompts else None


@dataclass(frozen=True)
class Metric:
    """A measured quantity of an erasure.

    Args:
        key: In `run.json`. The value before the erasure has the key that ends in "_before".
        title: As in tables, short.
        better: Which values are.
        unit: "%", or "" for a plain number.
        compute: The value of the unlearned model; of a breakdown the value of each part. The first line of its
            docstring is shown as the metric's meaning.
        needs: What it is computed from.
        per_concept: Whether it is computed for each concept too.
        breakdown: Whether it has parts, such as classes.
        finding: A sentence for readers who know no metrics, "" for none, on the values before and after and, of a
            metric that is `per_concept`, on the concept with its name and anchor.
    """

    key: str
    title: str
    better: Literal["higher", "lower"]
    unit: str
    compute: Callable[[EvaluationPair], Value | Mapping[str, Value]]
    needs: Source = "detections"
    per_concept: bool = False
    breakdown: bool = False
    finding: Callable[[Estimate, Estimate, Mapping[str, Any]], str] | None = None

    @property
    def key_before(self) -> str:
        """The key of the value before the erasure."""
        return self.key.removesuffix("_after") + "_before"

    @property
    def meaning(self) -> str:
        """One sentence."""
        return (self.compute.__doc__ or "").split("\n")[0]
