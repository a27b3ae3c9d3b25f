"""Folders of images as they are found: split folders, stray files, tables, class names that are numbers."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from salun.classification import pixel_store
from salun.classification.compare import compare
from salun.classification.data import ImageData, load_data
from salun.classification.experiment import evaluate, setup_of, train, unlearn
from salun.classification.hub import _renumbered as renumbered
from salun.classification.labeled import Sample
from salun.classification.models import load_model, save_model
from salun.classification.pretrained import folder_of
from salun.classification.preview import preview_unlearning
from salun.classification.splits import make_split, remarks, with_forget
from salun.classification.unlearn_options import UnlearnOptions
from salun.errors import Cancelled, ConfigError, DataError
from salun.progress import Event
from salun.runs.cache import Cache

QUICK: dict[str, Any] = {"model": "small", "train_epochs": 1, "train_batch_size": 8, "device": "cpu"}


def image_of(value: int) -> Image.Image:
    """A gray image with pixels of its own for each value."""
    pixels = np.random.default_rng(value).integers(0, 256, (8, 8), np.uint8)
    pixels[0, 0] = value
    return Image.fromarray(pixels)


def fill(folder: Path, *values: int, suffix: str = "png") -> Path:
    """A folder with an image of each value."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        image_of(value).save(folder / f"{value:03}.{suffix}")
    return folder


def values_of(data: ImageData, rows: torch.Tensor | None = None) -> list[int]:
    found: list[int] = (data.images if rows is None else data.images[rows])[:, 0, 0, 0].tolist()
    return found


def small_set(root: Path, names: tuple[str, ...] = ("cat", "dog"), each: int = 8) -> Path:
    """A data set that can be trained on in a moment."""
    for i, name in enumerate(names):
        fill(root / name, *range(i * each, (i + 1) * each))
    return root


@pytest.mark.parametrize(
    ("folders", "validation", "test"),
    [
        (("train", "test"), None, "test"),
        (("train", "val"), None, "val"),
        (("Training", "Testing"), None, "Testing"),
        (("TRAIN", "Validation"), None, "Validation"),
        (("train", "val", "test"), "val", "test"),
        (("train", "dev", "test"), "dev", "test"),
        (("training_set", "test_set"), None, "test_set"),
        (("seg_train/seg_train", "seg_test/seg_test"), None, "seg_test"),
        (("train_data", "valid data", "test-images"), "valid data", "test-images"),
        (("train ", "Test split"), None, "Test split"),
    ],
)
@pytest.mark.parametrize("around", ["", "dataset", "dataset/images"])
@pytest.mark.parametrize("classes_first", [False, True])
def test_split_folders_are_parts_and_never_classes(
    folders: tuple[str, ...], validation: str | None, test: str | None, around: str, classes_first: bool, tmp_path: Path
) -> None:
    expected: dict[str | None, list[int]] = {}
    for i, way in enumerate(folders):
        part = way.split("/")[0]
        for j, name in enumerate(("a", "b")):
            values = [50 * i + 10 * j + k for k in range(3)]
            fill(tmp_path / "set" / around / (f"{name}/{way}" if classes_first else f"{way}/{name}"), *values)
            expected.setdefault(part, []).extend(values)
    data = load_data(str(tmp_path / "set"))
    split = make_split(data, 0.2, 0.0, 0)
    assert data.classes == ("a", "b")
    assert values_of(data, split.train) == expected[first := folders[0].split("/")[0]]
    assert values_of(data, split.test) == expected[test]
    assert values_of(data, split.validation) == expected.get(validation, [])
    assert f"training part {first}, validation " in data.notes[0]
    assert f", test {test}" in data.notes[0]


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    for i, name in enumerate(("bus", "car", "train")):
        fill(tmp_path / "set" / name, i)
    assert load_data(str(tmp_path / "set")).classes == ("bus", "car", "train")


def test_split_folders_that_can_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "mixed" / "train" / "a", 1)
    fill(tmp_path / "mixed" / "cars", 2)
    with pytest.raises(DataError, match=r"holds train with a folder for each class.* but also images in cars"):
        load_data(str(tmp_path / "mixed"))
    fill(tmp_path / "twice" / "train" / "a", 1)
    fill(tmp_path / "twice" / "val" / "a", 2)
    fill(tmp_path / "twice" / "validation" / "a", 3)
    with pytest.raises(DataError, match="has two validation parts, val and validation"):
        load_data(str(tmp_path / "twice"))
    fill(tmp_path / "none" / "test" / "a", 1)
    with pytest.raises(DataError, match="has no part named train, only test"):
        load_data(str(tmp_path / "none"))
    fill(tmp_path / "flat" / "train", 1)
    fill(tmp_path / "flat" / "test", 1)
    with pytest.raises(DataError, match="has no labels: put the images of each class"):
        load_data(str(tmp_path / "flat"))
    fill(tmp_path / "half" / "a" / "train", 1)
    fill(tmp_path / "half" / "a" / "test", 1)
    fill(tmp_path / "half" / "b", 1)
    with pytest.raises(DataError, match="the class 'a' has the parts test, train, but 'b' has none"):
        load_data(str(tmp_path / "half"))
    for i, way in enumerate(("trainset/cats", "trainset/dogs", "testset/cats", "testset/dogs")):
        fill(tmp_path / "unknown" / way, i)
    fill(tmp_path / "unknown" / "samples", 9)
    with pytest.raises(DataError, match="not clear whether testset, trainset are classes"):
        load_data(str(tmp_path / "unknown"))


@pytest.mark.parametrize("classes_first", [False, True])
def test_images_beside_class_folders_are_skipped_and_counted(classes_first: bool, tmp_path: Path) -> None:
    root = tmp_path / "set"
    for i, (part, name) in enumerate((part, name) for part in ("train", "val") for name in ("cats", "dogs")):
        fill(root / (f"{name}/{part}" if classes_first else f"{part}/{name}"), i)
        fill(root / (name if classes_first else part), 100 + i)
    fill(root, 99)
    data = load_data(str(root))
    assert data.classes == ("cats", "dogs")
    assert values_of(data) == [0, 1, 2, 3]
    assert any(note.startswith("set: skipped 5 image outside the class folders: 099.png, ") for note in data.notes)
    fill(root / "samples", 50)
    with pytest.raises(DataError, match="samples"):
        load_data(str(root))


def numbered(tmp_path: Path, names: list[str]) -> ImageData:
    return load_data(str(small_set(tmp_path / "set", tuple(names), each=3)))


@pytest.mark.parametrize(
    ("names", "value", "readings"),
    [
        ([f"{i:03}" for i in range(1, 13)], "1", ["class:001", "class:002"]),
        (["0", "1", "5", "10"], "2", ["class:5"]),
        ([str(i) for i in range(1, 13)], "0", ["class:1 "]),
        (["007", "cat"], "7", ["class:007"]),
    ],
)
def test_class_numbers_are_refused_where_names_are_numbers(
    names: list[str], value: str, readings: list[str], tmp_path: Path
) -> None:
    data = numbered(tmp_path, names)
    with pytest.raises(ConfigError) as refused:
        with_forget(make_split(data, 0.2, 0.0, 0), data, f"class:{value}", 0)
    assert all(reading in str(refused.value) for reading in readings), refused.value


def test_numeric_class_names_sort_as_numbers_and_win_over_numbers(tmp_path: Path) -> None:
    names = [str(i) for i in range(1, 13)]
    data = numbered(tmp_path, [*names, "other"])
    assert data.classes == (*names, "other")
    split = with_forget(make_split(data, 0.2, 0.0, 0), data, "class:1", 0)
    assert set(data.labels[split.forget].tolist()) == {0}
    assert split.forgetting == "class:1"


def test_record_report_and_terminal_name_the_class(tmp_path: Path) -> None:
    root = small_set(tmp_path / "set")
    settings = {"data": str(root), "forget": "class:1", "method": "ft", "epochs": 1, **QUICK}
    run = unlearn(run_dir=tmp_path / "run", **settings)
    assert run.record.options["forget"] == run.split.forgetting == "class:dog"
    assert "class:dog" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert preview_unlearning(UnlearnOptions(**settings))["forget"] == "class:dog"
    made = compare(
        data=str(root), forget="class:1", methods=["ft"], seeds=1, noise_floor=False, search=False, epochs=1,
        workers=1, **QUICK,
    )  # fmt: skip
    assert made.record.options["forget"] == "class:dog"


def test_every_format_and_linked_folder_is_read(tmp_path: Path) -> None:
    root = small_set(tmp_path / "set", each=1)
    for value, suffix in ((10, "jfif"), (11, "ppm"), (12, "pgm"), (13, "JPG"), (14, "jp2"), (15, "tga")):
        image = image_of(value)
        image.save(root / "cat" / f"{value}.{suffix}", format="JPEG" if suffix in ("jfif", "JPG") else None)
    fill(tmp_path / "elsewhere" / "deep", 20)
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "cat" / "up").symlink_to(root)
    data = load_data(str(root))
    assert int((data.labels == 0).sum()) == 1 + 6 + 1
    assert any("2 linked folder that is read already" in note for note in data.notes)


@pytest.mark.parametrize(
    ("link", "target", "refused"),
    [
        ("cat/more.png", "../outside/020.png", None),
        ("owl", "../outside", None),
        ("cat/again.png", "cat/000.png", None),
        ("cat/again.png", "dog/008.png", r"dog/008\.png and .*cat/again\.png are one file, .* classes 'dog' and 'cat'"),
        ("kitten", "cat", r"kitten/000\.png and .*cat/000\.png are one file, .* the classes 'kitten' and 'cat'"),
        ("owl", "", r"are one file, by a link, but in the classes 'owl' and 'cat'\. Remove one of them"),
    ],
)
def test_a_link_adds_images_but_never_one_image_to_two_classes(
    link: str, target: str, refused: str | None, tmp_path: Path
) -> None:
    root = small_set(tmp_path / "set")
    fill(tmp_path / "outside", 20, 21)
    (root / link).symlink_to(root / target)
    if refused:
        with pytest.raises(DataError, match=refused):
            load_data(str(root))
        return
    data = load_data(str(root))
    if "again" in link:
        assert len(data.images) == 16
        assert f"set: skipped 1 link to an image that is read already: {link}" in data.notes
    else:
        assert 20 in values_of(data) and "20" not in "".join(data.notes)


def test_a_link_from_the_test_part_to_the_training_part_is_read_and_reported(tmp_path: Path) -> None:
    small_set(tmp_path / "set" / "train", each=3)
    (tmp_path / "set" / "test").symlink_to(tmp_path / "set" / "train")
    data = load_data(str(tmp_path / "set"))
    assert len(data.images) == 12
    assert any("also in the test set (same pixels)" in line for line in remarks(data, make_split(data, 0.2, 0.0, 0)))


@pytest.mark.parametrize("names", [("Cat", "cat"), ("cat", "cat "), ("caf\u00e9", "cafe\u0301")])
def test_class_names_that_look_alike_are_kept_apart_and_reported(names: tuple[str, str], tmp_path: Path) -> None:
    data = load_data(str(small_set(tmp_path / "set", (*names, "dog"), each=2)))
    assert len(data.classes) == 3
    listed = ", ".join(map(repr, sorted(names)))
    assert (
        f"set: class names that differ only by case, spaces or Unicode form are separate classes: {listed}"
        in data.notes
    )
    split = with_forget(make_split(data, 0.2, 0.0, 0), data, f"class:{names[1]}", 0)
    assert split.forgetting == f"class:{names[1]}"


@pytest.mark.parametrize(
    ("name", "content", "refused"),
    [
        ("cut.jpg", lambda whole: whole[:-40], r"cut\.jpg cannot be read as an image: unreadable\. Fix or remove it"),
        ("cut.jpg", lambda whole: whole[: len(whole) // 2], r"cut\.jpg cannot be read as an image: unreadable"),
        ("empty.png", lambda whole: b"", r"empty\.png cannot be read as an image: unreadable"),
        ("page.png", lambda whole: b"<html>404</html>", r"page\.png cannot be read as an image: unreadable"),
        ("exif.jpg", lambda whole: whole[:2] + b"\xff\xe1\x00\x14Exif\0\0II*\0\xff\xff\xff\xffoops" + whole[2:], None),
        ("png.jpg", lambda whole: whole, None),
    ],
)
def test_a_damaged_image_is_refused_by_name_and_damaged_exif_ignored(
    name: str, content: Callable[[bytes], bytes], refused: str | None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    root = small_set(tmp_path / "set", each=2)
    file = BytesIO()
    image_of(77).save(file, "PNG" if name == "png.jpg" else "JPEG")
    (root / "cat" / name).write_bytes(content(file.getvalue()))
    if refused:
        with pytest.raises(DataError, match=refused):
            load_data(str(root))
    else:
        assert len(load_data(str(root)).images) == 5
    assert not recwarn.list


@pytest.mark.parametrize(("side", "read"), [(8192, True), (9000, False)])
def test_an_image_above_the_limit_of_pixels_is_refused_by_name(side: int, read: bool, tmp_path: Path) -> None:
    root = small_set(tmp_path / "set", each=1)
    Image.new("1", (side, side)).save(root / "cat" / "large.png")
    if read:
        assert load_data(str(root), image_size=8).images.shape == (3, 1, 8, 8)
    else:
        with pytest.raises(
            DataError, match=r"large\.png cannot be read as an image: too large \(the limit is 67,108,864"
        ):
            load_data(str(root), image_size=8)


def test_more_images_than_memory_and_cache_hold_are_refused_and_large_sets_are_decoded_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first image is gray, a later one is in color: all take three planes."""
    root = small_set(tmp_path / "set", each=5)
    image_of(9).convert("RGB").save(root / "dog" / "color.png")
    monkeypatch.setenv("SALUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SALUN_CACHE_SIZE", "2111")
    for free, size in ((703, "7.04e-07"), (2111, "2.11e-06")):
        monkeypatch.setattr(pixel_store, "_free_memory", lambda free=free: free)
        with pytest.raises(DataError, match=rf"set has 11 images of 8×8 pixels, which take {size} GB in memory"):
            load_data(str(root))
    monkeypatch.setattr(pixel_store, "_free_memory", lambda: 2112)
    in_memory = load_data(str(root)).images
    monkeypatch.setattr(pixel_store, "IN_MEMORY", 0)
    monkeypatch.setenv("SALUN_CACHE_SIZE", "2112")
    monkeypatch.setattr(pixel_store, "_free_memory", lambda: 0)
    assert torch.equal(load_data(str(root)).images, in_memory)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(pixel_store, "_free_disk", lambda folder: 4223)
    with pytest.raises(DataError, match="in memory; 0 GB are free"):
        load_data(str(root))


def test_decoded_images_are_stored_and_mapped_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORTHWHILE", "SETTLED", "IN_MEMORY"):
        monkeypatch.setattr(pixel_store, name, 0)
    monkeypatch.setenv("SALUN_CACHE", str(tmp_path / "cache"))
    root = small_set(tmp_path / "set", each=2)
    image_of(9).convert("RGB").save(root / "dog" / "color.png")
    first = load_data(str(root))
    pixels = first.images.clone()
    (entry, _, _) = Cache.of_user().entries()[0]
    with monkeypatch.context() as context:
        context.setattr(pixel_store, "read_images", None)  # not called
        second = load_data(str(root))
    assert torch.equal(pixels, second.images) and first.digest == second.digest and first.notes == second.notes
    content = entry.read_bytes()
    second.images.zero_()  # a private mapping: nothing is written to the file
    entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert torch.equal(load_data(str(root)).images, pixels)  # a damaged entry is not used
    image_of(77).save(root / "cat" / "000.png")
    assert values_of(load_data(str(root))) == [77, 1, 2, 3, 9]
    assert len(Cache.of_user().entries()) == 2


def test_hidden_and_system_files_are_skipped_and_counted(tmp_path: Path) -> None:
    root = small_set(tmp_path / "set", each=2)
    fill(root / "cat" / ".ipynb_checkpoints", 0, 1)
    fill(root / ".ipynb_checkpoints", 3)
    fill(root / "__MACOSX" / "cat", 4)
    (root / "cat" / "._000.png").write_bytes(b"Mac OS X")
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "cat" / "notes.doc").write_text("text", encoding="utf-8")
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "cat" / "pipe.png")
        (root / "cat" / "zero.png").symlink_to("/dev/zero")
    data = load_data(str(root))
    assert data.classes == ("cat", "dog")
    assert values_of(data) == [0, 1, 2, 3]
    notes = "\n".join(data.notes)
    assert "skipped 6 hidden or system file: " in notes
    assert "skipped 1 not an image: cat/notes.doc" in notes
    if hasattr(os, "mkfifo"):
        assert "skipped 2 broken link, pipe or device: cat/pipe.png, cat/zero.png" in notes


def test_pixels_are_normalized_by_the_training_images_and_as_a_given_models_file_states(tmp_path: Path) -> None:
    root = small_set(tmp_path / "set")
    run = train(data=str(root), run_dir=tmp_path / "run", cache=Cache(tmp_path, 0), **QUICK)
    data = load_data(str(root))
    pixels = data.images[run.split.train].double() / 255
    path = tmp_path / "run" / "model.safetensors"
    stated = load_model(path)[1].pixels
    assert stated is not None and stated.mean is not None and stated.std is not None
    assert (stated.mean[0], stated.std[0]) == pytest.approx((float(pixels.mean()), float(pixels.std())), abs=2e-4)
    assert evaluate(tmp_path / "run")["train"] == run.metrics["train"]
    other = replace(load_model(path)[1], pixels=replace(stated, mean=(0.25,), std=(2.0,)))
    save_model(path, run.model, other)
    preset = setup_of(UnlearnOptions(data=str(root), original=str(path), forget="random:0.5", device="cpu")).data.preset
    assert (preset["mean"], preset["std"]) == ([0.25], [2.0])


def test_skipped_files_and_repeated_images_are_in_record_and_report(tmp_path: Path) -> None:
    root = small_set(tmp_path / "set")
    (root / "cat" / "notes.doc").write_text("text", encoding="utf-8")
    messages: list[str] = []
    run = train(
        data=str(root), run_dir=tmp_path / "run", progress=lambda event: messages.append(event.message), **QUICK
    )  # fmt: skip
    line = "set: skipped 1 not an image: cat/notes.doc"
    assert line in run.record.notes
    assert line in messages
    assert line in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_images_of_several_parts_are_counted(tmp_path: Path) -> None:
    fill(tmp_path / "set" / "train" / "a", 1, 2, 3)
    fill(tmp_path / "set" / "train" / "b", 4, 5, 3)
    fill(tmp_path / "set" / "test" / "a", 1, 2, 6)
    fill(tmp_path / "set" / "test" / "b", 7)
    data = load_data(str(tmp_path / "set"))
    notes = remarks(data, with_forget(make_split(data, 0.2, 0.0, 0), data, "class:a", 0))
    assert notes == [
        "set: 1 images of the forget set are also in the retain set (same pixels)",
        "set: 2 images of the forget set are also in the test set (same pixels)",
        "set: 2 images have the pixels of an image of another class: 003.png (a), 003.png (b)",
    ]


def test_classification_images_are_turned_as_the_camera_held_them(tmp_path: Path) -> None:
    root = small_set(tmp_path / "set", each=1)
    upright, exif = image_of(99), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(root / "cat" / "turned.png", exif=exif)
    assert np.array_equal(load_data(str(root)).images[1, 0].numpy(), np.asarray(upright))


@pytest.mark.parametrize(("top", "white"), [(200, 255), (1000, 1023), (4000, 4095), (60000, 65535)])
def test_images_of_16_bits_are_scaled_together_by_their_largest_value(top: int, white: int, tmp_path: Path) -> None:
    root = small_set(tmp_path / "set", each=1)
    for name, value in (("x", top), ("y", top // 4)):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(root / "cat" / f"{name}.png")
    data = load_data(str(root))
    assert values_of(data)[1:3] == [top * 255 // white, top // 4 * 255 // white]
    assert any(f"of 16 bits, scaled from 0 to {white}" in note for note in data.notes) == (white < 65535)


def table(root: Path, rows: list[dict[str, Any]], name: str = "metadata.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with (root / name).open("w", encoding="utf-8", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return root


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_labels_the_images_of_a_folder(name: str, tmp_path: Path) -> None:
    for part, values in (("train", range(6)), ("test", range(10, 14))):
        rows = [{"file_name": f"{v:03}.png", "label": ("cat", "dog")[v % 2], "text": "a photo"} for v in values]
        fill(table(tmp_path / "set" / "data" / part, rows, name), *values)
    data = load_data(str(tmp_path / "set"))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 1] * 5
    assert data.own_test is not None and values_of(data, data.own_test) == [10, 11, 12, 13]


def test_labels_of_a_table_without_gaps_and_without_unlabeled_rows(tmp_path: Path) -> None:
    labels = {"train": [0, 2, 10, 2, -1], "test": [-1, -1]}
    rows = [
        {"file_name": f"{part}/{10 * (part == 'test') + i:03}.png", "label": label}
        for part in labels
        for i, label in enumerate(labels[part])
    ]
    root = table(tmp_path / "set", rows)
    fill(root / "train", *range(5))
    fill(root / "test", 10, 11)
    fill(root / "unlisted", 99)
    data = load_data(str(root))
    assert data.classes == ("0", "2", "10")
    assert data.labels.tolist() == [0, 1, 2, 1]
    assert data.own_test is None
    notes = "\n".join(data.notes)
    (root / "unlisted" / "x.txt").write_text("text", encoding="utf-8")
    fill(root / ".ipynb_checkpoints", 98)
    notes = "\n".join(load_data(str(root)).notes)
    assert "skipped 1 not an image: unlisted/x.txt" in notes
    assert "skipped 1 hidden or system file: .ipynb_checkpoints/098.png" in notes
    for line in (
        "set: skipped 3 images without a label",
        "the labels are not 0 to 2; they name the classes: 0, 2, 10",
        "set: skipped 1 images that no table names",
    ):
        assert line in notes


def test_rows_of_other_splits_are_not_trained_on(tmp_path: Path) -> None:
    splits = ["train", "train", "holdout", "holdout", "", "test "]
    rows = [{"file_name": f"{i:03}.png", "label": "abccbb"[i], "split": split} for i, split in enumerate(splits)]
    data = load_data(str(fill(table(tmp_path / "set", rows), *range(6))))
    assert data.classes == ("a", "b")
    assert data.own_test is not None
    assert (values_of(data), values_of(data, data.own_test)) == ([0, 1, 5], [5])
    assert {"set: the part holdout is not used", "set: the part (no split) is not used"} <= {*data.notes}


def folds(root: Path, layout: str) -> Path:
    """Images 0 to 3 in fold1, 4 and 5 in fold2, 6 and 7 in fold3, of the classes cat and dog in turn."""
    rows = [
        {"file_name": f"{v:03}.png", "label": ("cat", "dog")[v % 2], "split": f"fold{max(v // 2, 1)}"} for v in range(8)
    ]
    if layout == "table":
        return fill(table(root, rows), *range(8))
    for row in rows:
        part = (row["split"], row["label"]) if layout == "parts of classes" else (row["label"], row["split"])
        fill(root / part[0] / part[1], int(row["file_name"][:3]))
    return root


@pytest.mark.parametrize("layout", ["table", "parts of classes", "classes of parts"])
def test_parts_of_any_name_are_chosen_by_an_option(layout: str, tmp_path: Path) -> None:
    root = folds(tmp_path / "all" / "set", layout)
    for where, config in ((root, None), (tmp_path / "all", "set")):
        data = load_data(str(where), data_config=config, split="train=fold1, test=fold3")
        assert data.classes == ("cat", "dog") and data.own_test is not None
        assert (sorted(values_of(data)), values_of(data, data.own_test)) == ([0, 1, 2, 3, 6, 7], [6, 7])
    assert load_data(str(root), split="train=fold2").own_test is None
    with pytest.raises(DataError, match=r"^split names (fold1, )?fold9, but"):
        load_data(str(root), split="train=fold1,test=fold9")
    with pytest.raises(DataError, match=r"data_config is 'other', but .* has no such folder"):
        load_data(str(root), data_config="other")


@pytest.mark.parametrize("text", ["fold1", "test=a", "train=a,test=a", "train=a,holdout=b", "train=", ""])
def test_an_invalid_choice_of_parts_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"split is .*, but must be train=NAME, with test=NAME or validation=NAME"):
        load_data("nowhere/here", split=text)
    with pytest.raises(ConfigError, match=r"split is .*, but digits has none\. Omit it"):
        load_data("digits", split=text)


@pytest.mark.parametrize("mark", ["-1.0", "NaN", "null", "NONE", "N/A"])
def test_marks_of_missing_labels_are_no_classes(mark: str, tmp_path: Path) -> None:
    rows = [{"file_name": f"{i:03}.png", "label": label} for i, label in enumerate(("a", "b", mark))]
    data = load_data(str(fill(table(tmp_path / "set", rows), *range(3))))
    assert data.classes == ("a", "b")
    assert "set: skipped 1 images without a label" in data.notes


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["0", "1.0", "1", "0.0"], (("0", "1"), [0, 1, 1, 0])),
        (["0.5", "1", "1", "0.5"], (("1", "0.5"), [1, 0, 0, 1])),
        (["a", "b", "1.0", "b"], (("1.0", "a", "b"), [1, 2, 0, 2])),
        ([["a"], "b", "a", "b"], r"metadata\.jsonl: the label of image 1 is \['a'\], but must be a name or a number"),
        ([{"x": 1}, "b", "a", "b"], r"the label of image 1 is \{'x': 1\}, but must be a name or a number"),
    ],
)
def test_labels_of_a_table_are_names_or_whole_numbers(labels: list[Any], expected: Any, tmp_path: Path) -> None:
    rows = [{"file_name": f"{i:03}.png", "label": label} for i, label in enumerate(labels)]
    root = fill(table(tmp_path / "set", rows, "metadata.jsonl"), *range(4))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            load_data(str(root))
    else:
        data = load_data(str(root))
        assert (data.classes, data.labels.tolist()) == expected


def test_an_image_that_a_table_names_twice_is_read_once_and_refused_with_two_labels(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i % 3:03}.png", "label": "ab"[i % 3 % 2]} for i in range(5)]
    root = fill(table(tmp_path / "set", rows), *range(3))
    data = load_data(str(root))
    assert values_of(data) == [0, 1, 2]
    assert "set: skipped 2 rows of images that a row before them names" in data.notes
    table(root, [*rows, {"file_name": "000.png", "label": "b"}])
    with pytest.raises(DataError, match=r"000\.png has two labels, 'a' and 'b'\. A classifier has one label per image"):
        load_data(str(root))


def test_spaces_around_column_names_are_ignored_and_unused_tables_named(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", 0, 1)
    (root / "metadata.csv").write_text("file_name, label \n000.png, a\n001.png, b\n", encoding="utf-8")
    assert load_data(str(root)).classes == ("a", "b")
    (root / "metadata.csv").write_text("file_name,kind\n000.png,a\n", encoding="utf-8")
    line = "set: the table metadata.csv has no column of labels, only file_name, kind, and is not used"
    with pytest.raises(DataError, match=f"has no labels: put .*; {line}"):
        load_data(str(root))
    assert line in load_data(str(small_set(root))).notes


def test_names_are_found_in_either_form_of_unicode(tmp_path: Path) -> None:
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    root = small_set(tmp_path / decomposed, (decomposed, "Cat"))
    data = load_data(str(tmp_path / composed))
    split = make_split(data, 0.2, 0.0, 0)
    assert values_of(data) == values_of(load_data(str(root)))
    assert with_forget(split, data, f"class:{composed}", 0).forgetting == f"class:{decomposed}"
    with pytest.raises(ConfigError, match=r"Did you mean class:Cat\?"):
        with_forget(split, data, "class:cat", 0)
    rows = tmp_path / f"{decomposed}.json"
    rows.write_text(json.dumps(split.train[:2].tolist()), encoding="utf-8")
    assert len(with_forget(split, data, str(tmp_path / f"{composed}.json"), 0).forget) == 2
    assert folder_of(str(tmp_path / composed), False) == root  # of a model


def test_forget_takes_a_path_in_quotes() -> None:
    assert UnlearnOptions(forget='"rows.json"').forget == "rows.json"


def test_tables_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    root = table(tmp_path / "set", [{"file_name": "../secret.png", "label": "a"}])
    with pytest.raises(DataError, match=r"names the file .* which is not inside its folder"):
        load_data(str(root))
    table(root, [{"file_name": "x.png", "kind": "a"}])
    with pytest.raises(DataError, match=r"label_column is 'label', but .* has no such column, only file_name, kind"):
        load_data(str(root), label_column="label")
    table(root, [{"filename": "x.png", "label": "a"}])
    with pytest.raises(DataError, match=r"no column of files, only filename, label.*Name the table's column by im"):
        load_data(str(root))
    table(root, [{"file_name": "x.png", "label": ""}, {"file_name": "x.png", "label": "a"}])
    with pytest.raises(DataError, match=r"metadata\.csv, row 2, names x\.png, which does not exist\. Correct or"):
        load_data(str(root))
    (root / "metadata.csv").write_bytes(b"file_name;label\nx.png;a\n")
    with pytest.raises(DataError, match=r"is separated by semicolons\. Save it with commas"):
        load_data(str(root))
    (root / "metadata.csv").write_bytes("file_name,label\nx.png,Bär\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"is not UTF-8\. Save it as UTF-8"):
        load_data(str(root))


def test_a_clone_with_parquet_files_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "datasets>=2\.16" \(the extra datasets\)'):
        load_data(str(tmp_path / "set"))


def hub_rows(values: list[int], labels: list[int], names: list[str] | None) -> Any:
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict({"image": [image_of(v) for v in values], "label": labels}, features=features)


@pytest.mark.packages
def test_a_clone_of_a_hub_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "clone" / "plain_text"
    folder.mkdir(parents=True)
    names = ["cat", "dog", "unused", "owl"]
    hub_rows([1, 2, 3, 4], [0, 1, 3, 1], names).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    hub_rows([5, 6], [-1, -1], names).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    hub_rows([8, 9], [0, 1], names).to_parquet(str(folder / "fold1.parquet"))
    folds = load_data(str(tmp_path / "clone"), data_config="plain_text", split="train=fold1,test=train")
    assert folds.own_test is not None and values_of(folds) == [8, 9, 1, 2, 3, 4]
    (folder / "fold1.parquet").unlink()
    hub_rows([8, 9], [0, 1], names).to_parquet(str(tmp_path / "clone" / "fold1.parquet"))
    with pytest.raises(DataError, match=r"several configurations \(\., plain_text\)\. Choose one by data_config"):
        load_data(str(tmp_path / "clone"))
    with pytest.raises(DataError, match=r"data_config is 'x', but .* holds \., plain_text"):
        load_data(str(tmp_path / "clone"), data_config="x")
    (tmp_path / "clone" / "fold1.parquet").unlink()
    data = load_data(str(tmp_path / "clone"))
    assert data.classes == ("cat", "dog", "owl")
    assert data.labels.tolist() == [0, 1, 2, 1]
    assert (values_of(data), data.own_test) == ([1, 2, 3, 4], None)
    notes = "\n".join(data.notes)
    assert "skipped 2 of 2 images of the part test: no label (−1)" in notes
    assert "skipped 1 classes without an image (unused); the other 3 are renumbered" in notes
    (folder / "train-00000-of-00001.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="is a Git LFS pointer"):
        load_data(str(tmp_path / "clone"))


def test_memory_does_not_grow_with_the_largest_label() -> None:
    parts = {"train": [Sample(b"", "x", label) for label in (7, 10**12)]}
    classes, notes = renumbered("set", parts, None)
    assert classes == ["7", "1000000000000"]
    assert [sample.label for sample in parts["train"]] == [0, 1]
    assert notes == ["set: the labels are not 0 to 1; they name the classes: 7, 1000000000000"]
    assert renumbered("set", {"train": [Sample(b"", "x", 1)]}, ["a", "b"])[0] == ["b"]


@pytest.mark.packages
def test_a_saved_data_sets_validation_part_is_used(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {part: hub_rows([v, v + 1], [7, 30_000], None) for part, v in (("train", 1), ("valid", 11), ("test", 21))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    data = load_data(str(tmp_path / "saved"), label_column="label")
    assert data.classes == ("7", "30000")
    assert "the labels are not 0 to 1; they name the classes: 7, 30000" in data.notes[-1]
    split = make_split(data, 0.2, 0.1, 0)
    assert [values_of(data, rows) for rows in (split.train, split.validation, split.test)] == [
        [1, 2],
        [11, 12],
        [21, 22],
    ]


def stop(event: Event) -> None:
    if event.stage in ("retraining", "unlearning") and event.step:
        raise Cancelled("stopped")


def test_a_run_is_resumed_with_the_same_data_and_original_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_set(tmp_path / "set")
    train(data="set", run_dir="original", **QUICK)
    settings: dict[str, Any] = {"method": "ft", "epochs": 1, "device": "cpu", "retrain": "no", "train_batch_size": None}
    common = {**settings, "forget": "class:dog"}
    with pytest.raises(Cancelled):
        unlearn(data="set", original="original", run_dir="run", progress=stop, **common)
    shutil.move("set", "moved")
    shutil.move("original", "cafe\u0301")
    original = str(tmp_path.resolve() / "caf\u00e9")  # the other form of Unicode
    run = unlearn(data=str(tmp_path / "moved"), original=original, run_dir="run", resume=True, **common)
    assert run.record.resumed == 1
    assert evaluate("run", data="moved")["UA"] == run.metrics["UA"]
    with pytest.raises(Cancelled):
        unlearn(data="moved", original=original, run_dir="other", progress=stop, **common)
    image_of(200).save(tmp_path / "moved" / "cat" / "000.png")
    with pytest.raises((ConfigError, DataError)):
        unlearn(data="moved", original=original, run_dir="other", resume=True, **common)


def test_a_comparison_is_resumed_with_the_same_data_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_set(tmp_path / "set")
    settings: dict[str, Any] = {
        "forget": "class:dog", "methods": ["ft"], "seeds": 1, "noise_floor": False, "search": False, "epochs": 1,
        "workers": 1, **QUICK,
    }  # fmt: skip
    with pytest.raises(Cancelled):
        compare(data="set", run_dir="run", progress=stop, **settings)
    kept = {path.name: path.read_bytes() for path in Path("run/jobs").glob("*.json")}
    assert kept
    shutil.move("set", "moved")
    compare(data=str(tmp_path / "moved"), run_dir="run", resume=True, **settings)
    assert {name: (Path("run/jobs") / name).read_bytes() for name in kept} == kept  # not done again
