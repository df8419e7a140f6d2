"""``python -m metakern`` is the command ``metakern``."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO


def main() -> None:
    """The command line; where a library is missing, a line that names it, and status 1."""
    warnings.showwarning = show_warning
    warnings.filterwarnings("default", ".* goes in the next release", DeprecationWarning)
    try:
        from metakern.core.requirements import required

        with required():
            from metakern.cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    app()


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line: the place in the code that it points at means nothing to the user of a command."""
    print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)


if __name__ == "__main__":
    main()
