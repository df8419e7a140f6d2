"""Callbacks that log metrics: JSON lines, TensorBoard events, and learning curves drawn from the lines.

An iteration's line has the keys iteration, loss, lr, grad_norm, tasks_per_second, seconds, skipped; an evaluation's
line has iteration and "evaluation" with the measures of validation tasks, accuracy if there are classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from metakern.core.files import write_whole
from metakern.core.plain_data import parse_json
from metakern.core.requirements import required
from metakern.evaluation.adaptation import chance_accuracy
from metakern.runs.run_files import FIGURES, METRICS, finite
from metakern.training.callbacks import Callback
from metakern.training.history import History, Record

if TYPE_CHECKING:
    from metakern.training.trainer import Trainer

Line = dict[str, Any]

#: Maximum number of iterations per run in TensorBoard.
POINTS = 1000


#: Maximum bytes of a line of metrics.jsonl; normal lines have about 200.
_LINE_BYTES = 64 * 1024


def read_metrics(path: Path) -> tuple[list[Line], list[Line]]:
    r"""Read the iteration lines and the evaluation lines, up to the first invalid line.

    Invalid are the unfinished line of a killed process, text that is not a JSON object with an integer "iteration",
    and lines that are too long or nested too deeply.

    Example:
        >>> file = Path("metrics.jsonl")
        >>> _ = file.write_text('{"iteration": 1, "loss": 0.5}\n')
        >>> iterations, evaluations = read_metrics(file)
        >>> iterations
        [{'iteration': 1, 'loss': 0.5}]
    """
    lines = []
    with path.open("rb") as file:
        while text := file.readline(_LINE_BYTES):
            try:
                line = parse_json(text.decode()) if text.endswith(b"\n") else None
            except ValueError:
                break
            if not isinstance(line, dict) or type(line.get("iteration")) is not int:
                break
            lines.append(line)
    return [line for line in lines if "evaluation" not in line], [line for line in lines if "evaluation" in line]


def line_of(record: Record) -> Line:
    """The line of an iteration."""
    return {
        "iteration": record.iteration,
        "loss": record.loss,
        "lr": record.lr,
        "grad_norm": record.grad_norm,
        "tasks_per_second": record.tasks_per_second,
        "seconds": record.seconds,
        "skipped": record.skipped,
    }


class MetricsLog(Callback):
    """Writes a folder's metrics.jsonl. A resumed run drops the lines after its checkpoint and writes them again.

    Example:
        >>> callbacks = [MetricsLog(Path("runs/mine"))]
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self._file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the file, without the lines that the run will write again."""
        kept: list[Line] = []
        if trainer.iteration and self.path.is_file():
            lines = [line for kind in read_metrics(self.path) for line in kind]
            kept = sorted((line for line in lines if line["iteration"] <= trainer.iteration), key=_order)
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self.path.open("a")

    def on_iteration(self, trainer: Trainer, record: Record) -> None:
        """One line."""
        self._write(line_of(record))

    def on_evaluation(self, trainer: Trainer, measures: dict[str, float]) -> None:
        """One line."""
        self._write({"iteration": trainer.iteration, "evaluation": measures})

    def on_end(self, trainer: Trainer, history: History, error: BaseException | None) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _write(self, line: Line) -> None:
        assert self._file, "on_start opens it"
        self._file.write(json.dumps(finite(line), allow_nan=False) + "\n")
        self._file.flush()  # a process that is killed loses no line


def _order(line: Line) -> tuple[int, bool]:
    return line["iteration"], "evaluation" in line


class TensorBoardLog(Callback):
    """Writes the same metrics as TensorBoard events; ``tensorboard --logdir runs`` compares runs.

    In a long run only every nth iteration, :data:`POINTS` in all: an event takes as long as a small meta-iteration.

    Example:
        >>> callbacks = [TensorBoardLog(Path("runs/mine"))]
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open an events file; on resume, TensorBoard drops earlier events of later iterations."""
        with required():
            from torch.utils.tensorboard import SummaryWriter  # it takes seconds to import

        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.iteration + 1)

    def on_iteration(self, trainer: Trainer, record: Record) -> None:
        """Write one scalar for every number."""
        if record.iteration % -(-trainer.config.iterations // POINTS):
            return
        numbers = line_of(record)
        self._add("train", {key: numbers[key] for key in numbers.keys() - {"iteration", "seconds"}}, record.iteration)

    def on_evaluation(self, trainer: Trainer, measures: dict[str, float]) -> None:
        """Write one scalar for every measure."""
        self._add("valid", measures, trainer.iteration)

    def on_end(self, trainer: Trainer, history: History, error: BaseException | None) -> None:
        """Close the file."""
        if self._writer:
            self._writer.close()

    def _add(self, group: str, numbers: Mapping[str, float], iteration: int) -> None:
        for key, number in numbers.items():
            self._writer.add_scalar(f"{group}/{key}", number, iteration)


class LearningCurves(Callback):
    """Draws figures/learning.png from all lines when a run ends; must come after :class:`MetricsLog`.

    Example:
        >>> callbacks = [MetricsLog(Path("runs/mine")), LearningCurves(Path("runs/mine"))]
    """

    def __init__(self, folder: Path, word: str = "iteration") -> None:
        self.folder, self.word = folder, word

    def on_end(self, trainer: Trainer, history: History, error: BaseException | None) -> None:
        """Draw, unless there is nothing to show."""
        from metakern.runs.figures import plot_learning  # matplotlib takes a second to import

        path = self.folder / METRICS
        iterations, evaluations = read_metrics(path) if path.is_file() else ([], [])
        if iterations:
            classes = any("accuracy" in line["evaluation"] for line in evaluations)
            chance = _chance(trainer) if classes else None
            plot_learning(iterations, evaluations, self.folder / FIGURES / "learning.png", self.word, chance)


def _chance(trainer: Trainer) -> float | None:
    """Accuracy of guessing, on as many validation tasks as an evaluation has; None if there are no class labels."""
    batch = trainer.tasks.split("valid").sample(trainer.config.eval_tasks, torch.Generator().manual_seed(0))
    return chance_accuracy(getattr(batch, "query_y", None))
