"""Options from a file: YAML or JSON that a person wrote, or the run.json of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salun.diffusion.options import EraseJob
from salun.errors import ConfigError
from salun.options import from_mapping, option_types
from salun.untrusted import read_json, read_yaml

_LARGEST = 1_000_000  # bytes of a run.json
_NOT_REPEATED = ("output", "run_dir", "resume", "config", "dry_run")  # options that belong to one run alone


def read_config(path: Path, kind: type = EraseJob) -> dict[str, Any]:
    """The values that a config file sets, by option name, checked as the dataclass `kind` checks them.

    A run.json gives the options it was made with, except where it wrote. Names may have dashes in place of underscores.

    Raises:
        ConfigError: The file cannot be read or is not valid YAML or JSON, has YAML aliases, a name given twice or
            unknown, or a value of a wrong type or out of range.
    """
    data = _parse(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected lines like `concept: circle`, got {type(data).__name__}")
    if "schema" in data and isinstance(data.get("options"), dict):
        data = {name: value for name, value in data["options"].items() if name not in _NOT_REPEATED}
    lists = {name for name, (plain, _) in option_types(kind).items() if plain is list}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in values:
            raise ConfigError(f"{path}: {name} is given twice")
        values[name] = [value] if name in lists and isinstance(value, str) else value
    job = from_mapping(kind, values, str(path))
    return {name: getattr(job, name) for name in values}


def read_record(record: Mapping[str, Any], path: Path, kind: type = EraseJob) -> dict[str, Any]:
    """The options of a run's record, untrusted input read from `path`, checked as the dataclass `kind` checks them.

    Where it wrote and the permission to read a pickle are not among them: only the command line gives these. Raises
    ConfigError for an unknown name, or a value of a wrong type or out of range.
    """
    denied = (*_NOT_REPEATED, "allow_pickle")
    values = {name: value for name, value in record["options"].items() if name not in denied}
    job = from_mapping(kind, values, str(path))
    return {name: getattr(job, name) for name in values}


def _parse(path: Path) -> Any:
    try:
        return read_json(path, _LARGEST) if path.suffix.lower() == ".json" else read_yaml(path) or {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: it is not UTF-8 text") from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
