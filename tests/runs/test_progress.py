"""Progress: a bar for a terminal, plain lines elsewhere, nothing where it is quiet."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from metakern.runs import progress
from metakern.runs.progress import Display, ProgressReport, describe, duration
from metakern.training import History, Record

#: Controls of a terminal: cursor, colours, erasing.
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def frames(console: Console) -> list[list[str]]:
    """What a terminal has shown, drawing by drawing, as lines without controls."""
    drawings = re.split(r"\x1b\[1A\x1b\[2K|\r\x1b\[2K", console.file.getvalue())
    plain = [CONTROLS.sub("", drawing).replace("\r", "").splitlines() for drawing in drawings]
    return [lines for lines in plain if any(line.strip() for line in lines)]


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


def console(width: int = 200, **options) -> Console:
    return Console(file=io.StringIO(), width=width, **options)


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


@pytest.mark.parametrize("no_color", [False, True])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_with_count_and_time_left_stays_whatever_the_note_says(width, no_color):
    terminal = console(width, force_terminal=True, force_interactive=True, no_color=no_color)
    play(terminal, skipped=3)  # "validation" comes with the 30th of 40 iterations
    shown = frames(terminal)
    assert any("validation" in line for lines in shown for line in lines)
    for lines in shown:
        assert re.search(r"meta-training [━╸╺ ]{8,} +\d+/40 \d:\d\d:\d\d (\d:\d\d:\d\d|-:--:--) left", lines[0]), lines
        assert all(len(line) <= width for line in lines)
        assert "…" not in "".join(lines)
    assert "validation loss 0.4 · accuracy 83.1 %" in " ".join(" ".join(shown[-1][1:]).split())
    assert ("\x1b[38" in terminal.file.getvalue() or "\x1b[3" in terminal.file.getvalue()) != no_color


def test_a_terminal_that_cannot_move_its_cursor_has_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    dumb = console(80, force_terminal=True)
    play(dumb)
    assert dumb.file.getvalue().startswith("episode 30/40: loss 0.52")


def test_counted_work_has_a_line_where_it_is_asked_for():
    plain = console(40)
    with Display(plain, "training networks", 4) as display:
        display.update(1, "SGD, learning rate 0.1")
        display.update(2, "SGD", line=True)
        display.update(4, "Adam", line=True)
    first, second = plain.file.getvalue().splitlines()
    assert re.fullmatch(r"training networks 2/4: SGD · \d+:\d\d left", first)
    assert second == "training networks 4/4: Adam"


def test_the_time_left_follows_from_the_pace_of_late(monkeypatch):
    clock = iter([0.0, *(100.0 + k for k in range(60))])  # the first piece takes as long as all others
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e9)
    plain = console(80)
    display = Display(plain, "work", 60)
    display.start()
    for completed in range(1, 31):
        display.update(completed, line=completed == 30)
    assert plain.file.getvalue() == "work 30/60: 0:30 left\n"


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
