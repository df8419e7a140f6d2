"""A missing library is named as missing, with the command that installs it."""

import os
import subprocess
import sys

import pytest
import torch

import metakern
from metakern.core import requirements as _requirements
from metakern.core.requirements import check_installed, required
from metakern.learners import MAMLLearner
from metakern.models import mlp
from metakern.tasks import Sinusoid
from metakern.training import Trainer, TrainerConfig
from tests.cli.commands import SINUSOID, invoke

#: Runs code in a process that has not some libraries.
WITHOUT = """
import importlib.abc, sys
library, code, *arguments = sys.argv[1:]
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["metakern", *arguments]
exec(code)
"""


def without(library: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, library, code, *arguments], capture_output=True, text=True, timeout=100,
        check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("library", "module", "distribution"),
    [
        ("torch", "metakern", "torch"),
        ("numpy", "metakern", "numpy"),
        ("safetensors", "metakern", "safetensors"),
        ("yaml", "metakern.runs", "pyyaml"),
        ("rich", "metakern.runs", "rich"),
        ("matplotlib", "metakern.runs.figures", "matplotlib"),
    ],
)
def test_an_import_names_what_is_missing(library, module, distribution):
    result = without(library, f"import {module}")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.endswith(f"metakern needs {distribution}, which is not installed: pip install {distribution}")
    assert "circular" not in last


def test_the_command_line_says_so_in_one_line():
    result = without("typer", "from metakern.__main__ import main; main()", "info")
    assert result.returncode == 1
    expected = "error: metakern needs typer, which is not installed: pip install typer\n"
    assert (result.stdout, result.stderr) == ("", expected)


@pytest.mark.parametrize(
    ("library", "distribution"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn"), ("scipy", "scipy")]
)
@pytest.mark.parametrize("command", [f"{SINUSOID} --iterations 2", "eval optimizer --networks 2", "eval maml x"])
def test_a_command_looks_for_its_libraries_before_the_work(command, library, distribution, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    result = invoke(f"{command} --output {tmp_path}/run")
    assert result.exit_code == 1
    assert (
        result.stderr == f"error: metakern needs {distribution}, which is not installed: pip install {distribution}\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_training_in_python_looks_for_what_its_figures_need_before_the_work(monkeypatch, tmp_path):
    learner = MAMLLearner(mlp(1, 4, 1), steps=1, lr=0.1)
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    config = TrainerConfig(iterations=2, num_tasks=2, eval_tasks=2)
    trainer = Trainer(learner, Sinusoid(2, 2), optimizer, config, folder=tmp_path / "run", progress=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        trainer.fit()
    assert trainer.iteration == 0


def test_clusters_need_scikit_learn(monkeypatch):
    from metakern.learners.clustering import Clusters

    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ModuleNotFoundError, match=r"metakern needs scikit-learn, .*: pip install scikit-learn"):
        Clusters(2).fit(torch.rand(20, 2))


def test_modules_of_its_own_and_what_is_named_already_are_left_alone():
    for error in (ModuleNotFoundError("no metakern.x", name="metakern.x"), _requirements.missing("yaml")):
        with pytest.raises(ModuleNotFoundError) as raised, required():
            raise error
        assert raised.value is error


def test_what_is_installed_passes():
    check_installed("torch", "yaml")
    with pytest.raises(ModuleNotFoundError, match="pip install nowhere"):
        check_installed("torch", "nowhere")


def test_the_package_shows_what_is_public():
    shown = dir(metakern)
    assert set(metakern.__all__) <= set(shown)
    assert [name for name in shown if name.startswith("_") and name != "__version__"] == []
    assert "required" not in shown
