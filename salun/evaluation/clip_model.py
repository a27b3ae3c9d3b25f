"""CLIP as transformers has it: embeddings of images and texts, of length 1 (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salun.checkpoints.transformers_folder import (
    PROCESSORS,
    TOKENIZER,
    ModelFiles,
    clip_tokenizer,
    folder_of,
    image_processor,
    load_model,
)
from salun.errors import ModelError
from salun.evaluation.pretrained import CLIP, REVISIONS, batches, by_processor, loading, version_of, weights_hash
from salun.progress import Event, Progress, Stage, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILES = ModelFiles("CLIP model", (*PROCESSORS, *TOKENIZER), (PROCESSORS[0], "tokenizer_config.json"))
TEXTS = 256  # in a batch


class ClipModel:
    """A CLIP model, which is loaded when it is first used.

    Args:
        name: A folder, or an id of the hub, which may have a revision as in ID@REVISION; by default it is the pinned
            one of `REVISIONS`, or else the newest.
        device: Where to compute, in float32.

    Every use raises DataError if the model cannot be loaded.
    """

    def __init__(self, name: str = CLIP, device: torch.device | str = "cpu") -> None:
        self.name, self.device = name, device

    @property
    def version(self) -> str:
        """The name for results, see `version_of`."""
        return version_of(self.name, self.folder)

    @property
    def weights(self) -> str:
        """The version and the hash of its weights, for results."""
        return f"{self.version} ({self.sha256})"

    @property
    def implementation(self) -> str:
        """The library and its version, for results."""
        import transformers

        return f"transformers {transformers.__version__}"

    @cached_property
    def folder(self) -> Path:
        """Where its files are."""
        with loading():
            return folder_of(self.name, FILES, REVISIONS.get(self.name))

    @cached_property
    def sha256(self) -> str:
        """Of its weights."""
        return weights_hash(self.folder)

    @cached_property
    def _model(self) -> Any:
        from transformers import CLIPModel

        with loading():
            model = load_model(self.name, self.folder, FILES, CLIPModel, CLIPModel)
            highest = max(self._tokenizer.get_vocab().values(), default=0)
            known = model.config.text_config.vocab_size
            if highest >= known:
                why = f"its tokenizer has tokens up to {highest}, but its text encoder {known} embeddings"
                raise ModelError(FILES.lacking(self.name, why))
        return model.to(self.device)

    @cached_property
    def _tokenizer(self) -> Any:
        with loading():
            return clip_tokenizer(self.folder, self.name, FILES)

    @cached_property
    def _processor(self) -> Any:
        with loading():
            return image_processor(self.folder, self.name, FILES)

    def load(self) -> None:
        """Load it now rather than at its first use."""
        _ = self._model, self._processor

    @property
    def dimension(self) -> int:
        """Numbers in an embedding."""
        return int(self._model.config.projection_dim)

    @property
    def scale(self) -> float:
        """The factor of cosines in the model's logits, about 100."""
        return float(self._model.logit_scale.detach().exp())

    def embed_images(self, images: Iterable[np.ndarray], progress: Progress = silent, total: int = 0) -> np.ndarray:
        """Embeddings of images, float32 (n, d), each of length 1.

        Args:
            images: uint8 (h, w, 3) each, of any sizes; one is held at a time.
            total: Their number, for the progress; 0 where it is not known.
        """
        import torch

        model, parts, done = self._model, [], 0
        with torch.no_grad():
            for pixels in batches(images, by_processor(self._processor), self.device):
                parts.append(_unit(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)))
                done += len(pixels)
                progress(Event(Stage.DETECTING, done, total))
        return np.concatenate(parts) if parts else np.empty((0, self.dimension), np.float32)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, float32 (n, d), each of length 1; what exceeds CLIP's 77 tokens is cut off."""
        import torch

        model, parts = self._model, []
        longest = model.config.text_config.max_position_embeddings
        with torch.no_grad():
            for start in range(0, len(texts), TEXTS):
                tokens = self._tokenizer(
                    list(texts[start : start + TEXTS]),
                    padding=True,
                    truncation=True,
                    max_length=longest,
                    return_tensors="pt",
                ).to(self.device)
                pooled = model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
                parts.append(_unit(model.text_projection(pooled)))
        return np.concatenate(parts) if parts else np.empty((0, self.dimension), np.float32)


def _unit(embeddings: Tensor) -> np.ndarray:
    """Of length 1, on the CPU."""
    scaled: np.ndarray = (embeddings / embeddings.norm(dim=-1, keepdim=True)).float().cpu().numpy()
    return scaled
