"""Layers of a model that kernels for many tasks serve: which calls under torch.vmap they take, and which not.

Under torch.vmap, convolutions with weights of each task's own become grouped ones, which PyTorch runs slowly.
:func:`metakern.ops.task_conv2d` takes their place.

Axis legend: S samples of a task, C and O channels, [H, W] images, [kh, kw] kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.core import backend as _backend
from metakern.core.torch_private import forward_mode_is_active
from metakern.core.transforms import is_batched
from metakern.inner_loop.vectorize import Slower
from metakern.ops.task_conv2d import task_conv2d

#: Products of a task's convolution from which the kernel is faster than PyTorch's grouped convolution, and from which a
#: loop over the tasks is faster on the CPU than the grouped convolution, where no kernel serves; see bench/NOTES.md.
KERNEL_PRODUCTS, LOOP_PRODUCTS = 2**19, 2**26

#: Backend of the kernels by type of device.
_BACKENDS = {"cpu": "cpp", "cuda": "triton"}


class TaskLayers:
    """The kernels for the layers of one model, and a record of what they serve.

    Args:
        device: of the model's parameters
        backend: as users name it

    Attributes:
        missing: why no kernel can run; empty where they can
        found: by operator and layer: why its kernel does not serve the layer; empty where it does
    """

    def __init__(self, device: torch.device, backend: str | None) -> None:
        self.missing = _missing(device, backend)
        self.found: dict[str, dict[str, str]] = {}

    def serves(self, func: Callable[..., Any]) -> bool:
        """Whether calls of a function come here under torch.vmap."""
        return func is F.conv2d

    def conv2d(self, names: Mapping[int, str], auto: bool, *args: Any, **kwargs: Any) -> Tensor:
        """F.conv2d of one task under torch.vmap, by a kernel for all tasks, or by PyTorch.

        Args:
            names: the model's parameters by id
            auto: whether a loop over the tasks may evaluate the model instead
            args: of F.conv2d
            kwargs: of F.conv2d

        Raises:
            Slower: with ``auto``, where no kernel serves and the loop is faster
        """
        try:
            x, weight, bias, stride, padding, dilation, groups = _arguments(*args, **kwargs)
        except TypeError:
            return F.conv2d(*args, **kwargs)  # raises PyTorch's own error
        reason = self.missing or _unserved_options(dilation, groups) or _unserved_tensors(x, weight, bias)
        border, products = None, _products(x, weight, stride)
        if not reason and products < KERNEL_PRODUCTS and x.device.type == "cpu":
            reason = "it is too small for a kernel"
        if not reason:
            border = _border(x, weight, stride, padding)
            reason = "" if border else f"its padding {padding!r} is not that of task_conv2d, or its kernel does not fit"
        if auto and reason and products >= LOOP_PRODUCTS and x.device.type == "cpu" and is_batched(weight):
            raise Slower
        if isinstance(weight, Tensor):
            self.record("task_conv2d", _label(names, weight), reason)
        if border is None:
            return F.conv2d(*args, **kwargs)
        of_task = None if bias is None else bias.unsqueeze(0)
        return task_conv2d(x.unsqueeze(0), weight.unsqueeze(0), of_task, *border).squeeze(0)

    def described(self) -> str:
        """Which layers kernels serve, and which not and why; empty for models without such layers."""
        parts = []
        for operator_name, layers in self.found.items():
            served = [name for name, reason in layers.items() if not reason]
            parts += [f"{operator_name} serves {', '.join(served)}"] if served else []
        rest = {name: reason for layers in self.found.values() for name, reason in layers.items() if reason}
        return "; ".join(parts + [f"PyTorch runs {name}: {reason}" for name, reason in rest.items()])

    def record(self, operator_name: str, layer: str, reason: str) -> None:
        """Note why an operator's kernel does not serve a layer; an empty reason if it does."""
        self.found.setdefault(operator_name, {})[layer] = reason


def _missing(device: torch.device, backend: str | None) -> str:
    if _backend.requested(backend) == "reference":
        return "backend 'reference' is plain PyTorch"
    name = _BACKENDS.get(device.type)
    return f"there are no kernels for {device.type}" if name is None else _backend.missing(name, device)


def _arguments(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> tuple[Any, ...]:
    """Arguments of F.conv2d in their order."""
    return input, weight, bias, stride, padding, dilation, groups


def _unserved_tensors(x: Any, weight: Any, bias: Any) -> str:
    """Why no kernel takes these tensors; empty where one does."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return "its arguments are no tensors"
    if x.dim() != 4 or weight.dim() != 4 or (bias is not None and bias.shape != weight.shape[:1]):
        return f"its input is {list(x.shape)}, not [S, C, H, W]"
    if x.shape[1] != weight.shape[1] or 0 in (*x.shape[1:], *weight.shape):
        return f"its input is {list(x.shape)} and its weight {list(weight.shape)}"
    dtypes, devices = {tensor.dtype for tensor in tensors}, {tensor.device for tensor in tensors}
    if len(dtypes) > 1 or x.dtype not in (torch.float32, torch.float64):
        return f"its dtype is {x.dtype}, not float32 or float64"
    if len(devices) > 1 or x.device.type not in _BACKENDS:
        return f"it is on {x.device}"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if forward_mode_is_active():
        return "the kernels have no forward-mode derivative"
    return "" if is_batched(weight) else "the tasks share its weight, so that it is one convolution"


def _unserved_options(dilation: Any, groups: Any) -> str:
    if groups != 1:
        return f"it has {groups} groups"
    return "" if dilation in (1, (1, 1), [1, 1], (1,), [1]) else f"it has dilation {dilation}"


def _products(x: Any, weight: Any, stride: Any) -> int:
    """Products of a task's convolution, about; 0 for arguments that are not a convolution's."""
    strides = _pair(stride)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or x.dim() != 4 or strides is None or 0 in strides:
        return 0
    return x.shape[0] * x.shape[2] * x.shape[3] * weight.numel() // (strides[0] * strides[1])


def _border(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Stride and padding as pairs; None where the kernel does not fit, or the padding is not the same on both sides."""
    kernel = weight.shape[2:]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
            return None
        padding = (kernel[0] // 2, kernel[1] // 2)
        if _pair(stride) != (1, 1):
            return None
    strides, paddings = _pair(stride), _pair(padding)
    if strides is None or paddings is None or min(strides) < 1 or min(paddings) < 0:
        return None
    fits = all(n + 2 * p >= k for n, p, k in zip(x.shape[2:], paddings, kernel, strict=True))
    return (strides, paddings) if fits else None


def _pair(value: Any) -> tuple[int, int] | None:
    """One integer for both axes, or two, as a pair; None for anything else."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2):
        return None
    try:
        return operator.index(values[0]), operator.index(values[-1])
    except TypeError:
        return None


def _label(names: Mapping[int, str], weight: Tensor) -> str:
    """The layer that a weight belongs to: its name in the model, or its shape."""
    name = names.get(id(weight))
    if name is None:
        return f"a convolution of weight {list(weight.shape)}"
    layer, _, of_layer = name.rpartition(".")
    return layer if of_layer == "weight" and layer else name
