"""Activation checkpointing for functions that take gradients inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metakern.core.random_state import kept_random_state, random_state, set_random_state
from metakern.core.torch_private import pytree


def recomputed(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """``function(*arguments)``; only the arguments are kept, and the backward runs the function again.

    torch.utils.checkpoint is unsuitable: it would rerun the function for every gradient that is taken inside. The
    second run has the random numbers and autocast of the first. Besides its arguments, the function must not depend on
    tensors that require a gradient. The result can be differentiated once.
    """
    leaves, structure = pytree.tree_flatten(arguments)
    results: list[Any] = []

    def flat(*flat_leaves: Any) -> tuple[Any, ...]:
        outputs, spec = pytree.tree_flatten(function(*pytree.tree_unflatten(list(flat_leaves), structure)))
        results[:] = [spec]
        return tuple(outputs)

    outputs = _Recomputed.apply(flat, *leaves)
    return pytree.tree_unflatten(list(outputs), results[0])


class _Recomputed(torch.autograd.Function):
    """See :func:`recomputed`; takes and returns flat leaves, tensors and others."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Any, ...]], *leaves: Any) -> tuple[Any, ...]:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = tensors[0].device
        ctx.function = function
        ctx.set_materialize_grads(False)  # no backward through unused results
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.random_state = random_state(device)
        kind = device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*tensors)
        return function(*leaves)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        leaves, inputs, positions = list(ctx.constants), [], []
        for position, tensor in zip(ctx.positions, ctx.saved_tensors, strict=True):
            leaves[position] = tensor.detach()
            if ctx.needs_input_grad[position + 1]:
                leaves[position].requires_grad_()
                inputs.append(leaves[position])
                positions.append(position + 1)
        kind, dtype, enabled = ctx.autocast
        with torch.enable_grad(), kept_random_state(leaves[ctx.positions[0]].device):
            set_random_state(ctx.random_state)
            with torch.autocast(kind, dtype, enabled):
                outputs = ctx.function(*leaves)
        pairs = [
            (o, c)
            for o, c in zip(outputs, cotangents, strict=True)
            if c is not None and isinstance(o, Tensor) and o.requires_grad
        ]
        found = torch.autograd.grad([o for o, _ in pairs], inputs, [c for _, c in pairs], allow_unused=True)
        grads: list[Any] = [None] * (len(leaves) + 1)
        for position, gradient in zip(positions, found, strict=True):
            grads[position] = gradient
        return tuple(grads)
