"""Batch norm, activation and max-pooling of a model under torch.vmap, joined into one kernel for all tasks.

Under torch.vmap, PyTorch permutes and copies images around batch norm, and the second derivatives of batch norm and
pooling come apart into dozens of passes. :func:`metakern.ops.task_norm_act_pool` takes the place of the sequence.

Axis legend: S samples of a task, C channels, [H, W] images.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.core.torch_private import forward_mode_is_active, func_level
from metakern.core.transforms import is_batched, wants_gradient
from metakern.inner_loop.pending import Pending, Recipe, Running, recipe_of, tensor_of, tensors_of
from metakern.inner_loop.task_layers import TaskLayers

OPERATOR = "task_norm_act_pool"

#: Elements of a task's images from which the kernel is faster than PyTorch's functions; see bench/NOTES.md.
KERNEL_ELEMENTS = 0


class TaskNorms:
    """Joins these layers of one task's evaluation.

    A batch norm yields a :class:`Pending`, which an activation and a max-pooling of 2 by 2 may join if they are the
    next functions that the model calls. Any other call computes what is pending first, so that nothing the model
    changes in place meanwhile can be seen.

    Args:
        layers: the kernels of the model
        names: its parameters by id
    """

    def __init__(self, layers: TaskLayers, names: Mapping[int, str]) -> None:
        self.layers, self.names, self.level = layers, names, func_level()
        self.open: list[weakref.ref[Pending]] = []

    def call(self, func: Callable[..., Any], types: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """The result of a function if it can be joined, else None, with its arguments as tensors."""
        step = _STEPS.get(func)
        first = args[0] if args else kwargs.get("input")
        if func is F.batch_norm or recipe_of(first) is None:
            self.finish()
            if Pending in types:
                args, kwargs = tensors_of(args), tensors_of(kwargs)
        result = None if step is None else step(self, *args, **kwargs)
        if step is not None and result is None and Pending in types:
            self.finish()
            args, kwargs = tensors_of(args), tensors_of(kwargs)
        return result, args, kwargs

    def finish(self) -> None:
        """Compute what is pending and can still be used."""
        while self.open:
            tensor_of(self.open.pop()())

    def batch_norm(
        self,
        input: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: Any = False,
        momentum: Any = 0.1,
        eps: Any = 1e-5,
    ) -> Any:
        """F.batch_norm."""
        x = input
        running, affine = (running_mean, running_var), (weight, bias)
        reason = self._unserved(x) or _unserved_norm(x, running, affine, training, momentum, eps)
        if isinstance(x, Tensor) and x.dim() == 4:
            self._found(self._label(weight, x), reason)
        if reason:
            return None
        moved = Running(running_mean, running_var, momentum)
        return self._pending(Recipe(x, weight, bias, "batch" if training else "given", moved, eps))

    def relu(self, input: Any, inplace: Any = False) -> Any:
        """F.relu."""
        return self._activation(input, inplace, "relu", 0.0)

    def relu_(self, input: Any) -> Any:
        """torch.relu_."""
        return self._activation(input, True, "relu", 0.0)

    def leaky_relu(self, input: Any, negative_slope: Any = 0.01, inplace: Any = False) -> Any:
        """F.leaky_relu."""
        if type(negative_slope) not in (int, float) or not 0 <= negative_slope < math.inf:
            return None
        return self._activation(input, inplace, "leaky_relu", float(negative_slope))

    def max_pool2d(
        self,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: Any = False,
        return_indices: Any = False,
    ) -> Any:
        """F.max_pool2d."""
        recipe = recipe_of(input)
        alone = recipe is None or recipe.statistics == "none"
        if recipe is None or recipe.pool:
            recipe = None if self._unserved(tensor_of(input)) else Recipe(tensor_of(input))
        of_two = _is(kernel_size, 2) and (stride is None or stride in ([], ()) or _is(stride, 2))
        plain = of_two and _is(padding, 0) and _is(dilation, 1) and not ceil_mode and not return_indices
        if recipe is None or not plain or min(recipe.x.shape[2:]) < 2:
            return None
        if alone:
            self._found("max-pooling", "")
        return self._pending(dataclasses.replace(recipe, pool=True))

    def _activation(self, input: Any, inplace: Any, activation: str, slope: float) -> Any:
        recipe = recipe_of(input)
        if recipe is None:
            if inplace or self._unserved(input):
                return None
            recipe = Recipe(input)
        elif recipe.pool or recipe.activation != "identity":
            return None
        recipe = dataclasses.replace(recipe, activation=activation, slope=slope)
        if not inplace:
            return self._pending(recipe)
        input._recipe = recipe  # what the variable means from now on
        return input

    def _pending(self, recipe: Recipe) -> Pending:
        pending = Pending(recipe)
        self.open.append(weakref.ref(pending))
        return pending

    def _unserved(self, x: Any) -> str:
        """Why no kernel takes these images; empty where one does."""
        if self.layers.missing:
            return self.layers.missing
        if not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:
            return "its input is no images [S, C, H, W]"
        if x.dtype not in (torch.float32, torch.float64):
            return f"its dtype is {x.dtype}, not float32 or float64"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if forward_mode_is_active():
            return "the kernels have no forward-mode derivative"
        if func_level() != self.level:
            return "the model transforms it by torch.func"
        too_small = x.device.type == "cpu" and x.numel() < KERNEL_ELEMENTS
        return "it is too small for a kernel" if too_small else ""

    def _found(self, label: str, reason: str) -> None:
        self.layers.record(OPERATOR, label, reason)

    def _label(self, weight: Any, x: Tensor) -> str:
        name = self.names.get(id(weight))
        return f"a batch norm of {x.shape[1]} channels" if name is None else name.rpartition(".")[0] or name


def _unserved_norm(x: Tensor, running: Any, affine: Any, training: Any, momentum: Any, eps: Any) -> str:
    """Why no kernel takes this batch norm; empty where one does."""
    if not all(t is None or (isinstance(t, Tensor) and t.shape == x.shape[1:2]) for t in (*running, *affine)):
        return "its statistics or weights are not those of its channels"
    tensors = [t for t in (*running, *affine) if t is not None]
    if any(t.dtype != x.dtype or t.device != x.device for t in tensors):
        return "its dtypes or devices differ"
    if type(eps) is not float or not 0 < eps < math.inf or type(momentum) not in (int, float):
        return f"its eps is {eps} and its momentum {momentum}"
    if not training:
        given = all(t is not None and not wants_gradient(t) for t in running)
        return "" if given else "its running statistics are not given, or have a gradient"
    if x.numel() == x.shape[1]:
        return "it has one value a channel"
    moved = [t for t in running if t is not None]
    shared = is_batched(x) and not all(map(is_batched, moved))
    return "the tasks share the running statistics that it moves" if shared else ""


def _is(value: Any, number: int) -> bool:
    """Whether an option for both axes, given as one number or two, is this number."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return len(values) in (1, 2) and all(type(v) is int and v == number for v in values)


_STEPS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: TaskNorms.batch_norm,
    F.relu: TaskNorms.relu,
    torch.relu: TaskNorms.relu,
    Tensor.relu: TaskNorms.relu,
    torch.relu_: TaskNorms.relu_,
    F.leaky_relu: TaskNorms.leaky_relu,
    F.max_pool2d: TaskNorms.max_pool2d,
    torch.max_pool2d: TaskNorms.max_pool2d,
}
