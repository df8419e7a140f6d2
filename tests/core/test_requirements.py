"""Errors for a missing library name it and the command that installs it."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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

#: Program that runs code without some libraries.
WITHOUT = """
import importlib.abc, sys
library, code, *arguments = sys.argv[1:]
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in library.split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["metakern", *arguments]
exec(code)
"""


def install(library: str) -> str:
    """The expected install command for a library, from the project's metadata."""
    distribution = _requirements.DISTRIBUTIONS.get(library, library)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    if any(re.split("[<>=]", line)[0] == distribution for line in project["dependencies"]):
        return f"pip install {distribution}"
    extras = [
        extra
        for extra, lines in project["optional-dependencies"].items()
        if any(re.split("[<>=]", line)[0] == distribution for line in lines)
    ]
    assert len(extras) == 1, f"{distribution} must be in one extra, got {extras}"
    return f"pip install 'metakern[{extras[0]}]'"


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
        ("yaml", "metakern.runs", "pyyaml"),
        ("rich", "metakern.runs", "rich"),
        ("filelock", "metakern.training", "filelock"),
        ("matplotlib", "metakern.runs.figures", "matplotlib"),
    ],
)
def test_an_import_names_what_is_missing(library, module, distribution):
    result = without(library, f"import {module}")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.endswith(f"metakern needs {distribution}, which is not installed: {install(library)}")
    assert "circular" not in last


#: Code that works without the libraries, and a failing call for each, run in one process that lacks them all.
CALLS = {
    "safetensors": "CoordinatewiseLSTM.pretrained('digits_lstm')",
    "huggingface_hub": "CoordinatewiseLSTM.from_pretrained('someone/rule')",
    "huggingface_hub ": "CoordinatewiseLSTM().push_to_hub('someone/rule')",
    "huggingface_hub  ": "CoordinatewiseLSTM().generate_model_card()",
    "sklearn": "metakern.tasks.Digits()",
}


def test_a_call_names_what_is_missing():
    code = "import metakern; from metakern.rules import CoordinatewiseLSTM\n"
    for call in CALLS.values():
        code += f"try:\n    {call}\nexcept ModuleNotFoundError as error: print(error)\n"
    result = without(",".join(name.strip() for name in CALLS), code)
    assert result.stderr == ""
    names = [name.strip() for name in CALLS]
    expected = [
        f"metakern needs {_requirements.DISTRIBUTIONS.get(name, name)}, which is not installed: {install(name)}"
        for name in names
    ]
    assert result.stdout.splitlines() == expected


def test_rules_are_saved_and_loaded_without_the_hub():
    code = (
        "import metakern, tempfile; folder = tempfile.mkdtemp()\n"
        "rule = metakern.rules.CoordinatewiseLSTM(4, 1); rule.save_pretrained(folder)\n"
        "print(repr(type(rule).from_pretrained(folder)) == repr(rule))"
    )
    result = without("huggingface_hub", code)
    assert (result.stdout, result.stderr) == ("True\n", "")


#: Modules that `import metakern` loads beyond torch and numpy, and its additional processor time.
FOREIGN = """
import sys, time
start = time.process_time()
import numpy, torch
before, middle = set(sys.modules), time.process_time()
import metakern
print((time.process_time() - middle) / (middle - start))
own = sys.stdlib_module_names | {"metakern", "torch", "numpy"}
print(sorted(name for name in set(sys.modules) - before if name.partition(".")[0] not in own))
print(sorted({"torch._dynamo", "torch.distributed", "torch.utils.tensorboard", "triton"} & (set(sys.modules) - before)))
"""


def test_the_package_imports_torch_and_numpy_alone():
    result = subprocess.run(
        [sys.executable, "-c", FOREIGN], capture_output=True, text=True, timeout=100, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    ratio, *foreign = result.stdout.splitlines()
    assert foreign == ["[]", "[]"]
    assert float(ratio) < 0.5, "it takes 0.1 to 0.2 of the time of torch and numpy"


def test_what_the_package_imports_is_declared():
    """Declared in the dependencies, or in the extra that the error message names."""
    used = set()
    for path in Path(metakern.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add((node.module or "").partition(".")[0])
    used -= {*sys.stdlib_module_names, "metakern"}
    assert {"torch", "numpy", "safetensors", "sklearn"} <= used
    for library in used:
        assert str(_requirements.missing(library)).endswith(install(library))
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert [re.split("[<>=]", line)[0] for line in project["dependencies"]] == ["torch", "numpy", "safetensors"]


def test_the_command_line_says_so_in_one_line():
    result = without("typer", "from metakern.__main__ import main; main()", "info")
    assert result.returncode == 1
    expected = f"error: metakern needs typer, which is not installed: {install('typer')}\n"
    assert (result.stdout, result.stderr) == ("", expected)


@pytest.mark.parametrize(
    ("library", "distribution"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn"), ("scipy", "scipy")]
)
@pytest.mark.parametrize("command", [f"{SINUSOID} --iterations 2", "eval optimizer --networks 2", "eval maml x"])
def test_a_command_looks_for_its_libraries_before_the_work(command, library, distribution, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    result = invoke(f"{command} --output {tmp_path}/run")
    assert result.exit_code == 1
    assert result.stderr == f"error: metakern needs {distribution}, which is not installed: {install(library)}\n"
    assert not list(tmp_path.iterdir())


def test_a_training_in_python_looks_for_what_its_figures_need_before_the_work(monkeypatch, tmp_path):
    learner = MAMLLearner(mlp(1, 4, 1), steps=1, inner_lr=0.1)
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    config = TrainerConfig(iterations=2, num_tasks=2, eval_tasks=2)
    trainer = Trainer(learner, Sinusoid(2, 2), optimizer, config, folder=tmp_path / "run", progress=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=re.escape(f"matplotlib, which is not installed: {install('matplotlib')}")
    ):
        trainer.fit()
    assert trainer.iteration == 0


def test_clusters_need_scikit_learn(monkeypatch):
    from metakern.learners.clustering import Clusters

    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=re.escape(f"scikit-learn, which is not installed: {install('sklearn')}"),
    ):
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
