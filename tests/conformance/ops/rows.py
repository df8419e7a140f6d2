"""The registry of the suite: one row an operator."""

from __future__ import annotations

from tests.conformance.ops.hrnn_step import HrnnStep
from tests.conformance.ops.inner_update import InnerUpdate
from tests.conformance.ops.lstm_step import LstmStep
from tests.conformance.ops.lstm_step_staged import LstmStepStaged
from tests.conformance.ops.mlp_inner_loop import MlpInnerLoop, MlpMetaLoss
from tests.conformance.ops.mlp_update_step import MlpUpdateStep
from tests.conformance.ops.operators import Operator

ROWS: tuple[Operator, ...] = (
    LstmStep(),
    LstmStepStaged(),
    HrnnStep(),
    InnerUpdate(),
    MlpInnerLoop(),
    MlpMetaLoss(),
    MlpUpdateStep(),
)
