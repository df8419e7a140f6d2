"""Objects that a lower room gets from a higher one."""

import json
import subprocess
import sys

import pytest

from metakern import runs
from metakern.core import provided as _provided
from metakern.core.provided import provide, provided
from metakern.runs.record import progress_reports

#: A trainer finds the record of its folder although nothing has imported metakern.runs.
ALONE = """
import sys
from pathlib import Path
import torch
from metakern.learners import MAMLLearner
from metakern.tasks import Sinusoid
from metakern.training import Trainer, TrainerConfig
assert "metakern.runs" not in sys.modules
learner = MAMLLearner(torch.nn.Linear(1, 1))
optimizer = torch.optim.SGD(learner.parameters(), 0.1)
config = TrainerConfig(iterations=1, num_tasks=2, eval_tasks=2)
trainer = Trainer(learner, Sinusoid(2, 2), optimizer, config, folder=Path(sys.argv[1]), progress=False)
print(type(trainer.record).__module__, trainer.record.folder == Path(sys.argv[1]))
"""


def test_a_maker_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(_provided, "_makers", dict(_provided._makers))
    provide("parser", "json:loads")
    assert provided("parser") is json.loads
    assert provided("record") is runs.RunRecord
    assert provided("progress") is progress_reports
    with pytest.raises(KeyError, match="nothing"):
        provided("nothing")


def test_a_trainer_finds_its_record_without_knowing_of_runs(tmp_path):
    command = [sys.executable, "-W", "error::DeprecationWarning:metakern", "-c", ALONE, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (result.stdout, result.stderr) == ("metakern.runs.record True\n", "")
