"""A module as the learner of one task: copied within the autograd graph, and stepped along a gradient.

Finn et al. 2017, arXiv 1703.03400.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from metakern.ops.inner_update import step_of_one_task

_M = TypeVar("_M", bound=nn.Module)


class Learner(nn.Module):
    """A module that is called like the one it wraps, and that lends its attributes."""

    module: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Special methods are looked up by copy and pickle, which must not end up in the wrapped module.
            if name.startswith("__") or "module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module returns."""
        return self.module(*args, **kwargs)

    def _copy(self) -> Self:
        """A learner of the same kind around a copy of the module, in the autograd graph of this one's parameters."""
        clone = _copy_containers(self)
        clone._modules["module"] = _clone_module(self.module, {})
        return clone

    def _gradients(
        self, loss: Tensor, params: Sequence[tuple[str, Tensor]], first_order: bool, allow_unused: bool
    ) -> list[Tensor | None]:
        """Gradients of the loss, None for parameters on which it does not depend."""
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss must be one number, got shape {list(loss.shape)}")
        if not loss.requires_grad:
            raise RuntimeError("loss must depend on the learner's parameters; it does not require a gradient")
        grads: tuple[Tensor | None, ...] = ()
        if params:
            tensors, record = [p for _, p in params], not first_order
            grads = torch.autograd.grad(loss, tensors, retain_graph=record, create_graph=record, allow_unused=True)
        unused = [name for (name, _), g in zip(params, grads, strict=True) if g is None]
        if unused and not allow_unused:
            raise RuntimeError(
                f"loss must depend on every parameter, but has no use for {unused}: try allow_unused=True"
            )
        return list(grads)

    def _update(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], lr: Any) -> None:
        """Put p − lr · g in place of each parameter that has a gradient, wherever the module holds it."""
        kept = [index for index, g in enumerate(grads) if g is not None]
        rates = [lr[index] for index in kept] if isinstance(lr, list) else lr
        updated = step_of_one_task([params[index] for index in kept], [g for g in grads if g is not None], rates)
        replacement = {id(params[index]): new for index, new in zip(kept, updated, strict=True)}
        for module in self.module.modules():
            for name, p in module._parameters.items():
                if id(p) in replacement:
                    module._parameters[name] = replacement[id(p)]
            _refresh_flat_weights(module)


def _copy_containers(module: _M) -> _M:
    """A module with the same contents, whose parameters, buffers and submodules can be replaced."""
    copied: _M = type(module).__new__(type(module))
    copied.__dict__ = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[name] = dict(module.__dict__[name])
    return copied


def _clone_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of the module whose parameters, and buffers that require gradients, are ``clone()`` of the originals.

    What the module holds twice, a parameter or a submodule, the copy holds twice; ``memo`` maps the originals' ids.
    """
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    copied = memo[id(module)] = _copy_containers(module)
    tensors: Any
    for tensors in (copied._parameters, copied._buffers):
        for name, tensor in tensors.items():
            if tensor is None or (tensors is copied._buffers and not tensor.requires_grad):
                continue
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.clone()
            tensors[name] = memo[id(tensor)]
    for name, child in copied._modules.items():
        if child is not None:
            copied._modules[name] = _clone_module(child, memo)
    _refresh_flat_weights(copied)
    return copied


def _refresh_flat_weights(module: nn.Module) -> None:
    """Let an LSTM, GRU or RNN compute with the parameters that it holds now; it keeps a list of them."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]
