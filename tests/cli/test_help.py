"""The help of every command: readable at 80 columns, in groups, with the defaults that depend on the tasks."""

import re

import pytest
import yaml

import metakern
from metakern.cli.fewshot import PRESETS
from tests.cli.commands import SINUSOID, invoke, succeed

COMMANDS = ("train maml", "train optimizer", "eval maml", "eval optimizer")


def help_of(command: str, columns: str = "80") -> str:
    result = invoke(f"{command} --help", COLUMNS=columns)
    assert result.exit_code == 0
    return result.stdout


def described(text: str, option: str) -> str:
    """The help text of an option, as one line."""
    found = re.search(rf"│ {option} .*?(?=│ --|╰)", text, re.DOTALL)
    assert found, option
    return " ".join(re.sub(r"[│\n]|^ *--\S+", " ", found[0]).split())


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_cut_and_its_words_have_room(command, columns):
    text = help_of(command, columns)
    assert "…" not in text
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert {len(line) for line in lines} == {int(columns)}
    starts = [re.match(r"│( \*)? +\S.*? {2,}(?=[A-Z])", line) for line in lines]
    widths = [int(columns) - len(start[0]) for start in starts if start]
    assert min(widths) >= 30


def test_options_stand_in_named_groups():
    titles = re.findall(r"╭─ (.+?) ─", help_of("train maml"))
    assert titles == [
        "Options", "Tasks", "Model", "Inner loop", "Outer loop", "Clusters", "Evaluation and checkpoints",
        "Machine and draws",
    ]  # fmt: skip
    assert {"Problem and episodes", "Learned optimizer"} < set(re.findall(r"╭─ (.+?) ─", help_of("train optimizer")))


@pytest.mark.parametrize("setting", ["shots", "queries", "num_tasks", "steps", "inner_lr", "hidden"])
def test_defaults_that_depend_on_the_tasks_are_all_named(setting):
    text = described(help_of("train maml"), "--" + setting.replace("_", "-"))
    given = dict(re.findall(r"([\d.,]+) \((.*?)\)", text.partition("default:")[2]))
    words = {task: value for value, tasks in given.items() for task in tasks.split(", ")}
    for tasks, preset in PRESETS.items():
        word = next(word for word in words if tasks.startswith(word))
        value = preset[setting]
        assert words[word] == (value if isinstance(value, str) else f"{value:g}"), tasks


def test_the_filters_have_their_defaults_too():
    text = described(help_of("train maml"), "--filters")
    assert "64 (omniglot); 32 (mini-imagenet)" in text
    assert (PRESETS["omniglot"]["filters"], PRESETS["mini-imagenet"]["filters"]) == (64, 32)


def test_a_flag_is_shown_once_and_can_be_cleared(tmp_path):
    text = help_of("train maml")
    assert "--no-FLAG" in text
    assert "--no-anil" not in text
    succeed(f"{SINUSOID} --iterations 2 --anil --output {tmp_path}/anil --quiet")
    again = f"train maml --config {tmp_path}/anil/config.yaml --output {tmp_path}/whole --no-anil --quiet"
    succeed(again)
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["anil"] is False


def test_the_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"metakern {metakern.__version__}\n")
