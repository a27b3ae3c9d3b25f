"""Names ↔ names: a bijection that agrees with the models' own names and with diffusers' converter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salun.checkpoints import keymap
from salun.checkpoints.families.registry import FAMILIES

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
COUNTS = {"sd1": 686, "sd2": 686, "sdxl": 1680}


def unet(family: str) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[family])


@pytest.mark.parametrize("family", UNETS)
def test_the_unet_map_is_a_bijection(family: str) -> None:
    names = list(unet(family).state_dict())
    assert len(names) == COUNTS[family]
    there = keymap.unet_to_ldm(names)
    assert len(set(there.values())) == len(names)
    back = keymap.unet_from_ldm(["first_stage_model.encoder.conv_in.weight", *there.values()])
    assert {back[theirs]: theirs for theirs in there.values()} == there
    assert len(back) == len(names)


@pytest.mark.parametrize("family", UNETS)
def test_a_unet_is_of_the_one_family_that_its_shapes_match(family: str) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in unet(family).named_parameters()}
    assert [each.name for each in FAMILIES.values() if each.matches(shapes)] == [family]
    known = FAMILIES[family]
    assert known.network.config(shapes, "epsilon")["cross_attention_dim"] == known.context_width
    assert known.label_width == UNETS[family].get("projection_class_embeddings_input_dim", 0)


@pytest.mark.parametrize("family", UNETS)
def test_the_unet_map_agrees_with_diffusers_own_converter(family: str) -> None:
    """diffusers renames a checkpoint's tensors when it loads one; ours must say the same of every tensor."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = unet(family).state_dict()
    there = keymap.unet_to_ldm(state)
    single = {theirs: state[ours] for ours, theirs in there.items()}
    config = {
        "layers_per_block": 2,
        "class_embed_type": None,
        "addition_embed_type": UNETS[family].get("addition_embed_type"),
    }
    converted = convert_ldm_unet_checkpoint(single, config)
    assert set(converted) == set(state)
    for theirs, ours in keymap.unet_from_ldm(single).items():
        assert converted[ours] is single[theirs]


def test_a_tensor_of_no_unet_is_named() -> None:
    with pytest.raises(KeyError, match="strange"):
        keymap.unet_to_ldm(["conv_in.weight", "strange.weight"])
    with pytest.raises(KeyError, match="strange"):
        keymap.unet_from_ldm(["model.diffusion_model.strange.weight"])


def vae() -> Any:
    from diffusers import AutoencoderKL

    kinds: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    with torch.device("meta"):
        return AutoencoderKL(**kinds)


def test_the_vae_map_is_a_bijection_and_diffusers_agrees() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    generator = torch.Generator().manual_seed(0)
    state = {n: torch.rand(p.shape, generator=generator, dtype=torch.half) for n, p in vae().state_dict().items()}
    there = keymap.vae_to_ldm(state)
    assert len(state) == 248
    assert len(set(there.values())) == len(state)
    assert keymap.vae_from_ldm(there.values()) == {theirs: ours for ours, theirs in there.items()}
    single = {}
    for ours, theirs in there.items():
        single[theirs] = state[ours][..., None, None] if keymap.is_vae_matrix(theirs) else state[ours]
    matrices = [name for name in single if keymap.is_vae_matrix(name)]
    assert len(matrices) == 8  # q, k, v and out of the encoder's and the decoder's attention
    config = {"down_block_types": ["x"] * 4, "up_block_types": ["x"] * 4}
    converted = convert_ldm_vae_checkpoint(single, config)
    assert set(converted) == set(state)
    for name, tensor in converted.items():
        assert torch.equal(tensor, state[name]), name


def test_old_names_of_the_vaes_attention_are_known() -> None:
    old = "decoder.mid_block.attentions.0.query.weight"
    assert keymap.vae_to_ldm([old])[old] == "first_stage_model.decoder.mid.attn_1.q.weight"


def text_model(projection: bool = False) -> dict[str, torch.Tensor]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=8,
    )
    state = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).state_dict()
    return dict(state)


def test_clips_names_get_their_prefix() -> None:
    state = text_model()
    there = keymap.text_to_ldm(state, FAMILIES["sd1"].text[0].layouts[0])
    assert all(part == "" for _, part in there.values())
    assert all(name.startswith("cond_stage_model.transformer.text_model.") for name, _ in there.values())
    assert len({name for name, _ in there.values()}) == len(there)


@pytest.mark.parametrize(("family", "which"), [("sd2", 0), ("sdxl", 1)])
def test_open_clips_fused_names_agree_with_diffusers_converter(family: str, which: int) -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
    )
    model = CLIPTextModelWithProjection(config)
    state, layout = model.state_dict(), FAMILIES[family].text[which].layouts[0]
    single: dict[str, torch.Tensor] = {}
    thirds: dict[str, dict[str, torch.Tensor]] = {}
    for ours, (theirs, part) in keymap.text_to_ldm(state, layout).items():
        if part in ("q", "k", "v"):
            thirds.setdefault(theirs, {})[part] = state[ours]
        else:
            single[theirs] = state[ours].T if part == "T" else state[ours]
    single.update({name: torch.cat([parts[k] for k in "qkv"]) for name, parts in thirds.items()})
    converted = convert_open_clip_checkpoint(model, single, prefix=layout.prefix)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    for name, tensor in state.items():
        left_out = family == "sd2" and name.startswith("text_projection")  # diffusers has no use for SD 2's
        if not name.endswith("position_ids") and not left_out:
            assert torch.equal(bare[name.removeprefix("text_model.")], tensor), name
