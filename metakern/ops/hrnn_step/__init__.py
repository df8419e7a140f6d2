"""hrnn_step: one step of the hierarchical RNN optimizer, for all coordinates of all tensors of all tasks in one launch.

Wichrowska et al. 2017, arXiv 1703.04813. The definition is :mod:`metakern.ops.hrnn_step.reference`.

Axis legend: M tensors, T tasks, n coordinates of one tensor of one task (a *segment*), H hidden units of the parameter
GRU, R = 11 + H rows of the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metakern.ops.core.checks import (
    check_dense,
    check_dtype,
    check_like,
    check_same_device,
    check_shape,
    check_type,
    check_value,
)
from metakern.ops.core.define_op import Kernel
from metakern.ops.core.devices import without_autocast
from metakern.ops.hrnn_step import reference
from metakern.ops.hrnn_step.autograd import step
from metakern.ops.hrnn_step.reference import Step

#: Largest H of the operator, and the H that the CPU kernels are compiled for; others run by the reference there.
MAX_HIDDEN, COMPILED_HIDDEN = 32, 10

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

__all__ = ["MAX_HIDDEN", "Step", "hrnn_step"]


def hrnn_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    biases: Tensor,
    mean_rate: Tensor,
    weights: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> Step:
    """Update every coordinate by its own small GRU: features, GRU, readouts, normalisation, update, means.

    The steps of the formulas are those of :func:`metakern.ops.hrnn_step.reference.hrnn_step`. Differentiable once
    through every tensor argument; backward recomputes the GRU from the old state, so that 92 bytes a coordinate are
    kept in float32 with H = 10: the old state, the gradient and the step before its normalisation (96 with attention).
    Works under ``torch.compile(fullgraph=True)``, ``torch.func.grad`` and ``torch.func.vmap``.

    A non-finite gradient makes the segment's new params NaN, and no other segment's. The same bits come out for any
    number of threads.

    Args:
        params: θ of M tensors, [T, *shape] each: T tasks, and n coordinates in a task. All of one dtype: float32,
            bfloat16, float16 or float64. n may be zero.
        grads: gradients of the shapes and dtype of ``params``.
        states: [T, R, n] each; float64 for float64 params and float32 otherwise, likewise all below. Rows: h (H), the
            moving means of the gradient at 4 scales, those of their squares, the log learning rate ℓ, the scale decay,
            the input decay.
        biases: [M, T, 3H], all that is added to the pre-activations of the gates r and u and of the candidate c: the
            GRU's own biases and what comes from the tensor's and the global level.
        mean_rate: [T], mean of ℓ over all coordinates of a task.
        weights: 5 tensors, see :class:`metakern.ops.hrnn_step.reference.Weights`; attention is a fifth row of
            ``readouts``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``; None is ``"auto"``.

    Returns:
        new params, new states, means over each segment of h', the features and ℓ', [M, T, H + 13] (zero for n = 0), and
        with attention the points of the next gradients.

    Raises:
        ValueError: for shapes or counts that do not fit.
        TypeError: for dtypes or types that do not fit.
        RuntimeError: for a backend that cannot run, and for a second derivative of a kernel.

    Example:
        >>> T, M, n, H = 1, 1, 6, 10  # tasks, tensors, coordinates, hidden units
        >>> params, grads = [torch.randn(T, n)], [torch.randn(T, n)]
        >>> states, biases, mean_rate = [torch.zeros(T, H + 11, n)], torch.zeros(M, T, 3 * H), torch.zeros(T)
        >>> shapes = [(2 * H, 12 + H), (H, 12 + H), (4, H), (4,), (5,)]
        >>> weights = [0.1 * torch.randn(shape) for shape in shapes]
        >>> step = hrnn_step(params, grads, states, biases, mean_rate, weights)
        >>> step.params[0].shape, step.states[0].shape
        (torch.Size([1, 6]), torch.Size([1, 21, 6]))
    """
    _check_lists(params, grads, states, weights)
    for name, x in (("biases", biases), ("mean_rate", mean_rate)):
        check_dense(x, name)
    device = params[0].device if len(params) else biases.device
    kernel = step.choose(backend, device, _unserved(biases))
    if not _checks_itself(kernel):
        _check(params, grads, states, biases, mean_rate, weights)
    if kernel is None:
        return _reference_step(params, grads, states, biases, mean_rate, weights)
    arguments = (list(params), list(grads), list(states), biases, mean_rate, list(weights))
    return Step(*kernel.call(arguments))


def _unserved(biases: Tensor) -> dict[str, str] | None:
    """Why the CPU kernels do not serve this H."""
    hidden = biases.shape[-1] // 3 if biases.dim() else 0
    if hidden == COMPILED_HIDDEN:
        return None
    return {"cpp": f"the CPU kernels are compiled for {COMPILED_HIDDEN} hidden units, and biases have 3 × {hidden}"}


def _checks_itself(kernel: Kernel | None) -> bool:
    """Whether a compiled kernel, which checks its arguments, runs; under torch.compile its fake kernel does."""
    return kernel is not None and kernel.implementation == "compiled" and not torch.compiler.is_compiling()


def _reference_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    biases: Tensor,
    mean_rate: Tensor,
    weights: Sequence[Tensor],
) -> Step:
    with without_autocast(biases.device):
        flat, flat_grads = ([x.reshape(x.shape[0], _coordinates(x)) for x in xs] for xs in (params, grads))
        new = reference.hrnn_step(flat, flat_grads, states, biases, mean_rate, weights)
    shaped = [[x.view(p.shape) for x, p in zip(xs, params, strict=False)] for xs in (new.params, new.attended)]
    return new._replace(params=shaped[0], attended=shaped[1])


def _coordinates(x: Tensor) -> int:
    """Number n of coordinates of a segment, of a tensor [T, *shape]."""
    return math.prod(x.shape[1:])


# ------------------------------------------------------------------------------------------------ argument checks


def _check_lists(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Tensor], weights: Sequence[Tensor]
) -> None:
    """Check what the operators' schema would report by itself."""
    for name, xs in (("params", params), ("grads", grads), ("states", states), ("weights", weights)):
        check_type(hasattr(xs, "__len__"), name, " must be a sequence of tensors, got ", type(xs).__name__)
        check_type(not isinstance(xs, Tensor), name, " must be a sequence of tensors, got a tensor")
        for index, x in enumerate(xs):
            check_dense(x, f"{name}[{index}]")


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    biases: Tensor,
    mean_rate: Tensor,
    weights: Sequence[Tensor],
) -> None:
    """Check the tensors as csrc/hrnn_step/arguments.h does."""
    count = len(params)
    for name, xs in (("grads", grads), ("states", states)):
        check_value(len(xs) == count, name, " must hold a tensor for each of params, ", count, ", got ", len(xs))
    check_value(mean_rate.dim() == 1, "mean_rate must have shape [T], got ", mean_rate.shape)
    tasks = mean_rate.shape[0]
    ok = biases.dim() == 3 and biases.shape[2] % 3 == 0 and 3 <= biases.shape[2] <= 3 * MAX_HIDDEN
    check_value(ok, "biases must have shape [M, T, 3H] with H of 1 to ", MAX_HIDDEN, ", got ", biases.shape)
    hidden = biases.shape[2] // 3
    check_shape(biases, "biases", (count, tasks, 3 * hidden))
    dtype = torch.float64 if biases.dtype == torch.float64 else torch.float32
    for name, x in (("biases", biases), ("mean_rate", mean_rate)):
        check_dtype(x, name, dtype)
        check_same_device(x, name, biases, "biases")
    rows = reference.num_rows(hidden)
    for index, (p, g, x) in enumerate(zip(params, grads, states, strict=True)):
        _check_tensor(index, p, g, x, (tasks, rows), biases, params[0].dtype)
    _check_weights(weights, hidden, biases)


def _check_tensor(
    index: int, p: Tensor, g: Tensor, state: Tensor, sizes: tuple[int, int], biases: Tensor, dtype: torch.dtype
) -> None:
    """Check one tensor of params with its gradient and state; ``sizes`` are T and R."""
    name, (tasks, rows) = f"params[{index}]", sizes
    ok = p.dim() > 0 and p.shape[0] == tasks
    check_value(ok, name, " must have shape [T, *shape] with T = ", tasks, ", got ", p.shape)
    double = biases.dtype == torch.float64
    ok = p.dtype in PARAM_DTYPES and (p.dtype == torch.float64) == double
    kinds = "float64" if double else "float32, bfloat16 or float16"
    check_type(ok, name, " must be ", kinds, " for ", biases.dtype, " biases, got ", p.dtype)
    check_dtype(p, name, dtype)
    check_same_device(p, name, biases, "biases")
    check_like(g, f"grads[{index}]", p, name)
    check_shape(state, f"states[{index}]", (tasks, rows, _coordinates(p)))
    check_dtype(state, f"states[{index}]", biases.dtype)
    check_same_device(state, f"states[{index}]", biases, "biases")


def _check_weights(weights: Sequence[Tensor], hidden: int, biases: Tensor) -> None:
    names = reference.Weights._fields
    check_value(len(weights) == len(names), "weights must hold ", len(names), " tensors, got ", len(weights))
    attention = len(weights[2]) == len(reference.READOUTS) if weights[2].dim() else False
    shapes = reference.weight_shapes(hidden, attention)
    for index, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        name = f"weights[{index}] ({names[index]})"
        check_shape(weight, name, tuple(shape))
        check_dtype(weight, name, biases.dtype)
        check_same_device(weight, name, biases, "biases")


def prepare(backend: str | None) -> None:
    """Import what ``backend`` needs ahead of the first call, as torch.compile cannot trace imports."""
    step.prepare(backend)
