"""The labels of class-conditional models: their names, and the vocabulary that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salun.checkpoints.safetensors_io import truncated
from salun.diffusion.prompts.vocabulary import VALUE, Vocabulary
from salun.errors import ModelError
from salun.untrusted import read_json_object, read_text
from salun.user_text import composed

FILE = "labels.txt"  # a name a line, in the order of the labels
ATTRIBUTE = "class"
MOST, BYTES = 10_000, 1_000_000


def read_labels(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The names of a model's labels: of its file, of DiT's `model_index.json`, else numbers.

    Args:
        config: Of the network, which says how many there are.

    Raises:
        ModelError: The network takes no labels, or the names do not fit.
    """
    dit = "num_embeds_ada_norm" in config
    count = config.get("num_embeds_ada_norm" if dit else "num_class_embeds")
    if count is None:
        raise ModelError(f"{folder} has a network without class embeddings, so there is no class that it could forget")
    labels = count if dit else count - 1  # of UNet2DModel the last one is the null label; DiT's config leaves it out
    if not 2 <= labels <= MOST:
        raise ModelError(
            f"{folder} has {count:,} class embeddings; salun takes from 2 to {MOST:,} classes and, in a UNet2DModel, "
            "one more for the null label of guidance"
        )
    names = _named(folder)
    if names is None:
        return [str(i) for i in range(labels)]
    if len(names) != labels:
        raise ModelError(
            f"{folder} names {len(names)} classes, but its network takes {labels} (and the null label of guidance)"
        )
    return names


def _named(folder: Path) -> list[str] | None:
    """The names that the folder holds, None if it holds none. Raises ModelError for names that cannot be used."""
    path = folder / FILE
    try:
        if path.is_file():
            names = [composed(line.strip()) for line in read_text(path, BYTES).splitlines() if line.strip()]
        else:
            listed = read_json_object(folder / "model_index.json").get("id2label")
            if not isinstance(listed, dict) or not listed:
                return None
            names = _shortened([str(listed[key]) for key in sorted(listed, key=int)])
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"the labels of {folder} cannot be read: {truncated(str(error))}") from error
    wrong = next((n for i, n in enumerate(names) if len(n) > VALUE or not n.isprintable() or n in names[:i]), None)
    if wrong is not None:
        raise ModelError(
            f"{folder} has the label {truncated(wrong)!r}, which is there twice, or not a text of at most {VALUE} "
            "characters"
        )
    return names


def _shortened(names: Sequence[str]) -> list[str]:
    """Of each label's synonyms the first, where no other label begins with it."""
    firsts = [name.split(",")[0].strip() for name in names]
    return [
        composed(first if firsts.count(first) == 1 else name[:VALUE]) for first, name in zip(firsts, names, strict=True)
    ]


def vocabulary_of(labels: Sequence[str]) -> Vocabulary:
    """Each label is a prompt, and the anchor of the one before it, as in the authors' experiment."""
    anchors = dict(zip(labels, [*labels[1:], labels[0]], strict=True))
    slot = [f"{{{ATTRIBUTE}}}"]
    return Vocabulary({ATTRIBUTE: list(labels)}, slot, slot, anchors)
