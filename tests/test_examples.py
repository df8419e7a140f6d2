"""Every example runs on a small setting, fits on a page, and is linked from a guide; so do the notebooks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--iterations", "4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip(), "it prints no result"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_fewer_than_60_lines(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 60


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        cell.source = re.sub(r"\b(iterations ?= ?)\d+", r"\g<1>4", cell.source)
    nbclient.NotebookClient(content, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()


def test_there_are_seven_scripts_and_two_notebooks() -> None:
    assert (len(SCRIPTS), len(NOTEBOOKS)) == (7, 2)


@pytest.mark.parametrize("path", [*SCRIPTS, *NOTEBOOKS], ids=lambda path: path.name)
def test_a_guide_links_to_it(path: Path) -> None:
    pages = [page.read_text() for page in (ROOT / "docs").rglob("*.md")]
    assert any(f"examples/{path.name})" in page for page in pages)
