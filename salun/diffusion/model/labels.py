"""The labels of class-conditional models: their names, and the vocabulary that they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salun.checkpoints.locate import LABELS
from salun.checkpoints.safetensors_io import truncated
from salun.diffusion.prompts.vocabulary import VALUE, Vocabulary
from salun.errors import ConfigError, ModelError
from salun.untrusted import read_json_object, read_text
from salun.user_text import composed

ATTRIBUTE = "class"
MOST, BYTES = 10_000, 1_000_000


def read_labels(folder: Path, config: Mapping[str, Any], dit: bool) -> list[str]:
    """The names of a model's labels: of its file, of DiT's `model_index.json`, else numbers.

    Args:
        config: Of the network, which says how many there are.
        dit: Whether it is a DiT's.

    Raises:
        ModelError: The network takes no labels, or the names do not fit.
    """
    count = config.get("num_embeds_ada_norm" if dit else "num_class_embeds")
    if count is None:
        raise ModelError(f"{folder} has a network without class embeddings, so there is no class that it could forget")
    labels = (count if dit else count - 1) if type(count) is int else 0  # DiT's config leaves the null label out
    if not 2 <= labels <= MOST:
        raise ModelError(
            f"{folder} has {truncated(repr(count))} class embeddings; salun takes from 2 to {MOST:,} classes and, in a "
            "UNet2DModel, one more for the null label of guidance"
        )
    names = _named(folder)
    if names is None:
        return [str(i) for i in range(labels)]
    if len(names) == labels + 1 and not dit:
        raise ModelError(
            f"{folder} names {len(names)} classes, as many as its network has class embeddings: none is left for the "
            "null label of guidance, without which salun takes no model"
        )
    if len(names) != labels:
        raise ModelError(
            f"{folder} names {len(names)} classes, but its network takes {labels} (and the null label of guidance)"
        )
    try:
        check_labels(names, str(folder))
    except ConfigError as error:
        raise ModelError(error.message) from error
    return names


def _named(folder: Path) -> list[str] | None:
    """The names that the folder holds, None if it holds none. Raises ModelError for names that cannot be read."""
    path = folder / LABELS  # a name a line, in the order of the labels
    try:
        if path.is_file():
            return [line for line in as_written(read_text(path, BYTES).split("\n")) if line]
        listed = read_json_object(folder / "model_index.json").get("id2label")
        if not isinstance(listed, dict) or not listed:
            return None
        if len(listed) > MOST:
            raise ValueError(f"there are {len(listed):,} of them")
        return _shortened([str(listed[key]) for key in sorted(listed, key=int)])
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"the labels of {folder} cannot be read: {truncated(str(error))}") from error


def as_written(names: Sequence[str]) -> list[str]:
    """Names as a file of labels gives them back: without blanks at the ends, accents composed."""
    return [composed(name.strip()) for name in names]


def _shortened(names: Sequence[str]) -> list[str]:
    """Of each label's synonyms the first, with its number where another label has the same one."""
    firsts = [composed(name.split(",")[0].strip()) for name in names]
    counts = Counter(firsts)
    return [first if counts[first] == 1 else f"{first} ({i})" for i, first in enumerate(firsts)]


def check_labels(names: Sequence[str], where: str) -> None:
    """Raises ConfigError for names that no model could have: too many, twice the same, empty, too long or odd."""
    if len(names) > MOST:
        raise ConfigError(f"{where} has {len(names):,} classes; the limit is {MOST:,}")
    counts = Counter(names)
    wrong = next((n for n in names if not 1 <= len(n) <= VALUE or not n.isprintable() or counts[n] > 1), None)
    if wrong is not None:
        raise ConfigError(
            f"{where} has the class {truncated(wrong)!r}, which is there twice, or no text of 1 to {VALUE} characters"
        )


def vocabulary_of(labels: Sequence[str]) -> Vocabulary:
    """Each label is a prompt, and the anchor of the one before it, as in the authors' experiment."""
    anchors = dict(zip(labels, [*labels[1:], labels[0]], strict=True))
    slot = [f"{{{ATTRIBUTE}}}"]
    return Vocabulary({ATTRIBUTE: list(labels)}, slot, slot, anchors)
