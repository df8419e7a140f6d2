"""Old names of modules."""

import importlib
import subprocess
import sys

import pytest

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
