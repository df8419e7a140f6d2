"""Everything that a page of the documentation shows runs, and every option of its commands exists."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import metakern
from metakern.runs import open_folder, write_config
from tests.documents import PAGES, ROOT, commands, python_blocks, shorter, titled_blocks

MIGRATING = (ROOT / "docs" / "migrating.md").read_text()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page.read_text())], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(python_blocks(page.read_text())):
        exec(compile(shorter(block), f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("library", titled_blocks(MIGRATING))
def test_the_calls_of_another_library_run_where_it_is_installed(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "learn2learn":  # metakern stands in for it
        monkeypatch.setitem(sys.modules, "learn2learn", metakern)
    elif importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    names: dict[str, object] = {}
    exec(compile(python_blocks(MIGRATING)[0], "migrating.md", "exec"), names)
    exec(compile(titled_blocks(MIGRATING)[library], f"migrating.md, {library}", "exec"), names)


@pytest.mark.parametrize(
    "arguments",
    [found for page in [ROOT / "README.md", *PAGES] for found in commands(page.read_text())],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_the_options_of_a_command_exist(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metakern.cli import app

    monkeypatch.chdir(tmp_path)
    open_folder(Path("runs/5way"))
    write_config(Path("runs/5way"), "maml", {"tasks": "digits"})  # of the run that a page goes on from
    command, context = get_command(app), None
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    with command.make_context("metakern", [word for word in arguments if word != "--help"], parent=context) as made:
        assert made.args == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs')}\n" in navigation, page
