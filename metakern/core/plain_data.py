"""JSON and YAML from untrusted files, with limits on size, depth and numbers, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metakern.core.text import one_line, quoted

#: Maximum bytes of a configuration; the longest that the project writes takes 2 kB.
CONFIG_BYTES = 32 * 1024

#: Maximum bytes of a results file or of one line of metrics.
RESULT_BYTES = 64 * 1024 * 1024

#: Maximum entries of a list in a configuration, and characters of a text (a path's maximum length).
LIST_ENTRIES = 64
TEXT_LENGTH = 4096

_INTEGER_BITS = 64
_INTEGER_DIGITS = 20


def read_text(path: Path, limit: int) -> str:
    """The content of a text file of at most ``limit`` bytes; at most one byte more is ever read.

    Raises:
        ValueError: for a larger file, and one that is not UTF-8; the message does not contain the path
        OSError: for a file that cannot be read
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it must be at most {limit:,} bytes, got more")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it must be UTF-8 text: {error}") from error


def parse_json(text: str) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: for text that is no JSON, for nesting beyond what Python's parser takes, and for integers of more
            than 64 bits; the message is one short line.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(one_line(error)) from error


def read_json(path: Path, limit: int = CONFIG_BYTES) -> Any:
    """The content of a JSON file of at most ``limit`` bytes; see :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, limit))


def parse_yaml(text: str) -> Any:
    """The content of a YAML text without anchors and aliases, at most a mapping of lists deep.

    Raises:
        ValueError: for other text; the message is one short line.
    """
    import yaml  # type: ignore[import-untyped]  # its stubs are another package

    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {one_line(error)}") from error
    try:
        return yaml.safe_load(text)
    except Exception as error:  # a value that does not fit its tag may raise any exception
        raise ValueError(f"it is not YAML: {one_line(error)}") from error


def check_flat(content: Any) -> dict[str, Any]:
    """Check that a configuration maps names to scalars and short lists of scalars, and return it.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it must map settings to values, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(f"settings must be named by text, got {quoted(name)}")
        entries = value if isinstance(value, list) else [value]
        if len(entries) > LIST_ENTRIES:
            raise ValueError(f"{quoted(name)} must be a list of at most {LIST_ENTRIES} entries, got {len(entries):,}")
        for entry in entries:
            if not isinstance(entry, str | int | float | bool | None):
                raise ValueError(f"{quoted(name)} must be a number, text or a list of these, got {quoted(value)}")
            if isinstance(entry, str) and len(entry) > TEXT_LENGTH:
                raise ValueError(
                    f"{quoted(name)} must be text of at most {TEXT_LENGTH:,} characters, got {len(entry):,}"
                )
            if isinstance(entry, int) and entry.bit_length() > _INTEGER_BITS:
                raise ValueError(f"{quoted(name)} must hold integers of at most 64 bits, got {quoted(entry)}")
    return content


def _integer(digits: str) -> int:
    if len(digits) > _INTEGER_DIGITS:
        raise ValueError(f"integers must have at most 64 bits, got one of {len(digits):,} digits")
    return int(digits)


def _check_events(events: Any) -> None:
    """Raise ValueError for anchors, aliases and deep nesting, before any object is built."""
    import yaml

    depth = 0
    for event in events:
        if getattr(event, "anchor", None) is not None:
            raise ValueError(f"it must have no anchors and aliases, got {quoted(event.anchor)}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > 2:
                raise ValueError("it must map settings to numbers, text and short lists, got deeper nesting")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
