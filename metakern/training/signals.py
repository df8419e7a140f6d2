"""SIGTERM and Ctrl-C stop a training after the current iteration."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

#: Signals that ask a training to stop.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal stopped the training; uncaught, it ends the process with status 128 + the signal's number.

    Attributes:
        message: what stopped it, where, and how to go on

    Example:
        >>> issubclass(Interrupted, SystemExit)
        True
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(128 + signum)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """Context in which :data:`STOP_SIGNALS` are only recorded; a second Ctrl-C raises KeyboardInterrupt at once.

    The previous handlers are restored on exit. Only the main thread can set handlers, so other threads do nothing; an
    ignored signal (nohup) stays ignored.

    Attributes:
        received: the first signal received, 0 for none
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum
