"""JSON and YAML of untrusted origin: read within bounds of size and nesting, plain values only.

Every JSON or YAML text that comes with a model, a data set or a run is read here, so that no file can hang the process,
fill its memory or exceed its recursion limit. Errors are one line.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

JSON_BYTES = 20_000_000  # the largest in use are the `tokenizer.json` of multilingual text encoders
YAML_BYTES = 250_000  # parsers of YAML need up to a second for this much
DEPTH = 40  # lists and objects in each other; configs of models have up to 6
_LARGEST = 2**63  # of whole numbers; larger ones cannot be converted to floats or printed


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """The values of a JSON file.

    Raises OSError if it cannot be opened, ValueError in one line if it is not a regular file, has more than `limit`
    bytes, is not UTF-8, is not JSON, or holds what `check_values` rejects.
    """
    return parse_json(read_text(path, limit))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError and ValueError as `read_json` does, and for any other value."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object")
    return values


def read_yaml(path: Path, limit: int = YAML_BYTES) -> Any:
    """The values of a YAML file. Raises OSError and ValueError as `read_json` and `parse_yaml` do."""
    return parse_yaml(read_text(path, limit))


def read_text(path: Path, limit: int) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises OSError and ValueError as `read_json` does."""
    return _bytes_of(path, limit).decode("utf-8-sig")


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises OSError and ValueError as `read_json` does."""
    return _bytes_of(path, limit)


def read_start(path: Path, length: int) -> str | None:
    """The first characters of a text file, undecodable bytes replaced; None if it is not a readable regular file."""
    try:
        content = _bytes_of(path, 4 * length + 3, cut=True)
    except (OSError, ValueError):
        return None
    return content.decode("utf-8-sig", "replace")[:length]


def _bytes_of(path: Path, limit: int, cut: bool = False) -> bytes:
    # without O_NONBLOCK, opening a named pipe waits until somebody writes to it
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        state = os.fstat(number)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is not a regular file")
        if state.st_size > limit and not cut:
            raise ValueError(f"it has {state.st_size:,} bytes; the limit is {limit:,}")
        with open(number, "rb", closefd=False) as file:
            content = file.read(limit if cut else limit + 1)  # the sizes of files in /proc are 0
    finally:
        os.close(number)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """The values of a JSON text. Raises ValueError in one line as `read_json` does."""
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"its values are nested more than {DEPTH} deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # Python converts no more than 4,300 digits
        raise ValueError("it holds an integer beyond 64 bits") from error
    check_values(values)
    return values


def parse_yaml(text: str) -> Any:
    """The values of a YAML text; `1e-4` is a number. None for an empty text.

    Raises ValueError in one line for a text that is not YAML, uses aliases (a few lines of them can expand to
    gigabytes), gives a name at the top twice, or that `check_values` rejects.
    """
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """A separate class, so that the resolver below is added to this one only."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
    )
    try:
        _check_events(text, Loader)
        loader = Loader(text)
        try:
            root = loader.get_single_node()
            if isinstance(root, yaml.MappingNode):
                names = Counter(key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode))
                twice = next((name for name, count in names.items() if count > 1), None)
                if twice is not None:
                    raise ValueError(f"{twice[:80]} is given twice")
            values = None if root is None else _constructed(loader, root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"it is not valid YAML{line}: {problem[:200]}") from error
    check_values(values)
    return values


def _constructed(loader: Any, root: Any) -> Any:
    try:
        return loader.construct_document(root)
    except ValueError as error:  # Python converts no more than 4,300 digits, and says how to allow more
        raise ValueError("it holds a number that is too long, or a value that does not fit its tag") from error


def _check_events(text: str, loader: Any) -> None:
    """Check the nesting before values are built, since the parser's time and the composer's recursion grow with it."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it uses YAML aliases (*name): write the values out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError(f"its values are nested more than {DEPTH} deep")


def check_values(values: Any) -> None:
    """Raises ValueError if values are nested more than `DEPTH` deep, are not those that JSON has, are whole numbers
    beyond 64 bits, or texts with half a character.
    """
    level = [values]
    for _ in range(DEPTH + 2):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            else:
                _check_scalar(value)
        if not below:
            return
        level = below
    raise ValueError(f"its values are nested more than {DEPTH} deep")


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can escape half a character
                raise ValueError("a text in it is not Unicode") from error
    elif isinstance(value, bool | float) or value is None:
        return
    elif not isinstance(value, int):
        raise ValueError(f"it holds a {type(value).__name__}; only texts, numbers, lists and mappings are allowed")
    elif not -_LARGEST <= value < _LARGEST:
        raise ValueError("it holds an integer beyond 64 bits")
