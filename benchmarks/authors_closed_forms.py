"""The closed forms of UCE and RECE compared with the code of RECE's authors, which holds both, on random layers.

    python -m benchmarks.authors_closed_forms PATH

PATH is a checkout of github.com/CharlesGong12/RECE, which is not part of this repository. Its functions run unchanged
on a stand-in for a pipeline: two blocks with cross-attention, and a text encoder that looks prompts up in a table.
Prints the largest difference of any weight or embedding, relative to the largest entry.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salun.diffusion.methods.rece import adversarial
from salun.diffusion.methods.uce import edit_of

WIDTH, TOKENS, OUT = 24, 5, (16, 32)  # of text embeddings; of a prompt; of the projections of each block
ERASE, PRESERVE, LAMBDA = 1.0, 0.1, 0.1  # the weights of their function's callers
CONCEPTS, ANCHORS, RETAINED = ["nudity", "gun"], ["a person", "a stick"], ["a dog", "a house", "a tree"]


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


class Pipeline:
    """What their functions use of a pipeline."""

    device = "cpu"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.unet = nn.Module()
        self.unet.down_blocks = nn.ModuleList([CrossAttnBlock(OUT[0], generator)])
        self.unet.up_blocks = nn.ModuleList([CrossAttnBlock(OUT[1], generator)])
        names = [*CONCEPTS, *ANCHORS, *RETAINED]
        self.rows = {name: i for i, name in enumerate(names)}
        self.table = torch.randn(len(names), TOKENS, WIDTH, generator=generator, dtype=torch.float64)
        self.tokenizer: Any = self._tokenize
        self._tokenize.__func__.model_max_length = TOKENS  # type: ignore[attr-defined]

    def _tokenize(self, texts: str | list[str], **_: Any) -> Any:
        ids = torch.tensor([[self.rows[text]] for text in ([texts] if isinstance(texts, str) else texts)])
        return type("Tokens", (dict,), {"input_ids": ids})(input_ids=ids)

    def text_encoder(self, ids: Tensor) -> tuple[Tensor]:
        return (self.table[ids[:, 0]],)

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
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main() -> None:
    torch.set_default_dtype(torch.float64)  # their identity matrices have the default type
    checkout = Path(sys.argv[1])
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


if __name__ == "__main__":
    main()
