"""mlp_update_step: one step of a per-parameter MLP optimizer, for all tensors of all tasks in one call.

Metz et al. 2022, arXiv 2203.11860 ("small_fc_lopt"), µLO (arXiv 2406.00153) and ELO. The definition is
:mod:`metakern.ops.mlp_update_step.reference`.

Axis legend: M tensors, T tasks, n coordinates of one tensor of one task (a *segment*), W hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
from metakern.ops.mlp_update_step import reference
from metakern.ops.mlp_update_step.autograd import step
from metakern.ops.mlp_update_step.factors import RANKS, factor_shapes, factored_axes
from metakern.ops.mlp_update_step.reference import DECAYS, TENSOR_FEATURES, TIME_FEATURES, TIME_SCALES, Moments

#: Widths W and numbers of hidden layers that the kernels take. Keep in step with csrc/mlp_update_step/problem.h.
WIDTHS, HIDDEN_LAYERS = range(4, 65), range(1, 5)

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

__all__ = [
    "DECAYS",
    "HIDDEN_LAYERS",
    "RANKS",
    "TENSOR_FEATURES",
    "TIME_FEATURES",
    "TIME_SCALES",
    "WIDTHS",
    "Moments",
    "factor_shapes",
    "factored_axes",
    "mlp_update_step",
]


def mlp_update_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Moments,
    weights: Sequence[Tensor],
    decays: Tensor,
    rates: Tensor,
    keep: Tensor,
    steps: Tensor,
    *,
    exp_mult: float = 1e-3,
    backend: str | None = None,
) -> tuple[list[Tensor], Moments]:
    """Update every coordinate by the same small MLP of 28 features of its tensor and 11 of the time.

    θ' = keep · θ − rate · d · exp(exp_mult · s), where d and s are the outputs of the MLP. Its inputs, in order, from
    the new moments: g, θ, m (3), v, m·(v + 1e-6)^-½ (3), (v + 1e-6)^-½, g·R·C (3), r (3), c (3), (r + 1e-8)^-½ (3),
    (c + 1e-8)^-½ (3), m·R·C (3), with R = max(r/(mean r + 1e-9), 1e-9)^-½, the mean over the second largest axis, and
    C = max(c, 1e-9)^-½; each divided by its root mean square over the segment, x·(1e-5 + mean x²)^-½; then
    tanh(t/τ − 1) for the 11 :data:`TIME_SCALES`. For tensors of one axis: g·max(V + 1e-9, 1e-9)^-½, V twice,
    (V + 1e-8)^-½ twice and m·(V + 1e-6)^-½. The hidden units are ReLUs. Empty tensors keep their moments.

    Differentiable once through every tensor argument but ``steps``. Backward recomputes; it keeps the arguments, 24
    bytes a coordinate in float32 and the factors, and the new factors, which are results. Works under
    ``torch.compile(fullgraph=True)``, ``torch.func.grad`` and ``torch.func.vmap``. A non-finite number stays in its
    segment. The same bits come out for any number of threads.

    Args:
        params: θ of M tensors, [T, *shape] each, with 1 to 4 axes behind that of the T tasks. All of one dtype:
            float32, bfloat16, float16 or float64.
        grads: gradients g of the shapes and dtype of ``params``.
        moments: the state; float64 for float64 params and float32 otherwise, likewise all below. The shapes of r and c
            are those of :func:`factor_shapes`, behind [T, 3].
        weights: weight and bias of every layer: [W, 39], [W], then [W, W], [W] for each further hidden layer, then
            [2, W], [2]. W is 4 to 64, with 1 to 4 hidden layers.
        decays: [7], of m (3), of v, and of the factors (3), each from 0 to 1: a moving mean is decay·old +
            (1 − decay)·new.
        rates: [M, T], factors of the update: the learning rate times the step multiplier.
        keep: [M, T], factors of the old params: 1 without weight decay.
        steps: [T], numbers of steps taken before this one, int64.
        exp_mult: factor of the MLP's second output in the exponent.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``; None is ``"auto"``.

    Returns:
        new params, new moments

    Raises:
        ValueError: for shapes or counts that do not fit.
        TypeError: for dtypes or types that do not fit.
        RuntimeError: for a backend that cannot run, and for a second derivative of a kernel.

    Example:
        >>> from metakern.ops.mlp_update_step import Moments, factor_shapes
        >>> params, grads = [torch.randn(1, 6, 4)], [torch.randn(1, 6, 4)]  # one task, one matrix
        >>> rows, columns = (torch.zeros(1, 3, *shape) for shape in factor_shapes((6, 4)))
        >>> moments = Moments([torch.zeros(1, 3, 6, 4)], [torch.zeros(1, 6, 4)], [rows], [columns])
        >>> weights = [p.detach() for p in mlp(39, 32, 2).parameters()]
        >>> rates, keep, steps = torch.full((1, 1), 1e-3), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
        >>> decays = torch.tensor([0.9, 0.99, 0.999, 0.999, 0.9, 0.99, 0.999])
        >>> params, moments = mlp_update_step(params, grads, moments, weights, decays, rates, keep, steps)
    """
    numbers = (decays, rates, keep, steps)
    _check_types(params, grads, moments, weights, numbers)
    first = params[0] if params else decays
    kernel = step.choose(backend, first.device) if isinstance(first, Tensor) else None
    if not _checks_itself(kernel):
        _check(params, grads, moments, weights, numbers, exp_mult)
    if kernel is None:
        with without_autocast(decays.device):
            return reference.mlp_update_step(params, grads, moments, weights, decays, rates, keep, steps, exp_mult)
    lists = (list(xs) for xs in (params, grads, *moments, weights))
    new = kernel.call((*lists, decays, rates, keep, steps, float(exp_mult)))
    return new[0], Moments(*new[1:5])


def _checks_itself(kernel: Kernel | None) -> bool:
    """Whether a compiled kernel, which checks its arguments, runs; under torch.compile its fake kernel does."""
    return kernel is not None and kernel.implementation == "compiled" and not torch.compiler.is_compiling()


# ------------------------------------------------------------------------------------------------ argument checks


def _check_types(params: Any, grads: Any, moments: Any, weights: Any, numbers: Any) -> None:
    """Check what the operators' schema would report by itself."""
    check_type(isinstance(moments, Moments), "moments must be Moments, got ", type(moments).__name__)
    named = {"params": params, "grads": grads, **moments._asdict(), "weights": weights}
    for name, xs in named.items():
        check_type(hasattr(xs, "__len__"), name, " must be a sequence of tensors, got ", type(xs).__name__)
        check_type(not isinstance(xs, Tensor), name, " must be a sequence of tensors, got a tensor")
        for index, x in enumerate(xs):
            check_dense(x, f"{name}[{index}]")
    for name, x in zip(("decays", "rates", "keep", "steps"), numbers, strict=True):
        check_dense(x, name)


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Moments,
    weights: Sequence[Tensor],
    numbers: tuple[Tensor, Tensor, Tensor, Tensor],
    exp_mult: float,
) -> None:
    """Check the arguments as csrc/mlp_update_step/arguments.h does; ``numbers`` are decays, rates, keep and steps."""
    decays, rates, keep, steps = numbers
    check_value(math.isfinite(exp_mult), "exp_mult must be finite, got ", exp_mult)
    double = decays.dtype == torch.float64
    dtype, count = torch.float64 if double else torch.float32, len(params)
    check_shape(decays, "decays", (sum(DECAYS),))
    check_dtype(decays, "decays", dtype)
    check_value(steps.dim() == 1, "steps must have shape [T], got ", steps.shape)
    check_dtype(steps, "steps", torch.int64)
    check_same_device(steps, "steps", decays, "decays")
    for name, x in (("rates", rates), ("keep", keep)):
        check_shape(x, name, (count, steps.shape[0]))
        check_dtype(x, name, dtype)
        check_same_device(x, name, decays, "decays")
    _check_weights(weights, decays)
    for name, xs in (("grads", grads), *moments._asdict().items()):
        check_value(len(xs) == count, name, " must hold a tensor for each of params, ", count, ", got ", len(xs))
    for index, p in enumerate(params):
        name = f"params[{index}]"
        ok = p.dim() - 1 in RANKS and p.shape[0] == steps.shape[0]
        wanted = f" must have shape [T, *shape] with T = {steps.shape[0]} and 1 to 4 axes behind it, got "
        check_value(ok, name, wanted, p.shape)
        kinds = "float64" if double else "float32, bfloat16 or float16"
        ok = p.dtype in PARAM_DTYPES and (p.dtype == torch.float64) == double
        check_type(ok, name, " must be ", kinds, " for ", dtype, " decays, got ", p.dtype)
        check_dtype(p, name, params[0].dtype)
        check_same_device(p, name, decays, "decays")
        check_like(grads[index], f"grads[{index}]", p, "its params")
        _check_moments(index, [xs[index] for xs in moments], p.shape, decays)


def _check_moments(index: int, moments: Sequence[Tensor], shape: torch.Size, decays: Tensor) -> None:
    tasks, own = shape[0], shape[1:]
    rows, columns = factor_shapes(own)
    shapes = ((tasks, 3, *own), tuple(shape), (tasks, 3, *rows), (tasks, 3, *columns))
    for letter, x, expected in zip(Moments._fields, moments, shapes, strict=True):
        name = f"{letter}[{index}]"
        check_shape(x, name, expected)
        check_dtype(x, name, decays.dtype)
        check_same_device(x, name, decays, "decays")


def _check_weights(weights: Sequence[Tensor], decays: Tensor) -> None:
    counts = [2 * layers + 2 for layers in HIDDEN_LAYERS]
    ok = len(weights) in counts
    check_value(ok, "weights must hold 4, 6, 8 or 10 tensors, two a layer, got ", len(weights))
    first = weights[0]
    ok = first.dim() == 2 and first.shape[0] in WIDTHS
    check_value(ok, "weights[0] must have shape [W, 39] with W of 4 to 64, got ", first.shape)
    width, layers = first.shape[0], len(weights) // 2
    inputs = TENSOR_FEATURES + TIME_FEATURES
    for layer in range(layers):
        outputs = 2 if layer == layers - 1 else width
        for index, shape in ((2 * layer, (outputs, inputs)), (2 * layer + 1, (outputs,))):
            name = f"weights[{index}]"
            check_shape(weights[index], name, shape)
            check_dtype(weights[index], name, decays.dtype)
            check_same_device(weights[index], name, decays, "decays")
        inputs = width
