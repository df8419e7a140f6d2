"""Old names of modules."""

import importlib
import subprocess
import sys

import pytest

import metakern.runs
from metakern.core.moved import MOVED


@pytest.mark.parametrize(("old", "new"), [(old, new) for old, new in MOVED.items() if new])
def test_an_old_name_gives_the_module_and_a_warning(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__spec__.name == new


def test_old_names_import_in_every_form():
    lines = [
        "from metakern.reference import lstm_step, inner_update",
        "import metakern.reference.mlp_inner_loop as third",
        "import metakern.clustering",
        "print(lstm_step.__name__, inner_update.__name__, third.__name__, metakern.clustering.__name__)",
    ]
    command = [sys.executable, "-W", "ignore", "-c", "; ".join(lines)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    new = ("metakern.reference.lstm_step", "metakern.reference.inner_update", "metakern.reference.mlp_inner_loop")
    assert result.stdout.split() == [*map(MOVED.get, new), "metakern.learners.clustering"]


def test_an_import_of_an_old_name_warns_at_its_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "metakern.figures", raising=False)
    with pytest.warns(DeprecationWarning, match="metakern.figures is now") as caught:
        import metakern.figures  # noqa: F401
    assert [warning.filename for warning in caught] == [__file__]


def test_a_name_that_has_moved_gives_the_class_and_a_warning():
    with pytest.warns(DeprecationWarning, match="metakern.training.RunRecord is now metakern.runs.RunRecord") as caught:
        from metakern.training import RunRecord
    assert RunRecord is metakern.runs.RunRecord
    assert {(warning.filename, warning.lineno) for warning in caught} == {
        (__file__, caught[0].lineno)
    }  # Python asks twice
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from metakern.training import Nothing  # noqa: F401
