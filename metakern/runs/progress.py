"""Progress of long work: a bar where a terminal can draw one, plain lines everywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from metakern.training.callbacks import Callback
from metakern.training.history import History, Record

if TYPE_CHECKING:
    from metakern.training.trainer import Trainer

#: Seconds between plain lines; every evaluation also prints one.
LINE_SECONDS = 30.0

#: Seconds between updates of the bar: more frequent ones would slow small meta-iterations by a tenth.
UPDATE_SECONDS = 0.1

#: Number of latest iterations averaged for tasks per second, and of latest updates for the time left.
RATE_WINDOW = 20

#: Minimum width of the bar in columns; on a wider terminal it fills the space beside count and times.
BAR_WIDTH = 8

#: Terminals narrower than this show no title before the bar.
TITLE_WIDTH = 60


class _TwoLines(Progress):
    """Bar, count and times on one line, the note on separate lines, so that a long note cannot squeeze the bar."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the note, wrapped."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["note"]:
                yield Text(task.fields["note"], overflow="fold")


class Display:
    """Progress display for countable work.

    A terminal shows a bar with the count, elapsed and remaining time, and a note below it. Elsewhere plain lines are
    printed now and then. A quiet console shows nothing.

    Args:
        console: where to print
        title: label of the bar
        total: number of items
        completed: items done before the start
        word: name for an item at the start of a plain line; default: ``title``
    """

    def __init__(self, console: Console, title: str, total: int, *, completed: int = 0, word: str = "") -> None:
        self.console, self.word, self.total, self._first = console, word or title, total, completed
        self._latest: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)  # times and counts of the latest updates
        whole = Column(no_wrap=True)
        columns = (
            BarColumn(None, table_column=Column(ratio=1, min_width=BAR_WIDTH)), MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left", table_column=whole),
        )  # fmt: skip
        self._bar = _TwoLines(
            *([TextColumn("{task.description}", table_column=whole)] if console.width >= TITLE_WIDTH else []),
            *columns, console=console, expand=True, disable=not console.is_interactive or console.quiet,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, completed=completed, note="")
        self._last_line = 0.0

    def start(self) -> None:
        """Show the bar and start its clock."""
        self._last_line = time.monotonic()
        self._latest.append((self._last_line, self._first))
        self._bar.reset(self._task, completed=self._first)  # its clock starts here too
        self._bar.start()

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def update(self, completed: int, note: str = "", *, line: bool = False) -> None:
        """Move the bar.

        Args:
            completed: finished items
            note: text to show with them
            line: print a plain line now, if there is no bar; otherwise one comes every :data:`LINE_SECONDS`
        """
        self._bar.update(self._task, completed=completed, note=note)
        now = time.monotonic()
        since, before = self._latest[0] if self._latest else (now, completed)
        self._latest.append((now, completed))
        if self.console.is_interactive or not (line or now - self._last_line > LINE_SECONDS):
            return
        self._last_line, done, rest = now, completed - before, self.total - completed
        left = f"{duration((now - since) / done * rest)} left" if done > 1 and rest > 0 else ""  # one is too few
        notes = " · ".join(part for part in (note, left) if part)
        text = f"{self.word} {completed}/{self.total}: {notes}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def describe(measures: dict[str, float]) -> str:
    """Format measures, the loss first: "loss 0.52 · accuracy 83.1 %"."""
    names = sorted(measures, key=lambda name: name != "loss")
    return " · ".join(
        f"accuracy {100 * measures[name]:.1f} %" if name == "accuracy" else f"{name} {measures[name]:.3g}"
        for name in names
    )


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds: "0:42", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressReport(Callback):
    """Shows a training's loss, accuracy, tasks per second and time left, as a bar or as plain lines.

    Args:
        console: where to print
        word: name for an iteration

    Example:
        >>> from rich.console import Console
        >>> callbacks = [ProgressReport(Console())]
    """

    def __init__(self, console: Console, word: str = "iteration") -> None:
        self.console, self.word = console, word
        self._display: Display | None = None
        self._note = self._validation = ""
        self._updated = 0.0
        self._latest: deque[Record] = deque(maxlen=RATE_WINDOW)

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar, starting at a resumed run's iteration."""
        first = trainer.iteration
        self._display = Display(
            self.console, "meta-training", trainer.config.iterations, completed=first, word=self.word
        )
        self._display.start()
        if first and not self.console.is_interactive:
            self.console.print(f"goes on after {self.word} {first}")

    def on_iteration(self, trainer: Trainer, record: Record) -> None:
        """Move the bar; without one, print a plain line now and then."""
        self._latest.append(record)
        now, last = time.monotonic(), record.iteration == trainer.config.iterations
        if now - self._updated < UPDATE_SECONDS and not last and record.iteration % trainer.config.eval_every:
            return
        self._updated = now
        parts = [describe({"loss": record.loss}), f"{self._rate():,.0f} tasks/s"]
        if record.skipped:
            parts.append(f"{record.skipped} skipped")
        self._note = " · ".join(parts)
        self._show(record.iteration)

    def on_evaluation(self, trainer: Trainer, measures: dict[str, float]) -> None:
        """Add validation measures to the note; without a bar, print a plain line."""
        self._validation = f" · validation {describe(measures)}"
        self._show(trainer.iteration, line=True)

    def on_end(self, trainer: Trainer, history: History, error: BaseException | None) -> None:
        """Leave the bar as it stands."""
        if self._display:
            self._display.stop()

    def _show(self, iteration: int, *, line: bool = False) -> None:
        assert self._display, "on_start makes it"
        self._display.update(iteration, self._note + self._validation, line=line)

    def _rate(self) -> float:
        """Tasks per second over the latest iterations."""
        seconds = sum(record.seconds for record in self._latest)
        return sum(record.tasks_per_second * record.seconds for record in self._latest) / max(seconds, 1e-9)
