"""``python -m metakern`` is the command ``metakern``."""

from metakern.cli import app

app()
