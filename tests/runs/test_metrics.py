"""metrics.jsonl and TensorBoard: every event exactly once, even after a killed process."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from metakern.learners.clustering import ClusterSampler
from metakern.runs import figures, metrics
from metakern.runs.metrics import LearningCurves, MetricsLog, TensorBoardLog, read_metrics
from metakern.tasks import Digits
from metakern.training import Callback, History, Record


def record(iteration: int, loss: float = 1.0) -> Record:
    return Record(iteration, loss, tasks_per_second=10.0, lr=0.1, grad_norm=2.0, skipped=0, seconds=0.5)


def play(log: Callback, iterations: range, evaluate_at: tuple[int, ...] = ()) -> None:
    """A training from ``iterations.start - 1`` that a callback hears of."""
    trainer = SimpleNamespace(iteration=iterations.start - 1, config=SimpleNamespace(iterations=iterations.stop - 1))
    log.on_start(trainer)
    for iteration in iterations:
        trainer.iteration = iteration
        log.on_iteration(trainer, record(iteration))
        if iteration in evaluate_at:
            log.on_evaluation(trainer, {"loss": 0.5})
    log.on_end(trainer, History(), None)


def test_every_iteration_and_every_evaluation_has_a_line(tmp_path):
    play(MetricsLog(tmp_path), range(1, 4), evaluate_at=(2,))
    iterations, evaluations = read_metrics(tmp_path / "metrics.jsonl")
    assert iterations[0] == {
        "iteration": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "tasks_per_second": 10.0, "seconds": 0.5,
        "skipped": 0,
    }  # fmt: skip
    assert [line["iteration"] for line in iterations] == [1, 2, 3]
    assert evaluations == [{"iteration": 2, "evaluation": {"loss": 0.5}}]


def test_a_resumed_run_writes_lines_after_its_checkpoint_anew(tmp_path):
    play(MetricsLog(tmp_path), range(1, 6), evaluate_at=(3, 5))
    play(MetricsLog(tmp_path), range(4, 7), evaluate_at=(5,))
    iterations, evaluations = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in iterations] == [1, 2, 3, 4, 5, 6]
    assert [line["iteration"] for line in evaluations] == [3, 5]
    order = [json.loads(text)["iteration"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert order == [1, 2, 3, 3, 4, 5, 5, 6]


def test_a_new_run_does_not_keep_the_lines_of_an_old_one(tmp_path):
    play(MetricsLog(tmp_path), range(1, 4))
    play(MetricsLog(tmp_path), range(1, 3))
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 2


def test_a_line_that_a_killed_process_left_unfinished_is_passed_over(tmp_path):
    play(MetricsLog(tmp_path), range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 4, "lo')
    assert len(read_metrics(path)[0]) == 3
    play(MetricsLog(tmp_path), range(4, 5))
    assert [line["iteration"] for line in read_metrics(path)[0]] == [1, 2, 3, 4]


def test_what_is_not_finite_is_null(tmp_path):
    log, trainer = MetricsLog(tmp_path), SimpleNamespace(iteration=0)
    log.on_start(trainer)
    log.on_iteration(trainer, record(1, math.nan))
    log.on_end(trainer, History(), None)
    assert read_metrics(tmp_path / "metrics.jsonl")[0][0]["loss"] is None


def test_tensorboard_drops_what_a_resumed_run_writes_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play(TensorBoardLog(tmp_path), range(1, 6), evaluate_at=(5,))
    play(TensorBoardLog(tmp_path), range(4, 7), evaluate_at=(6,))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("valid/loss")] == [6]


def test_tensorboard_shows_a_long_run_at_as_many_iterations_as_a_screen_has_pixels(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(metrics, "POINTS", 4)
    play(TensorBoardLog(tmp_path), range(1, 11))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 9]


@pytest.mark.parametrize("iterations", [0, 3])
def test_learning_curves_are_drawn_where_there_is_something_to_show(tmp_path, iterations):
    play(MetricsLog(tmp_path), range(1, 1 + iterations))
    LearningCurves(tmp_path).on_end(SimpleNamespace(), History(), KeyboardInterrupt())
    assert (tmp_path / "figures" / "learning.png").is_file() == (iterations > 0)


def test_learning_curves_call_an_iteration_what_the_run_calls_it(tmp_path, monkeypatch):
    words = []
    monkeypatch.setattr(figures, "plot_learning", lambda *arguments: words.append(arguments[3]))
    play(MetricsLog(tmp_path), range(1, 3))
    LearningCurves(tmp_path, "episode").on_end(SimpleNamespace(), History(), None)
    assert words == ["episode"]


@pytest.mark.parametrize("clustered", [False, True])
def test_accuracies_are_drawn_with_the_level_of_chance(tmp_path, monkeypatch, clustered):
    levels = []
    monkeypatch.setattr(figures, "plot_learning", lambda *arguments: levels.append(arguments[4]))
    log = MetricsLog(tmp_path)
    tasks = ClusterSampler(Digits(ways=4), torch.nn.Linear(1, 1), "one") if clustered else Digits(ways=4)
    trainer = SimpleNamespace(iteration=0, tasks=tasks, config=SimpleNamespace(eval_tasks=3, iterations=2))
    log.on_start(trainer)
    log.on_iteration(trainer, record(1))
    log.on_evaluation(trainer, {"loss": 1.0, "accuracy": 0.5})
    log.on_end(trainer, History(), None)
    LearningCurves(tmp_path).on_end(trainer, History(), None)
    assert levels == [pytest.approx(0.25)]


def test_a_run_that_could_not_start_draws_nothing(tmp_path):
    for log in (MetricsLog(tmp_path), TensorBoardLog(tmp_path), LearningCurves(tmp_path)):
        log.on_end(SimpleNamespace(), History(), OSError("full"))
    assert not list(tmp_path.iterdir())
