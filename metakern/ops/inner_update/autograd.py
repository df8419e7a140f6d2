"""Tracing, autograd and batching formulas of inner_update's operators, the same for every implementation.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.core.torch_private import below_autograd, foreach_mul, foreach_sub
from metakern.core.transforms import is_transformed_or_dual
from metakern.ops.core.devices import check_devices
from metakern.ops.inner_update import reference

#: With fewer elements the kernel does not win back what an autograd.Function in Python costs (bench_inner_update).
FUSED_ELEMENTS = 2**17


class Options(NamedTuple):
    """The operators' scalars: α where no tensor holds it, the inner step or -1, the largest norm or None."""

    rate: float
    step: int
    clip_norm: float | None


class Operators:
    """One implementation's operator. It travels through autograd as one opaque argument."""

    def __init__(self, name: str) -> None:
        """The operator torch.ops.metakern.<name>, given its formulas."""
        self.update: Callable[..., list[Tensor]] = getattr(torch.ops.metakern, name).default
        self._register(f"metakern::{name}")

    def _register(self, name: str) -> None:
        def batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            params, grads, lr, rate, step, clip_norm, active = args
            tensors, dims = (params, grads, lr, active), (*in_dims[:3], in_dims[-1])
            return _batched(update, info.batch_size, dims, tensors, Options(rate, step, clip_norm))

        def update(params: Any, grads: Any, lr: Any, active: Any, options: Options) -> list[Tensor]:
            return self.update(params, grads, lr, *options, active)

        torch.library.register_fake(name, _fake)
        torch.library.register_autograd(name, _backward, setup_context=_setup_context)
        torch.library.register_vmap(name, batched)


def call(
    operators: Operators,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: Sequence[Tensor],
    active: Tensor | None,
    options: Options,
) -> list[Tensor]:
    """The operator, by the way that serves the caller; see :func:`metakern.ops.lstm_step.autograd.call` for the ways.

    Few elements, of which a graph is recorded, take PyTorch's own operators: they give the same bits, and an
    autograd.Function in Python costs more than it saves.
    """
    if torch.compiler.is_compiling():
        return operators.update(params, grads, lr, *options, active)
    if is_transformed_or_dual():
        return list(_Update.apply(operators, options, len(params), active, *params, *grads, *lr))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*params, *grads, *lr)):
        if active is None and options.clip_norm is None and is_small((*params, *lr)):
            return subtract(params, grads, _rates(lr, options, len(params)))
        return list(_EagerUpdate.apply(operators, options, len(params), active, *params, *grads, *lr))
    with below_autograd():
        return operators.update(params, grads, lr, *options, active)


def is_small(tensors: Sequence[Tensor]) -> bool:
    """Whether these are few elements, and of one dtype whose arithmetic is its own."""
    dtype, elements = tensors[0].dtype, 0
    for x in tensors:
        if x.dtype is not dtype:
            return False
        elements += x.numel()
    return elements < FUSED_ELEMENTS and dtype in (torch.float32, torch.float64)


def subtract(params: Sequence[Tensor], grads: Sequence[Tensor], rates: list[Any]) -> list[Tensor]:
    """θ − α ⊙ g in two operators with autograd formulas of their own, the cheapest with the formula's bits."""
    factor: Any = rates if isinstance(rates[0], Tensor) else rates[0]  # a number is one for all
    return list(foreach_sub(list(params), foreach_mul(list(grads), factor)))


def formula(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: Sequence[Tensor],
    active: Tensor | None,
    options: Options,
) -> list[Tensor]:
    """What the operator computes, by the reference."""
    rates: Any = _rates(lr, options, len(params))
    updated = reference.inner_update(params, grads, rates, clip_norm=options.clip_norm, active=active)
    return [new.to(p.dtype) for new, p in zip(updated, params, strict=True)]


def _is_shared(lr: Sequence[Tensor]) -> bool:
    """Whether one tensor holds the α of everything."""
    return len(lr) == 1 and lr[0].numel() == 1


def _rates(lr: Sequence[Tensor], options: Options, count: int) -> list[Any]:
    """The step's α of each of ``count`` tensors."""
    if not lr:
        return [options.rate] * count
    if _is_shared(lr):
        return [lr[0].reshape(())] * count
    return list(lr) if options.step < 0 else [rate[options.step] for rate in lr]


def _fake(params: Sequence[Tensor], grads: Sequence[Tensor], lr: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    if params:
        check_devices("params[0]", params[0].device, params=params, grads=grads, lr=lr, active=rest[-1])
    return [p.new_empty(p.shape) for p in params]


# ------------------------------------------------------------------------------------------------------ autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, grads, lr, rate, step, clip_norm, active = inputs
    _save(ctx, grads, lr, active, Options(rate, step, clip_norm))


def _backward(ctx: Any, grad_updated: Sequence[Tensor]) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad
    grad_grads, grad_lr = _gradients(ctx, grad_updated, any(wanted[1]), any(wanted[2]))
    return list(grad_updated), grad_grads, grad_lr, None, None, None, None


def _save(ctx: Any, grads: Sequence[Tensor], lr: Sequence[Tensor], active: Tensor | None, options: Options) -> None:
    ctx.options, ctx.count = options, len(grads)
    ctx.save_for_backward(active, *grads, *lr)


class _Update(torch.autograd.Function):
    """inner_update with its formula for torch.func; the tensors travel one by one: params, grads, lr."""

    @staticmethod
    def forward(operators: Operators, options: Options, count: int, active: Tensor | None, *tensors: Tensor) -> Any:
        lists = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        return tuple(operators.update(*lists, *options, active))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, options, count, active, *tensors = inputs
        _save(ctx, tensors[count : 2 * count], tensors[2 * count :], active, options)

    @staticmethod
    def backward(ctx: Any, *grad_updated: Tensor) -> tuple[Any, ...]:
        wanted, count = ctx.needs_input_grad[4:], ctx.count
        grad_grads, grad_lr = _gradients(ctx, grad_updated, any(wanted[count : 2 * count]), any(wanted[2 * count :]))
        return None, None, None, None, *grad_updated, *grad_grads, *grad_lr

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        operators, options, count, active, *tensors = args
        lists = tensors[:count], tensors[count : 2 * count], tensors[2 * count :], active
        dims = in_dims[4 : 4 + count], in_dims[4 + count : 4 + 2 * count], in_dims[4 + 2 * count :], in_dims[3]
        update = functools.partial(call, operators)
        updated, out_dims = _batched(update, info.batch_size, dims, lists, options)
        return tuple(updated), tuple(out_dims)


class _EagerUpdate(torch.autograd.Function):
    """The same for eager mode: with a setup_context of its own, apply() would inspect signatures for 40 µs a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        _Update.setup_context(ctx, inputs, None)
        with below_autograd():
            return _Update.forward(*inputs)

    backward = _Update.backward


def _wide(x: Tensor) -> Tensor:
    """In the dtype of the arithmetic."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _gradients(
    ctx: Any, grad_updated: Sequence[Tensor], wants_grads: bool, wants_lr: bool
) -> tuple[list[Any], list[Any]]:
    """Gradients of grads and lr, differentiable, None where they are not wanted; that of params is ``grad_updated``."""
    active, *saved = ctx.saved_tensors
    options, count = ctx.options, ctx.count
    grads, lr = saved[:count], saved[count:]
    grad_grads: list[Any] = [None] * count
    grad_lr: list[Any] = [None] * len(lr)
    if not wants_grads and not wants_lr:
        return grad_grads, grad_lr
    rates, incoming = _rates(lr, options, count), [_wide(x) for x in grad_updated]
    used = [_wide(g) for g in grads]
    if active is not None:
        incoming, used = _masked(active, incoming), _masked(active, used)
    coefficients = None
    if options.clip_norm is not None:
        coefficients = reference.clip_coefficients(used, options.clip_norm)
    if wants_lr:
        clipped = used if coefficients is None else [reference.scaled(coefficients, g) for g in used]
        sums = [(-x * g).sum_to_size(rate.shape) for x, g, rate in zip(incoming, clipped, rates, strict=True)]
        grad_lr = _grad_of_rates(sums, lr, options.step)
    if wants_grads:
        steps = [-rate * x for x, rate in zip(incoming, rates, strict=True)]
        if coefficients is not None and options.clip_norm is not None:
            steps = _through_clipping(steps, used, coefficients, options.clip_norm)
        grad_grads = [step.to(g.dtype) for step, g in zip(steps, grads, strict=True)]
    return grad_grads, grad_lr


def _masked(active: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [T, *shape], zero for the tasks that rest."""
    return [torch.where(reference._per_task(active, x), x, torch.zeros_like(x)) for x in tensors]


def _through_clipping(
    cotangents: Sequence[Tensor], grads: Sequence[Tensor], coefficients: Tensor, clip_norm: float
) -> list[Tensor]:
    """Gradient of g, given that of c(g) · g for c = min(1, clip_norm / ‖g‖): c x − c³ / clip_norm² ⟨x, g⟩ g.

    In the dtype of the coefficients: float32 does not hold c³ where the norm is far from ``clip_norm``.
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


def _batched(update: Callable[..., Any], batch: int, dims: Any, tensors: Any, options: Options) -> tuple[Any, Any]:
    """torch.func.vmap of inner_update: more tasks, or one more leading axis that α is repeated along.

    Where α is batched, or has the task axis of clipped or resting tasks, elements are taken one after another.

    Args:
        update: takes params, grads, lr, active and options to the new params
        batch: size of the axis
        dims: where it is in ``tensors``, None where it is not
        tensors: params, grads, lr, active
        options: the scalars
    """
    lr, active = tensors[2:]
    params, grads = ([leading(x, dim, batch) for x, dim in zip(tensors[i], dims[i], strict=True)] for i in range(2))
    shapes, out_dims = [p.shape for p in params], [0] * len(params)
    by_task = options.clip_norm is not None or active is not None
    own_axes = [] if _is_shared(lr) else [rate.dim() - (options.step >= 0) for rate in lr]
    has_task_axis = by_task and any(own > p.dim() - 2 for own, p in zip(own_axes, params, strict=False))
    if any(dim is not None for dim in dims[2]) or has_task_axis:
        rows = []
        for index in range(batch):
            rates = [x if dim is None else x.select(dim, index) for x, dim in zip(lr, dims[2], strict=True)]
            own_active = active if dims[3] is None else active.select(dims[3], index)
            rows.append(update([p[index] for p in params], [g[index] for g in grads], rates, own_active, options))
        return [torch.stack(news) for news in zip(*rows, strict=True)], out_dims
    if by_task:
        params, grads = ([x.flatten(0, 1) for x in xs] for xs in (params, grads))
        active = None if active is None else leading(active, dims[3], batch).flatten()
    updated = update(params, grads, lr, active, options)
    return [new.view(shape) for new, shape in zip(updated, shapes, strict=True)], out_dims


def leading(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """With the batch axis first."""
    return x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
