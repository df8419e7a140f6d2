"""Recognises models and losses by a recording: one call under a mode that sees every PyTorch function.

A model with its own ``forward``, or a user-defined loss, is served if it calls the same functions as the known layers
and losses. Every call of adapt or meta_loss makes its own recording, and nothing is cached. An unknown function ends
the recording before it runs, so a recording draws no random numbers of PyTorch and writes into no tensors. Other Python
code in a ``forward`` or a loss runs once.

Axis legend: S samples of a task, I inputs and O outputs of the model.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from metakern.core.text import first_line
from metakern.inner_loop.as_shipped import HOOKS, KNOWN_CLASSES, changed_functions, changed_instance, is_plain
from metakern.inner_loop.engines.mlp_model import LOSS_FUNCTIONS, Chain, Mlp, leaky_relu
from metakern.inner_loop.engines.protocol import Unserved
from metakern.inner_loop.lineage import used_by
from metakern.ops.mlp_inner_loop.arguments import MAX_LAYERS

#: Functions that read metadata, which is the same for every task and step.
_READS = frozenset(
    [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "itemsize")]
    + [Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__]
    + [Tensor.is_floating_point, torch.is_floating_point, torch.is_tensor, torch.numel]
)

#: Conversions, allowed only where they are no-ops and return their first argument.
_CASTS = frozenset([Tensor.contiguous, Tensor.to, Tensor.float, Tensor.double, Tensor.long, Tensor.type_as])

_RESHAPES = frozenset([Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten])

_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys([F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_], "relu"),
    **dict.fromkeys([torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_], "tanh"),
    **dict.fromkeys([torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_], "sigmoid"),
    F.gelu: "gelu",
}

_DIFFERENCES = frozenset([torch.sub, Tensor.sub, Tensor.__sub__, torch.subtract, Tensor.subtract])
_POWERS = frozenset([torch.pow, Tensor.pow, Tensor.__pow__])
_SQUARES = frozenset([torch.square, Tensor.square])
_PRODUCTS = frozenset([torch.mul, Tensor.mul, Tensor.__mul__, torch.multiply, Tensor.multiply])
_MEANS = frozenset([torch.mean, Tensor.mean])

#: PyTorch classes that a recorded model may contain. A model with any other is not run.
_KNOWN_MODULES = (*KNOWN_CLASSES, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

_DROPOUT, _LEAKY = inspect.signature(F.dropout), {F.leaky_relu: inspect.signature(F.leaky_relu)}
_SIGNATURES = {f: inspect.signature(f) for f in LOSS_FUNCTIONS}


#: Containers that are checked for changes, up to this many elements.
_CONTAINERS, _SMALL = frozenset([dict, list, set]), 64


class _Stop(BaseException):
    """Ends a recording; a BaseException, so that recorded code does not catch it by ``except Exception``."""


class _Recorder(TorchFunctionMode):
    """Mode that runs the functions that ``step`` knows, and ends the recording at any other.

    Attributes:
        reason: why the recorded code is not served; empty so far
        current: result of the last function
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.reason = device, ""
        self.current: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.reason:  # refused before, but the recorded code caught the exception
            raise _Stop
        if func in _READS:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            self.refuse("switches gradients off")
        if torch.is_autocast_enabled(self.device.type):
            self.refuse("runs under autocast")
        if func in _CASTS:
            if not args or not self.is_known(args[0]):
                self.refuse(f"calls {_name(func)} of other tensors")
            result = func(*args, **kwargs)
            if result is not args[0]:
                self.refuse(f"calls {_name(func)}, which changes dtype, device or layout")
            return result
        return self.step(func, args, kwargs)

    def step(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run and record a function that computes, or refuse it."""
        raise NotImplementedError

    def is_known(self, x: Any) -> bool:
        """Whether ``x`` is a tensor of the recorded computation."""
        return x is self.current

    def refuse(self, does: str) -> None:
        """End the recording, as the recorded code does something that is not served."""
        self.stop(f"{self.what} {does}")

    def stop(self, reason: str) -> None:
        """End the recording with this reason."""
        self.reason = reason
        raise _Stop

    def record(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function`` under the recording, and return its result.

        Raises:
            Unserved: for unknown functions, and errors
        """
        try:
            with torch.enable_grad(), self:
                result = function(*args)
        except _Stop:
            result = None
        except Exception as error:  # the generic path will meet it, too
            raise Unserved(f"{self.what} raises {first_line(error)}") from error
        if not self.reason and result is not self.current:
            self.reason = f"{self.what} returns something else than the last function's result"
        if self.reason:
            raise Unserved(self.reason)
        return result

    what = "it"


def _name(func: Any) -> str:
    name = getattr(func, "__name__", None) or str(func)
    owner = getattr(func, "__self__", None)  # the attribute, if func is its getter
    return getattr(owner, "__name__", name) if name == "__get__" else name


# ----------------------------------------------------------------------------------------------------------- models


class _Layers(_Recorder):
    """Records a chain of layers.

    Args:
        x: [S, ...], the model's input
        names: names of the tensors that replace the model's parameters, by id
    """

    what = "the model's forward"

    def __init__(self, x: Tensor, names: dict[int, str]) -> None:
        super().__init__(x.device)
        self.current, self.names, self.chain = x, names, Chain()
        self.version = x._version

    def step(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Record one layer, activation or change of shape."""
        known = kwargs.get("input", kwargs.get("self")) if not args else args[0]
        if known is not self.current:
            self.refuse(f"calls {_name(func)} of something else than the last function's result")
        self.check_version()
        if func is F.linear:
            self._linear(*args, **kwargs)
        elif func in _ACTIVATIONS:
            if func is F.gelu and kwargs.get("approximate", "none") != "none":
                self.refuse("calls gelu with an approximation")
            self._note(self.chain.add_activation, _ACTIVATIONS[func])
        elif func in _LEAKY:
            slope = _LEAKY[func].bind(*args, **kwargs).arguments.get("negative_slope", 0.01)
            self._note(lambda: self.chain.add_activation(leaky_relu(slope)))
        elif func is F.dropout:
            if _DROPOUT.bind(*args, **kwargs).arguments.get("training", True) is not False:
                self.refuse("calls dropout in train() mode")
        elif func not in _RESHAPES:
            self.refuse(f"calls {_name(func)}")
        result = func(*args, **kwargs)
        if func in _RESHAPES or func is F.dropout:
            self._reshaped(func, result)
        self.current, self.version = result, result._version
        return result

    def check_version(self) -> None:
        """Refuse if the last result (at first, the samples) was written in place."""
        if self.current._version != self.version:
            self.refuse("writes into samples or results of its layers")

    def _linear(self, input: Tensor, weight: Any, bias: Any = None) -> None:
        parameters = [id(p) in self.names for p in (weight, bias) if p is not None]
        if not all(parameters):
            self.refuse("calls linear with weights that are no parameters of the model")
        names = [self.names.get(id(p), "") for p in (weight, bias)]
        self._note(self.chain.add_linear, names[0], weight, names[1], bias)

    def _note(self, add: Callable[..., None], *args: Any) -> None:
        try:
            add(*args)
        except Unserved as unserved:
            self.stop(str(unserved))

    def _reshaped(self, func: Any, result: Tensor) -> None:
        x: Tensor = self.current
        rows = (x.shape[0], x[0].numel())
        if result.dtype != x.dtype or result.shape not in (x.shape, rows):
            self.refuse(f"calls {_name(func)} to another shape than that of flat samples")
        if result.shape != x.shape:
            self._note(self.chain.add_flatten)


def record_mlp(model: nn.Module, samples: Sequence[Tensor]) -> Mlp:
    """Record the chain of layers that a model computes for a task.

    Args:
        model: any module
        samples: [S, ...] of one task for each of its sets; the model is called once per shape

    Raises:
        Unserved: for a model that computes anything else
    """
    reason = changed_functions() or _unrecorded(model)
    if reason:
        raise Unserved(reason)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    before = _Surroundings("the model's forward", model)
    chains: dict[Any, Chain] = {}
    for x in samples:
        if x.shape not in chains:
            chains[x.shape] = _chain_of(model, parameters, x)
    before.check()
    found = list(chains.values())
    if any(not chain.equals(found[0]) for chain in found[1:]):
        raise Unserved("the model computes something else for query sets of another size")
    if {name for name in found[0].names if name} != set(parameters):
        raise Unserved("the model has parameters that its layers do not use")
    found[0].params = [parameters[name] if name else p for name, p in zip(found[0].names, found[0].params, strict=True)]
    return found[0].mlp(recorded=True)


def _chain_of(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Chain:
    """The chain that a model computes for ``x`` with other tensors in place of its parameters.

    The inner loop evaluates models the same way. A forward that reaches a parameter otherwise, through a variable or a
    list, would not see it adapt; here it is refused.
    """
    instead = {name: p.detach() for name, p in parameters.items()}
    recorder = _Layers(x, {id(p): name for name, p in instead.items()})
    versions = [p._version for p in instead.values()]
    recorder.record(lambda: functional_call(model, instead, (x,), tie_weights=False))
    try:
        recorder.check_version()
    except _Stop:
        raise Unserved(recorder.reason) from None
    if versions != [p._version for p in instead.values()]:
        raise Unserved("the model's forward writes into its parameters")
    return recorder.chain


class _Surroundings:
    """Snapshot of the state that a call could change besides its results: attributes, variables, random numbers.

    For instance, a model that counts its calls may compute something else in the next one.

    Args:
        what: name of the callable in messages
        called: the module or other callable
    """

    def __init__(self, what: str, called: Any) -> None:
        self.what, self.called = what, called
        self.before, self.random = self._held(), _random_states()

    def check(self) -> None:
        """Raise Unserved if anything changed since the snapshot."""
        now = self._held()
        if len(now) != len(self.before) or any(a is not b for a, b in zip(now, self.before, strict=True)):
            raise Unserved(f"{self.what} changes attributes or variables")
        if _random_states() != self.random:
            raise Unserved(f"{self.what} draws random numbers")

    def _held(self) -> list[Any]:
        """Attributes, objects in closures and globals, and the elements of small containers among these."""
        modules = list(self.called.modules()) if isinstance(self.called, nn.Module) else []
        held = [d for m in modules for d in (vars(m), m._parameters, m._modules, m._buffers)]
        found = _elements(held or [getattr(self.called, "__dict__", {})])
        for function in {id(f): f for f in ([type(m).forward for m in modules] or [self.called])}.values():
            found += used_by(function)
        return found + _elements(x for x in found if type(x) in _CONTAINERS and 0 < len(x) <= _SMALL)


def _elements(containers: Iterable[Any]) -> list[Any]:
    """Keys and values of dicts, and elements of other containers."""
    found: list[Any] = []
    for each in containers:
        found += each
        if isinstance(each, dict):
            found += each.values()
    return found


def _random_states() -> tuple[Any, ...]:
    """Random states of Python and NumPy; a recording cannot draw from PyTorch's generators."""
    _, _, *numpy_state = numpy.random.get_state()  # noqa: NPY002 -- what a forward may draw from
    return random.getstate(), numpy_state


def _unrecorded(model: nn.Module) -> str:
    """Why a model need not, or must not, be run for a recording; empty if it may."""
    layers = 0
    for module in model.modules():
        kind, reason = type(module), changed_instance(module)
        if reason == HOOKS:
            return reason
        if module._compiled_call_impl is not None:
            return "the model is compiled"
        if any(buffer is not None for buffer in module._buffers.values()):
            return f"the model has buffers: {kind.__name__}"
        if kind.__module__.split(".")[0] == "torch" and kind not in _KNOWN_MODULES:
            return f"the model is no chain of nn.Linear with activations between: {kind.__name__}"
    for p in model.parameters():
        if not is_plain(p):
            return "the model has weights that are no plain tensors"
        if p.dim() not in (1, 2):
            return f"the model has a parameter of shape {list(p.shape)}, which is none of an nn.Linear"
        layers += p.dim() == 2
    return "" if 1 <= layers <= MAX_LAYERS else f"the model has {layers} layers; 1 to {MAX_LAYERS} are served"


# ----------------------------------------------------------------------------------------------------------- losses


class _Loss(_Recorder):
    """Records a loss: a function of PyTorch, or the mean of the squares of a difference.

    Args:
        prediction: [S, O]
        target: targets of these samples
    """

    what = "the loss"

    def __init__(self, prediction: Tensor, target: Tensor) -> None:
        super().__init__(prediction.device)
        self.prediction, self.target = prediction, target
        self.versions = prediction._version, target._version
        self.stage, self.name = "", ""

    def is_known(self, x: Any) -> bool:
        """Whether ``x`` is the prediction, the target or the last result."""
        return any(x is known for known in (self.prediction, self.target, self.current))

    def step(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Record one function of the loss."""
        stage = self._stage(func, args, kwargs)
        if not stage:
            self.refuse(f"calls {_name(func)}")
        self.stage, self.current = stage, func(*args, **kwargs)
        return self.current

    def _stage(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        """The stage of the loss that this function computes: "difference", "squares" or "loss"; else empty."""
        if func in LOSS_FUNCTIONS and not self.stage:
            self.name = LOSS_FUNCTIONS[func]
            return "loss" if self._is_plain(func, args, kwargs) else ""
        if kwargs:
            return ""
        ours, of_current = [id(x) for x in args], [x is self.current for x in args]
        if func in _DIFFERENCES and not self.stage:
            return "difference" if sorted(ours) == sorted([id(self.prediction), id(self.target)]) else ""
        if self.stage == "difference":
            squared = func in _SQUARES and of_current == [True]
            squared = squared or (func in _PRODUCTS and of_current == [True, True])
            squared = squared or (func in _POWERS and of_current == [True, False] and _is_two(args[1]))
            return "squares" if squared else ""
        if self.stage == "squares" and func in _MEANS and of_current == [True]:
            self.name = "mse"
            return "loss"
        return ""

    def _is_plain(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether ``func`` is called with prediction and target, and default options."""
        signature = _SIGNATURES[func]
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        pair = arguments.pop("input"), arguments.pop("target")
        if pair[0] is not self.prediction or pair[1] is not self.target:
            return False
        return all(
            value is default or (type(value) is type(default) and value == default)
            for value, default in ((v, signature.parameters[name].default) for name, v in arguments.items())
        )


def _is_two(x: Any) -> bool:
    return type(x) in (int, float) and x == 2


def record_loss(loss: Callable[..., Any], mlp: Mlp, targets: Sequence[Tensor]) -> str:
    """Record a callable loss, and return the name of the fused inner loop's loss that it computes.

    Args:
        loss: called as ``loss(prediction, y)``
        mlp: the model
        targets: [S, ...] of one task for each of its sets; the loss is called once per shape

    Raises:
        Unserved: for any other loss
    """
    reason = changed_functions()
    if isinstance(loss, nn.Module) and any(changed_instance(m) == HOOKS for m in loss.modules()):
        reason = "the loss has hooks"
    if reason:
        raise Unserved(reason)
    names: dict[Any, str] = {}
    before = _Surroundings("the loss", loss)
    for y in targets:
        if y.shape in names:
            continue
        # Zeros will do: no known loss branches on the values.
        prediction = mlp.params[0].detach().new_zeros(y.shape[0], mlp.widths[-1]).requires_grad_()
        recorder = _Loss(prediction, y)
        recorder.record(loss, prediction, y)
        if recorder.stage != "loss" or recorder.versions != (prediction._version, y._version):
            raise Unserved("the loss is none of mse_loss, cross_entropy and binary_cross_entropy_with_logits")
        names[y.shape] = recorder.name
    before.check()
    if len(set(names.values())) != 1:
        raise Unserved("the loss is another one for query sets of another size")
    return names[targets[0].shape]
