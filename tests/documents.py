"""Code blocks and commands of a page of the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: The documentation's pages; the reference has its own tests.
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "reference"]


def python_blocks(text: str) -> list[str]:
    """The Python blocks without a title: those of another library have one."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def titled_blocks(text: str) -> dict[str, str]:
    """The Python blocks with a title, by title."""
    return dict(re.findall(r'```python title="(\w+)"\n(.*?)```', text, re.DOTALL))


def shorter(code: str) -> str:
    """The same code with fewer iterations: pages train for longer."""
    code = re.sub(r"\brange\(\d{3,}\)", "range(3)", code)
    return re.sub(r"\b((?:iterations|num_tasks|eval_tasks)=)\d{2,}\b", r"\g<1>3", code)


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every call of `metakern` in the page's shell blocks."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["metakern"]:
                yield words[1:]
            elif "metakern" in words and words[0] == "torchrun":
                yield words[words.index("metakern") + 1 :]
