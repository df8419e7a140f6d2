"""Checks of mlp_inner_loop's arguments for the implementations in Python: Triton's kernels and the reference.

For the kernels the checks guard memory: an operator called directly, without the Python function, must not read out of
bounds. Messages as in csrc/mlp_inner_loop/arguments.h. Axis legend: T tasks, S support and Q query samples of a task,
K inner steps, P parameters of a task.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metakern.ops.core.checks import check_dtype, check_same_device, check_shape, check_type, check_value

#: Keep in step with csrc/mlp_inner_loop/problem.h.
MAX_LAYERS = 8

#: Maximum steps, and units, inputs or samples of a task.
_MOST = 2**20

#: Kinds of activations: relu, tanh, sigmoid, gelu, leaky_relu.
_LAST_KIND = 4

#: On the CPU the kernels take the first two; the reference and GPUs take all.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Arguments(NamedTuple):
    """Arguments common to the operators; see :func:`metakern.ops.mlp_inner_loop.mlp_inner_loop`."""

    params: list[Tensor]
    lr: list[Tensor]
    rate: float
    steps: int
    per_step: bool
    adapted: int  # bit i: whether params[i] is
    activation: list[int]  # of every hidden layer, or of all
    loss: int
    checkpoint_every: int
    slopes: list[float] = []  # noqa: RUF012 of leaky_relu, for every activation; or none
    clip_norm: float | None = None


class Network:
    """Sizes of the tasks' MLPs.

    Attributes:
        tasks: T
        widths: inputs, then the units of every layer
        sizes: elements of every tensor of one task
        shared: bit i: params[i] has no task axis
        activations: kind and slope of every hidden layer's
    """

    def __init__(self, arguments: Arguments, x: Tensor) -> None:
        """Check params and rates, and read their sizes; ``x`` are the support samples."""
        fits = x.dim() == 3 and x.shape[0] >= 1
        check_value(fits, "support_x must be [T, S, inputs] with at least 1 task, got ", x.shape)
        self.tasks = x.shape[0]
        steps, every = arguments.steps, arguments.checkpoint_every
        check_value(1 <= steps <= _MOST, "steps must be 1 to ", _MOST, ", got ", steps)
        check_value(0 <= arguments.loss <= 2, "loss must be 0, 1 or 2, got ", arguments.loss)
        check_value(1 <= every <= steps, "checkpoint_every must be 1 to ", steps, ", got ", every)
        check_value(math.isfinite(arguments.rate), "rate must be finite, got ", arguments.rate)
        clip = arguments.clip_norm
        check_value(clip is None or 0 < clip < math.inf, "clip_norm must be positive and finite, got ", clip)
        self.widths: tuple[int, ...] = ()
        self.sizes: tuple[int, ...] = ()
        self.shared = 0
        params = arguments.params
        check_value(
            0 < len(params) <= 2 * MAX_LAYERS and len(params) % 2 == 0,
            *("params must hold a weight and a bias for 1 to ", MAX_LAYERS, " layers, got ", len(params), " tensors"),
        )
        dtype = params[0].dtype
        check_type(dtype in DTYPES, "params must be float32, float64, bfloat16 or float16, got ", dtype)
        for index, p in enumerate(params):
            self._add(index, p, params[0])
        self.activations = self._activations(arguments)
        self._check_rates(arguments)

    def _add(self, index: int, p: Tensor, first: Tensor) -> None:
        own, name = 2 - index % 2, f"params[{index}]"
        axes = f" must have {own} axes, or one more for the tasks, got "
        check_value(p.dim() in (own, own + 1), name, axes, p.shape)
        if p.dim() == own:
            self.shared |= 1 << index
        else:
            check_value(
                p.shape[0] == self.tasks, name, " must share the task axis, T = ", self.tasks, ", got ", p.shape
            )
        units = p.shape[-own]
        fits = 1 <= units <= _MOST and (own == 1 or p.shape[-1] <= _MOST)
        check_value(fits, name, " must have 1 to ", _MOST, " units and inputs, got ", p.shape)
        if own == 2:
            inputs = self.widths[-1] if index else p.shape[-1]
            check_value(p.shape[-1] == inputs >= 1, name, " must take ", inputs, " inputs, got ", p.shape)
            self.widths += (units,) if index else (inputs, units)
        else:
            check_value(units == self.widths[-1], name, " must have ", self.widths[-1], " units, got ", p.shape)
        self.sizes += (math.prod(p.shape[-own:]),)
        check_dtype(p, name, first.dtype)
        check_same_device(p, name, first, "params[0]")

    def _activations(self, a: Arguments) -> tuple[tuple[int, float], ...]:
        """Kind and slope of every hidden layer's activation."""
        hidden, count = len(self.widths) - 2, len(a.activation)
        check_value(
            count in (1, hidden),
            *("activation must hold 1 kind or one for each of the ", hidden, " hidden layers, got ", count),
        )
        check_value(
            len(a.slopes) in (0, count),
            *("slopes must hold none or one for each of the ", count, " activations, got ", len(a.slopes)),
        )
        for kind in a.activation:
            check_value(0 <= kind <= _LAST_KIND, "activation must be 0 to ", _LAST_KIND, ", got ", kind)
        for slope in a.slopes:
            check_value(0 <= slope < math.inf, "slopes must be finite and not negative, got ", slope)
        pairs = tuple(zip(a.activation, a.slopes or [0.0] * count, strict=True))
        return pairs[:hidden] if count == hidden else pairs * hidden

    def _check_rates(self, a: Arguments) -> None:
        count = len(self.sizes)
        check_value(
            len(a.lr) in (0, 1, count),
            *("lr must hold no tensor, 1 or one for each of the ", count, " params, got ", len(a.lr)),
        )
        for index, rate in enumerate(a.lr):
            check_dtype(rate, f"lr[{index}]", a.params[0].dtype)
            check_same_device(rate, f"lr[{index}]", a.params[0], "params[0]")
            size, leading = self.sizes[index], a.steps if a.per_step else 1
            fits = rate.numel() in (leading, leading * size) if len(a.lr) > 1 else rate.numel() == leading
            check_value(fits, f"lr[{index}] must hold 1 or {size} rates", " a step" * a.per_step, ", got ", rate.shape)

    @property
    def outputs(self) -> int:
        """Outputs of the last layer."""
        return self.widths[-1]

    @property
    def params(self) -> int:
        """P."""
        return sum(self.sizes)

    @property
    def units(self) -> int:
        """Units of all layers."""
        return sum(self.widths[1:])

    def check_samples(self, name: str, loss: int, x: Tensor, y: Tensor, mask: Tensor | None, like: Tensor) -> None:
        """Check the set ``name``, "support" or "query"."""
        tasks, inputs = self.tasks, self.widths[0]
        check_value(
            x.dim() == 3 and x.shape[0] == tasks and x.shape[1] >= 1 and x.shape[2] == inputs,
            *(name, f"_x must be [{tasks}, samples, {inputs}], got ", x.shape),
        )
        check_dtype(x, f"{name}_x", like.dtype)
        check_same_device(x, f"{name}_x", like, "params[0]")
        check_same_device(y, f"{name}_y", like, "params[0]")
        count = x.shape[1]
        check_value(count <= _MOST, name, "_x must have at most ", _MOST, " samples, got ", count)
        check_shape(y, f"{name}_y", [tasks, count] if loss == 1 else [tasks, count, self.outputs])
        check_dtype(y, f"{name}_y", torch.int64 if loss == 1 else like.dtype)
        if mask is not None:
            check_shape(mask, f"{name}_mask", [tasks, count])
            check_dtype(mask, f"{name}_mask", torch.bool)
            check_same_device(mask, f"{name}_mask", like, "params[0]")
