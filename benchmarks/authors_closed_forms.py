"""The closed forms of UCE, RECE and SPEED compared with the code of RECE's and SPEED's authors, on random layers.

    python -m benchmarks.authors_closed_forms --rece PATH --speed PATH

The paths are a checkout of github.com/CharlesGong12/RECE, which holds UCE too, and a checkout or bare git directory of
github.com/Ouxiang-Li/SPEED, neither of them part of this repository. Their functions run unchanged on a stand-in for a
pipeline: two blocks with cross-attention, and a text encoder that looks prompts up in a table. Prints the largest
difference of any weight or embedding, relative to the largest entry.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.authors_source import Source, commit
from salun.diffusion.methods import speed
from salun.diffusion.methods.rece import adversarial
from salun.diffusion.methods.uce import edit_of

WIDTH, TOKENS, OUT = 24, 5, (16, 32)  # of text embeddings; of a prompt; of the projections of each block
ERASE, PRESERVE, LAMBDA = 1.0, 0.1, 0.1  # the weights of their function's callers
CONCEPTS, ANCHORS, RETAINED = ["nudity", "gun"], ["a person", "a stick"], ["a dog", "a house", "a tree"]
MORE_RETAINED = [f"a thing of sort {i}" for i in range(30)]  # for SPEED, whose null space needs more than the width


class CrossAttnBlock(nn.Module):
    """A block as they walk through it, found by its class's name."""

    def __init__(self, out: int, generator: torch.Generator) -> None:
        super().__init__()
        attention = nn.Module()
        for name in ("to_k", "to_v"):
            layer = nn.Linear(WIDTH, out, bias=False, dtype=torch.float64)
            layer.weight.data = torch.randn(out, WIDTH, generator=generator, dtype=torch.float64)
            setattr(attention, name, layer)
        transformer = nn.Module()
        transformer.attn2 = attention
        inner = nn.Module()
        inner.transformer_blocks = nn.ModuleList([transformer])
        self.attentions = nn.ModuleList([inner])


class Encoded(NamedTuple):
    """What a text encoder returns: (n, tokens, width)."""

    last_hidden_state: Tensor


class Pipeline:
    """What their functions use of a pipeline."""

    device = "cpu"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.unet = nn.Module()
        self.unet.down_blocks = nn.ModuleList([CrossAttnBlock(OUT[0], generator)])
        self.unet.up_blocks = nn.ModuleList([CrossAttnBlock(OUT[1], generator)])
        names = [*CONCEPTS, *ANCHORS, *RETAINED, "", *MORE_RETAINED]
        self.rows = {name: i for i, name in enumerate(names)}
        self.table = torch.randn(len(names), TOKENS, WIDTH, generator=generator, dtype=torch.float64)
        self.tokenizer: Any = self._tokenize
        self._tokenize.__func__.model_max_length = TOKENS  # type: ignore[attr-defined]

    def _tokenize(self, texts: str | list[str], **_: Any) -> Any:
        ids = torch.tensor([[self.rows[text]] for text in ([texts] if isinstance(texts, str) else texts)])
        mask = (torch.arange(TOKENS) < TOKENS - ids % 2).long()  # of every second text, the last token is padding
        return type("Tokens", (dict,), {"input_ids": ids, "attention_mask": mask})(input_ids=ids)

    def text_encoder(self, ids: Tensor) -> Encoded:
        return Encoded(self.table[ids[:, 0]])

    def last(self, name: str) -> Tensor:
        """The embedding of the last token of its subject, (1, width): the one before the token that ends it."""
        at = int(self._tokenize(name).attention_mask.sum()) - 2
        return self.embedding(name)[at : at + 1]

    def embedding(self, name: str) -> Tensor:
        """(tokens, width)."""
        return self.table[self.rows[name]]

    def projections(self) -> list[Tensor]:
        """The weights of all projections."""
        return [p.detach() for p in self.unet.parameters()]


def load(path: Path, name: str) -> types.ModuleType:
    """A file of the checkout, as a module of this name; the packages above it are empty."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:i]))
        package.__path__ = []
        sys.modules.setdefault(package.__name__, package)
    around = sys.modules[name.rpartition(".")[0]]
    around.embedding2img = around.setup_seed = None  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((ours - theirs.detach()).abs().max() / theirs.detach().abs().max())


def compare_uce_and_rece(checkout: Path) -> None:
    """Two rounds of RECE after UCE."""
    uce = load(checkout / "erase_methods" / "uce.py", "rece.erase_methods.uce")
    closed = load(
        checkout / "utils" / "embedding_calculation" / "close_form_emb.py", "rece.utils.embedding_calculation.emb"
    )
    original, theirs = Pipeline(), Pipeline()
    weights = original.projections()
    c, g, r = (torch.cat([original.embedding(name) for name in names]) for names in (CONCEPTS, ANCHORS, RETAINED))
    edit = torch.eye(WIDTH, dtype=torch.float64)
    gram: Tensor = sum((w.T @ w for w in weights), torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
    to_erase = [original.embedding(name) for name in CONCEPTS]
    for step in ("UCE", "RECE, first round", "RECE, second round"):
        if step != "UCE":
            shown = [
                closed.close_form_emb_regzero(theirs, copy.deepcopy(original), name, regeular_scale=LAMBDA)[1][0]
                for name in CONCEPTS
            ]
            ours = adversarial(torch.cat([original.embedding(name) for name in CONCEPTS]), edit, gram, LAMBDA)
            print(f"{step}: embeddings apart by {apart(ours, torch.cat(shown)):.1e}")
            to_erase, c = shown, ours
        uce.edit_model_adversarial(
            theirs, to_erase, [original.embedding(name) for name in ANCHORS], RETAINED, technique="replace",
            lamb=LAMBDA, erase_scale=ERASE, preserve_scale=PRESERVE,
        )  # fmt: skip
        edit = edit @ edit_of(c, g, r, ERASE, PRESERVE, LAMBDA)
        most = max(apart(w @ edit, t) for w, t in zip(weights, theirs.projections(), strict=True))
        print(f"{step}: weights apart by {most:.1e}")


def compare_speed(clone: Path) -> None:
    """The empty prompt's embeddings that stay are three means here: a stand-in for their clusters.

    Their threshold is absolute, of the mean over the retain prompts; that of salun is relative. Their concepts are
    averaged, which is a factor of the embeddings of salun.
    """
    source, threshold = Source(clone, "train_erase_null.py"), 0.5
    original = Pipeline()
    r = torch.cat([original.last(name) for name in MORE_RETAINED])
    free = speed.null_space(r, threshold * len(r) / float(torch.linalg.eigvalsh(r.T @ r).max()))
    of_empty = original.embedding("")
    means = torch.stack([part.mean(0) for part in of_empty[1:].chunk(3)])
    invariant = torch.cat([of_empty[:1], means])
    functions = source.defined(
        "get_token_id", "edit_model", re=re, tqdm=lambda items, **_: items, kmeans=lambda **_: (None, means)
    )
    options = types.SimpleNamespace(
        params="V", aug_num=0, disable_filter=True, threshold=threshold, retain_scale=1.0, lamb=0.0
    )
    for concepts, anchors in ((CONCEPTS[:1], ANCHORS[:1]), (CONCEPTS, ANCHORS)):
        edited = functions["edit_model"](
            options, original, concepts, anchors, MORE_RETAINED, "SPEED", emb_size=WIDTH, device="cpu"
        )
        if concepts == ["nudity"]:  # of which their code moves every token but the first
            c, g = (original.embedding(name)[1:] for name in (*concepts, *anchors))
        else:
            c, g = (
                torch.cat([original.last(name) for name in names]) / len(names) ** 0.5 for names in (concepts, anchors)
            )
        weights = dict(original.unet.state_dict())
        for ridge in (0.0, speed.RIDGE):
            with patch.object(speed, "RIDGE", ridge):
                edit = speed.edit_of(c, g, free, invariant)
            most = max(apart(weights[name] @ edit, weight) for name, weight in edited.items())
            rank = round(float(free.trace()))
            what = f"{len(concepts)} concept(s), {rank} of {WIDTH} directions free, ridge {ridge:.0e}"
            print(f"SPEED {commit(clone)}, {what}: weights apart by {most:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rece", type=Path, help="Checkout of RECE's repository (default: skipped).")
    parser.add_argument("--speed", type=Path, help="Clone of SPEED's repository (default: skipped).")
    paths = parser.parse_args()
    torch.set_default_dtype(torch.float64)  # their identity matrices have the default type
    if paths.rece is not None:
        compare_uce_and_rece(paths.rece)
    if paths.speed is not None:
        compare_speed(paths.speed)


if __name__ == "__main__":
    main()
