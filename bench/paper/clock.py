"""Where the time of a meta-iteration goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up seconds by name; off until :meth:`start`."""

    def __init__(self) -> None:
        self.running, self.seconds = False, dict[str, float]()
        self._open: set[str] = set()

    def start(self) -> None:
        """Begin anew."""
        self.running, self.seconds = True, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of a block to ``name``; of nested blocks of one name the outer one counts."""
        if not self.running or name in self._open:
            yield
            return
        self._open.add(name)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self._open.remove(name)
