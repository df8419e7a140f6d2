"""The operators, one package each: public function, shapes for tracing, autograd formula, backends."""

from metakern.ops.hrnn_step import hrnn_step
from metakern.ops.inner_update import inner_update
from metakern.ops.lstm_step import lstm_step, lstm_step_
from metakern.ops.lstm_step.staged import lstm_step_staged, lstm_step_staged_
from metakern.ops.lstm_step.state import LSTMState, pack_state, unpack_state
from metakern.ops.mlp_inner_loop import mlp_inner_loop, mlp_meta_loss
from metakern.ops.mlp_update_step import mlp_update_step
from metakern.ops.task_conv2d import task_conv2d, task_conv2d_input, task_conv2d_weight
from metakern.ops.task_norm_act_pool import task_norm_act_pool

__all__ = [
    "LSTMState",
    "hrnn_step",
    "inner_update",
    "lstm_step",
    "lstm_step_",
    "lstm_step_staged",
    "lstm_step_staged_",
    "mlp_inner_loop",
    "mlp_meta_loss",
    "mlp_update_step",
    "pack_state",
    "task_conv2d",
    "task_conv2d_input",
    "task_conv2d_weight",
    "task_norm_act_pool",
    "unpack_state",
]
