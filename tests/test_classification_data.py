"""Image data and its splits: what can be read, what is refused, and that a split is the same for everyone."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from salun.classification.data import ImageData, load_data, presets
from salun.classification.hub import _label, _source
from salun.classification.preview import preview_unlearning
from salun.classification.splits import Split, make_split, remarks, with_forget
from salun.classification.stages import slow_training
from salun.classification.unlearn_options import UnlearnOptions
from salun.errors import ConfigError, DataError, SalunError
from salun.randomness import generator_of, seed_of


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def folder_of(root: Path, classes: dict[str, list[Image.Image]]) -> Path:
    for name, pictures in classes.items():
        (root / name).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            picture.save(root / name / f"{i}.png")
    return root


def grey(value: int, size: int = 4) -> Image.Image:
    return Image.new("L", (size, size), value)


def test_the_digits_are_real_images_of_all_classes(digits: ImageData) -> None:
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    assert set(digits.labels.tolist()) == set(range(10))
    x = digits.images_of(torch.arange(1797))
    assert abs(float(x.mean())) < 0.001  # the mean and deviation in datasets.yaml were counted on them
    assert float(x.std()) == pytest.approx(1, abs=0.001)


def test_every_preset_says_how_to_read_and_train() -> None:
    for name, preset in {**presets()["datasets"], "others": presets()["others"]}.items():
        assert {"mean", "std", "augment", "model", "train"} <= set(preset), name
        assert set(preset["train"]) == {"epochs", "lr", "batch_size"}
        assert len(preset["mean"]) == len(preset["std"])


def test_a_split_shares_no_row_and_leaves_none_out(digits: ImageData) -> None:
    split = with_forget(make_split(digits, 0.2, 0.1, 0), digits, "random:0.1", 0)
    parts = [split.forget, split.retain, split.validation, split.test]
    assert Counter(torch.cat(parts).tolist()) == Counter(range(1797))
    assert torch.equal(torch.cat([split.forget, split.retain]).sort().values, split.train)
    assert [len(p) for p in parts] == [129, 1166, 143, 359]


def test_a_split_is_the_same_for_the_same_seed_and_another_for_another(digits: ImageData) -> None:
    one, two, other = (with_forget(make_split(digits, 0.2, 0.1, s), digits, "random:0.1", 0) for s in (3, 3, 4))
    assert one.digest == two.digest != other.digest
    redrawn = with_forget(make_split(digits, 0.2, 0.1, 3), digits, "random:0.1", 1)
    assert redrawn.base == one.base  # another forget set of the very same training rows
    assert redrawn.digest != one.digest


def test_a_split_outlives_its_file(digits: ImageData, tmp_path: Path) -> None:
    split = with_forget(make_split(digits, 0.2, 0.1, 0), digits, "class:3", 0)
    split.save(tmp_path / "split.json")
    again = Split.load(tmp_path / "split.json")
    assert again.digest == split.digest
    assert again.forgetting == "class:3"
    (tmp_path / "split.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as a split"):
        Split.load(tmp_path / "split.json")


def test_the_data_sets_own_test_part_is_the_test(digits: ImageData) -> None:
    from dataclasses import replace

    data = replace(digits, own_test=torch.arange(1500, 1797))
    split = make_split(data, 0.2, 0.1, 0)
    assert split.test.tolist() == list(range(1500, 1797))
    assert torch.cat([split.train, split.validation]).max() < 1500


def test_a_class_is_forgotten_whole_and_leaves_the_test(digits: ImageData) -> None:
    base = make_split(digits, 0.2, 0.1, 0)
    split = with_forget(base, digits, "class:3", 0)
    assert set(digits.labels[split.forget].tolist()) == {3}
    assert 3 not in digits.labels[split.retain]
    assert 3 in digits.labels[split.test]
    assert 3 not in digits.labels[split.retained_test_rows(digits.labels)]
    assert torch.equal(base.retained_test_rows(digits.labels), base.test)


def test_rows_from_a_file_are_forgotten(digits: ImageData, tmp_path: Path) -> None:
    split = make_split(digits, 0.2, 0.1, 0)
    rows = split.train[[5, 1, 9]].tolist()
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    assert with_forget(split, digits, str(tmp_path / "rows.json"), 0).forget.tolist() == sorted(rows)


WRONG_FORGET = {
    "random:0": "above 0 and below 1",
    "random:1": "above 0 and below 1",
    "random:nan": "above 0 and below 1",
    "random:tenth": "is not a number",
    "random:0.0001": "selects none of the",
    "class:eleven": "does not exist",
    "class:10": "does not exist",
    "class:-1": "does not exist",
    "everything": "must be random:FRACTION",
    "random:": "must be random:FRACTION",
}


@pytest.mark.parametrize("wish", WRONG_FORGET)
def test_a_wish_that_cannot_be_met_is_refused(wish: str, digits: ImageData) -> None:
    with pytest.raises(ConfigError, match=WRONG_FORGET[wish]):
        with_forget(make_split(digits, 0.2, 0.1, 0), digits, wish, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, 1797], "row 1797 is out of range: the data has rows 0 to 1796"),
        ([-1], "out of range"),
        ([], "must hold a list"),
        ([1.5], "must hold a list"),
        ({"rows": [1]}, "must hold a list"),
        ([True], "must hold a list"),
    ],
)
def test_a_list_of_rows_that_are_none_is_refused(rows: object, message: str, digits: ImageData, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        with_forget(make_split(digits, 0.2, 0.1, 0), digits, str(tmp_path / "rows.json"), 0)


def test_rows_repeated_untrained_or_all_are_refused(digits: ImageData, tmp_path: Path) -> None:
    split, path = make_split(digits, 0.2, 0.1, 0), tmp_path / "rows.json"
    first = int(split.train[0])
    for rows, message in (
        ([first, first], f"row {first} is repeated"),
        ([int(split.test[0])], "not in the training part"),
        (split.train.tolist(), "some must be retained"),
    ):
        path.write_text(json.dumps(rows), encoding="utf-8")
        with pytest.raises(SalunError, match=message):
            with_forget(split, digits, str(path), 0)
    with pytest.raises(DataError, match="cannot be read"):
        with_forget(split, digits, str(tmp_path / "gone.json"), 0)


def test_a_folder_of_images_is_read_whatever_their_pixels(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    root = folder_of(tmp_path / "set", {"cat": [grey(10), deep], "dog": [clear, Image.new("RGB", (4, 4), (1, 2, 3))]})
    data = load_data(str(root))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert [data.images[i, :, 0, 0].tolist() for i in range(4)] == [[10] * 3, [100] * 3, [255] * 3, [1, 2, 3]]


def test_grey_images_stay_grey_and_sizes_can_be_made_equal(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", {"a": [grey(10)], "b": [grey(20, size=6)]})
    with pytest.raises(DataError, match=r"different sizes \(4×4 and 6×6, width × height\)"):
        load_data(str(root))
    assert load_data(str(root), image_size=8).images.shape == (2, 1, 8, 8)


def test_a_folder_with_train_and_test_keeps_them_apart(tmp_path: Path) -> None:
    folder_of(tmp_path / "set" / "train", {"a": [grey(1), grey(2)], "b": [grey(3)]})
    folder_of(tmp_path / "set" / "test", {"a": [grey(4)], "b": [grey(5)]})
    data = load_data(str(tmp_path / "set"))
    assert data.own_test is not None
    assert data.images[data.own_test, 0, 0, 0].tolist() == [4, 5]
    (tmp_path / "set" / "test" / "c").mkdir()
    with pytest.raises(DataError, match="has other classes"):
        load_data(str(tmp_path / "set"))


def test_folders_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    grey(1).save(flat / "1.png")
    with pytest.raises(DataError, match="has no labels: put the images of each class into a sub-folder"):
        load_data(str(flat))
    root = folder_of(tmp_path / "set", {"a": [grey(1)], "b": []})
    with pytest.raises(DataError, match="the class 'b' is empty"):
        load_data(str(root))
    (root / "b" / "x.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"x\.png cannot be read as an image: unreadable"):
        load_data(str(root))
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(root / "b" / "x.tif")
    (root / "b" / "x.png").unlink()
    with pytest.raises(DataError, match="of 32 bits per pixel"):
        load_data(str(root))
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(root / "b" / "x.tif")
    with pytest.raises(DataError, match="of floats, whose range is not known"):
        load_data(str(root))


def test_a_class_without_a_training_image_is_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", {"a": [grey(i) for i in range(40)], "b": [grey(1)]})
    data = load_data(str(root))
    seeds = [s for s in range(40) if 40 in torch.randperm(41, generator=generator_of(s, "split"))[:20]]
    with pytest.raises(DataError, match=r"the class 'b' has no training images \(of 1 in all\)\. Add images"):
        make_split(data, 0.5, 0.0, seeds[0])


def test_a_split_without_a_test_image_of_a_retained_class_is_refused_before_training(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", {"cat": [grey(i) for i in range(63)], "dog": [grey(100 + i) for i in range(3)]})
    untested = next(
        s for s in range(9) if not {63, 64, 65} & {*make_split(load_data(str(root)), 0.2, 0.1, s).test.tolist()}
    )
    options = UnlearnOptions(data=str(root), forget="class:cat", split_seed=untested, model="small")
    with pytest.raises(DataError, match=r"no test image is of a retained class \(dog\)\. Raise test_share or draw"):
        preview_unlearning(options)


def test_hours_of_training_on_a_cpu_are_reported_with_faster_models(digits: ImageData) -> None:
    split, options = make_split(digits, 0.2, 0.1, 0), UnlearnOptions(model="resnet18", train_epochs=100_000)
    (note,) = slow_training(options, digits, split)
    hours = 0.04 / 16 * len(split.train) * 100_000 / torch.get_num_threads() / 3600
    assert note == f"digits: resnet18 takes about {hours:,.0f} h to train on this CPU; resnet20 and small are faster"
    assert not slow_training(replace(options, train_epochs=20), digits, split)
    assert not slow_training(replace(options, model="small"), digits, split)


@pytest.mark.parametrize("of_b", [1, 2, 5])
def test_tiny_classes_are_split_and_those_without_test_images_reported(of_b: int, tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", {"a": [grey(i) for i in range(40)], "b": [grey(100 + i) for i in range(of_b)]})
    data = load_data(str(root))
    for seed in range(5):
        try:
            split = with_forget(make_split(data, 0.2, 0.1, seed), data, "class:b", 0)
        except DataError as error:  # all of them were drawn for other parts
            assert f"the class 'b' has no training images (of {of_b} in all)" in str(error)
            continue
        assert data.labels[split.forget].tolist() == [1] * len(split.forget) != []
        absent = 1 not in data.labels[split.test]
        assert remarks(data, split) == ["set: the test set has no image of 1 class: b"] * absent


def test_unknown_data_and_missing_libraries_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="did you mean 'digits'"):
        load_data("digit")
    with pytest.raises(DataError, match="give a folder, a hub id, or one of"):
        load_data("nothing-like-it")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "datasets>=2\.16" \(the extra datasets\)'):
        load_data("cifar10")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r'pip install "scikit-learn>=1\.3" \(the extra classification\)'):
        load_data("digits")


@pytest.mark.packages
def test_a_saved_hugging_face_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])})
    rows = {"img": [grey(i) for i in (1, 2, 3)], "kind": [0, 1, 1]}
    made = {part: datasets.Dataset.from_dict(rows, features=features) for part in ("train", "test")}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    data = load_data(str(tmp_path / "saved"))
    assert (data.classes, data.labels.tolist()) == (("x", "y"), [0, 1, 1, 0, 1, 1])
    assert data.images[:, 0, 0, 0].tolist() == [1, 2, 3, 1, 2, 3]
    assert data.own_test is not None and data.own_test.tolist() == [3, 4, 5]
    with pytest.raises(DataError, match="has no column 'label', only img, kind"):
        load_data(str(tmp_path / "saved"), label_column="label")
    bare = datasets.Dataset.from_dict({"img": rows["img"]}, features=datasets.Features({"img": datasets.Image()}))
    bare.save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(DataError, match=r"has no labels.* Set label_column to one of them"):
        load_data(str(tmp_path / "bare"))


@pytest.mark.packages
def test_images_that_are_none_and_an_empty_set_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"]), "n": datasets.Value("int64")}
    )
    rows = {"img": [grey(1), None], "kind": [0, 1], "n": [7, 8]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "some"))
    with pytest.raises(DataError, match=r"row 1 has no image in the column 'img', but must have an image"):
        load_data(str(tmp_path / "some"))
    with pytest.raises(DataError, match=r"row 0 has 7 in the column 'n', but must have an image"):
        load_data(str(tmp_path / "some"), image_column="n")
    # (the package cannot save a column of pictures that has none)
    plain = datasets.Features({"img": datasets.Value("string"), "kind": features["kind"]})
    datasets.Dataset.from_dict({"img": [], "kind": []}, features=plain).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError, match="is empty"):
        load_data(str(tmp_path / "none"))


@pytest.mark.parametrize("value", [None, 7, "a.png"])
def test_an_image_is_an_image(value: object) -> None:
    with pytest.raises(DataError, match=r"set, row 7 has .* in the column 'img', but must have an image"):
        _source(value, "set, row 7", "img")
    assert _source({"bytes": b"x", "path": None}, "set, row 7", "img") == b"x"
    assert _source({"bytes": None, "path": "x.png"}, "set, row 7", "img") == Path("x.png")


def test_images_that_come_along_have_one_size() -> None:
    for name in ("digits", "clutter"):
        with pytest.raises(ConfigError, match=f"image_size is 16, but the images of {name} are not resized"):
            load_data(name, image_size=16)


def test_one_class_alone_is_refused() -> None:
    """As a Hugging Face data set may have it; a folder's is refused where it is read."""
    data = ImageData("one", torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.zeros(20).long(), ("x",))
    with pytest.raises(DataError, match=r"one has only one class \(x\), but a classifier needs two or more"):
        make_split(data, 0.2, 0.1, 0)


@pytest.mark.packages
def test_labels_that_are_no_whole_numbers_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for values, kind in ((["cat", "dog"], "string"), ([0, None], "int64"), ([0.5, 1.0], "float32")):
        rows = {"img": [grey(1), grey(2)], "kind": values}
        features = datasets.Features({"img": datasets.Image(), "kind": datasets.Value(kind)})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / kind))
        with pytest.raises(DataError, match=r"has the label .* in the column 'kind', but labels must be integers"):
            load_data(str(tmp_path / kind), label_column="kind")


@pytest.mark.parametrize("value", ["cat", None, 0.5, "3"])
def test_a_label_is_a_whole_number(value: object) -> None:
    with pytest.raises(DataError, match=r"set, row 7 has the label .* labels must be integers. Set label_column"):
        _label(value, "set, row 7", "kind")
    assert _label(3, "set, row 7", "kind") == 3


def test_every_purpose_draws_from_a_stream_of_its_own() -> None:
    seeds = {seed_of(s, *p) for s in range(3) for p in (("split",), ("forget",), ("unlearning", 0), ("unlearning", 1))}
    assert len(seeds) == 12
    assert seed_of(0, "split") == 0x3451854FC583B385  # as it was: the splits of everybody's runs hang on it


def test_images_that_a_device_has_no_room_for_stay_and_their_batches_are_sent() -> None:
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    preset = {"mean": [0.5] * 3, "std": [0.25] * 3, "augment": "crop-flip"}
    data = ImageData("six", images, torch.arange(6), tuple("abcdef"), preset=preset)
    rows, elsewhere = torch.tensor([4, 1]), torch.device("meta")
    for room, home in ((images.nbytes, "meta"), (images.nbytes - 1, "cpu")):
        there = data.to(elsewhere, room)
        assert (there.images.device.type, there.labels.device.type, there.device) == (home, "meta", elsewhere)
        assert there.augmented(rows, torch.Generator()).device == there.images_of(rows).device == elsewhere
    sent = data.to(torch.device("cpu"), room=0)
    drawn = [each.augmented(rows, torch.Generator().manual_seed(1)) for each in (data, sent)]
    assert torch.equal(*drawn) and torch.equal(data.images_of(rows), sent.images_of(rows))


def test_augmentation_shifts_and_mirrors_and_is_seeded() -> None:
    ramp = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    preset = {"mean": [0.0], "std": [1.0], "augment": "crop-flip"}
    data = ImageData("ramp", ramp, torch.zeros(1, dtype=torch.int64), ("a",), preset=preset)
    rows = torch.zeros(200, dtype=torch.int64)
    once, again = (data.augmented(rows, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(once, again)
    padded = torch.nn.functional.pad(ramp, (1, 1, 1, 1))[0, 0]
    crops = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    allowed = {tuple(c.flatten().tolist()) for c in crops} | {tuple(c.flip(1).flatten().tolist()) for c in crops}
    seen = {tuple(x.mul(255).round().int().flatten().tolist()) for x in once}
    assert seen == allowed  # 18 of them, in 200 draws
