"""The list of commands, and their common behaviour."""

import warnings

import torch

from metakern import cli
from metakern.__main__ import main
from tests.cli.commands import invoke, metakern, succeed


def test_info_says_what_is_in_use(tmp_path):
    result = metakern("info", cwd=tmp_path)
    assert result.returncode == 0
    for text in ("cpu_capability", "compiler", torch.__version__):
        assert text in result.stdout


def test_help_names_every_command():
    assert all(name in succeed("--help") for name in ("train", "eval", "info"))
    for group in ("train", "eval"):
        assert all(name in succeed(f"{group} --help") for name in ("maml", "optimizer"))


def test_the_help_of_training_names_its_options_and_choices():
    printed = succeed("train maml --help")
    for text in ("--tasks", "--inner-lr", "--clusters", "--resume", "--config", "mini-imagenet", "meta-sgd"):
        assert text in printed


def test_an_unknown_option_is_a_usage_error():
    result = invoke("train maml --wrap 3")
    assert result.exit_code == 2
    assert "No such option: --wrap" in result.stderr


def test_a_warning_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # restored afterwards
    monkeypatch.setattr(cli, "app", lambda: warnings.warn("the rule was\n  trained for 4 steps", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main()
    assert capsys.readouterr().err == "warning: the rule was trained for 4 steps\n"


def test_no_command_shows_the_help():
    result = invoke("")
    assert "eval" in result.output
    assert "Traceback" not in result.output
