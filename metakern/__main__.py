"""``python -m metakern`` is the command ``metakern``."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line; where a library is missing, a line that names it, and status 1."""
    try:
        from metakern._requirements import required

        with required():
            from metakern.cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    app()


if __name__ == "__main__":
    main()
