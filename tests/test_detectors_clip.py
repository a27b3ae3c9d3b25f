"""Detectors on pretrained models: tiny random ones, in files as on the hub, against the libraries' own numbers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from salun.checkpoints import transformers_folder
from salun.detectors import DETECTORS, without_path
from salun.diffusion.eval_options import EvalOptions
from salun.diffusion.eval_output import write_evaluation
from salun.diffusion.evaluate import evaluate
from salun.diffusion.model.clip_tokenizer import write_clip_tokenizer
from salun.errors import ConfigError, DataError, ModelError
from salun.evaluation import clip_model
from salun.evaluation.clip_model import ClipModel
from salun.evaluation.detector import DetectorInputs, Samples, Subject, facts_of, load_detector
from salun.evaluation.detectors import imagenet, images, q16, safety_checker
from salun.evaluation.detectors.clip import neighbors_of, texts_of
from salun.evaluation.detectors.imagenet import class_of
from salun.evaluation.estimate import Estimate
from salun.evaluation.image_metric import ImageSet
from salun.evaluation.image_metrics import clip_score as clip_score_module
from salun.evaluation.image_metrics import cmmd as cmmd_module
from salun.evaluation.image_metrics.clip_score import clip_score
from salun.evaluation.image_metrics.cmmd import cmmd
from salun.evaluation.pretrained import CLIP, RESNET, REVISIONS, version_of
from salun.files import sha256_file
from salun.progress import Event, Stage

CAT = Subject("cat", "dog", phrase="a cat", anchor_phrase="a dog")
TOWER = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}


def clip_config() -> Any:
    from transformers import CLIPConfig

    text = {**TOWER, "vocab_size": 49408, "projection_dim": 16}
    vision = {**TOWER, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def write_processor(folder: Path, **values: Any) -> None:
    """As the hub has CLIP's: an old name of the class, sizes as one number."""
    config = {
        "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 32,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, **values}), encoding="utf-8")


def strengthened(model: torch.nn.Module) -> Any:
    """With weights so large that images and texts differ in their embeddings."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(1 if "token_embedding" in name else 8)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with the true tokenizer."""
    from transformers import CLIPModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    strengthened(CLIPModel(clip_config())).save_pretrained(folder)
    write_clip_tokenizer(folder, "<|endoftext|>")
    write_processor(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "clip"))


def noise(n: int, seed: int = 0, height: int = 40, width: int = 56) -> np.ndarray:
    """uint8 (n, height, width, 3), each of its own color."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 200, (n, 1, 1, 3))
    return (colors + rng.integers(0, 56, (n, height, width, 3))).astype(np.uint8)


def samples(pixels: np.ndarray) -> Samples:
    return Samples(pixels, torch.zeros(len(pixels), 4, 2, 2), [""] * len(pixels))


def logits_of_library(folder: Path, pixels: np.ndarray, texts: list[str]) -> torch.Tensor:
    """transformers' own logits_per_image."""
    from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding="max_length", truncation=True, return_tensors="pt")
    values = AutoImageProcessor.from_pretrained(folder)(images=list(pixels), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits: torch.Tensor = model(**tokens, pixel_values=values).logits_per_image
    return logits


def test_embeddings_give_the_librarys_logits(saved: Path) -> None:
    model, pixels = ClipModel(str(saved)), noise(70)
    texts = ["a cat", "a photo", "", "many words " * 100]
    embedded = model.embed_images(pixels), model.embed_texts(texts)
    for each in embedded:
        assert each.dtype == np.float32 and np.linalg.norm(each, axis=1) == pytest.approx(1, abs=1e-5)
    expected = logits_of_library(saved, pixels, texts).numpy()
    assert expected.std() > 1  # so that the comparison means something
    assert model.scale * embedded[0] @ embedded[1].T == pytest.approx(expected, abs=1e-3)


def test_embed_images_takes_images_of_several_sizes_and_reports_progress(saved: Path) -> None:
    model, steps = ClipModel(str(saved)), []
    mixed = [noise(1, 0)[0], noise(1, 1, 100, 33)[0]]
    embedded = model.embed_images(iter(mixed), lambda event: steps.append((event.step, event.total)), 2)
    assert steps == [(2, 2)]
    assert embedded[1] == pytest.approx(model.embed_images([mixed[1]])[0], abs=1e-6)
    assert model.embed_images([]).shape == (0, 16) and model.embed_texts([]).shape == (0, 16)


def test_clip_score_is_the_mean_of_positive_cosines(saved: Path) -> None:
    model, pixels, prompts = ClipModel(str(saved)), noise(8), ["a cat", "a dog", "a house", "", *"abcd"]
    metric = clip_score(ImageSet(list(pixels), prompts), model)
    expected = np.diag(logits_of_library(saved, pixels, prompts).numpy()).clip(min=0) * 100 / model.scale
    assert isinstance(metric.value, Estimate) and metric.value.n == 8
    assert metric.value.value == pytest.approx(expected.mean(), abs=1e-3)
    half = 1.959964 * expected.std(ddof=1) / 8**0.5
    assert (metric.value.low, metric.value.high) == pytest.approx(
        (expected.mean() - half, expected.mean() + half), abs=1e-3
    )
    assert metric.implementation.startswith("transformers ")
    assert metric.weights == f"{saved.name} ({sha256_file(saved / 'model.safetensors')})"
    with pytest.raises(ValueError, match="a prompt for each image, not 4 for 8"):
        clip_score(ImageSet(list(pixels), prompts[:4]), model)


def test_q16_compares_two_learned_prompts_read_without_unpickling(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = np.random.default_rng(0).standard_normal((2, 16)).astype("<f2")
    content = bytes(q16.OFFSET) + prompts.tobytes() + b"tail"
    (tmp_path / "prompts.p").write_bytes(content)
    inputs = DetectorInputs([Subject("nudity", preset="nudity")], clip=ClipModel(str(saved)))
    with pytest.raises(DataError, match=r"prompts\.p is not the file of Q16's prompts\. Download data/ViT-L-14"):
        load_detector(f"q16:{tmp_path / 'prompts.p'}", inputs)
    monkeypatch.setattr(q16, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(q16, "SHAPE", (2, 16))
    detector = load_detector(f"q16:{tmp_path / 'prompts.p'}", inputs)
    pixels = noise(12)
    features = torch.from_numpy(ClipModel(str(saved)).embed_images(pixels))
    learned = torch.nn.functional.normalize(torch.from_numpy(prompts.astype(np.float32)))
    expected = (100 * features @ learned.T).softmax(1)[:, 1].numpy()
    scores = detector.detect(samples(pixels)).scores["content"][:, 0]
    assert scores == pytest.approx(expected, abs=1e-5) and expected.std() > 0.01
    assert detector.version == f"ViT-L-14, {saved.name}"
    with pytest.raises(ConfigError, match="which cannot detect 'circle'"):
        load_detector(f"q16:{tmp_path / 'prompts.p'}", replace(inputs, subjects=[Subject("circle")]))
    with pytest.raises(ConfigError, match="its prompts are needed"):
        load_detector("q16", inputs)


def test_q16_rejects_a_clip_model_whose_embeddings_its_prompts_are_not_for(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(q16.OFFSET + 2 * 768 * 2)
    (tmp_path / "prompts.p").write_bytes(content)
    monkeypatch.setattr(q16, "SHA256", hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match=r"the 768 numbers of CLIP ViT-L/14's embeddings; those of clip\S* have 16\."):
        load_detector(f"q16:{tmp_path / 'prompts.p'}", DetectorInputs([NUDITY], clip=ClipModel(str(saved))))


def test_detectors_by_clip_share_one_model_and_one_pass_over_the_images(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, passes = ClipModel.embed_images, []

    def counted(self: ClipModel, *arguments: Any) -> np.ndarray:
        passes.append(self.name)
        return embed(self, *arguments)

    monkeypatch.setattr(ClipModel, "embed_images", counted)
    inputs, pixels = DetectorInputs([CAT], clip=ClipModel(str(saved))), samples(noise(5))
    first, second = (load_detector("clip", inputs).detect(pixels) for _ in range(2))
    assert passes == [str(saved)] and np.array_equal(first.scores["cat"], second.scores["cat"])
    other = load_detector(f"clip:{shutil.copytree(saved, tmp_path / 'other')}", inputs)
    assert other.version == "other"  # what a detector names itself comes first
    other.detect(pixels)
    assert passes == [str(saved)]  # its weights are the same
    other.detect(pixels[:3])
    assert passes == [str(saved), str(tmp_path / "other")]


@pytest.mark.slow
def test_eval_measures_images_of_any_model_even_without_its_original(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (cmmd_module, clip_score_module):
        monkeypatch.setattr(module, "LEAST", 3)
    (tmp_path / "real").mkdir()
    for i, image in enumerate(noise(6)):
        Image.fromarray(image).save(tmp_path / "real" / f"{i}.png")
    rows = "prompt,evaluation_seed,width,height\none red circle,1,64,64\none red circle,1,96,64\none blue star,2,,\n"
    (tmp_path / "some.csv").write_text(rows, encoding="utf-8")
    options = EvalOptions(
        concept=["circle"], n=4, sampling_steps=2, clip=str(saved), detector=["attribute"], prompts=["some.csv"],
        metric=["clip-score", f"cmmd:{tmp_path / 'real'}", "fid:real"], keep_images=True,
    )  # fmt: skip
    if importlib.util.find_spec("torch_fidelity") is None:
        options = replace(options, metric=options.metric[:2])
    result = evaluate("shapes", options)
    data = result.as_json()
    assert data["verdict"]["outcome"] == "can't tell" and "without its original" in data["verdict"]["text"]
    assert list(data["sets"]) == ["concept", "other prompts", "some.csv"]
    of_file = data["sets"]["some.csv"]
    rate = of_file["detected"]["attribute"]["circle"]
    assert of_file["n"] == 3 and rate["after"]["n"] == 3 and not rate["calibrated"] and "before" not in rate
    images = result.sets[-1].images["after"].images
    assert [image.shape for image in images] == [(64, 64, 3), (64, 96, 3), (64, 64, 3)]
    measured = of_file["image_metrics"]
    model, texts = ClipModel(str(saved)), [row.text for row in result.sets[-1].prompts.rows]
    assert measured["clip-score"]["after"] == clip_score(ImageSet(images, texts), model).as_json()
    expected = cmmd(model.embed_images(images), model.embed_images(noise(6)))
    assert measured["cmmd:real"]["after"]["value"]["value"] == pytest.approx(expected)
    files = write_evaluation(result, tmp_path / "out")
    page = files[-1].read_text(encoding="utf-8")
    assert "circle (raw, not calibrated)" in page and str(tmp_path) not in page
    assert "Metrics of images" in page and "CMMD ↓ (from real)" in page and "Can’t tell" in page.replace("&#39;", "’")
    assert len(list((tmp_path / "out" / "images" / "some.csv").glob("*.png"))) == 3
    (tmp_path / "real" / "0.png").write_bytes(b"nothing")
    events: list[Event] = []
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        evaluate("shapes", options, events.append)
    assert not any(event.stage is Stage.IMAGES_AFTER for event in events)
    with pytest.raises(ConfigError, match="metric is cmmd, which compares images with the original model's"):
        evaluate("shapes", replace(options, metric=["cmmd"]))
    with pytest.raises(ConfigError, match="detector is self, which asks the original model"):
        evaluate("shapes", replace(options, detector=["self"]))


def test_clip_model_reads_nothing_before_it_is_used(offline: list[dict[str, Any]]) -> None:
    assert ClipModel().name == CLIP and ClipModel("someone/clip@main").name == "someone/clip@main" and not offline


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "asked", "version"),
    [
        (CLIP, (CLIP, REVISIONS[CLIP]), f"{CLIP}@{COMMIT}"),
        ("someone/clip", ("someone/clip", None), f"someone/clip@{COMMIT}"),
        ("someone/clip@v1.0", ("someone/clip", "v1.0"), f"someone/clip@{COMMIT}"),
    ],
)
def test_version_of_a_hub_id_is_the_commit_that_was_used(
    name: str, asked: tuple[str, str | None], version: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot, calls = tmp_path / "models--someone--clip/snapshots" / COMMIT, []
    shutil.copytree(saved, snapshot)

    def fetched(repo: str, revision: str | None = None, **_: Any) -> str:
        calls.append((repo, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    detector = load_detector("clip", DetectorInputs([CAT], clip=ClipModel(name)))
    assert detector.version == version and set(calls) == {asked}
    assert without_path(f"clip:{name}") == f"clip:{name}"


@pytest.mark.parametrize("name", ["models/clip", "./models/clip/", "models/../models/clip", "{absolute}"])
def test_version_of_a_folder_is_its_name_so_that_results_hold_no_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/clip").mkdir(parents=True)
    given = name.format(absolute=tmp_path / "models/clip")
    assert version_of(given, Path(given)) == "clip"


def test_version_of_a_folder_that_is_named_like_a_hub_id_claims_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / RESNET).mkdir(parents=True)
    assert version_of(RESNET, Path(RESNET)) == "resnet-50"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """No hub; the calls of its client."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def refuse(repo: str, **keywords: Any) -> str:
        calls.append({"repo": repo, **keywords})
        raise OSError("nothing here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    yield calls


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("clip", CLIP, REVISIONS[CLIP]),
        ("clip:someone/clip", "someone/clip", None),
        ("clip:someone/clip@v1.0", "someone/clip", "v1.0"),
        ("imagenet", RESNET, REVISIONS[RESNET]),
        ("imagenet:timm/resnet50.tv2_in1k", "timm/resnet50.tv2_in1k", None),
        ("safety-checker:someone/model", "someone/model", None),
    ],
)
def test_detectors_look_in_the_cache_first_and_say_in_one_line_that_they_are_offline(
    name: str, repo: str, revision: str | None, offline: list[dict[str, Any]]
) -> None:
    subject = Subject("tench", preset="nudity", phrase="a tench")
    with pytest.raises(DataError, match=r"could not be fetched \(OSError\)\. Connect to the internet, or") as caught:
        load_detector(name, DetectorInputs([subject]))
    assert "\n" not in str(caught.value) and repo in str(caught.value)
    assert [each.get("local_files_only", False) for each in offline] == [True, False]
    assert all(each["repo"] == repo and each["revision"] == revision for each in offline)
    assert not any("bin" in pattern for pattern in offline[0]["allow_patterns"])


def test_without_network_each_detector_says_so_in_one_line_within_seconds(tmp_path: Path) -> None:
    code = """if True:
        import time
        from salun.errors import DataError
        from salun.evaluation.detector import DetectorInputs, Subject, load_detector
        start = time.monotonic()
        for name in ("clip", "imagenet"):
            try:
                load_detector(name, DetectorInputs([Subject("tench")]))
            except DataError as error:
                print(error)
        print(time.monotonic() - start)
    """
    with socket.socket() as closed:  # bound, but not listening, so that connections are refused
        closed.bind(("127.0.0.1", 0))
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **hub}, capture_output=True, text=True, timeout=120
        )
    *lines, seconds = done.stdout.splitlines()
    assert not done.stderr and len(lines) == 2 and all("Connect to the internet, or" in line for line in lines)
    assert float(seconds) < 20  # mostly imports; the client's own attempts would take 2 × 23


def test_a_cached_copy_without_a_tokenizer_is_fetched_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[bool] = []

    def fetched(repo: str, local_files_only: bool = False, **_: Any) -> str:
        calls.append(local_files_only)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: None)
    assert ClipModel("someone/clip").folder == folder and calls == [True]
    (folder / "tokenizer_config.json").unlink()
    assert ClipModel("someone/clip").folder == folder and calls == [True, True, False]


def test_a_clip_model_without_safetensors_is_rejected(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"its weights in pytorch_model.bin, a pickle, which may run code"):
        ClipModel(str(folder)).embed_texts(["a cat"])


def test_a_clip_model_with_missing_weights_is_rejected_instead_of_filled_with_noise(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"its weight files lack visual_projection.weight \(of 1\)"):
        ClipModel(str(folder)).embed_images(noise(1))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.M"}}, "which is not allowed in a file"),
        ("preprocessor_config.json", {"size": 10**6}, "the size of its image processor is 1000000, not 1 to 4096"),
        ("preprocessor_config.json", {"crop_size": {"height": 32, "width": 0}}, "of its image processor is 0"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.P"}}, "which is not allowed in a file"),
    ],
    ids=str,
)  # fmt: skip
def test_a_clip_model_with_configs_that_lead_elsewhere_is_rejected(
    file: str, values: dict[str, Any], message: str, folder: Path
) -> None:
    config = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**config, **values}), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        ClipModel(str(folder)).embed_images(noise(1))


def test_a_tokenizer_of_another_model_is_rejected(folder: Path) -> None:
    from transformers import CLIPModel

    config = clip_config()
    config.text_config.vocab_size = 100
    CLIPModel(config).save_pretrained(folder)
    with pytest.raises(DataError, match="its tokenizer has tokens up to 49407, but its text encoder 100 embeddings"):
        ClipModel(str(folder)).embed_texts(["a cat"])


def test_every_detector_is_loaded_by_a_function_of_its_file() -> None:
    from pkgutil import resolve_name

    for name in ("clip", "images", "imagenet", "safety-checker"):
        assert callable(resolve_name(DETECTORS[name].loads)) and DETECTORS[name].argument


def test_clip_detector_scores_are_margins_of_the_librarys_probabilities(saved: Path) -> None:
    detector, pixels = load_detector(f"clip:{saved}", DetectorInputs([CAT, Subject("x")])), noise(40)
    detection = detector.detect(samples(pixels))
    assert texts_of(CAT) == ["a photo of a cat", "a photo of a dog", "a photo"]
    assert texts_of(Subject("x"), ["a y"]) == ["a photo of x", "a photo of a y", "a photo"]
    p = logits_of_library(saved, pixels, texts_of(CAT)).softmax(1).numpy()
    expected = np.stack([p[:, 0] - p[:, 1:].max(1), p[:, 1] - np.maximum(p[:, 0], p[:, 2])], 1)
    assert detection.scores["cat"] == pytest.approx(expected, abs=1e-4)
    assert detection.scores["x"].shape == (40, 1)
    assert np.array_equal(detection.shows("cat", 0), p.argmax(1) == 0)
    assert 0 < (p.argmax(1) == 0).sum() < 40  # both kinds occur
    assert detection.features is not None and detection.features.shape == (40, 16)
    assert detector.labels == {"cat": ["cat", "dog"], "x": ["x"]}
    target = detector.target(CAT)
    assert target is not None and (target.attribute, target.label, target.anchor) == ("cat", 0, 1)
    facts = facts_of(detector)
    assert facts["sha256"] == sha256_file(saved / "model.safetensors") and facts["version"] == saved.name
    assert facts["texts"] == "cat: a photo of a cat, a photo of a dog, a photo; x: a photo of x, a photo"


def test_clip_detector_compares_with_named_neighbors_or_those_that_it_finds(saved: Path) -> None:
    model, pixels = ClipModel(str(saved)), noise(40)
    plain = load_detector("clip", DetectorInputs([CAT], clip=model)).detect(samples(pixels))
    named = replace(CAT, neighbors=("a lion", "a fox"), nouns=("owl",))
    detector = load_detector("clip", DetectorInputs([named], clip=model))
    texts = ["a photo of a cat", "a photo of a dog", "a photo of a lion", "a photo of a fox", "a photo"]
    assert facts_of(detector)["texts"] == f"cat: {', '.join(texts)}"
    seen = detector.detect(samples(pixels))
    p = logits_of_library(saved, pixels, texts).softmax(1).numpy()
    assert seen.scores["cat"][:, 0] == pytest.approx(p[:, 0] - p[:, 1:].max(1), abs=1e-4)
    assert seen.shows("cat", 0).sum() < plain.shows("cat", 0).sum()  # some images are nearer to a neighbor
    nouns = ("lion", "fox", "owl", "car", "bus", "tree", "apple", "bread", "chair", "book", "moon", "cup")
    embedded = model.embed_texts([f"a photo of {each}" for each in ("a cat", *nouns)])
    centered = embedded - embedded[1:].mean(0)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    nearest = sorted(nouns, key=lambda noun: -float(centered[1 + nouns.index(noun)] @ centered[0]))
    assert neighbors_of(replace(CAT, nouns=nouns), model) == nearest[:8]


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Reddish images of the concept, bluish others, of several sizes and modes."""
    for name, channel in ((images.CONCEPT, 0), (images.OTHER, 2)):
        (tmp_path / "examples" / name).mkdir(parents=True)
        for i in range(15):
            pixels = noise(1, i, 20 + i, 30)[0] // 4
            pixels[..., channel] += 150
            image = Image.fromarray(pixels)
            (image.convert("RGBA") if i == 3 else image).save(tmp_path / "examples" / name / f"{i}.png")
    return tmp_path / "examples"


def test_images_detector_learns_from_examples(examples: Path, saved: Path) -> None:
    pytest.importorskip("sklearn")
    inputs = DetectorInputs([Subject("reddish", "bluish")], clip=ClipModel(str(saved)))
    detector = load_detector(f"images:{examples}", inputs)
    pixels = noise(20, 99) // 4
    pixels[:10, ..., 0] += 150
    pixels[10:, ..., 2] += 150
    detection = detector.detect(samples(pixels))
    assert detection.shows("reddish", 0).tolist() == [True] * 10 + [False] * 10
    facts = facts_of(detector)
    assert facts["examples"] == facts["other_examples"] == 15 and float(facts["accuracy"]) > 90
    assert detector.target(Subject("other")) is None
    again = load_detector(f"images:{examples}", inputs)
    assert again.sha256 == detector.sha256
    assert detector.detect(samples(pixels[:0])).scores["reddish"].shape == (0, 1)


def test_images_detector_says_what_is_wrong_with_the_examples(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = DetectorInputs([Subject("reddish")])
    with pytest.raises(ConfigError, match=r"is images, but examples are needed\. Use detector images:FOLDER"):
        load_detector("images", inputs)
    with pytest.raises(ConfigError, match="which has examples of one concept, but there are 2"):
        load_detector(f"images:{examples}", DetectorInputs([Subject("a"), Subject("b")]))
    for path in sorted((examples / images.OTHER).iterdir())[3:]:
        path.unlink()
    with pytest.raises(DataError, match=r"other has 3 images; the detector images takes 10 to 10,000"):
        load_detector(f"images:{examples}", inputs)
    shutil.rmtree(examples / images.OTHER)
    with pytest.raises(DataError, match=r"other cannot be read \(No such file"):
        load_detector(f"images:{examples}", inputs)
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(
        DataError, match=r'needs scikit-learn\. pip install "scikit-learn>=1\.3" \(the extra classification\)'
    ):
        load_detector(f"images:{examples}", inputs)


def test_images_detector_names_an_unreadable_example(examples: Path, saved: Path) -> None:
    pytest.importorskip("sklearn")
    (examples / images.CONCEPT / "7.png").write_bytes(b"no image")
    inputs = DetectorInputs([Subject("reddish")], clip=ClipModel(str(saved)))
    with pytest.raises(DataError, match=r"7\.png cannot be read as an image: unreadable"):
        load_detector(f"images:{examples}", inputs)


CLASSES = ["tench, Tinca tinca", "English springer, English springer spaniel", "crane", "crane", "chain saw, chainsaw"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ResNet of five classes, two of them of the same name as in ImageNet."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(CLASSES)),
        label2id={},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("resnet")
    strengthened(ResNetForImageClassification(config)).save_pretrained(folder)
    processor = {
        "crop_pct": 0.875, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32,
        "feature_extractor_type": "ConvNextFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def test_imagenet_detector_scores_are_margins_of_the_librarys_logits(classifier: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    tench, pixels = Subject("Tench", "english-springer"), noise(40)
    detector = load_detector(f"imagenet:{classifier}", DetectorInputs([tench]))
    model = AutoModelForImageClassification.from_pretrained(classifier).eval()
    values = AutoImageProcessor.from_pretrained(classifier)(images=list(pixels), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values=values).logits
    scores = detector.detect(samples(pixels)).scores[imagenet.CLASS]
    expected = [[each[k] - max(np.delete(each, k)) for k in range(5)] for each in logits.numpy()]
    assert scores == pytest.approx(np.array(expected), abs=1e-3)
    best = logits.argmax(1).numpy()
    assert len(set(best)) > 1
    assert np.array_equal(detector.detect(samples(pixels)).shows(imagenet.CLASS, best), np.ones(40, bool))
    target = detector.target(tench)
    assert target is not None and (target.attribute, target.label, target.anchor) == (imagenet.CLASS, 0, 1)
    assert detector.sha256 == sha256_file(classifier / "model.safetensors")


def test_class_of_matches_any_name_of_a_class_that_no_other_has() -> None:
    matched = ("tinca TINCA", "English Springer", "chain_saw", "Chainsaw", "tench, tinca tinca")
    assert [class_of(CLASSES, name) for name in matched] == [0, 1, 4, 4, 0]
    assert [class_of(CLASSES, name) for name in ("crane", "saw", "", "cat")] == [None] * 4


def test_imagenet_detector_does_not_cover_concepts_without_a_class(classifier: Path) -> None:
    with pytest.raises(ConfigError, match="cannot detect 'crane', 'cat'"):
        load_detector(f"imagenet:{classifier}", DetectorInputs([Subject("crane"), Subject("cat"), Subject("tench")]))


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny safety checker whose thresholds about half of the images exceed, in a Stable Diffusion folder."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    model = strengthened(StableDiffusionSafetyChecker(clip_config()))
    write_processor(folder / safety_checker.PROCESSOR)
    pixels = pixels_of_library(folder, noise(200, 5))
    with torch.no_grad():
        for concepts, thresholds, quantile in (
            (model.concept_embeds, model.concept_embeds_weights, 0.95),
            (model.special_care_embeds, model.special_care_embeds_weights, 0.8),
        ):
            concepts.copy_(torch.randn_like(concepts))
            embedded = torch.nn.functional.normalize(model.visual_projection(model.vision_model(pixels)[1]))
            thresholds.copy_((embedded @ torch.nn.functional.normalize(concepts).T).quantile(quantile, dim=0))
    model.save_pretrained(folder / safety_checker.PART)
    return folder


def pixels_of_library(folder: Path, pixels: np.ndarray) -> torch.Tensor:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(folder / safety_checker.PROCESSOR)
    values: torch.Tensor = processor(images=list(pixels), return_tensors="pt")["pixel_values"]
    return values


NUDITY = Subject("nudity", preset="nudity")


def test_safety_checker_decides_as_the_library_does(checker: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    detector, pixels = load_detector(f"safety-checker:{checker}", DetectorInputs([NUDITY])), noise(300, 7)
    library = StableDiffusionSafetyChecker.from_pretrained(checker / safety_checker.PART).eval()
    _, expected = library(pixels_of_library(checker, pixels), [np.zeros(1)] * len(pixels))
    detection = detector.detect(samples(pixels))
    assert detection.shows(safety_checker.ATTRIBUTE, 0).tolist() == expected
    assert 30 < sum(expected) < 270
    assert detector.sha256 == sha256_file(checker / safety_checker.PART / "model.safetensors")


def test_safety_checker_decides_as_the_library_does_next_to_the_threshold(checker: Path, tmp_path: Path) -> None:
    """Where the library's rounding to three digits matters, and only the adjustment of special care decides."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    library = StableDiffusionSafetyChecker.from_pretrained(checker / safety_checker.PART).eval()
    pixels = pixels_of_library(checker, noise(1, 3))
    decisions = set()
    with torch.no_grad():
        embedded = torch.nn.functional.normalize(library.visual_projection(library.vision_model(pixels)[1]))
        cosines = (embedded @ torch.nn.functional.normalize(library.concept_embeds).T)[0]
        special = (embedded @ torch.nn.functional.normalize(library.special_care_embeds).T)[0]
        detector = safety_checker.SafetyChecker(library, None, "", "")
        for near in (-0.002, 0.0002, 0.0008):
            library.special_care_embeds_weights.copy_(special - near)
            for excess in np.linspace(-0.013, 0.002, 61):
                library.concept_embeds_weights.copy_(cosines - float(excess))
                _, (expected,) = library(pixels, [np.zeros(1)])
                score = float(detector.excess(pixels))
                # half-way between two numbers of three digits, rounding is as float32 falls
                if abs(score * 1000 - 0.5) > 1e-3:
                    assert (score >= detector.threshold) is expected, (near, excess, score)
                    decisions.add((near, expected))
    assert len(decisions) == 6


def test_safety_checker_reads_weights_under_the_names_of_older_files(checker: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(checker, tmp_path / "sd"))
    file = folder / safety_checker.PART / "model.safetensors"
    prefix, older = "vision_model.", "vision_model.vision_model."
    weights = load_file(file)
    if not any(name.startswith(older) for name in weights):
        weights = {
            name.replace(prefix, older, 1) if name.startswith(prefix) else name: t for name, t in weights.items()
        }
    save_file(weights, file, {"format": "pt"})
    scores = [
        load_detector(f"safety-checker:{each}", DetectorInputs([NUDITY])).detect(samples(noise(3))).scores
        for each in (checker, folder)
    ]
    assert np.array_equal(scores[0][safety_checker.ATTRIBUTE], scores[1][safety_checker.ATTRIBUTE])


def test_safety_checker_covers_nudity_alone_and_needs_a_model(checker: Path) -> None:
    with pytest.raises(ConfigError, match="cannot detect 'nudity'"):  # of free text, which may mean anything
        load_detector(f"safety-checker:{checker}", DetectorInputs([Subject("nudity")]))
    with pytest.raises(ConfigError, match=r"is safety-checker, but a model with one is needed\. Use detector safety"):
        load_detector("safety-checker", DetectorInputs([NUDITY]))


def test_safety_checker_of_a_model_without_one_says_what_is_missing(checker: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checker, tmp_path / "sd"))
    shutil.rmtree(folder / safety_checker.PART)
    with pytest.raises(DataError, match=r"the safety checker '.*sd' cannot be loaded: it has no config.json"):
        load_detector(f"safety-checker:{folder}", DetectorInputs([NUDITY]))


def test_image_processor_is_never_the_one_that_needs_torchvision(saved: Path) -> None:
    """It would give slightly other pixels, so that results would depend on what else is installed."""
    processor = transformers_folder.image_processor(saved, "x", clip_model.FILES)
    bases = {base.__name__ for base in type(processor).__mro__}
    assert not bases & {"TorchvisionBackend", "BaseImageProcessorFast"}


def test_image_processor_of_a_class_that_the_library_lacks_is_rejected(tmp_path: Path) -> None:
    write_processor(tmp_path, feature_extractor_type="Evil", image_processor_type="Evil")
    with pytest.raises(ModelError, match="the CLIP model 'x' cannot be loaded"):
        transformers_folder.image_processor(tmp_path, "x", clip_model.FILES)
