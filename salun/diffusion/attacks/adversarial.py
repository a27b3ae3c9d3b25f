"""A file of adversarial prompts: what attacks made, to be replayed on other models. Such files are untrusted input."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.safetensors_io import Header
from salun.diffusion.attacks.task import AdversarialPrompts, AttackTask
from salun.diffusion.model.protocol import Conditioning
from salun.errors import DataError
from salun.untrusted import parse_json

FORMAT = "salun-adversarial-1"
LONGEST_NAME = 80  # characters of an attack's name that are read
MOST, MOST_ENCODERS = 1_000_000, 256  # prompts, and tokens of all of them; text encoders, or tables of labels


def write_adversarial(path: Path, made: Sequence[tuple[str, AdversarialPrompts]]) -> None:
    """Write what attacks made, by their names."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for i, (name, of) in enumerate(made):
        tensors |= {f"{i}.{k}": vector.float() for k, vector in enumerate(of.vectors)}
        entry = {"attack": name, "rows": list(map(list, of.rows)), "seeds": list(of.seeds), "texts": list(of.texts)}
        entries.append({**entry, "encoders": len(of.vectors), "exact": of.exact})
    tensors = tensors or {"none": torch.zeros(1)}  # a safetensors file needs one
    safetensors_io.write(path, tensors, {"format": FORMAT, "prompts": json.dumps({"prompts": entries})})


def read_adversarial(path: Path) -> list[tuple[str, AdversarialPrompts]]:
    """What `write_adversarial` wrote. Raises DataError for anything else, and ModelError for a damaged file."""
    if not path.is_file():
        raise DataError(f"{path} does not exist", advice="Name the adversarial.safetensors of an attack")
    header = safetensors_io.read_header(path)
    if header.metadata.get("format") != FORMAT:
        raise DataError(f"{path} holds no adversarial prompts", advice="Name the adversarial.safetensors of an attack")
    try:
        entries = parse_json(header.metadata["prompts"])["prompts"]
        names = [str(entry["attack"])[:LONGEST_NAME] for entry in entries]
        return [(name, _prompts(path, header, i, entries[i])) for i, name in enumerate(names)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds adversarial prompts that cannot be read") from error


def _prompts(path: Path, header: Header, number: int, entry: Mapping[str, Any]) -> AdversarialPrompts:
    """One entry, checked. Raises ValueError, TypeError or KeyError for what is not one."""
    rows = [[int(token) for token in row] for row in entry["rows"]]
    seeds, texts = [int(seed) for seed in entry["seeds"]], [str(text) for text in entry["texts"]]
    encoders = int(entry["encoders"])
    if len(seeds) > MOST or sum(map(len, rows)) > MOST or encoders not in range(MOST_ENCODERS + 1):
        raise ValueError("too many")
    if len(rows or texts) != len(seeds) or any(not 0 <= seed < 2**63 for seed in seeds):
        raise ValueError("seeds that do not fit the prompts")
    vectors = [safetensors_io.read_one(path, header, f"{number}.{k}") for k in range(encoders)]
    if any(vector.ndim != 2 or not torch.isfinite(vector.float()).all() for vector in vectors):
        raise ValueError("vectors that are not finite")
    least = min((token for row in rows for token in row), default=0)
    if least < 0 and (not vectors or -least > min(map(len, vectors))):
        raise ValueError("a token without a vector")
    return AdversarialPrompts(rows, seeds, vectors, texts, bool(entry["exact"]))


def made_for(name: str, concepts: Sequence[str]) -> str | None:
    """Of these concepts, the one that an entry of a file was made for; None where it was made for another.

    Args:
        name: Of the entry, "attack concept".
    """
    return max((each for each in concepts if name.endswith(f" {each}")), key=len, default=None)


def encoded(task: AttackTask, made: AdversarialPrompts, path: Path) -> Conditioning:
    """Conditionings (n,) of adversarial prompts in the attacked model. Raises DataError where they do not fit it."""
    if not made.rows:
        return task.encode(made.texts)
    tokens, matrices = task.tokens, task.tokens.token_embeddings
    widths = [vector.shape[1] for vector in made.vectors]
    if made.vectors and widths != [matrix.shape[1] for matrix in matrices]:
        raise DataError(f"{path} has embeddings of another text encoder than {task.attacked.name}")
    if max((token for row in made.rows for token in row), default=0) >= min(map(len, matrices)):
        raise DataError(f"{path} has tokens that the text encoder of {task.attacked.name} does not have")
    with torch.no_grad():
        parts = [
            tokens.encode_tokens(made.rows[start : start + 64], made.vectors) for start in range(0, len(made.rows), 64)
        ]
    return Conditioning.cat(parts)
