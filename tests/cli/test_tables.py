"""Tables of results are not truncated at any width."""

import io

import pytest
import torch
from rich.console import Console

from metakern.cli.tables import adaptation_table, figures_table, print_table
from metakern.evaluation.adaptation import Adaptation
from tests.cli.commands import SINUSOID, invoke, metakern, succeed


def runs(count: int, prefix: str = "run") -> list[Adaptation]:
    """Runs with known means after each step: loss 100 + run + step / 8, accuracy 0.5."""
    steps = torch.arange(3.0).unsqueeze(1).expand(3, 10) / 8
    return [
        Adaptation(f"{prefix}-{k}", {"loss": 100 + k + steps, "accuracy": torch.full((3, 10), 0.5)}, 0.2)
        for k in range(count)
    ]


def printed(width: int, adaptations: list[Adaptation], **options) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    print_table(console, adaptation_table(console, adaptations))
    return console.file.getvalue()


@pytest.mark.parametrize("options", [{}, {"force_terminal": True}, {"force_terminal": True, "no_color": True}])
@pytest.mark.parametrize("width", [10, 40, 80, 120, 200])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_every_figure_is_printed_whole(width, count, options):
    text = printed(width, runs(count), **options)
    assert "…" not in text
    for k in range(count):
        for step in range(3):
            assert f"{100 + k + step / 8:.1f} ± 0" in text
    assert text.count("50.0 ± 0.0 %") == 3 * count


def test_learners_stand_side_by_side_where_they_fit_and_below_each_other_where_not():
    heads = [line for line in printed(200, runs(4)).splitlines() if "accuracy" in line]
    assert [line.count("accuracy") for line in heads] == [4]
    text = printed(80, runs(4))
    assert max(map(len, text.splitlines())) <= 80
    assert [line.count("accuracy") for line in text.splitlines() if "accuracy" in line] == [1]
    assert [sum(f"run-{k} " in line for line in text.splitlines()) for k in range(4)] == [1] * 4


def test_a_long_name_goes_on_in_the_next_line():
    text = printed(60, runs(3, "a/very/long/folder/of/many/runs/that/were/started/before"))
    assert max(map(len, text.splitlines())) <= 60
    names = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert "a/very/long/folder/of/many/runs/that/were/started/before-2" in names


def test_the_width_of_the_console_stays():
    console = Console(file=io.StringIO(), width=10)
    table = figures_table("title", "name", "a long figure")
    table.add_row("x", "123456789")
    print_table(console, table)
    assert "123456789" in console.file.getvalue()
    assert console.width == 10


def test_four_runs_in_a_pipe_of_80_columns(tmp_path):
    """The command in a pipe: a separate process, no terminal, the usual width."""
    for k in range(2):
        succeed(f"{SINUSOID} --iterations 2 --seed {k} --output {tmp_path}/run-{k} --quiet")
    runs = [f"{tmp_path}/run-{k % 2}" for k in range(4)]
    result = metakern("eval", "maml", *runs, "--num-tasks", "6", "--output", "all", cwd=tmp_path, COLUMNS="80")
    assert result.returncode == 0, result.stderr
    assert "…" not in result.stdout
    assert result.stdout.count("±") == 1 + 4 * 3  # the title, and three numbers of steps of four runs
    assert invoke(f"eval maml {tmp_path}/run-0 --num-tasks 6").exit_code == 0
