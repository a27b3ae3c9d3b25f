"""CLIP's tokenizer from the files that come with salun."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from salun.checkpoints.locate import ASSETS

CLIP_TOKENS = 77


def clip_tokenizer(pad_token: str) -> Any:
    """CLIP's tokenizer, from its merges alone: its tokens are the 256 bytes, those at a word's end, and the merges."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as place:
        write_clip_tokenizer(Path(place), pad_token)
        return CLIPTokenizer.from_pretrained(place, trust_remote_code=False)


def write_clip_tokenizer(folder: Path, pad_token: str) -> None:
    """Write CLIP's tokenizer as the hub has it, in files that every version of transformers reads."""
    merges = (ASSETS / "clip" / "merges.txt").read_text(encoding="utf-8")
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in plain] + [chr(256 + i) for i in range(256 - len(plain))]  # in GPT-2's order
    joined = [line.replace(" ", "") for line in merges.splitlines()[1:] if line]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_bytes(merges.encode("utf-8"))
    # a mark at a word's end is a token of its own for CLIP, not padding
    pad = {"content": pad_token, "single_word": True, "special": True, "normalized": False}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CLIP_TOKENS,
        "pad_token": pad_token,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "added_tokens_decoder": {str(tokens.index(pad_token)): {**pad, "lstrip": False, "rstrip": False}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
