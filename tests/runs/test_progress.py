"""Progress: a bar for a terminal, plain lines elsewhere, nothing where it is quiet."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from metakern.runs import progress
from metakern.runs.progress import ProgressReport, describe, duration
from metakern.training import History, Record


def play(console: Console, first: int = 0, skipped: int = 0) -> None:
    """Iterations up to the 40th of 40, with one evaluation."""
    trainer = SimpleNamespace(iteration=first, config=SimpleNamespace(iterations=40, eval_every=30))
    report = ProgressReport(console, "episode")
    report.on_start(trainer)
    for iteration in range(first + 1, 41):
        trainer.iteration = iteration
        report.on_iteration(trainer, Record(iteration, 0.52, 100.0, 0.1, 2.0, skipped, 0.01))
        if iteration == 30:
            report.on_evaluation(trainer, {"accuracy": 0.8312, "loss": 0.4})
    report.on_end(trainer, History(), None)


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=200, **options)


def test_without_a_terminal_every_evaluation_has_a_plain_line():
    plain = console()
    play(plain)
    printed = plain.file.getvalue()
    (line,) = printed.splitlines()
    assert line.startswith("episode 30/40: loss 0.52 · 100 tasks/s · validation loss 0.4 · accuracy 83.1 %")
    assert line.endswith(" left")
    assert "\x1b" not in printed


def test_a_long_wait_has_a_line_too(monkeypatch):
    for name in ("LINE_SECONDS", "UPDATE_SECONDS"):
        monkeypatch.setattr(progress, name, -1.0)
    plain = console()
    play(plain)
    assert len(plain.file.getvalue().splitlines()) > 30


def test_a_terminal_has_a_bar_with_loss_accuracy_speed_and_the_time_left():
    terminal = console(force_terminal=True, force_interactive=True)
    play(terminal)
    printed = terminal.file.getvalue()
    for text in ("meta-training", "40/40", "loss 0.52", "100 tasks/s", "accuracy 83.1 %", "0:00:00"):
        assert text in printed
    assert "episode 30/40" not in printed


def test_a_resumed_run_says_where_it_goes_on():
    plain = console()
    play(plain, first=20)
    assert plain.file.getvalue().splitlines()[0] == "goes on after episode 20"


def test_skipped_steps_are_shown():
    plain = console()
    play(plain, skipped=3)
    assert "3 skipped" in plain.file.getvalue()


def test_quiet_is_quiet():
    quiet = console(quiet=True)
    play(quiet, first=20)
    assert quiet.file.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (42, "0:42"), (3723, "1:02:03"), (59.6, "1:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_measures_in_words_have_the_loss_first():
    assert describe({"accuracy": 0.5, "loss": 0.123456, "error": 2.0}) == "loss 0.123 · accuracy 50.0 % · error 2"
