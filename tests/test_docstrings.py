"""Every public name is in the reference, with an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from metakern.rules import registry

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
PAGES = ("maml", "rules", "optim", "ops", "tasks", "learners", "training", "evaluation", "runs", "models")


def public(module: ModuleType) -> list[str]:
    """The public names of a module, modules aside; without ``__all__`` what the module itself defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


def documented() -> dict[str, Any]:
    """Every public class and function, by the first name that it has."""
    found: dict[int, tuple[str, Any]] = {}
    for page in (*PAGES, ""):
        module = importlib.import_module(f"metakern.{page}".rstrip("."))
        for name in public(module):
            value = getattr(module, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                found.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return dict(found.values())


def names_in_examples() -> dict[str, Any]:
    """The names that the reference's first page promises."""
    (code,) = re.findall(r"```python\n(.*?)```", (REFERENCE / "metakern.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "metakern.md", "exec"), names)
    return names


DOCUMENTED = documented()

#: Names whose examples need files that these tests do not have: data sets, a run of the command line.
NEED_FILES = {"metakern.tasks.MiniImageNet", "metakern.tasks.Omniglot", "metakern.runs.LoadedRun", "metakern.runs.load"}


@pytest.mark.parametrize("page", PAGES)
def test_the_reference_has_every_public_name(page: str) -> None:
    module = importlib.import_module(f"metakern.{page}")
    listed = re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)$", (REFERENCE / f"{page}.md").read_text(), re.M)
    assert sorted(listed) == sorted({*public(module), *(name for name in listed if name.isupper())})


def test_the_reference_says_where_each_name_of_the_package_is() -> None:
    import metakern

    page = (REFERENCE / "metakern.md").read_text()
    for name in metakern.__all__:
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_public_name_has_an_example_that_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value = DOCUMENTED[name]
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(inspect.unwrap(value)) or "", name)
    assert examples, f"{name} has no example"
    assert any(doctest.SKIP in example.options for example in examples) == (name in NEED_FILES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))  # an example registers a rule
    torch.manual_seed(0)
    test = doctest.DocTest(examples, names_in_examples(), name, None, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    with warnings.catch_warnings():
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out
