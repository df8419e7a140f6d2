"""One learner for one task, as users of learn2learn write it: copied within the autograd graph, stepped by gradients.

MAML: Finn et al. 2017, arXiv 1703.03400. Meta-SGD: Li et al. 2017, arXiv 1707.09835.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from metakern._rates import check_rate
from metakern.ops.inner_update import step_of_one_task

_M = TypeVar("_M", bound=nn.Module)


class Learner(nn.Module):
    """A module that is called like the one it wraps, and that lends its attributes."""

    module: nn.Module

    def __init__(self, model: nn.Module, lr: float | Tensor) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        check_rate("lr", lr)
        self.module = model

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


class MAML(Learner):
    """Model-agnostic meta-learning, one task at a time, with the calls of ``learn2learn.algorithms.MAML``.

    For all tasks of a meta-batch at once see :func:`metakern.adapt` and :func:`metakern.meta_loss`.

    Args:
        model: any module; its parameters are the meta-parameters and it is the learner's ``module``
        lr: α, the learning rate of the inner steps, a number or a tensor of one element, which receives meta-gradients
        first_order: FOMAML: take the inner gradients as constants
        allow_unused: whether a loss may have no use for some parameters, which then stay as they are; None means
            ``allow_nograd``
        allow_nograd: whether parameters with ``requires_grad=False`` are allowed, which then stay as they are

    Buffers that require no gradient are shared between a learner and its clones, as in learn2learn: running statistics
    that a clone's batch norm gathers are the model's.

    Raises:
        TypeError, ValueError: for a model that is no module, and an ``lr`` that is not finite or has more elements.

    Example:
        >>> maml = MAML(torch.nn.Linear(3, 1), lr=0.1)
        >>> learner = maml.clone()
        >>> learner.adapt(F.mse_loss(learner(support_x), support_y))
        >>> F.mse_loss(learner(query_x), query_y).backward()  # meta-gradients in maml.parameters()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(model, lr)
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> Self:
        """A learner for one task: its parameters are copies through which meta-gradients flow to this one's.

        A clone can be cloned, adapted or not. Arguments replace those of the constructor; None keeps them.
        """
        clone = self._copy()
        clone.first_order = self.first_order if first_order is None else first_order
        clone.allow_unused = self.allow_unused if allow_unused is None else allow_unused
        clone.allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        return clone

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One inner step along the gradient of ``loss`` [], in place of the learner's parameters.

        Arguments replace those of the constructor for this step; None keeps them.

        Raises:
            TypeError, ValueError: for a loss that is no tensor or not one number.
            RuntimeError: for a loss that depends on no parameter; for parameters that require no gradient or have no
                part in the loss, where they are not allowed.
        """
        first_order = self.first_order if first_order is None else first_order
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        params = list(self.module.named_parameters())
        frozen = [name for name, p in params if not p.requires_grad]
        if frozen and not allow_nograd:
            raise RuntimeError(f"parameters must require gradients, but {frozen} do not: try allow_nograd=True")
        params = [(name, p) for name, p in params if p.requires_grad]
        grads = self._gradients(loss, params, first_order, allow_unused)
        self._update([p for _, p in params], grads, self.lr)


class MetaSGD(Learner):
    """MAML with a learned learning rate for every parameter, with the calls of ``learn2learn.algorithms.MetaSGD``.

    Li et al. 2017, "Meta-SGD", arXiv 1707.09835.

    Args:
        model: any module, the learner's ``module``; parameters that require no gradient stay as they are
        lr: first value of all learning rates
        first_order: take the inner gradients as constants
        lrs: the learning rates, one tensor a parameter of the model and of its shape, instead of ``lr``

    Attributes:
        lrs: ``nn.ParameterList``, one entry a parameter of the model; a list of tensors in a clone

    Raises:
        TypeError, ValueError: for a model that is no module, and rates of another number or shape.
    """

    lrs: Any

    def __init__(
        self, model: nn.Module, lr: float = 1.0, first_order: bool = False, lrs: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__(model, lr)
        params = list(model.parameters())
        if lrs is not None and len(lrs) != len(params):
            raise ValueError(f"lrs must have one tensor a parameter, {len(params)}, got {len(lrs)}")
        for index, (rate, p) in enumerate(zip(lrs or (), params, strict=False)):
            if not isinstance(rate, Tensor):
                raise TypeError(f"lrs[{index}] must be a tensor, got {type(rate).__name__}")
            if rate.shape != p.shape:
                raise ValueError(f"lrs[{index}] must have shape {list(p.shape)}, got {list(rate.shape)}")
        self.lrs = lrs or nn.ParameterList([nn.Parameter(torch.full_like(p, float(lr))) for p in params])
        self.first_order = first_order

    def clone(self) -> Self:
        """A learner for one task; meta-gradients flow to this one's parameters and learning rates."""
        clone = self._copy()
        clone._modules.pop("lrs", None)
        clone.lrs = [rate.clone() for rate in self.lrs]
        return clone

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One inner step along the gradient of ``loss`` [], in place of the learner's parameters.

        ``first_order`` replaces that of the constructor for this step; None keeps it.

        Raises:
            TypeError, ValueError: for a loss that is no tensor or not one number.
            RuntimeError: for a loss that does not depend on every parameter that requires a gradient.
        """
        first_order = self.first_order if first_order is None else first_order
        named = zip(self.module.named_parameters(), self.lrs, strict=True)
        trainable = [(name, p, rate) for (name, p), rate in named if p.requires_grad]
        grads = self._gradients(loss, [(name, p) for name, p, _ in trainable], first_order, allow_unused=False)
        self._update([p for _, p, _ in trainable], grads, [rate for *_, rate in trainable])


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
