"""Options from a file: YAML or JSON that a person wrote, or the run.json of an earlier run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salun.errors import ConfigError
from salun.options import EraseJob, from_mapping

_LARGEST = 1_000_000  # bytes; a config is a page of text
_NOT_REPEATED = ("output", "run_dir", "resume", "config", "dry_run")  # of a run.json: they belong to that run alone


def read_config(path: Path, kind: type = EraseJob) -> dict[str, Any]:
    """The values that a config file sets, by option name, checked as the dataclass `kind` checks them.

    A run.json gives the options it was made with, but for where it wrote. Names may have dashes for underscores.
    Raises ConfigError for a file that cannot be read, an unknown name (with the nearest known one), a value of a wrong
    type or out of range, and YAML with aliases or a name given twice.
    """
    found = _parse(path)
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: expected lines like `concept: circle`, got {type(found).__name__}")
    if "schema" in found and isinstance(found.get("options"), dict):
        found = {name: value for name, value in found["options"].items() if name not in _NOT_REPEATED}
    lists = {item.name for item in dataclasses.fields(kind) if str(item.type).startswith("list")}
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name in values:
            raise ConfigError(f"--config {path}: {name} is given twice")
        values[name] = [value] if name in lists and isinstance(value, str) else value
    job = from_mapping(kind, values, f"--config {path}")
    return {name: getattr(job, name) for name in values}


def read_record(record: Mapping[str, Any], path: Path, kind: type = EraseJob) -> dict[str, Any]:
    """The options of a run's record, which was read from `path` and may be untrusted input, checked as `kind` does.

    Where it wrote, and the permission to read a pickle, are not among them: only the command line gives these. Raises
    ConfigError for an unknown name or a value of a wrong type or out of range.
    """
    denied = (*_NOT_REPEATED, "allow_pickle")
    values = {name: value for name, value in record["options"].items() if name not in denied}
    job = from_mapping(kind, values, str(path))
    return {name: getattr(job, name) for name in values}


def _parse(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"--config {path} has {path.stat().st_size:,} bytes: is it a config?")
        text = path.read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark first
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--config {path} cannot be read: {reason}") from error
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--config {path} is no JSON: {error}") from error
    return parse_yaml(text, f"--config {path}")


def parse_yaml(text: str, where: str) -> Any:
    """YAML of plain values: no aliases (a few lines of them can unfold to gigabytes), no name twice, 1e-4 a number.

    where: how an error names the text. Raises ConfigError.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader of its own, so that what is added below is added to no other's."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
    )
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=Loader)):
            raise ConfigError(f"{where} uses YAML aliases (*name): write the values out")
        root = yaml.compose(text, Loader=Loader)
        if isinstance(root, yaml.MappingNode):
            names = [key.value for key, _ in root.value]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ConfigError(f"{where}: {twice} is given twice")
        return yaml.load(text, Loader=Loader) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where} is no YAML{line}: {problem}") from error
