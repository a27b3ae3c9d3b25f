"""How prompts reach the UNet: long ones in chunks, other layers by clip skip, tags for tag-trained models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from salun.diffusion.data.latents import sample_latents
from salun.diffusion.model.loading import describe
from salun.diffusion.model.protocol import Conditioning
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.diffusion.prompts.concepts import Concept, prompts_of, resolve
from salun.errors import ConfigError, DataError

LONG = "one red circle, plain style, " * 14  # more than 75 tokens of any tokenizer


def test_short_prompts_are_encoded_as_diffusers_does(shapes: Model) -> None:
    prompts = ["one red circle, plain style", "", "a picture of one green star, night style"]
    tokenizer, encoder = shapes.tokenizers[0], shapes.text_encoders[0]
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(shapes.encode(prompts).hidden, encoder(ids).last_hidden_state)


def test_a_long_prompt_is_read_to_its_end(shapes: Model) -> None:
    found = shapes.encode([LONG, LONG + ", night style", "one red circle"])
    chunks = found.hidden.shape[1] // 77
    assert chunks >= 2
    assert not torch.equal(found.hidden[0], found.hidden[1])
    head = shapes.encode([shapes.tokenizers[0].decode(shapes.tokenizers[0](LONG).input_ids[1:76])])
    torch.testing.assert_close(found.hidden[0, :77], head.hidden[0, :77])


def test_a_short_prompt_beside_a_long_one_says_what_it_says_alone(shapes: Model) -> None:
    x, t = torch.randn(1, *shapes.latent_shape), torch.tensor([500])
    alone = shapes.encode(["one red circle"])
    beside = shapes.encode([LONG, "one red circle"])[1:2]
    assert beside.hidden.shape[1] > alone.hidden.shape[1]
    with torch.no_grad():  # the same sums in another order
        torch.testing.assert_close(shapes.predict(x, t, beside), shapes.predict(x, t, alone), atol=1e-5, rtol=1e-4)


def test_rows_of_two_and_three_chunks_meet_at_six() -> None:
    two, three = Conditioning(torch.randn(1, 2 * 77, 4)), Conditioning(torch.randn(2, 3 * 77, 4))
    assert Conditioning.cat([two, three]).hidden.shape == (3, 6 * 77, 4)


def test_a_prompt_without_end_is_refused(shapes: Model) -> None:
    with pytest.raises(DataError, match="Shorten it"):
        shapes.encode(["circle " * 400])


def test_clip_skip_takes_an_earlier_layer_through_the_last_norm(shapes: Model) -> None:
    last = shapes.encode(["one red circle"]).hidden
    with shapes.configured(EraseOptions(clip_skip=1)):
        assert torch.equal(shapes.encode(["one red circle"]).hidden, last)
    with shapes.configured(EraseOptions(clip_skip=2)):
        earlier = shapes.encode(["one red circle"]).hidden
    assert not torch.equal(earlier, last)
    assert earlier.std() == pytest.approx(float(last.std()), rel=0.5)  # normed like the last
    with shapes.configured(EraseOptions(clip_skip=9)), pytest.raises(ConfigError, match=r"clip_skip is 9.*2 layers"):
        shapes.encode(["one red circle"])
    assert torch.equal(shapes.encode(["one red circle"]).hidden, last)


def test_guidance_leads_away_from_a_negative_prompt(shapes: Model) -> None:
    """As hosts do it: the negative prompt takes the empty one's place. Against itself, guidance has nothing to add."""
    asked, seeds = ["one red circle, plain style"], [3]
    plain = sample_latents(shapes, asked, seeds)
    with shapes.configured(EraseOptions(negative_prompt="")):
        assert torch.equal(sample_latents(shapes, asked, seeds), plain)
    with shapes.configured(EraseOptions(negative_prompt="one red circle, plain style")):
        itself = sample_latents(shapes, asked, seeds)
    unguided = replace(shapes.settings, sampling=replace(shapes.settings.sampling, guidance=1.0))
    guided, shapes.settings = shapes.settings, unguided
    try:
        # guidance w on one side and none on the other are equal but for the order of float operations
        torch.testing.assert_close(itself, sample_latents(shapes, asked, seeds), atol=1e-3, rtol=1e-3)
    finally:
        shapes.settings = guided
    assert not torch.allclose(itself, plain, atol=0.1)


def test_other_resolutions(shapes: Model) -> None:
    with shapes.configured(EraseOptions(resolution=96)):
        assert shapes.latent_shape == (4, 12, 12)
    assert shapes.latent_shape == (4, 8, 8)
    with (
        pytest.raises(ConfigError, match=r"resolution is 100.*multiple"),
        shapes.configured(EraseOptions(resolution=100)),
    ):
        pass


@pytest.mark.parametrize("name", ["nudity", "van gogh", "golden retriever", "church"])
def test_tags_are_words_between_commas(name: str) -> None:
    concept, _ = resolve(Concept(name), None, "a model", "tags")
    prompts = prompts_of([concept], None, "tags")
    (own,) = prompts.concepts
    assert len(own.forget) == len(own.anchor) >= 10
    texts = [p.text for p in own.forget + own.eval_forget]
    assert not any(text.lower().startswith(("a ", "an ", "the ")) for text in texts)
    assert {p.text for p in own.eval_forget + prompts.eval_retain}.isdisjoint(
        {p.text for p in own.forget + own.anchor + prompts.retain} - {""}
    )
    natural = prompts_of([resolve(Concept(name), None, "a model")[0]], None)
    assert {p.text for p in natural.concepts[0].forget}.isdisjoint(texts) or name == "golden retriever"


def test_tags_are_rejected_for_a_model_with_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match="prompt_style is tags"):
        make_plan(describe("shapes").settings, "shapes", "circle", EraseOptions(prompt_style="tags"))
