"""What kind of file something is, by its first bytes, whatever its name says.

A failed download leaves a web page, a pointer or zero bytes under a model's name; files are renamed by hand.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from salun.errors import ModelError

PICKLE = "a pickle"
SAFETENSORS = "a safetensors file"
UNKNOWN = "of no known format"
DOWNLOAD_AGAIN = "Download or write it again"
_FIRST = 4096  # bytes that are looked at
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_MARKS = (  # how a file begins, and what it is then
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "an XML document"),
    (b"gguf", "a GGUF file"),
    (b"\x89hdf", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x89png", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)
_ADVICE = {
    SAFETENSORS: "Rename it to end in .safetensors",
    "a Git LFS pointer": "Download the file that it stands for by `git lfs pull`",
    "a zip archive": "Unpack it",
    "a gzip archive": "Unpack it",
    "a RAR archive": "Unpack it",
    "a 7z archive": "Unpack it",
}


def kind_of(path: Path) -> str:
    """A file's kind as a message says it: `PICKLE`, `SAFETENSORS`, "an HTML page" … or `UNKNOWN`.

    Raises ModelError for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            first, size = file.read(_FIRST), path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if not first:
        return "empty"
    if not any(first):
        return "filled with zero bytes"
    if first.startswith(b"PK\x03\x04"):
        return PICKLE if _is_torch_zip(path) else "a zip archive"
    if first.startswith(_PICKLES):
        return PICKLE
    length = int.from_bytes(first[:8], "little")
    if first[8:9] == b"{" and 2 <= length <= size - 8:
        return SAFETENSORS
    start = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((kind for mark, kind in _MARKS if start.startswith(mark)), UNKNOWN)


def advice(kind: str) -> str:
    """What to do with a file of another kind than its name says."""
    return _ADVICE.get(kind, DOWNLOAD_AGAIN)


def _is_torch_zip(path: Path) -> bool:
    """Whether torch's newer format, or cut short, so that only its beginning is left."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True
