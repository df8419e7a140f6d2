"""mlp_inner_loop: the inner loops of T small MLPs in one call: K times forward, loss, backward, update.

Finn et al. 2017, arXiv 1703.03400. The definition is :mod:`metakern.ops.mlp_inner_loop.reference`. Meta-gradients
are exact to second order, by products of the Hessian with a vector along the way back (Pearlmutter 1994, "Fast exact
multiplication by the Hessian").

Axis legend: T tasks, S support and Q query samples of a task, K inner steps, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.core import backend as _backend
from metakern.core.memo import memoized
from metakern.core.transforms import is_transformed_or_dual
from metakern.ops.core.checks import check_dense
from metakern.ops.core.define_op import IMPLEMENTATIONS
from metakern.ops.core.devices import check_devices
from metakern.ops.mlp_inner_loop import reference
from metakern.ops.mlp_inner_loop.arguments import MAX_LAYERS, Arguments, Network
from metakern.ops.mlp_inner_loop.autograd import (
    Problem,
    adapt,
    adapt_backward,
    adapt_call,
    meta_backward_call,
    meta_loss,
    meta_loss_backward,
    meta_loss_call,
)

#: Keep in step with csrc/mlp_inner_loop/problem.h.
MAX_WIDTH = 1024

ACTIVATIONS = tuple(reference.ACTIVATIONS)

#: Maximum bytes of a task on the CPU (three times its parameters, eight times its activations), to stay in the cache.
MAX_TASK_BYTES = 2**24

#: Keep in step with csrc/mlp_inner_loop/cuda.h.
MAX_CUDA_STEPS = 256

#: Keep in step with metakern/ops/mlp_inner_loop/triton_arguments.py.
MAX_TRITON_OUTPUTS = 4096


def unserved(widths: tuple[int, ...], samples: int, dtype: torch.dtype) -> str:
    """Why the kernels do not serve MLPs of these widths and this many samples per task; empty where they do."""
    if dtype not in (torch.float32, torch.float64):
        return f"the parameters are {dtype}; float32 and float64 are served"
    if len(widths) - 1 > MAX_LAYERS or max(widths[1:]) > MAX_WIDTH:
        return f"the model has more than {MAX_LAYERS} layers or {MAX_WIDTH} units"
    params = sum((inputs + 1) * units for inputs, units in itertools.pairwise(widths))
    size = (3 * params + 8 * sum(widths[1:]) * samples) * dtype.itemsize
    if size > MAX_TASK_BYTES:
        return f"a task of this size takes {size >> 20} MiB; {MAX_TASK_BYTES >> 20} at most stay in the cache"
    return ""


def unserved_by_triton(widths: tuple[int, ...]) -> str:
    """Why Triton's kernels do not serve MLPs of these widths; empty where they do. Their working memory is global."""
    if len(widths) - 1 > MAX_LAYERS or widths[-1] > MAX_TRITON_OUTPUTS:
        return f"the model has more than {MAX_LAYERS} layers or {MAX_TRITON_OUTPUTS} outputs"
    return ""


def cuda_shared_bytes(
    widths: Sequence[int], samples: int, queries: int, activation: str | Sequence[str], loss: str, dtype: torch.dtype
) -> int:
    """Minimum shared memory of a block for one task: csrc/mlp_inner_loop/cuda_layout.h in Python.

    More shared memory is faster; what does not fit is kept in global memory.
    """

    def odd(n: int) -> int:
        return n + 1 - n % 2

    layers = list(itertools.pairwise(widths))
    params = sum(units * odd(inputs + 1) for inputs, units in layers)
    units = sum(units + 1 for _, units in layers)
    targets = 1 if loss == "cross_entropy" else widths[-1]
    support, query = odd(samples), odd(queries)
    names = [activation] * (len(layers) - 1) if isinstance(activation, str) else activation
    kept = units * (4 if "gelu" in names else 3)
    passes = max(3 * units * support, (kept - units) * query)
    widest = max(units * max(inputs + 1, samples, queries) for inputs, units in layers)
    warps = 4 if widest <= 512 else 8 if widest <= 4096 else 16
    elements = (widths[0] + targets + 2) * (support + query) + 2 * params + kept * support + passes
    return (elements + queries + 2 * len(layers) * warps) * (8 if dtype == torch.float64 else 4)


@memoized
def unserved_on_cuda(
    widths: tuple[int, ...],
    samples: int,
    queries: int,
    steps: int,
    activation: str | tuple[str, ...],
    loss: str,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """Why the CUDA kernels do not serve such MLPs on ``device``; empty where they do."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"the parameters are {dtype}; float32, float64, bfloat16 and float16 are served"
    if len(widths) - 1 > MAX_LAYERS or steps > MAX_CUDA_STEPS:
        return f"the model has more than {MAX_LAYERS} layers, or there are more than {MAX_CUDA_STEPS} steps"
    size = cuda_shared_bytes(widths, samples, queries, activation, loss, dtype)
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    if size > limit:
        return f"a task of this size takes {size} bytes of a block's shared memory; {device} has {limit}"
    return ""


def mlp_inner_loop(
    params: Sequence[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    *,
    lr: float | Tensor | Sequence[Tensor],
    steps: int,
    per_step: bool = False,
    adapted: Sequence[bool] | None = None,
    activation: str | Sequence[str] = "relu",
    loss: str = "mse",
    first_order: bool | Sequence[bool] = False,
    clip_norm: float | None = None,
    support_mask: Tensor | None = None,
    checkpoint_every: int | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Parameters of T MLPs after K gradient steps on their support sets.

    Differentiable once, exact to second order, in ``params`` and ``lr``. For the backward the parameters of every
    ``checkpoint_every``-th step are kept, and the steps are recomputed from them.

    Args:
        params: weight and bias of every layer in turn, float32 or float64, on a GPU also bfloat16 or float16 with
            float32 arithmetic: [O, I] and [O], the common start of all tasks, or [T, O, I] and [T, O]
        support_x: [T, S, I]
        support_y: [T, S, O], or int64 labels [T, S] for ``"cross_entropy"``; on a GPU, where a CUDA graph is captured
            or torch.compile or torch.func is at work, a label that names no output makes its task's results NaN
        lr: α: a number, or a tensor of one element for everything, or one tensor for each of ``params``, [] or of its
            shape; with ``per_step`` tensors have one more leading axis [K]
        steps: K
        per_step: whether the rates differ by step
        adapted: for each of ``params`` whether the steps change it; None for all
        activation: between the layers: ``"relu"``, ``"tanh"``, ``"sigmoid"``, ``"gelu"``, ``"leaky_relu:<slope>"`` with
            a slope that is not negative, ``"leaky_relu"``, whose slope is 0.01, or ``"identity"``; one for all, or a
            list of one for each hidden layer
        loss: mean over samples and outputs: ``"mse"``, ``"cross_entropy"`` or ``"binary_cross_entropy_with_logits"``
        first_order: treat the steps' gradients as constants; one bool, or one per step
        clip_norm: largest norm of a task's gradient over all adapted tensors; a longer one is scaled down to it, and
            meta-gradients flow through the scaling
        support_mask: bool [T, S], False for ignored samples; a task with only ignored samples has a loss and
            gradients of zero, and keeps its parameters
        checkpoint_every: steps between kept parameters; None keeps those of every step
        backend: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None is ``"auto"``

    Returns:
        new parameters, [T, O, I] and [T, O] in turn

    Raises:
        ValueError: for shapes, sizes, counts, labels or option values that do not fit
        TypeError: for dtypes or types that do not fit
        RuntimeError: for tensors on several devices, a backend that cannot run, and a second derivative

    Example:
        >>> model = mlp(64, 20, 5)
        >>> new = mlp_inner_loop(list(model.parameters()), support_x, support_y, lr=0.1, steps=3, loss="cross_entropy")
        >>> new[0].shape  # the first layer of 8 tasks
        torch.Size([8, 20, 64])
    """
    problem = make_problem(
        params, lr, steps, per_step, adapted, activation, loss, first_order, checkpoint_every or 1, clip_norm
    )
    _check_tensors(params, lr, support_x=support_x, support_y=support_y, support_mask=support_mask)
    serves = _backend.resolve(backend, support_x.device, _reasons(params, support_x, None, steps, activation, loss))
    if serves == "reference":
        _check_shapes(problem, params, lr, support=(support_x, support_y, support_mask))
        trajectory = _reference(problem, params, support_x, support_y, support_mask, lr, activation, loss)
        return trajectory[-1]
    if serves != "cpp" and loss == "cross_entropy":  # cpp's operator checks labels itself
        _check_labels("support", support_x, support_y, params)
    support = support_x, support_y, support_mask
    return adapt_call(IMPLEMENTATIONS[serves], problem, params, _rate_tensors(lr), support)


def mlp_meta_loss(
    params: Sequence[Tensor],
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    *,
    lr: float | Tensor | Sequence[Tensor],
    steps: int,
    per_step: bool = False,
    adapted: Sequence[bool] | None = None,
    activation: str | Sequence[str] = "relu",
    loss: str = "mse",
    first_order: bool | Sequence[bool] = False,
    clip_norm: float | None = None,
    support_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    step_weights: Sequence[float] | None = None,
    checkpoint_every: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Query losses [T] of T MLPs after K gradient steps, with meta-gradients.

    If a gradient is required, the same pass computes it while the steps are in the cache: the graph keeps one gradient
    per task, whatever K is.

    Args:
        params: as for :func:`mlp_inner_loop`
        support: (x, y) as for :func:`mlp_inner_loop`
        query: (x [T, Q, I], y)
        lr: as for :func:`mlp_inner_loop`
        steps: K
        per_step: as for :func:`mlp_inner_loop`
        adapted: as for :func:`mlp_inner_loop`
        activation: as for :func:`mlp_inner_loop`
        loss: of both sets, as for :func:`mlp_inner_loop`
        first_order: as for :func:`mlp_inner_loop`
        clip_norm: as for :func:`mlp_inner_loop`
        support_mask: as for :func:`mlp_inner_loop`
        query_mask: bool [T, Q]; a task with only ignored samples has a loss and gradients of zero
        step_weights: [K], weight of the query loss after each step (MAML++'s multi-step loss); None uses the last step
        checkpoint_every: steps between parameters kept within the pass, for each group of tasks; None keeps all
        backend: as for :func:`mlp_inner_loop`

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mlp_inner_loop`.

    Example:
        >>> model = mlp(64, 20, 5)
        >>> support, query = (support_x, support_y), (query_x, query_y)
        >>> losses = mlp_meta_loss(list(model.parameters()), support, query, lr=0.1, steps=3, loss="cross_entropy")
        >>> losses.mean().backward()
    """
    problem = make_problem(
        params, lr, steps, per_step, adapted, activation, loss, first_order, checkpoint_every or steps, clip_norm
    )
    weights = make_weights(step_weights, steps)
    for name, (x, y), mask in (("support", support, support_mask), ("query", query, query_mask)):
        _check_tensors(params, lr, **{f"{name}_x": x, f"{name}_y": y, f"{name}_mask": mask})
    reasons = _reasons(params, support[0], query[0], steps, activation, loss)
    serves = _backend.resolve(backend, support[0].device, reasons)
    if serves == "reference":
        _check_shapes(problem, params, lr, support=(*support, support_mask), query=(*query, query_mask))
        trajectory = _reference(problem, params, *support, support_mask, lr, activation, loss)
        total: Any = 0.0
        for weight, now in zip(weights, trajectory[1:], strict=True):
            if weight:
                prediction = reference.predict(now, query[0], activation)
                total = total + weight * reference.task_losses(prediction, query[1], loss, query_mask)
        return total  # type: ignore[no-any-return]
    sets = (*support, support_mask), (*query, query_mask)
    return run_meta_loss(serves, problem, weights, params, _rate_tensors(lr), *sets)


def run_meta_loss(
    serves: str,
    problem: Problem,
    weights: tuple[float, ...],
    params: Sequence[Tensor],
    lr: Sequence[Tensor],
    support: tuple[Tensor, Tensor, Tensor | None],
    query: tuple[Tensor, Tensor, Tensor | None],
) -> Tensor:
    """:func:`mlp_meta_loss` with a resolved backend and checked options; the sets are (x, y, mask)."""
    _check_classes(serves, problem, params, support, query)
    return meta_loss_call(IMPLEMENTATIONS[serves], problem, params, lr, support, query, weights)


def run_meta_backward(
    serves: str,
    problem: Problem,
    weights: tuple[float, ...],
    params: Sequence[Tensor],
    support: tuple[Tensor, Tensor, Tensor | None],
    query: tuple[Tensor, Tensor, Tensor | None],
    gradient: Tensor | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Losses as :func:`run_meta_loss`, and gradients of params; for a number as rate, outside all transforms.

    ``gradient`` [T] is the gradient of the objective by the losses; None stands for their mean.
    """
    _check_classes(serves, problem, params, support, query)
    return meta_backward_call(IMPLEMENTATIONS[serves], problem, params, support, query, weights, gradient)


def _check_tensors(params: Sequence[Tensor], lr: Any, **samples: Tensor | None) -> None:
    """Raise TypeError for what is no dense tensor, RuntimeError for one on another device than the first of params."""
    for index, p in enumerate(params):
        check_dense(p, f"params[{index}]")
    for name, x in samples.items():
        if x is not None or not name.endswith("_mask"):
            check_dense(x, name)
    if isinstance(lr, Sequence) and not isinstance(lr, str):
        for index, rate in enumerate(lr):
            check_dense(rate, f"lr[{index}]")
    elif isinstance(lr, Tensor):
        check_dense(lr, "lr")
    if params:
        check_devices("params[0]", params[0].device, params=params, lr=lr, **samples)


def _check_shapes(
    problem: Problem, params: Sequence[Tensor], lr: Any, **sets: tuple[Tensor, Tensor, Tensor | None]
) -> None:
    """Raise for shapes and dtypes that the kernels would refuse; the reference would broadcast and promote some."""
    tensors = list(params), _rate_tensors(lr)
    arguments = Arguments._make([*tensors, *problem.scalars, *problem.options])
    network = Network(arguments, sets["support"][0])
    for name, samples in sets.items():
        network.check_samples(name, problem.loss, *samples, params[0])


def _check_classes(serves: str, problem: Problem, params: Sequence[Tensor], *sets: tuple[Any, ...]) -> None:
    """Check the labels of support and query, unless the operator does."""
    if serves != "cpp" and reference.LOSSES[problem.loss] == "cross_entropy":
        for name, (x, y, _) in zip(("support", "query"), sets, strict=True):
            _check_labels(name, x, y, params)


def _reasons(
    params: Sequence[Tensor], x: Tensor, query_x: Tensor | None, steps: int, activation: str | Sequence[str], loss: str
) -> dict[str, str]:
    """By backend, why it does not serve these tensors. The operators report wrong shapes."""
    queries = x if query_x is None else query_x
    if x.device.type != "cuda" or not x.dim() == queries.dim() == 3 or not all(p.dim() for p in params):
        return {}
    widths = (params[0].shape[-1], *(p.shape[-1] for p in params[1::2]))
    sizes = x.shape[1], 0 if query_x is None else query_x.shape[1]
    names = activation if isinstance(activation, str) else tuple(activation)
    return {
        "cuda": unserved_on_cuda(widths, *sizes, steps, names, loss, params[0].dtype, x.device),
        "triton": unserved_by_triton(widths),
    }


def _check_labels(name: str, x: Tensor, labels: Tensor, params: Sequence[Tensor]) -> None:
    """Raise ValueError for labels out of range, on the host, which waits for the device.

    During CUDA graph capture, torch.compile and torch.func the values cannot be read; then such a label makes the loss
    NaN. The operators report labels of another dtype or shape.
    """
    outputs = params[-1].shape[-1]
    if is_transformed_or_dual() or labels.dtype != torch.int64 or labels.shape != x.shape[:2] or _is_captured(labels):
        return
    if not labels.numel():
        return
    for label in torch.stack(torch.aminmax(labels)).tolist():
        if not 0 <= label < outputs:
            raise ValueError(f"{name}_y must be 0 to {outputs - 1}, as the model has {outputs} outputs, got {label}")


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def make_weights(step_weights: Sequence[float] | None, steps: int) -> tuple[float, ...]:
    """Checked weights [K] of the query losses."""
    if step_weights is None:
        return (0.0,) * (steps - 1) + (1.0,)
    if len(step_weights) != steps or not any(step_weights):
        raise ValueError(f"step_weights must hold {steps} weights, not all zero, got {list(step_weights)}")
    return tuple(float(weight) for weight in step_weights)


def _reference(
    problem: Problem,
    params: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    lr: Any,
    activation: str | Sequence[str],
    loss: str,
) -> list[list[Tensor]]:
    adapted = [bool(problem.adapted >> i & 1) for i in range(len(params))]
    return reference.mlp_inner_loop(
        params,
        x,
        y,
        mask,
        lr,
        steps=problem.steps,
        per_step=problem.per_step,
        adapted=adapted,
        first_order=[not second for second in problem.second_order],
        activation=activation,
        loss=loss,
        clip_norm=problem.clip_norm,
    )


def _rate_tensors(lr: Any) -> list[Tensor]:
    if isinstance(lr, Tensor):
        return [lr]
    return list(lr) if isinstance(lr, Sequence) else []


def make_problem(
    params: Sequence[Tensor],
    lr: Any,
    steps: int,
    per_step: bool,
    adapted: Sequence[bool] | None,
    activation: str | Sequence[str],
    loss: str,
    first_order: bool | Sequence[bool],
    checkpoint_every: int,
    clip_norm: float | None = None,
) -> Problem:
    """The operators' scalars, checked; tensors are checked by the operators."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps must be an integer, got {steps!r}")
    if clip_norm is not None:
        clip_norm = _number("clip_norm", clip_norm)
    if not isinstance(activation, Sequence):
        raise TypeError(f"activation must be a name or a list of names, got {type(activation).__name__}")
    names = activation if isinstance(activation, str) else tuple(activation)
    rate = 0.0 if isinstance(lr, (Tensor, Sequence)) else float(lr)
    orders = first_order if isinstance(first_order, bool) else tuple(first_order)
    flags = None if adapted is None else tuple(adapted)
    return _checked(len(params), rate, steps, per_step, flags, names, loss, orders, checkpoint_every, clip_norm)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # includes NumPy's numbers
        raise TypeError(f"{name} must be None or a number, got {type(value).__name__}")
    return float(value)


@memoized
def _checked(
    num_params: int,
    rate: float,
    steps: int,
    per_step: bool,
    adapted: tuple[bool, ...] | None,
    activation: str | tuple[str, ...],
    loss: str,
    first_order: bool | tuple[bool, ...],
    checkpoint_every: int,
    clip_norm: float | None,
) -> Problem:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if loss not in reference.LOSSES:
        raise ValueError(f"loss must be one of {', '.join(reference.LOSSES)}, got {loss!r}")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    if num_params % 2 or not 2 <= num_params <= 2 * MAX_LAYERS:
        raise ValueError(f"params must hold weight and bias of 1 to {MAX_LAYERS} layers, got {num_params} tensors")
    if adapted is not None and (len(adapted) != num_params or not any(adapted)):
        raise ValueError(f"adapted must hold a bool for each of {num_params} params, one True, got {list(adapted)}")
    orders = (first_order,) * steps if isinstance(first_order, bool) else first_order
    if len(orders) != steps:
        raise ValueError(f"first_order must have one bool a step, {steps}, got {len(orders)}")
    kinds = reference.activations_of(activation, num_params // 2 - 1)
    slopes = tuple(slope for _, slope in kinds)
    return Problem(
        rate,
        steps,
        per_step,
        -1 if adapted is None else sum(1 << i for i, flag in enumerate(adapted) if flag),
        tuple(ACTIVATIONS.index(kind) for kind, _ in kinds),
        reference.LOSSES.index(loss),
        min(checkpoint_every, steps),
        tuple(not order for order in orders),
        slopes if any(slopes) else (),
        clip_norm,
    )


def prepare(backend: str | None) -> None:
    """Import what ``backend`` needs ahead of the first call, as torch.compile cannot trace imports."""
    for operator in (adapt, adapt_backward, meta_loss, meta_loss_backward):
        operator.prepare(backend)
