"""Class-conditional models: diffusers' UNet2DModel with class embeddings, and DiT. They have no single-file layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from salun.checkpoints.families.family import Family, Shapes, Vae
from salun.errors import ModelError

NO_FILE = "class-conditional models have no single-file layout"
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}


@dataclass(frozen=True, eq=False)
class ClassNetwork:
    """A network that takes a class label. Implements `Network`, but for what concerns single files.

    Args:
        part: Its folder in a diffusers model.
        table: Ending of the name of an embedding of the labels; the last row is the null label.
        attention: What the names of attention layers contain.
    """

    part: str
    class_name: str
    table: str
    attention: str
    prefix: str = "class-conditional."  # of no file

    @property
    def scopes(self) -> Mapping[str, Callable[[str], bool]]:
        """There is no cross-attention to select."""

        def attends(name: str) -> bool:
            return self.attention in name

        return {"full": lambda name: True, "selfattn": attends, "attn": attends}

    @property
    def size_features(self) -> int:
        return 0

    def to_single(self, names: Iterable[str]) -> dict[str, str]:
        _refuse()

    def from_single(self, names: Iterable[str]) -> dict[str, str]:
        _refuse()

    def fault(self, shapes: Shapes) -> str:
        return NO_FILE

    def is_conditioned(self, shapes: Shapes) -> bool:
        return any(name.endswith(self.table) for name in shapes)

    def config(self, shapes: Shapes, prediction_type: str) -> dict[str, Any]:
        _refuse()

    def latent_side(self, prediction_type: str) -> int:
        _refuse()

    def lora_modules(self, names: Iterable[str]) -> dict[str, str]:
        raise ModelError("class-conditional models have no LoRA files", advice="Write the delta or the folder")


def _refuse() -> NoReturn:
    raise ModelError(NO_FILE, advice="Use a diffusers folder")


def _family(
    name: str, title: str, pipeline: str, network: ClassNetwork, vae: Vae | None, also: tuple[str, ...] = ()
) -> Family:
    return Family(
        name=name,
        title=title,
        pipeline=pipeline,
        architecture=name,
        matches=lambda shapes: False,
        network=network,
        text=(),
        vae=vae,
        lora_metadata={},
        scheduler=LINEAR,
        also=also,
    )


PIXELS = _family(
    "class",
    "class-conditional UNet",
    "DDPMPipeline",
    ClassNetwork("unet", "UNet2DModel", "class_embedding.weight", ".attentions."),
    None,
    also=("DDIMPipeline",),
)
DIT = _family(
    "dit",
    "DiT",
    "DiTPipeline",
    ClassNetwork("transformer", "DiTTransformer2DModel", ".class_embedder.embedding_table.weight", ".attn1."),
    Vae(scaling_factor=0.18215, sample_size=256),
)
