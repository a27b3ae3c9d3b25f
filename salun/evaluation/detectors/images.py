"""A classifier trained on the user's own examples: for concepts that no model has a name for.

The folder has two folders in it: `concept/` with images that show the concept, `other/` with images that do not. A
logistic regression on CLIP's embeddings separates them. How well it does so on examples that it was not trained on is
among its facts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from salun.errors import ConfigError, DataError
from salun.evaluation.clip_model import ClipModel
from salun.evaluation.detector import Detection, DetectorInputs, Samples, Subject, Target, clip_embeddings
from salun.extras import install_command
from salun.files import sha256_file
from salun.images import counted, list_images, read_image, white_level
from salun.progress import Progress, silent
from salun.user_text import as_spelled, unquoted

CONCEPT, OTHER = "concept", "other"  # folders
FEWEST, MOST = 10, 10_000  # images in each
FOLDS = 5
logger = logging.getLogger("salun")


class ExampleDetector:
    """A logistic regression on CLIP's embeddings.

    Args:
        model: Makes the embeddings.
        probe: Fitted on those of the examples, with `decision_function`.
        concept: The name of the concept.
        sha256: Of the model's weights and the examples, from which the regression follows.
        facts: The number of examples and the cross-validated accuracy, in percent.
    """

    name = "images"
    threshold, unit = 0.0, "log-odds"
    prompt_match = None

    def __init__(self, model: ClipModel, probe: Any, concept: str, sha256: str, facts: Mapping[str, float]) -> None:
        self.model, self.version, self.probe, self.sha256, self.facts = model, model.version, probe, sha256, facts
        self.labels: Mapping[str, Sequence[str]] = {concept: [concept]}

    def target(self, subject: Subject) -> Target | None:
        """The concept of the examples; its anchor cannot be detected."""
        return Target(subject.name, 0) if subject.name in self.labels else None

    def detect(self, samples: Samples, progress: Progress = silent) -> Detection:
        """Where the concept is likelier than not; the features are the embeddings."""
        features = clip_embeddings(samples, self.model, progress)
        scores = (
            np.asarray(self.probe.decision_function(features), np.float32) if len(features) else np.empty(0, np.float32)
        )
        return Detection(dict.fromkeys(self.labels, scores[:, None]), self.threshold, features=features)


def load(inputs: DetectorInputs) -> ExampleDetector:
    """The detector trained on the examples in the folder of its argument.

    Raises:
        ConfigError: There is no argument, or the run has several concepts.
        DataError: scikit-learn is not installed, there are too few or unreadable examples, or CLIP cannot be loaded.
    """
    if not inputs.argument:
        raise ConfigError(
            "is images, but examples are needed",
            option="detector",
            advice=f"Use {{detector}} images:FOLDER, with example images in FOLDER/{CONCEPT} and FOLDER/{OTHER}",
        )
    if len(inputs.subjects) != 1:
        raise ConfigError(
            f"is images, which has examples of one concept, but there are {len(inputs.subjects)}", option="detector"
        )
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise DataError("the detector images needs scikit-learn", advice=install_command("classification")) from error
    folder = as_spelled(Path(unquoted(inputs.argument)).expanduser())
    files = {name: _examples(folder / name) for name in (CONCEPT, OTHER)}
    model = inputs.clip or ClipModel(device=inputs.device)
    features = {name: model.embed_images(_pixels(paths)) for name, paths in files.items()}
    probe, accuracy = fitted(features[CONCEPT], features[OTHER])
    facts = {"examples": len(files[CONCEPT]), "other_examples": len(files[OTHER]), "accuracy": accuracy}
    hashes = [model.sha256, *(sha256_file(path) for paths in files.values() for path in paths)]
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return ExampleDetector(model, probe, inputs.subjects[0].name, digest, facts)


def fitted(concept: np.ndarray, other: np.ndarray) -> tuple[Any, float]:
    """A logistic regression on embeddings (n, d) and (m, d), and its accuracy on examples held out, in percent.

    Both kinds count the same however many there are: in the fit, and in the accuracy, whose chance level is 50 %.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, shows = np.concatenate([concept, other]), np.repeat([1, 0], [len(concept), len(other)])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    scores = cross_val_score(probe, features, shows, cv=folds, scoring="balanced_accuracy")
    return probe.fit(features, shows), 100 * float(scores.mean())


def _examples(folder: Path) -> list[Path]:
    """The image files in a folder. Raises DataError if there are too few or too many."""
    listing = list_images(folder)
    for line in counted(listing.skipped):
        logger.warning("%s: skipped %s", folder, line)
    files = listing.files
    if not FEWEST <= len(files) <= MOST:
        raise DataError(f"{folder} has {len(files):,} images; the detector images takes {FEWEST} to {MOST:,}")
    return files


def _pixels(files: Sequence[Path]) -> Iterator[np.ndarray]:
    """uint8 (h, w, 3) of each file. Raises DataError, which names the file."""
    white = cache(lambda: white_level(files))
    for path in files:
        try:
            image, _ = read_image(path, white)
        except DataError as error:
            raise DataError(f"{path} cannot be read as an image: {error}", advice="Fix or remove it") from error
        yield np.array(image.convert("RGB"))
