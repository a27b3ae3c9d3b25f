"""The user's own pictures: every kind that phones and folders hold is read right, or named and left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import salun
from salun.cache import Cache
from salun.diffusion import images
from salun.diffusion.images import encode_folder, folder_digest
from salun.diffusion.latents import sample_pictures
from salun.diffusion.models import Model
from salun.errors import DataError
from salun.images import white_level

from .conftest import SHORT


def picture(seed: int = 0, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """A smooth coloured picture (height, width as numpy has them swapped)."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def pixels_of(path: Path, side: int = 64) -> np.ndarray:
    return images._read(path, side, lambda: white_level([path]))[0]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff", "PNG"])
def test_common_formats_are_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"Ä picture.{suffix}"
    picture().save(path)
    assert images.picture_files(tmp_path).files == [path]
    assert pixels_of(path).shape == (64, 64, 3)


def test_a_picture_is_turned_as_the_camera_held_it(tmp_path: Path) -> None:
    upright = picture(size=(64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: show it turned by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels_of(tmp_path / "turned.png"), np.asarray(upright))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("P", (64, 64)).save(tmp_path / "palette.png", transparency=0)
    for name in ("clear", "palette"):
        assert (pixels_of(tmp_path / f"{name}.png") == 255).all()


@pytest.mark.parametrize("mode", ["L", "CMYK", "I;16", "1", "LA"])
def test_every_colour_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    suffix = "tiff" if mode == "CMYK" else "png"
    if mode == "I;16":
        Image.fromarray(np.full((64, 64), 128 * 257, np.uint16)).save(tmp_path / "x.png")
    else:
        Image.new("L", (64, 64), 128).convert(mode).save(tmp_path / f"x.{suffix}")
    found = pixels_of(tmp_path / f"x.{suffix}")
    assert found.shape == (64, 64, 3)
    if mode != "1":  # which dithers
        assert abs(int(found.mean()) - 128) <= 2, "a deep or odd mode must keep its brightness"


def test_wide_pictures_are_cut_to_their_central_square(tmp_path: Path) -> None:
    wide = Image.new("RGB", (192, 64), "black")
    wide.paste("white", (64, 0, 128, 64))
    wide.save(tmp_path / "wide.png")
    assert (pixels_of(tmp_path / "wide.png") == 255).all()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder such as phones make: seven files, four of them usable."""
    folder = tmp_path / "phone"
    (folder / "more").mkdir(parents=True)
    picture(1).save(folder / "a.png")
    (folder / "a.txt").write_text("\ufeffa red circle,\r\n plain style\n", encoding="utf-8")
    picture(2).save(folder / "more" / "b.jpg")
    picture(3, (40, 40)).save(folder / "small.png")
    picture(4).save(folder / "moving.gif", save_all=True, append_images=[picture(5)])
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:200])
    picture(6, (10, 200)).save(folder / "tiny.png")
    picture(1).save(folder / "z copy of a.png")
    (folder / "notes.doc").write_text("no picture", encoding="utf-8")
    return folder


def test_what_was_left_out_and_why_is_told(mixed: Path, shapes: Model) -> None:
    found = encode_folder(shapes, mixed)
    assert found.latents.shape == (4, *shapes.latent_shape)
    assert found.captions == ["a red circle, plain style", None, None, None]
    told = "\n".join(found.notes)
    for line in (
        "phone: 4 of 7 pictures used",
        "1 unreadable, left out: torn.png",
        "1 tiny (less than 16 pixels), left out: tiny.png",
        "1 repeated, left out: z copy of a.png",
        "1 enlarged to 64 pixels: small.png",
        "1 animated, first frame taken: moving.gif",
    ):
        assert line in told


def test_folders_without_a_usable_picture_say_so(tmp_path: Path, shapes: Model) -> None:
    with pytest.raises(DataError, match="is no folder"):
        encode_folder(shapes, tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no pictures"):
        encode_folder(shapes, tmp_path)
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0 of 1 pictures used; 1 unreadable, left out: x\.png"):
        encode_folder(shapes, tmp_path)


def test_a_huge_picture_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="too large"):
        pixels_of(tmp_path / "x.png")


def test_encoding_is_the_inverse_of_decoding(shapes: Model, tmp_path: Path) -> None:
    made = sample_pictures(shapes, ["one red circle, plain style"] * 4, [1, 2, 3, 4])
    again = shapes.decode(shapes.encode_pictures(made))
    error = np.abs(again.astype(int) - made.astype(int)).mean()
    assert error < 8  # the VAE's own loss on drawn pictures: 28 dB, which is a root mean square of 10


def test_pictures_are_encoded_once(mixed: Path, shapes: Model, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = encode_folder(shapes, mixed, cache=cache)
    assert len(cache.entries()) == 4
    assert torch.equal(first.latents, encode_folder(shapes, mixed, cache=cache).latents)
    assert len(cache.entries()) == 4


def test_a_folder_that_changed_is_another(mixed: Path) -> None:
    before = folder_digest(mixed)
    (mixed / "a.txt").write_text("another caption", encoding="utf-8")
    assert folder_digest(mixed) != before


def test_a_run_on_own_pictures(mixed: Path, shapes: Model, tmp_path: Path) -> None:
    told: list[str] = []
    run = salun.erase(
        shapes,
        "circle",
        forget_images=str(mixed),
        retain_images=str(mixed),
        progress=lambda event: told.append(event.message),
        run_dir=tmp_path / "run",
        **SHORT,
    )
    assert any("4 of 7 pictures used" in line for line in told)
    assert run.history[-1][0] == SHORT["steps"]
    assert run.mask != salun.erase(shapes, "circle", **{**SHORT, "steps": 1, "eval_images": 0}).mask
    assert any("1 pictures to keep left out" in line for line in told)  # a.txt says "a red circle"
    assert run.record.data["facts"]["forget_images"] == folder_digest(mixed)
    with pytest.raises(DataError, match="several concepts need one each"):
        salun.erase(shapes, ["circle", "red"], forget_images=str(mixed), **SHORT)
