"""The user's own pictures: every kind that phones and folders hold is read right, or named and left out."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import salun
from salun.diffusion.data import images
from salun.diffusion.data.images import encode_folder, folder_digest
from salun.diffusion.data.latents import sample_images
from salun.diffusion.model.stable_diffusion import Model
from salun.errors import DataError
from salun.images import read_image, white_level
from salun.runs.cache import Cache

from .campaign import MEMORY, ROOT
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
    assert images.image_files(tmp_path).files == [path]
    assert pixels_of(path).shape == (64, 64, 3)


def test_an_image_is_turned_as_the_camera_held_it(tmp_path: Path) -> None:
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


def test_wide_images_are_cut_to_their_central_square(tmp_path: Path) -> None:
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


def test_what_was_skipped_and_why_is_reported(mixed: Path, shapes: Model) -> None:
    found = encode_folder(shapes, mixed)
    assert found.latents.shape == (4, *shapes.latent_shape)
    assert found.captions == ["a red circle, plain style", None, None, None]
    notes = "\n".join(found.notes)
    for line in (
        "phone: 4 of 7 images used",
        "1 unreadable, skipped: torn.png",
        "1 tiny (less than 16 pixels), skipped: tiny.png",
        "1 duplicates, skipped: z copy of a.png",
        "1 enlarged to 64 pixels: small.png",
        "1 animated, first frame taken: moving.gif",
    ):
        assert line in notes


def test_folders_without_a_usable_image_say_so(tmp_path: Path, shapes: Model) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        encode_folder(shapes, tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no images"):
        encode_folder(shapes, tmp_path)
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0 of 1 images used; 1 unreadable, skipped: x\.png"):
        encode_folder(shapes, tmp_path)


def test_a_huge_image_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="too large"):
        pixels_of(tmp_path / "x.png")


def test_encoding_is_the_inverse_of_decoding(shapes: Model, tmp_path: Path) -> None:
    made = sample_images(shapes, ["one red circle, plain style"] * 4, [1, 2, 3, 4])
    again = shapes.decode(shapes.encode_images(made))
    error = np.abs(again.astype(int) - made.astype(int)).mean()
    assert error < 8  # the VAE's own loss on drawn pictures: 28 dB, which is a root mean square of 10


def test_images_are_encoded_once(mixed: Path, shapes: Model, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = encode_folder(shapes, mixed, cache=cache)
    assert len(cache.entries()) == 4
    assert torch.equal(first.latents, encode_folder(shapes, mixed, cache=cache).latents)
    assert len(cache.entries()) == 4


def test_a_folder_that_changed_is_another(mixed: Path) -> None:
    before = folder_digest(mixed)
    (mixed / "a.txt").write_text("another caption", encoding="utf-8")
    assert folder_digest(mixed) != before


def test_a_run_on_own_images(mixed: Path, shapes: Model, tmp_path: Path) -> None:
    messages: list[str] = []
    run = salun.erase(
        shapes,
        "circle",
        forget_images=str(mixed),
        retain_images=str(mixed),
        progress=lambda event: messages.append(event.message),
        run_dir=tmp_path / "run",
        **SHORT,
    )
    assert any("4 of 7 images used" in line for line in messages)
    assert run.history[-1]["step"] == SHORT["steps"]
    assert run.mask != salun.erase(shapes, "circle", **{**SHORT, "steps": 1, "eval_images": 0}).mask
    assert any("1 retain images skipped" in line for line in messages)  # a.txt says "a red circle"
    assert run.record.facts["forget_images"] == folder_digest(mixed)
    with pytest.raises(DataError, match="Several concepts need one each"):
        salun.erase(shapes, ["circle", "red"], forget_images=str(mixed), **SHORT)


def test_an_mpo_is_a_photo_and_not_animated(tmp_path: Path, shapes: Model) -> None:
    picture().save(tmp_path / "x.mpo", save_all=True, append_images=[picture(1)])
    (tmp_path / "y.jpg").write_bytes((tmp_path / "x.mpo").read_bytes())
    image, traits = read_image(tmp_path / "y.jpg", lambda: 65535)
    assert (image.mode, image.size, traits) == ("RGB", (80, 64), [])
    assert "animated" not in "\n".join(encode_folder(shapes, tmp_path).notes)


def test_a_tiff_of_several_pages_is_named(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.tiff", save_all=True, append_images=[picture(1)])
    assert read_image(tmp_path / "x.tiff", lambda: 65535)[1] == ["of several pages, first page taken"]


def test_floats_are_skipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64), 0.5, np.float32)).save(tmp_path / "x.tiff")  # of 0 to 1: it came out black
    with pytest.raises(DataError, match="of floats, whose range is not known"):
        pixels_of(tmp_path / "x.tiff")


def test_images_of_a_folder_with_12_bits_keep_their_brightness(tmp_path: Path) -> None:
    for name, value in (("x", 4000), ("y", 1000)):
        Image.fromarray(np.full((64, 64), value, np.uint16)).save(tmp_path / f"{name}.png")
    white = white_level(sorted(tmp_path.iterdir()))
    found = [images._read(tmp_path / f"{name}.png", 64, lambda: white)[0].max() for name in "xy"]
    assert (white, found) == (4095, [4000 * 255 // 4095, 1000 * 255 // 4095])


def test_an_eps_under_another_name_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **b: started.append(a))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **b: started.append(a))
    picture().save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(DataError, match="unreadable"):
        read_image(tmp_path / "x.png", lambda: 65535)
    assert not started


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_and_devices_are_neither_images_nor_captions(tmp_path: Path, shapes: Model) -> None:
    for name in "abc":
        picture(ord(name)).save(tmp_path / f"{name}.png")
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    (tmp_path / "c.txt").write_text("a red circle" + " " * 10_000_000, encoding="utf-8")
    os.mkfifo(tmp_path / "d.png")
    found = encode_folder(shapes, tmp_path)
    assert found.captions == [None, None, "a red circle"]
    assert "  3 broken link, pipe or device, skipped: a.txt, b.txt, d.png" in found.notes
    assert folder_digest(tmp_path) == folder_digest(tmp_path)


def png_of_zeros(path: Path, side: int, color: int, channels: int, depth: int = 8) -> Path:
    """A PNG of few bytes that decodes to many."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes(1 + side * channels * depth // 8)) for _ in range(side)]
    header = struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", b"".join(rows) + packer.flush()), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_a_small_file_of_many_pixels_takes_little_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is that of reading alone."""
    png_of_zeros(tmp_path / "huge.png", 13_300, 6, 4)  # took 4.2 GB
    png_of_zeros(tmp_path / "large.png", 8192, 6, 4)
    png_of_zeros(tmp_path / "deep.png", 8192, 0, 1, depth=16)
    program = """
import sys
from pathlib import Path
from salun.errors import DataError
from salun.images import read_image
from tests.campaign import peak_memory
for name in sys.argv[1:]:
    try:
        print(read_image(Path(name), lambda: 65535)[0].size)
    except DataError as error:
        print(error)
print(peak_memory())
"""
    names = [str(tmp_path / f"{name}.png") for name in ("huge", "large", "deep")]
    done = subprocess.run([sys.executable, "-c", program, *names], check=True, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["too large (the limit is 67,108,864 pixels)", "(8192, 8192)", "(8192, 8192)"]
    assert int(lines[3]) < MEMORY, f"{int(lines[3]) / 1e6:.0f} MB"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_file_names_that_are_no_text_are_shown(tmp_path: Path, shapes: Model) -> None:
    picture().save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xe4.png"))
    (tmp_path / "torn.png").write_bytes(b"no image")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xf6.doc")).write_text("x", encoding="utf-8")
    folder_digest(tmp_path)
    "\n".join(encode_folder(shapes, tmp_path).notes).encode("utf-8")


def test_images_to_forget_and_to_keep_alike_are_counted(mixed: Path, shapes: Model, tmp_path: Path) -> None:
    messages: list[str] = []
    run = salun.erase(
        shapes, "circle", forget_images=str(mixed), retain_images=str(mixed), run_dir=tmp_path / "run",
        progress=lambda event: messages.append(event.message), **{**SHORT, "steps": 1, "eval_images": 0},
    )  # fmt: skip
    line = "4 images of retain_images are in forget_images as well (same pixels)"
    assert line in messages
    assert line in run.record.notes
    assert "1 not an image, skipped: notes.doc" in "\n".join(run.record.notes)
