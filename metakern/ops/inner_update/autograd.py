"""The operator inner_update: gradient formula and batching rule, shared by all implementations.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.core.torch_private import foreach_mul, foreach_sub
from metakern.core.transforms import is_transformed_or_dual
from metakern.ops.core.batching import Batch, looped
from metakern.ops.core.define_op import Gradient, Kernel, define_op
from metakern.ops.core.functions import Backward
from metakern.ops.inner_update import reference

#: Below this number of elements the kernel gains less than a Python autograd.Function costs (bench_inner_update).
FUSED_ELEMENTS = 2**17


class Options(NamedTuple):
    """The operators' scalars: α if it is a number, the inner step or -1, clip_norm or None."""

    rate: float
    step: int
    clip_norm: float | None


def call(
    kernel: Kernel,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: Sequence[Tensor],
    active: Tensor | None,
    options: Options,
) -> list[Tensor]:
    """Call the operator or, for few elements under autograd, PyTorch's own operators.

    These give the same bits, and for few elements a Python autograd.Function costs more than it saves.
    """
    arguments = (params, grads, lr, *options, active)
    is_recorded = None
    if active is None and options.clip_norm is None and not is_transformed_or_dual():
        is_recorded = update.is_recorded(arguments)
        if is_recorded and is_small((*params, *lr)):
            return subtract(params, grads, _rates(lr, options.rate, options.step, len(params)))
    updated: list[Tensor] = kernel.call(arguments, is_recorded=is_recorded)
    return updated


def is_small(tensors: Sequence[Tensor]) -> bool:
    """Whether these are few elements, all in float32 or all in float64."""
    dtype, elements = tensors[0].dtype, 0
    for x in tensors:
        if x.dtype is not dtype:
            return False
        elements += x.numel()
    return elements < FUSED_ELEMENTS and dtype in (torch.float32, torch.float64)


def subtract(params: Sequence[Tensor], grads: Sequence[Tensor], rates: list[Any]) -> list[Tensor]:
    """θ − α ⊙ g by two torch operators with built-in autograd, the cheapest way to the formula's bits."""
    factor: Any = rates if isinstance(rates[0], Tensor) else rates[0]  # a number is one for all
    return list(foreach_sub(list(params), foreach_mul(list(grads), factor)))


def formula(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: Sequence[Tensor],
    active: Tensor | None,
    options: Options,
) -> list[Tensor]:
    """The operator's result, computed by the reference."""
    rates: Any = _rates(lr, options.rate, options.step, len(params))
    updated = reference.inner_update(params, grads, rates, clip_norm=options.clip_norm, active=active)
    return [new.to(p.dtype) for new, p in zip(updated, params, strict=True)]


def _is_shared(lr: Sequence[Tensor]) -> bool:
    """Whether one tensor holds a single α for all params."""
    return len(lr) == 1 and lr[0].numel() == 1


def _rates(lr: Sequence[Tensor], rate: float, step: int, count: int) -> list[Any]:
    """The step's α of each of ``count`` tensors."""
    if not lr:
        return [rate] * count
    if _is_shared(lr):
        return [lr[0].reshape(())] * count
    return list(lr) if step < 0 else [rates[step] for rates in lr]


# ------------------------------------------------------------------------------------------------------ autograd


def _wide(x: Tensor) -> Tensor:
    """Cast to the arithmetic dtype."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _gradients(backward: Backward) -> dict[str, Any]:
    """Gradients by the names of arguments, differentiable."""
    a, updated = backward.arguments, list(backward.grads.updated)
    found: dict[str, Any] = {"params": updated}
    wants = backward.wants
    if not wants & {"grads", "lr"}:
        return found
    rates, incoming = _rates(a.lr, a.rate, a.step, len(a.grads)), [_wide(x) for x in updated]
    used = [_wide(g) for g in a.grads]
    if a.active is not None:
        incoming, used = _masked(a.active, incoming), _masked(a.active, used)
    coefficients = None
    if a.clip_norm is not None:
        coefficients = reference.clip_coefficients(used, a.clip_norm)
    if "lr" in wants:
        clipped = used if coefficients is None else [reference.scaled(coefficients, g) for g in used]
        sums = [(-x * g).sum_to_size(rate.shape) for x, g, rate in zip(incoming, clipped, rates, strict=True)]
        found["lr"] = _grad_of_rates(sums, a.lr, a.step)
    if "grads" in wants:
        steps = [-rate * x for x, rate in zip(incoming, rates, strict=True)]
        if coefficients is not None:
            steps = _through_clipping(steps, used, coefficients, a.clip_norm)
        found["grads"] = [step.to(g.dtype) for step, g in zip(steps, a.grads, strict=True)]
    return found


def _masked(active: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [T, *shape] with zeros for inactive tasks."""
    return [torch.where(reference._per_task(active, x), x, torch.zeros_like(x)) for x in tensors]


def _through_clipping(
    cotangents: Sequence[Tensor], grads: Sequence[Tensor], coefficients: Tensor, clip_norm: float
) -> list[Tensor]:
    """Gradient x of c(g) · g, c = min(1, clip_norm / ‖g‖), back to g: c x − c³ / clip_norm² ⟨x, g⟩ g.

    Computed in the dtype of the coefficients: c³ leaves float32's range where the norm is far from ``clip_norm``.
    """
    pairs = [(reference.for_norms(x), reference.for_norms(g)) for x, g in zip(cotangents, grads, strict=True)]
    products = [x * g for x, g in pairs]
    dots = torch.stack([x.flatten(1).sum(1) if x.dim() > 1 else x for x in products]).sum(0)
    shares = coefficients * (coefficients / clip_norm) ** 2 * dots
    shares = torch.where(coefficients != 1, shares, torch.zeros_like(shares))
    wide = [reference.scaled(coefficients, x) - reference.scaled(shares, g) for x, g in pairs]
    return [x.to(cotangent.dtype) for x, cotangent in zip(wide, cotangents, strict=True)]


def _grad_of_rates(sums: Sequence[Tensor], lr: Sequence[Tensor], step: int) -> list[Tensor]:
    """Gradients of ``lr``, from those of each tensor's α."""
    if _is_shared(lr):
        return [torch.stack([x.to(sums[0].dtype) for x in sums]).sum().reshape(lr[0].shape).to(lr[0].dtype)]
    if step >= 0:  # zero at the other steps
        sums = [
            F.pad(x.unsqueeze(0), (*[0, 0] * x.dim(), step, rate.shape[0] - 1 - step))
            for x, rate in zip(sums, lr, strict=True)
        ]
    return [x.to(rate.dtype) for x, rate in zip(sums, lr, strict=True)]


# ------------------------------------------------------------------------------------------------------ batching


def _batched(batch: Batch) -> tuple[Any, Any]:
    """Batch as more tasks, or as one more leading axis along which α is repeated.

    Where α is batched, or has the task axis of clipped or inactive tasks, the rule loops over elements.
    """
    a = batch.arguments
    params, grads = batch.leading("params"), batch.leading("grads")
    by_task = a.clip_norm is not None or a.active is not None
    own_axes = [] if _is_shared(a.lr) else [rate.dim() - (a.step >= 0) for rate in a.lr]
    has_task_axis = by_task and any(own > p.dim() - 2 for own, p in zip(own_axes, params, strict=False))
    if batch.has_axis("lr") or has_task_axis:
        return looped(batch)
    shapes, active = [p.shape for p in params], a.active
    if by_task:
        params, grads = ([x.flatten(0, 1) for x in xs] for xs in (params, grads))
        active = None if active is None else batch.leading("active").flatten()
    updated = batch.call(*a._replace(params=params, grads=grads, active=active)).updated
    return [[new.view(shape) for new, shape in zip(updated, shapes, strict=True)]], [[0] * len(params)]


update = define_op(
    "inner_update(Tensor[] params, Tensor[] grads, Tensor[] lr, float rate, int step, float? clip_norm, "
    "Tensor? active) -> Tensor[]",
    results=("updated",),
    shapes=lambda a: [p.new_empty(p.shape) for p in a.params],
    gradient=Gradient(_gradients, of=("params", "grads", "lr"), saves=("grads", "lr", "active")),
    batching=_batched,
    backends=("cpp", "cuda", "triton"),
    triton="metakern.ops.inner_update.triton",
    reference=reference.inner_update,
)
