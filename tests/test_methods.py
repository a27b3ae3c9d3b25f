"""The registry of methods, and the first entries against their equations."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from salun.methods import DIFFUSION


@pytest.mark.parametrize("name", DIFFUSION)
def test_every_method_has_a_function_and_options_with_help(name: str) -> None:
    method = DIFFUSION[name]
    assert method.title and method.paper and callable(method.function)
    kind = method.options_class
    assert kind is None or all(item.metadata["help"] for item in dataclasses.fields(kind))


def test_the_registry_and_options_of_methods_import_no_torch() -> None:
    code = "import sys; from salun.methods import DIFFUSION; [m.options_class for m in DIFFUSION.values()]; "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
