"""Detects changes to PyTorch's behaviour: patched functions and methods, active modes, hooks.

The fused inner loop recognises layers and losses by class or function, and computes what PyTorch documents for these.
It must not serve if a caller has changed their behaviour.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from metakern.core.torch_private import (
    GLOBAL_BACKWARD_HOOKS,
    GLOBAL_FORWARD_HOOKS,
    DeviceContext,
    FakeTensor,
    FakeTensorMode,
    FunctionalTensor,
    FunctionalTensorMode,
    called_by_the_compiler,
    count_dispatch_modes,
    count_function_modes,
    dispatch_modes,
    function_mode,
    nn_functions,
)

#: Registries of hooks that run for all modules; an empty registry is falsy.
GLOBAL_HOOKS = (*GLOBAL_FORWARD_HOOKS, *GLOBAL_BACKWARD_HOOKS)

#: Dispatch modes that trace operators and do not change them.
_TRACING_MODES = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)

#: Types allowed as a module's weights: plain tensors (torch.func's included) and traced ones.
_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)

HOOKS = "the model has hooks"

#: Classes that are recognised; their instances compute what PyTorch documents.
KNOWN_CLASSES = (
    nn.Module,
    nn.Sequential,
    nn.Linear,
    nn.ReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.MSELoss,
    nn.CrossEntropyLoss,
    nn.BCEWithLogitsLoss,
)


def _methods(kind: Any) -> tuple[Any, ...]:
    """The methods that calling an instance of a class runs, as currently defined."""
    return kind.forward, kind.__call__, kind._call_impl, kind.__getattr__


def _functions() -> tuple[Any, ...]:
    """The functions that these classes and torch.nn.functional call, as currently defined."""
    c = nn_functions
    return (
        *(F.linear, F.relu, F.gelu, F.leaky_relu, F.dropout, F.mse_loss, F.cross_entropy),
        *(F.binary_cross_entropy_with_logits, torch.binary_cross_entropy_with_logits),
        *(torch.relu, torch.relu_, torch.tanh, torch.sigmoid, Tensor.flatten),
        *(c.mse_loss, c.cross_entropy_loss, c.leaky_relu, c.leaky_relu_),
    )


def _shipped(functions: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """These functions; None, which never compares equal, if one was patched before this package was imported."""
    home = os.path.dirname(torch.__file__)
    codes = [f.__code__ for f in functions if hasattr(f, "__code__")]  # others are built in
    return functions if all(code.co_filename.startswith(home) for code in codes) else None


_FUNCTIONS = _shipped(_functions())
_METHODS: dict[type, tuple[Any, ...] | None] = {kind: _shipped(_methods(kind)) for kind in KNOWN_CLASSES}
_ITERATED = nn.Sequential.__iter__


@called_by_the_compiler
def changed_functions() -> str:
    """Why functions cannot be recognised by name now (patches, modes, global hooks); empty if they can."""
    for hooks in GLOBAL_HOOKS:
        if hooks:
            return "global module hooks are registered"
    if _functions() != _FUNCTIONS:
        return "a function of PyTorch that it knows is replaced by another"
    if count_function_modes() and not _only_a_default_device():
        return "a TorchFunctionMode is active"
    if count_dispatch_modes() and not _only_traced():
        return "a TorchDispatchMode is active"
    return ""


def changed_class(kind: type) -> str:
    """Why instances of one of :data:`KNOWN_CLASSES` may not compute what PyTorch documents; empty if they do."""
    changed = _methods(kind) != _METHODS[kind]
    if kind is nn.Linear:
        changed = changed or "weight" in kind.__dict__ or "bias" in kind.__dict__
    elif kind is nn.Sequential:
        changed = changed or nn.Sequential.__iter__ is not _ITERATED
    return f"a method of {kind.__name__} was replaced" if changed else ""


@called_by_the_compiler
def changed_classes() -> str:
    """The first reason that :func:`changed_class` gives for any of :data:`KNOWN_CLASSES`; empty if none."""
    return next(filter(None, map(changed_class, KNOWN_CLASSES)), "")


def changed_instance(module: nn.Module) -> str:
    """Why a call of ``module`` may run anything but its class's ``forward`` (hooks, replaced methods); empty if not."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return HOOKS
    if "forward" in own or "_call_impl" in own or own.get("_compiled_call_impl") is not None:
        return "the model has a forward that was replaced"
    return ""


def is_plain(x: Any) -> bool:
    """Whether ``x`` is a tensor or parameter, not of a subclass that may override functions."""
    return type(x) in _PLAIN


def _only_a_default_device() -> bool:
    stack = (function_mode(i) for i in range(count_function_modes()))
    return all(type(mode) is DeviceContext for mode in stack)


def _only_traced() -> bool:
    return all(type(mode) in _TRACING_MODES for mode in dispatch_modes())
