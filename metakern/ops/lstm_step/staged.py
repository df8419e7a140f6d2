"""lstm_step with other stages: features × LSTM cells × head, for other learned optimizers.

The stages are those of :data:`metakern.ops.lstm_step.reference.FEATURES` and ``HEADS``; the kernels are compiled for
the pairs of csrc/lstm_step/stages.h.

Axis legend: N coordinates, F features, H hidden units, L layers, R outputs of the head, E rows of the stages' own
state, K coordinate inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.core.checks import is_number
from metakern.ops.core.checks import (
    check,
    check_dense,
    check_dtype,
    check_like,
    check_same_device,
    check_shape,
    check_type,
    check_value,
)
from metakern.ops.core.define_op import Gradient, Kernel, Operator, define_op
from metakern.ops.core.devices import without_autocast
from metakern.ops.lstm_step import (
    PARAM_DTYPES,
    PRECISION_INDEX,
    check_contiguous,
    check_memory,
    check_precision,
    check_scales,
    checks_itself,
    is_plain,
    overlap,
    reference,
)
from metakern.ops.lstm_step.autograd import call_keeping_gates, empty_gates
from metakern.ops.lstm_step.state import (
    TILE_LANES,
    LSTMState,
    check_layout,
    pack_rows,
    pack_state,
    tiles,
    unpack_rows,
    unpack_state,
)

_INPUTS = "Tensor coordinate_inputs, Tensor[] weights"
_COORDINATES = "Tensor params, Tensor grads, Tensor state, Tensor stage_state"
TENSORS = f"{_COORDINATES}, {_INPUTS}"
OPTIONS = "int features, int head, float features_scale, float beta1, float beta2, float head_scale, int precision"

#: Pairs of stages with compiled kernels: those of lstm_step, RNNProp and Meta-LSTM.
COMPILED = frozenset(
    {*((name, "add") for name in reference.PREPROCESS), ("moments", "tanh"), ("log_sign_with_loss", "gates")}
)

_FEATURES_INDEX, _HEADS_INDEX = (
    {name: index for index, name in enumerate(stages)} for stages in (reference.FEATURES, reference.HEADS)
)

#: On a GPU the CUDA kernels of lstm_step take the stages, as the structs of csrc/math that the CPU kernels take too. In
#: Triton every stage would be written again, in Python.
BACKENDS = ("cpp", "cuda")


_GRADIENTS: dict[str, Any] = {
    "results": (
        "grad_params",
        "grad_grads",
        "grad_state",
        "grad_stage_state",
        "grad_coordinate_inputs",
        "grad_weights",
    ),
    "shapes": lambda a: (
        *(x.new_empty(x.shape) for x in (a.params, a.grads, a.state, a.stage_state, a.coordinate_inputs)),
        [w.new_empty(w.shape) for w in a.weights],
    ),
    "family": "lstm_step_staged",
}
_ALL = ("params", "grads", "state", "stage_state", "coordinate_inputs", "weights")


def _new_shapes(a: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (a.params, a.state, a.stage_state))


step_backward = define_op(
    "lstm_step_staged_backward(Tensor grad_new_params, Tensor grad_new_state, Tensor grad_new_stage_state, "
    f"{TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    backends=BACKENDS,
    **_GRADIENTS,
)

step = define_op(
    f"lstm_step_staged({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    results=("new_params", "new_state", "new_stage_state"),
    shapes=_new_shapes,
    gradient=Gradient(step_backward, of=_ALL, saves=_ALL),  # recomputes the gates from the incoming state
    reference=reference.staged_step,
    backends=BACKENDS,
)

step_with_gates_backward = define_op(
    "lstm_step_staged_with_gates_backward(Tensor grad_new_params, Tensor grad_new_state, Tensor grad_new_stage_state, "
    f"{_COORDINATES}, Tensor coordinate_inputs, Tensor gates, Tensor[] weights, {OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    **_GRADIENTS,
)

#: :data:`step` that also returns what backward would recompute; see lstm_step's of this name.
step_with_gates = define_op(
    f"lstm_step_staged_with_gates({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    results=("new_params", "new_state", "new_stage_state", "gates"),
    shapes=lambda a: (*_new_shapes(a), empty_gates(a.state)),
    gradient=Gradient(step_with_gates_backward, of=_ALL, saves=(*_ALL, "gates"), private=("gates",)),
    family="lstm_step_staged",
)

step_ = define_op(
    "lstm_step_staged_(Tensor(a!) params, Tensor grads, Tensor(b!) state, Tensor(c!) stage_state, "
    f"{_INPUTS}, {OPTIONS}) -> ()",
    shapes=lambda a: None,
    family="lstm_step_staged",
    backends=BACKENDS,
)


def lstm_step_staged(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    *,
    features: str,
    head: str,
    stage_state: Tensor | None = None,
    coordinate_inputs: Tensor | None = None,
    features_scale: float = 10.0,
    beta1: float = 0.95,
    beta2: float = 0.95,
    head_scale: float = 0.1,
    precision: str = "highest",
    backend: str | None = None,
) -> tuple[Tensor, LSTMState, Tensor]:
    """One step of a learned optimizer with LSTM cells and the given stages. Differentiable once.

    The kernels, for CPUs and in CUDA C++ for GPUs, are those of :func:`metakern.ops.lstm_step`, compiled with the
    stages of RNNProp and of Meta-LSTM; other pairs run by the reference. What forward keeps for backward is that of
    :func:`metakern.ops.lstm_step`, too.

    Args:
        params: θ, N coordinates in any shape; float32, bfloat16, float16 or float64.
        grads: gradients of the shape and dtype of ``params``.
        state: the packed (h, c) of N coordinates.
        weights: per layer weight_ih [4H, F or H], weight_hh [4H, H], bias_ih [4H], bias_hh [4H]; the head's weight
            [R, H] and bias [R]; then the stages' own weights, [number] each, if any: the features', then the head's.
        features: name of the features stage: ``"none"``, ``"log_sign"`` or ``"log_and_clip"``; ``"moments"``
            (RNNProp, arXiv 1703.03633) or ``"log_sign_with_loss"`` (Meta-LSTM, Ravi & Larochelle 2017).
        head: name of the head stage: ``"add"``, ``"tanh"`` (RNNProp) or ``"gates"`` (Meta-LSTM).
        stage_state: [ceil(N/32), E, 32], the stages' state per coordinate in tiles, as
            :func:`metakern.ops.lstm_step.state.pack_rows` makes them: first the features' rows, then the head's; in the
            dtype of the weights; zeros before the first step. Lanes after the last coordinate carry no meaning. None
            for stages without state.
        coordinate_inputs: [K, N], inputs per coordinate, in the order of the stages and in the dtype of the weights:
            the loss of the coordinate's task for ``"log_sign_with_loss"``. None for stages without such inputs.
        features_scale: p of the gradient preprocessing.
        beta1: decay of the gradient's moving mean in ``"moments"``, at least 0 and less than 1.
        beta2: decay of the moving mean of its square, likewise.
        head_scale: factor of the update of ``"add"`` and ``"tanh"``.
        precision: as for :func:`metakern.ops.lstm_step`, for the head ``"add"``; other heads have float32 products.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"`` or ``"reference"``; None is ``"auto"``.

    Returns:
        The new parameters, like ``params``, the new state, and the new stage state.

    Raises:
        ValueError: for shapes, counts, names or option values that do not fit.
        TypeError: for dtypes or types that do not fit.
        RuntimeError: for a backend that cannot run, and for a second derivative of a kernel.

    Example:
        >>> lstm, head = torch.nn.LSTM(4, 20), torch.nn.Linear(20, 2)  # Meta-LSTM: two gates from log, sign and loss
        >>> weights = [*lstm.parameters(), *head.parameters(), torch.zeros(4)]
        >>> params, state, gates = torch.randn(100), LSTMState.zeros(100, num_layers=1), torch.zeros(4, 2, 32)
        >>> options = {"features": "log_sign_with_loss", "head": "gates", "coordinate_inputs": torch.ones(1, 100)}
        >>> params, state, gates = lstm_step_staged(
        ...     params, 2 * params, state, weights, stage_state=gates, **options
        ... )
    """
    scalars = reference.Scalars(features_scale, beta1, beta2, head_scale)
    call = _Call(params, grads, state, weights, features, head, stage_state, coordinate_inputs, scalars, precision)
    kernel = call.chosen(step, backend)
    if kernel is None:
        return call.by_reference()
    new_params, new_state, new_stage_state = call_keeping_gates(kernel, step_with_gates, state.data, call.arguments())
    return new_params, LSTMState(new_state, state.num_coordinates), new_stage_state


@torch.no_grad()
def lstm_step_staged_(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    *,
    features: str,
    head: str,
    stage_state: Tensor | None = None,
    coordinate_inputs: Tensor | None = None,
    features_scale: float = 10.0,
    beta1: float = 0.95,
    beta2: float = 0.95,
    head_scale: float = 0.1,
    precision: str = "highest",
    backend: str | None = None,
) -> None:
    """:func:`lstm_step_staged` in place, without a graph: overwrites ``params``, ``state.data`` and ``stage_state``.

    All three must be contiguous. ``params`` and ``grads`` may be the same tensor; no other arguments may share memory.
    Arguments and errors as for :func:`lstm_step_staged`.

    Example:
        >>> lstm, head = torch.nn.LSTM(2, 20, num_layers=2), torch.nn.Linear(20, 1)
        >>> weights = [*lstm.parameters(), *head.parameters()]
        >>> params, state = torch.randn(1000), LSTMState.zeros(1000)
        >>> lstm_step_staged_(params, 2 * params, state, weights, features="log_sign", head="add")
    """
    scalars = reference.Scalars(features_scale, beta1, beta2, head_scale)
    call = _Call(params, grads, state, weights, features, head, stage_state, coordinate_inputs, scalars, precision)
    kernel = call.chosen(step_, backend)
    if not checks_itself(kernel):
        call.check_in_place()
    if kernel is None:
        new_params, new_state, new_stage_state = call.by_reference()
        params.copy_(new_params)
        state.data.copy_(new_state.data)
        call.stage_state.copy_(new_stage_state)
        return
    kernel.call(call.arguments())
    if not torch.compiler.is_compiling():  # autograd must detect that saved values were overwritten
        torch.autograd.graph.increment_version((params, state.data, call.stage_state))


class _Call:
    """The arguments of a call, with tensors in place of None and names in place of indices."""

    def __init__(
        self,
        params: Tensor,
        grads: Tensor,
        state: LSTMState,
        weights: Sequence[Tensor],
        features: str,
        head: str,
        stage_state: Tensor | None,
        coordinate_inputs: Tensor | None,
        scalars: reference.Scalars,
        precision: str,
    ) -> None:
        for name, value, known in (("features", features, reference.FEATURES), ("head", head, reference.HEADS)):
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        check_scales(scalars.features_scale, scalars.head_scale, ("features_scale", "head_scale"))
        check_decays(scalars.beta1, scalars.beta2)
        check_precision(precision)
        check_dense(params, "params")
        dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
        n = params.numel()
        if stage_state is None:
            stage_state = params.new_empty(tiles(n), 0, TILE_LANES, dtype=dtype)
        if coordinate_inputs is None:
            coordinate_inputs = params.new_empty(0, n, dtype=dtype)
        self.params, self.grads, self.state, self.weights = params, grads, state, weights
        self.stage_state, self.coordinate_inputs = stage_state, coordinate_inputs
        self.names = features, head
        self.stages = reference.FEATURES[features], reference.HEADS[head]
        self.scalars, self.precision = scalars, precision

    def chosen(self, operator: Operator, backend: str | None) -> Kernel | None:
        """The kernel that serves the call, None for the reference; checks the tensors unless the kernel does."""
        extra = (self.stage_state, self.coordinate_inputs)
        plain = is_plain(self.params, self.grads, self.state, self.weights) and all(
            isinstance(x, Tensor) and not x.is_meta for x in extra
        )
        if not plain:
            self._check()
        unserved = None
        if self.names not in COMPILED:
            features, head = self.names
            reason = f"the kernels are not compiled for features {features!r} with head {head!r}"
            unserved = dict.fromkeys(BACKENDS, reason)
        kernel = operator.choose(backend, self.params.device, unserved)
        if plain and not checks_itself(kernel):
            self._check()
        return kernel

    def arguments(self) -> tuple[Any, ...]:
        """The operators' arguments."""
        features, head = self.names
        return (
            *(self.params, self.grads, self.state.data, self.stage_state, self.coordinate_inputs, self.weights),
            *(_FEATURES_INDEX[features], _HEADS_INDEX[head]),
            *(*map(float, self.scalars), PRECISION_INDEX[self.precision]),
        )

    def by_reference(self) -> tuple[Tensor, LSTMState, Tensor]:
        """The results by the definition in plain PyTorch."""
        n = self.params.numel()
        with without_autocast(self.params.device):
            new_params, h, c, rows = reference.staged_step(
                *(self.params.reshape(-1), self.grads.reshape(-1), *unpack_state(self.state)),
                *(unpack_rows(self.stage_state, n), self.coordinate_inputs, self.weights),
                *(*self.stages, self.scalars),
            )
        return new_params.view(self.params.shape), pack_state(h, c), pack_rows(rows)

    def _check(self) -> None:
        """Check the tensors as csrc/lstm_step/arguments.h does."""
        (first, last), params = self.stages, self.params
        check_type(
            params.dtype in PARAM_DTYPES, "params must be float32, bfloat16, float16 or float64, got ", params.dtype
        )
        check_dense(self.grads, "grads")
        check_like(self.grads, "grads", params, "params")
        check_layout(self.state)
        n, hidden, layers = params.numel(), self.state.hidden_size, self.state.num_layers
        held = self.state.num_coordinates
        check_value(held == n, "state must hold as many coordinates as params, ", n, ", got ", held)
        named = [
            ("state", self.state.data, tuple(self.state.data.shape)),
            ("stage_state", self.stage_state, (tiles(n), first.states + last.states, TILE_LANES)),
            ("coordinate_inputs", self.coordinate_inputs, (first.coordinate_inputs + last.coordinate_inputs, n)),
        ]
        shapes = [(4 * hidden, hidden), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)] * layers
        shapes[0] = (4 * hidden, first.inputs)
        shapes += [(last.outputs, hidden), (last.outputs,), *((s.weights,) for s in self.stages if s.weights)]
        weights = self.weights
        check_value(len(weights) == len(shapes), "weights must hold ", len(shapes), " tensors, got ", len(weights))
        named += [(f"weights[{i}]", w, shape) for i, (w, shape) in enumerate(zip(weights, shapes, strict=True))]
        dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
        for name, x, shape in named:
            check_dense(x, name)
            check_shape(x, name, shape)
            check_dtype(x, name, dtype)
            check_same_device(x, name, params, "params")

    def check_in_place(self) -> None:
        """Raise where the tensors to overwrite are not contiguous or share memory with others."""
        params, grads, state, stage_state = self.params, self.grads, self.state, self.stage_state
        check_contiguous(params=params, **{"state.data": state.data}, stage_state=stage_state)
        if torch.compiler.is_compiling():
            return
        check_memory(params, grads, state)
        inputs = self.coordinate_inputs.contiguous()
        others = (params, grads.contiguous(), state.data, inputs)
        what = "params, grads, state and coordinate_inputs"
        check(not any(overlap(stage_state, x) for x in others), "stage_state must share no memory with ", what)
        shared = overlap(inputs, params) or overlap(inputs, state.data)
        check(not shared, "coordinate_inputs must share no memory with params and state")


def check_decays(beta1: Any, beta2: Any) -> None:
    """Raise TypeError for decays that are no numbers, ValueError for those that are not in [0, 1)."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not is_number(beta):
            raise TypeError(f"{name} must be a number, got {beta!r} of type {type(beta).__name__}")
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {beta}")
