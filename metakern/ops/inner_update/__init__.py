"""inner_update: one gradient step for T tasks, each with its own parameters, over a whole list of tensors.

Finn et al. 2017, arXiv 1703.03400, equation 1. The definition is :mod:`metakern.ops.inner_update.reference`.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.core.transforms import is_transformed_or_dual
from metakern.ops.core.checks import check_dense, check_like, check_same_device
from metakern.ops.inner_update import reference
from metakern.ops.inner_update.autograd import (
    Options,
    call,
    formula,
    is_small,
    subtract,
    update,
)

#: Number types of Python and NumPy.
_NUMBERS = (float, int, numbers.Real)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def inner_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float | Tensor | Sequence[Tensor],
    *,
    step: int | None = None,
    clip_norm: float | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """θ' = θ − α ⊙ g for a list of tensors in one call, differentiable to any order in θ, g and α.

    α may be learned: per parameter (Meta-SGD, arXiv 1707.09835) or per tensor and step (LSLR, arXiv 1810.09502). Works
    under ``torch.compile(fullgraph=True)``, ``torch.func.grad`` and ``torch.func.vmap``. In float32 and float64,
    without ``clip_norm``, the result is bitwise equal to ``p - lr * g``.

    Args:
        params: θ, each [T, *shape]; float32, float64, bfloat16 or float16. Without ``clip_norm`` and ``active`` the
            task axis is not needed: tensors of one task, [*shape], may be given.
        grads: g, of the shapes and dtypes of ``params``
        lr: α, a number or a tensor [] for everything, or one tensor per parameter tensor, shared by the tasks: [] or
            [*shape], or any last axes of the parameter tensor; with ``step`` each has one more leading axis: [K] or
            [K, *shape], and a tensor for everything is [K]. Any of the four dtypes; it is cast to the arithmetic
            dtype: float64 for float64 params, float32 otherwise.
        step: index of the inner step, 0 to K − 1, that selects from the leading axis of ``lr``
        clip_norm: largest norm of a task's gradient, over all its tensors; a longer one is scaled down to it
        active: bool [T], tasks that step; the others keep θ bit for bit, and their g has no effect
        backend: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None is ``"auto"``.

    Returns:
        θ', in the order, shapes and dtypes of ``params``

    Raises:
        ValueError: for shapes, counts or values that do not fit.
        TypeError: for dtypes or types that do not fit.
        RuntimeError: for a backend that cannot run.

    Example:
        >>> params = [torch.zeros(4, 3, 2), torch.zeros(4, 3)]  # of T = 4 tasks
        >>> grads = [torch.ones_like(p) for p in params]
        >>> params = inner_update(params, grads, 0.1, clip_norm=1.0)
    """
    rates, options = _rates_and_options(lr, step, clip_norm)
    is_plain = isinstance(lr, (float, int)) and _is_plain(params, grads, active)
    if not is_plain:
        check(params, grads, lr, step, active, clip_norm)
    if not params:
        return []
    kernel = update.choose(backend, params[0].device)
    # A compiled kernel checks its own arguments, but under torch.compile its fake kernel runs in its place.
    if is_plain and (kernel is None or kernel.implementation != "compiled" or torch.compiler.is_compiling()):
        check(params, grads, lr, step, active, clip_norm)
    if kernel is None:
        return formula(params, grads, rates, active, options)
    return call(kernel, params, grads, rates, active, options)


def step_of_one_task(params: Sequence[Tensor], grads: Sequence[Tensor], lr: float | Tensor | list[Tensor]) -> list[Any]:
    """:func:`inner_update` for a module's parameters and their gradients, which are known to match.

    Small modules skip the checks, which would take half the time.
    """
    if isinstance(lr, Tensor):
        lr = lr.reshape(()).to(params[0].device) if params else lr
    elif not isinstance(lr, list):
        lr = float(lr)  # NumPy would compute a NumPy number times a tensor as arrays
    # torch.compile can fuse the formula and torch.func transform it; no kernel takes complex tensors.
    if is_transformed_or_dual() or any(p.is_complex() for p in params):
        return reference.inner_update(params, grads, lr)
    if params and torch.is_grad_enabled() and is_small(params):
        return subtract(params, grads, lr if isinstance(lr, list) else [lr] * len(params))
    return inner_update(params, grads, lr)


# ------------------------------------------------------------------------------------------------ argument checks


def _rates_and_options(lr: Any, step: int | None, clip_norm: float | None) -> tuple[Sequence[Tensor], Options]:
    """α and the scalars in the operators' form; raises for invalid ones."""
    is_index = isinstance(step, (int, numbers.Integral)) and not isinstance(step, bool)
    if step is not None and (not is_index or step < 0):
        error: type[Exception] = ValueError if is_index else TypeError
        raise error(f"step must be None or an index of an inner step, 0 or more, got {step!r}")
    if clip_norm is not None and type(clip_norm) is not float:
        if isinstance(clip_norm, bool) or not isinstance(clip_norm, _NUMBERS):
            raise TypeError(f"clip_norm must be None or a number, got {type(clip_norm).__name__}")
        clip_norm = float(clip_norm)
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    index = -1 if step is None else int(step)
    if isinstance(lr, Tensor):
        if step is None:
            _check_shared(lr, 0, "lr as one tensor must have shape []")
            return (lr,), Options(0.0, -1, clip_norm)
        _check_shared(lr, 1, "lr as one tensor must have shape [K] with step")
        _check_step(step, lr, "lr")
        return (lr[step],), Options(0.0, -1, clip_norm)
    if isinstance(lr, _NUMBERS) and not isinstance(lr, bool):
        if step is not None:
            raise ValueError(f"lr must be tensors with a leading axis of inner steps for step={step}, got {lr}")
        return (), Options(float(lr), -1, clip_norm)
    if isinstance(lr, (str, bytes)) or not hasattr(lr, "__len__") or not hasattr(lr, "__iter__"):
        raise TypeError(f"lr must be a number, a tensor or a sequence of tensors, got {type(lr).__name__}")
    return list(lr), Options(0.0, index, clip_norm)


def _check_shared(lr: Tensor, dim: int, expected: str) -> None:
    if lr.dim() != dim:
        raise ValueError(f"{expected}, got {list(lr.shape)}")


def _check_step(step: int, rate: Tensor, name: str) -> None:
    if step >= rate.shape[0]:
        raise ValueError(f"step must be less than the {rate.shape[0]} inner steps that {name} holds, got {step}")


def _is_plain(params: Any, grads: Any, active: Any) -> bool:
    """Whether the operators check these tensors fully: no broadcasting, no tensor without memory."""
    if not isinstance(params, (list, tuple)) or not isinstance(grads, (list, tuple)) or len(params) != len(grads):
        return False
    for x in (*params, *grads) if active is None else (*params, *grads, active):
        if not isinstance(x, Tensor) or x.is_meta:
            return False
    return all(p.shape == g.shape and p.dtype is g.dtype for p, g in zip(params, grads, strict=True))


def check(params: Any, grads: Any, lr: Any, step: int | None, active: Any, clip_norm: float | None) -> None:
    """Check the tensors' types, shapes, dtypes and devices; raises as :func:`inner_update`."""
    for name, xs in (("params", params), ("grads", grads)):
        if isinstance(xs, Tensor) or not hasattr(xs, "__len__"):
            raise TypeError(f"{name} must be a sequence of tensors, got {type(xs).__name__}")
    if len(grads) != len(params):
        raise ValueError(f"grads must hold as many tensors as params, {len(params)}, got {len(grads)}")
    for index, (p, g) in enumerate(zip(params, grads, strict=True)):
        _check_pair(index, p, g, params[0])
    if isinstance(lr, Tensor):
        if params:
            _check_rate("lr", lr, params[0])
    elif not isinstance(lr, _NUMBERS):
        _check_rates(lr, params, step)
    if clip_norm is not None or active is not None:
        _check_tasks(params, active)


def _check_pair(index: int, p: Any, g: Any, first: Tensor) -> None:
    for name, x in ((f"params[{index}]", p), (f"grads[{index}]", g)):
        check_dense(x, name)
        check_same_device(x, name, first, "params[0]")
    if p.dtype not in DTYPES:
        raise TypeError(f"params[{index}] must be float32, float64, bfloat16 or float16, got {p.dtype}")
    check_like(g, f"grads[{index}]", p, "its params")


def _check_rate(name: str, rate: Any, first: Tensor) -> None:
    check_dense(rate, name)
    if rate.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {rate.dtype}")
    check_same_device(rate, name, first, "params[0]")


def _check_rates(lr: Any, params: Sequence[Tensor], step: int | None) -> None:
    if len(lr) != len(params):
        raise ValueError(f"lr must hold one tensor for each of params, {len(params)}, got {len(lr)}")
    for index, (rate, p) in enumerate(zip(lr, params, strict=True)):
        name = f"lr[{index}]"
        _check_rate(name, rate, params[0])
        shape = rate.shape
        if step is not None:
            if not shape:
                raise ValueError(f"{name} must have a leading axis of inner steps for step={step}, got shape []")
            _check_step(step, rate, name)
            shape = shape[1:]
        if len(shape) > p.dim() or shape != p.shape[p.dim() - len(shape) :]:
            behind = "" if step is None else ", behind that of the inner steps"
            raise ValueError(
                f"{name} must have shape [] or the last axes of its params, {list(p.shape)}{behind}, "
                f"got {list(rate.shape)}"
            )


def _check_tasks(params: Sequence[Tensor], active: Any) -> None:
    if active is not None:
        if not isinstance(active, Tensor) or active.dtype != torch.bool:
            got = active.dtype if isinstance(active, Tensor) else type(active).__name__
            raise TypeError(f"active must be a tensor of bool, got {got}")
        check_dense(active, "active")
        if active.dim() != 1:
            raise ValueError(f"active must have shape [T], got {list(active.shape)}")
        if params:
            check_same_device(active, "active", params[0], "params[0]")
    if not params:
        return
    count = params[0].shape[:1] if active is None else active.shape  # no len(): it would fix the count for a compiler
    if not all(p.dim() and p.shape[:1] == count for p in params):
        shapes = [list(p.shape) for p in params]
        wanted = "one leading axis of tasks" if active is None else f"a leading axis of the {count[0]} tasks"
        raise ValueError(f"params must have {wanted} for clip_norm and active, got shapes {shapes}")


def prepare(backend: str | None) -> None:
    """Import what ``backend`` needs ahead of the first call, as torch.compile cannot trace imports."""
    update.prepare(backend)
