"""Turns docstrings, which are written for reading in an editor, into Markdown for the reference pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: Code stays as it is, shapes such as [T, *shape] become code, and what Markdown would take for markup is escaped.
_PARTS = re.compile(r"(?P<code>``.*?``|`[^`]+`)|(?P<shape>\[[^\]\[`\n]*\])|(?P<markup>[*<_])", re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")
_EXAMPLE = re.compile(r"((?:^[ \t]*(?:>>>|\.\.\. ).*\n?)+)", re.MULTILINE)


def markdown(text: str) -> str:
    """The text of a docstring as Markdown; lines of examples are left alone."""
    blocks = _EXAMPLE.split(re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE))
    for place in range(0, len(blocks), 2):
        blocks[place] = _PARTS.sub(_replaced, _ROLE.sub(r"`\1`", blocks[place]))
    return "".join(blocks)


def _replaced(match: re.Match[str]) -> str:
    if match["shape"] is not None:
        return f"`{match['shape']}`"
    return match["code"] or f"\\{match['markup']}"


class Docstrings(griffe.Extension):
    """Rewrites each docstring of the package once, when it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
