"""Definitions and statements of other repositories, read from a clone at run time; none are in this one."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


class Source:
    """A Python file of a clone.

    Args:
        clone: A git directory or a checkout.
        file: Its path inside the repository.
        commit: Which version of it.
    """

    def __init__(self, clone: Path, file: str, commit: str = "HEAD") -> None:
        self.name = f"{commit}:{file}"
        command = ["git", "-C", str(clone), "show", self.name]
        self.tree = ast.parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def definition(self, name: str, within: str | None = None) -> ast.stmt:
        """A class or function, wherever it is nested; or one that is nested in another."""
        top = self.definition(within) if within else self.tree
        return next(
            node for node in ast.walk(top) if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
        )

    def loop(self, variables: str, over: str) -> list[ast.stmt]:
        """The statements inside the loop `for variables in over`."""
        return next(
            node.body
            for node in ast.walk(self.tree)
            if isinstance(node, ast.For) and (ast.unparse(node.target), ast.unparse(node.iter)) == (variables, over)
        )

    def run(self, statements: Sequence[ast.stmt], names: Mapping[str, Any]) -> dict[str, Any]:
        """Run statements with these names around them; returns all names afterwards. Annotations are not evaluated."""
        unevaluated = ast.parse("from __future__ import annotations").body
        known = {"torch": torch, "nn": torch.nn, "__name__": "authors", **names}
        exec(compile(ast.Module([*unevaluated, *statements], []), self.name, "exec"), known)
        return known

    def defined(self, *names: str, **around: Any) -> dict[str, Any]:
        """Classes and functions by name, with these names around them."""
        return self.run([self.definition(name) for name in names], around)


class Torch:
    """torch for their code, with some functions replaced, such as those that draw random numbers."""

    def __init__(self, **replaced: Any) -> None:
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(torch, name)


def commit(clone: Path) -> str:
    """The commit that a clone is at, in seven digits."""
    command = ["git", "-C", str(clone), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
