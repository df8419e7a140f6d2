"""How a run shows that it goes on: a bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metakern.training import Callback, History, Record, Trainer

#: Seconds between two plain lines, but for evaluations, which have a line each.
LINE_SECONDS = 30.0

#: Seconds between two updates of the bar: more often would cost a small meta-iteration a tenth of its time.
UPDATE_SECONDS = 0.1

#: Iterations that the tasks per second shown are of.
RATE_WINDOW = 20


def progress_bar(console: Console) -> Progress:
    """A bar with the time taken and left; silent where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip


def describe(measures: dict[str, float]) -> str:
    """Measures in words, the loss first: "loss 0.52 · accuracy 83.1 %"."""
    names = sorted(measures, key=lambda name: name != "loss")
    return " · ".join(
        f"accuracy {100 * measures[name]:.1f} %" if name == "accuracy" else f"{name} {measures[name]:.3g}"
        for name in names
    )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "0:42", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressReport(Callback):
    """Loss, accuracy, tasks per second and time left, for a terminal or as lines.

    Args:
        console: where it goes
        word: what an iteration is called
    """

    def __init__(self, console: Console, word: str = "iteration") -> None:
        self.console, self.word = console, word
        self._bar = progress_bar(console)
        self._note = ""
        self._validation = ""
        self._start = self._last_line = self._updated = 0.0
        self._first = 0
        self._latest: deque[Record] = deque(maxlen=RATE_WINDOW)

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar, from where a resumed run stands."""
        self._first, self._start = trainer.iteration, time.monotonic()
        self._last_line = self._start
        self._task = self._bar.add_task(
            "meta-training", total=trainer.config.iterations, completed=trainer.iteration, note=""
        )
        self._bar.start()
        if self._first and not self.console.is_terminal:
            self.console.print(f"goes on after {self.word} {self._first}")

    def on_iteration(self, trainer: Trainer, record: Record) -> None:
        """Move the bar; a plain line now and then."""
        self._latest.append(record)
        now, last = time.monotonic(), record.iteration == trainer.config.iterations
        if now - self._updated < UPDATE_SECONDS and not last and record.iteration % trainer.config.eval_every:
            return
        self._updated = now
        parts = [describe({"loss": record.loss}), f"{self._rate():,.0f} tasks/s"]
        if record.skipped:
            parts.append(f"{record.skipped} skipped")
        self._note = " · ".join(parts)
        self._bar.update(self._task, completed=record.iteration, note=self._note + self._validation)
        if now - self._last_line > LINE_SECONDS:
            self._print_line(record.iteration, trainer.config.iterations)

    def on_evaluation(self, trainer: Trainer, measures: dict[str, float]) -> None:
        """Validation measures join the bar, and have a plain line of their own."""
        self._validation = f" · validation {describe(measures)}"
        self._bar.update(self._task, note=self._note + self._validation)
        self._print_line(trainer.iteration, trainer.config.iterations)

    def on_end(self, trainer: Trainer, history: History, error: BaseException | None) -> None:
        """Take the bar off."""
        self._bar.stop()

    def _rate(self) -> float:
        """Tasks per second of the latest iterations."""
        seconds = sum(record.seconds for record in self._latest)
        return sum(record.tasks_per_second * record.seconds for record in self._latest) / max(seconds, 1e-9)

    def _print_line(self, iteration: int, iterations: int) -> None:
        self._last_line = now = time.monotonic()
        if self.console.is_terminal:
            return
        done = iteration - self._first
        left = f" · {duration((now - self._start) / done * (iterations - iteration))} left" if done > 0 else ""
        line = f"{self.word} {iteration}/{iterations}: {self._note}{self._validation}{left}"
        self.console.print(line, highlight=False, soft_wrap=True)
