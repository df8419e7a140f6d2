"""Recognises models and losses of the fused inner loop: chains of linear layers with activations between them.

Models made of torch.nn's own classes are recognised by class, at every call: nothing is cached, so no change of a model
goes unseen. For other models and losses see :mod:`metakern.inner_loop.engines.recorded`.

Axis legend: T tasks, S samples of a task, I inputs and O outputs of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.core.transforms import wants_gradient
from metakern.inner_loop.as_shipped import changed_class, changed_classes, changed_functions, changed_instance, is_plain
from metakern.inner_loop.engines.protocol import Unserved
from metakern.ops.mlp_inner_loop import unserved, unserved_by_triton, unserved_on_cuda
from metakern.rules.rates import LearningRates

ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.GELU: "gelu"}

LOSS_FUNCTIONS: dict[Callable[..., Tensor], str] = {
    F.mse_loss: "mse",
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
}
_LOSS_MODULES: dict[type, str] = {
    nn.MSELoss: "mse",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "binary_cross_entropy_with_logits",
}


#: Classes that a recognised model may consist of.
_LAYERS = frozenset([nn.Sequential, nn.Linear, *ACTIVATIONS, nn.LeakyReLU, nn.Identity, nn.Flatten, nn.Dropout])


class Mlp(NamedTuple):
    """A multilayer perceptron in the form that the fused inner loop takes.

    Attributes:
        names: names of the parameters; empty where a layer has no bias
        params: weight [O, I] and bias [O] of every layer in turn
        widths: inputs, then the units of every layer
        activation: between the layers, by the names of :func:`metakern.ops.mlp_inner_loop`: one, or one for each pair
        flattens: whether the model flattens a sample first
        recorded: whether it was recognised by a recording, not by its classes
    """

    names: list[str]
    params: list[Tensor]
    widths: tuple[int, ...]
    activation: str | tuple[str, ...]
    flattens: bool
    recorded: bool = False

    def samples(self, x: Tensor) -> Tensor:
        """The model's inputs as samples [T, S, I]."""
        if self.flattens:
            # x.view(-1, 1) in a recorded forward takes samples that are one number each; nn.Flatten does not.
            x = x.unsqueeze(2) if self.recorded and x.dim() == 2 else x.flatten(2)
        if x.dim() != 3 or x.shape[2] != self.widths[0]:
            raise Unserved(f"the samples are {list(x.shape)}, not [T, S, {self.widths[0]}]")
        return x

    def rates(self, rates: LearningRates, names: Sequence[str], steps: int) -> float | Tensor | list[Tensor]:
        """Learning rates of all ``params``: those of the adapted parameters ``names``, and 0 for the others."""
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


class Chain:
    """Builder of an :class:`Mlp`: collects a model's layers in the order in which they run.

    Attributes:
        names, params: as in :class:`Mlp`
        activations: the activations between consecutive layers
        after_linear: whether the last layer was linear, so that an activation may follow
        flattens: whether a sample is flattened before the first layer
    """

    __slots__ = ("activations", "after_linear", "flattens", "names", "params")

    def __init__(self) -> None:
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.activations: list[str] = []
        self.after_linear = self.flattens = False

    def add_linear(self, weight_name: str, weight: Any, bias_name: str, bias: Any) -> None:
        """Append a linear layer; ``bias`` is None for a layer without one."""
        if self.after_linear:
            self.activations.append("identity")
        if not is_plain(weight) or not (bias is None or is_plain(bias)):
            raise Unserved("the model has weights that are no plain tensors")
        if bias is None:
            bias_name, bias = "", weight.new_zeros(weight.shape[0])
        self.names += (weight_name, bias_name)
        self.params += (weight, bias)
        self.after_linear = True

    def add_activation(self, name: str) -> None:
        """Append an activation after a linear layer."""
        if not self.after_linear:
            raise Unserved(f"the model has {name} elsewhere than behind an nn.Linear")
        self.activations.append(name)
        self.after_linear = False

    def add_flatten(self) -> None:
        """Note that samples are flattened before the first layer."""
        if self.params:
            raise Unserved("the model flattens between layers")
        self.flattens = True

    def equals(self, other: Chain) -> bool:
        """Whether the other chain has the same layers with the same parameter names."""
        ours, others = ((c.names, c.activations, c.after_linear, c.flattens) for c in (self, other))
        return ours == others

    def mlp(self, recorded: bool) -> Mlp:
        """The finished model.

        Raises:
            Unserved: unless the chain ends in a linear layer, with untied parameters of one dtype and device
        """
        if not self.after_linear:
            raise Unserved("the model does not end in nn.Linear")
        params = self.params
        if len(set(map(id, params))) != len(params):
            raise Unserved("the model has tied parameters")
        dtype, device = params[0].dtype, params[0].device
        for p in params:
            if p.dtype is not dtype or p.device != device:
                raise Unserved("the parameters differ in dtype or device")
        widths = (params[0].shape[1], *[p.shape[0] for p in params[1::2]])
        kinds = self.activations
        activation = tuple(kinds) if len(set(kinds)) > 1 else kinds[0] if kinds else "relu"
        return Mlp(self.names, params, widths, activation, self.flattens, recorded)


def find_mlp(model: nn.Module) -> Mlp:
    """Recognise a model of torch.nn's own classes: layers in nn.Sequential, nested at will.

    Raises:
        Unserved: for any other model, and if PyTorch or the model was patched
    """
    compiling = torch.compiler.is_compiling()
    reason = changed_functions() or (changed_classes() if compiling else "")
    if reason:
        raise Unserved(reason)
    chain = Chain()
    kinds: set[type] = set()
    _add(model, "", chain, kinds)
    if not compiling:
        for kind in kinds:
            reason = changed_class(kind)
            if reason:
                raise Unserved(reason)
    return chain.mlp(recorded=False)


def _add(module: nn.Module, prefix: str, chain: Chain, kinds: set[type]) -> None:
    """Append a module and its submodules to the chain, and their classes to ``kinds``."""
    kind = type(module)
    if kind not in _LAYERS:
        raise Unserved(f"the model is no chain of nn.Linear with activations between: {kind.__name__}")
    reason = changed_instance(module)
    if reason:
        raise Unserved(reason)
    kinds.add(kind)
    held = module._parameters
    if kind is nn.Linear:
        own = module.__dict__
        if len(held) != 2 or "weight" not in held or "bias" not in held or "weight" in own or "bias" in own:
            raise Unserved("the model has other parameters than weight and bias of its layers")
        chain.add_linear(prefix + "weight", held["weight"], prefix + "bias", held["bias"])
    elif held:
        raise Unserved("the model has other parameters than weight and bias of its layers")
    if kind is nn.Sequential:
        for name, child in module._modules.items():
            _add(child, f"{prefix}{name}.", chain, kinds)  # type: ignore[arg-type]
    elif module._modules:
        raise Unserved(f"the model has modules within an nn.{kind.__name__}")
    elif kind in ACTIVATIONS:
        if kind is nn.GELU and module.approximate != "none":
            raise Unserved("the model has an approximate GELU")
        chain.add_activation(ACTIVATIONS[kind])
    elif kind is nn.LeakyReLU:
        chain.add_activation(leaky_relu(module.negative_slope))
    elif kind is nn.Flatten:
        if module.start_dim != 1 or module.end_dim != -1:
            raise Unserved("the model flattens other axes than those of a sample")
        chain.add_flatten()
    elif kind is nn.Dropout and module.training:
        raise Unserved("the model has nn.Dropout in train() mode")


def leaky_relu(slope: Any) -> str:
    """The operators' name for a leaky ReLU of this slope; raises Unserved for one that is not a finite number ≥ 0."""
    if type(slope) not in (int, float) or not 0 <= slope < math.inf:
        raise Unserved(f"the model has a leaky ReLU of slope {slope}")
    return f"leaky_relu:{float(slope)!r}"


def known_loss(loss: Any) -> str:
    """The name of a loss recognised by its function or class; empty for any other loss.

    Names are those of :func:`metakern.ops.mlp_inner_loop`.
    """
    if not isinstance(loss, nn.Module):
        for function, name in LOSS_FUNCTIONS.items():  # a loop, as a user's loss may be unhashable
            if loss is function:
                return name
        return ""
    name = _LOSS_MODULES.get(type(loss), "")
    if not name or changed_instance(loss) or (not torch.compiler.is_compiling() and changed_class(type(loss))):
        return ""
    options = [getattr(loss, option, None) for option in ("weight", "pos_weight")]
    plain = loss.reduction == "mean" and options == [None, None] and not getattr(loss, "label_smoothing", 0)
    return name if plain and getattr(loss, "ignore_index", -100) == -100 else ""


def unserved_size(mlp: Mlp, backend: str, loss: str, steps: int, support: Tensor, query: Tensor | None = None) -> str:
    """Why the kernels of ``backend`` do not serve a model and samples [T, S, I] of this size; empty if they do."""
    first, sizes = mlp.params[0], (support.shape[1], 0 if query is None else query.shape[1])
    if backend == "triton":
        return unserved_by_triton(mlp.widths)
    if backend == "cuda":
        return unserved_on_cuda(mlp.widths, *sizes, steps, mlp.activation, loss, first.dtype, first.device)
    return unserved(mlp.widths, max(sizes), first.dtype)


def check_data(mlp: Mlp, loss: str, x: Tensor, y: Tensor) -> None:
    """Raise Unserved for samples and targets of one set that the kernels do not support."""
    first = mlp.params[0]
    if not is_plain(x) or not is_plain(y):
        raise Unserved("the samples are of a subclass of Tensor")
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
