"""Every Python example in the README runs unchanged; the commands that it names exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_has_fewer_than_150_lines():
    assert len(README.splitlines()) < 150


def test_links_lead_to_files():
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists(), path


def test_there_is_an_example_of_each_kind():
    for name in ("meta_loss(", "LearnedOptimizer(", "lstm_step("):
        assert any(name in example for example in EXAMPLES), name


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[1])
def test_an_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shorter = re.sub(r"\b(iterations=|range\()\d+", r"\g<1>3", example)  # the README trains for longer
    exec(compile(shorter, "README.md", "exec"), {})


def test_make_targets_that_the_readme_names_exist():
    listing = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"demo", "test", "docs"} <= named
    for target in named:
        assert f"make {target}" in listing, target


def test_cleaning_leaves_what_took_someone_time(tmp_path):
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = {"runs/mine/model.safetensors", "build/clusters/run.json", ".venv/bin/python"}
    for name in (*kept, "runs/demo/a", "runs/fit/plain/a", "build/temp/a.o", "dist/a.whl", "metakern/_C.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == kept | {"Makefile"}
