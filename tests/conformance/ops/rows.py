"""The registry of the suite: one row an operator."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from tests.conformance.ops.hrnn_step import HrnnStep
from tests.conformance.ops.inner_update import InnerUpdate
from tests.conformance.ops.lstm_step import LstmStep
from tests.conformance.ops.lstm_step_staged import LstmStepStaged
from tests.conformance.ops.mlp_inner_loop import MlpInnerLoop, MlpMetaLoss
from tests.conformance.ops.mlp_update_step import MlpUpdateStep
from tests.conformance.ops.operators import Operator
from tests.conformance.ops.task_conv2d import TaskConv2d, TaskConv2dInput, TaskConv2dWeight
from tests.conformance.ops.task_norm_act_pool import TaskNormActPool

ROWS: tuple[Operator, ...] = (
    LstmStep(),
    LstmStepStaged(),
    HrnnStep(),
    InnerUpdate(),
    MlpInnerLoop(),
    MlpMetaLoss(),
    MlpUpdateStep(),
    TaskConv2d(),
    TaskConv2dInput(),
    TaskConv2dWeight(),
    TaskNormActPool(),
)


def with_modules(name: str) -> Iterator[tuple[Operator, Any]]:
    """Every row with the module ``name`` of its folder in tests/ops, once each; with None where there is none."""
    seen = set()
    for op in ROWS:
        package = f"tests.ops.{op.folder or op.name}"
        module = f"{package}.{name}"
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
            yield op, None
        elif module not in seen:
            seen.add(module)
            yield op, importlib.import_module(module)
