"""Which models and losses the fused inner loop serves: chains of linear layers with one kind of activation.

Axis legend: T tasks, S samples of a task, I inputs and O outputs of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern._rates import LearningRates
from metakern.ops.mlp_inner_loop import unserved, unserved_by_triton, unserved_on_cuda
from metakern.ops.mlp_inner_loop_autograd import wants_gradient

_ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.GELU: "gelu"}

_LOSS_FUNCTIONS = {
    F.mse_loss: "mse",
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
}
_LOSS_MODULES: dict[type, str] = {
    nn.MSELoss: "mse",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "binary_cross_entropy_with_logits",
}


class Unserved(Exception):
    """Why the fused inner loop does not serve a call."""


class Mlp(NamedTuple):
    """A model as the fused inner loop takes it.

    Attributes:
        names: of the parameters; empty where a layer has no bias
        params: weight [O, I] and bias [O] of every layer in turn
        widths: inputs, then the units of every layer
        activation: between the layers
        flattens: whether the model flattens a sample first
    """

    names: list[str]
    params: list[Tensor]
    widths: tuple[int, ...]
    activation: str
    flattens: bool

    def samples(self, x: Tensor) -> Tensor:
        """[T, S, I] from what the model takes."""
        x = x.flatten(2) if self.flattens else x
        if x.dim() != 3 or x.shape[2] != self.widths[0]:
            raise Unserved(f"the samples are {list(x.shape)}, not [T, S, {self.widths[0]}]")
        return x

    def rates(self, rates: LearningRates, names: Sequence[str], steps: int) -> float | Tensor | list[Tensor]:
        """Learning rates of the adapted parameters ``names`` as rates of all ``params``."""
        values: Any = rates.values
        if isinstance(values, float):
            return values
        dtype, device = self.params[0].dtype, self.params[0].device
        if any(rate.device != device for rate in ([values] if isinstance(values, Tensor) else values)):
            raise Unserved("the learning rates are on another device than the parameters")
        if isinstance(values, Tensor):
            return values.to(dtype)
        by_name = dict(zip(names, values, strict=True))
        nothing = self.params[0].new_zeros((steps,) if rates.per_step else ())
        return [by_name[name].to(dtype) if name in by_name else nothing for name in self.names]


class _Chain(NamedTuple):
    """How a model was recognised: what later calls compare it with, and take its parameters from."""

    modules: list[tuple[nn.Module | None, type, tuple[nn.Module, ...]]]  # None for the model; types and children
    linears: list[nn.Module]
    names: list[str]
    activation: str
    flattens: bool

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model still consists of these modules, with biases where there were some and without hooks."""
        for known, kind, children in self.modules:
            module = model if known is None else known
            if type(module) is not kind or (module._modules and tuple(module._modules.values()) != children):
                return False
            if _has_hooks(module):
                return False
        biases = [linear._parameters["bias"] is not None for linear in self.linears]
        return biases == [name != "" for name in self.names[1::2]]


#: Recognised once; every call looks whether it still holds. Not with GELU and Flatten, whose options may change, and
#: of nn.Sequential alone: a value must not hold its key.
_chains: weakref.WeakKeyDictionary[nn.Module, _Chain] = weakref.WeakKeyDictionary()


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A model of nested nn.Sequential: these, and the modules within, in order."""
    yield prefix, model
    if _is_sequential(model):
        for name, child in model._modules.items():
            yield from _modules(child, f"{prefix}{name}.")  # type: ignore[arg-type]


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _recognise(model: nn.Module) -> _Chain:
    modules: list[Any] = []
    linears: list[nn.Module] = []
    names: list[str] = []
    activation, flattens, after_linear = "", False, False
    for prefix, module in _modules(model):
        if _has_hooks(module):
            raise Unserved("the model has hooks")
        kind: type = type(module)
        modules.append((None if module is model else module, kind, tuple(module._modules.values())))
        if kind is nn.Identity or _is_sequential(module):
            continue
        if kind is nn.Flatten and not linears and module.start_dim == 1 and module.end_dim == -1:
            flattens = True
        elif kind is nn.Linear and not after_linear:
            names += [f"{prefix}weight", "" if module.bias is None else f"{prefix}bias"]
            linears.append(module)
            after_linear = True
        elif kind in _ACTIVATIONS and after_linear and activation in ("", _ACTIVATIONS[kind]):
            if kind is nn.GELU and module.approximate != "none":
                raise Unserved("the model has an approximate GELU")
            activation, after_linear = _ACTIVATIONS[kind], False
        else:
            raise Unserved(f"the model is no chain of nn.Linear with one kind of activation between: {kind.__name__}")
    if not linears or not after_linear:
        raise Unserved("the model does not end in nn.Linear")
    return _Chain(modules, linears, names, activation or "relu", flattens)


def _chain(model: nn.Module) -> _Chain:
    if torch.compiler.is_compiling():  # which cannot see memories
        return _recognise(model)
    chain = _chains.get(model)
    if chain is None or not chain.is_of(model):
        chain = _recognise(model)
        if _is_sequential(model) and chain.activation != "gelu" and not chain.flattens:
            _chains[model] = chain
    return chain


def find_mlp(model: nn.Module) -> Mlp:
    """The chain of layers that the model is.

    Raises:
        Unserved: for any other model
    """
    chain = _chain(model)
    params: list[Any] = []
    for linear in chain.linears:  # past nn.Module.__getattr__, which is slow
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        params += (weight, weight.new_zeros(weight.shape[0]) if bias is None else bias)  # type: ignore[union-attr]
    if len(set(map(id, params))) != len(params):
        raise Unserved("the model has tied parameters")
    dtype, device = params[0].dtype, params[0].device
    for p in params:
        if p.dtype is not dtype or p.device != device:
            raise Unserved("the parameters differ in dtype or device")
    widths = (params[0].shape[1], *(p.shape[0] for p in params[::2]))
    return Mlp(chain.names, params, widths, chain.activation, chain.flattens)


def find_loss(loss: Callable[..., Tensor]) -> str:
    """Its name among the losses of the fused inner loop.

    Raises:
        Unserved: for any other loss
    """
    if isinstance(loss, nn.Module):
        name = _LOSS_MODULES.get(type(loss))
        options = [getattr(loss, option, None) for option in ("weight", "pos_weight")]
        plain = loss.reduction == "mean" and options == [None, None] if name else False
        if name and plain and not getattr(loss, "label_smoothing", 0) and getattr(loss, "ignore_index", -100) == -100:
            return name
    else:
        for function, name in _LOSS_FUNCTIONS.items():
            if loss is function:
                return name
    raise Unserved("the loss is none of mse_loss, cross_entropy and binary_cross_entropy_with_logits, as they are")


def unserved_size(mlp: Mlp, backend: str, loss: str, steps: int, support: Tensor, query: Tensor | None = None) -> str:
    """Why the kernels of ``backend`` do not serve models and samples, [T, S, I], of this size; empty where they do."""
    first, sizes = mlp.params[0], (support.shape[1], 0 if query is None else query.shape[1])
    if backend == "triton":
        return unserved_by_triton(mlp.widths)
    if backend == "cuda":
        return unserved_on_cuda(mlp.widths, *sizes, steps, mlp.activation, loss, first.dtype, first.device)
    return unserved(mlp.widths, max(sizes), first.dtype)


def check_data(mlp: Mlp, loss: str, x: Tensor, y: Tensor) -> None:
    """Raise Unserved for samples of one set that the kernels do not take."""
    first = mlp.params[0]
    if x.dtype != first.dtype or x.device != first.device or y.device != first.device:
        raise Unserved("samples and parameters differ in dtype or device")
    if loss == "cross_entropy":
        fits = y.dtype == torch.int64 and y.shape == x.shape[:2]
    else:
        fits = y.dtype == first.dtype and y.shape == (*x.shape[:2], mlp.widths[-1])
    if not fits:
        raise Unserved(f"the targets are {y.dtype} of shape {list(y.shape)}")
    if torch.is_grad_enabled() and (wants_gradient(x) or wants_gradient(y)):
        raise Unserved("the samples require gradients")
