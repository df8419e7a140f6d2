"""A tensor that is not computed yet: a batch norm, activation or pooling whose successor may join it in one kernel.

Axis legend: S samples of a task, C channels, [H, W] images.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.core.torch_private import func_level, outside_transform, pytree, without_function_modes
from metakern.ops.task_norm_act_pool import task_norm_act_pool


class Running:
    """Running statistics [C] that a batch norm moves once, however many results are computed from it."""

    def __init__(self, mean: Tensor | None, var: Tensor | None, momentum: float) -> None:
        self.mean, self.var, self.momentum = mean, var, momentum
        self.moved = False

    def move(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Towards a batch's mean [C] and biased variance [C] over ``count`` values, which become unbiased."""
        if self.moved:
            return
        self.moved = True
        with torch.no_grad():
            for running, new in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
                if running is not None:
                    running.mul_(1 - self.momentum).add_(new, alpha=self.momentum)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to compute a result: batch norm, then the activation, then pooling, as in :func:`task_norm_act_pool`.

    Attributes:
        x: [S, C, H, W]
        weight, bias: [C] or None
        statistics: of :func:`task_norm_act_pool`
        running: with statistics "given", those; with "batch", those to move
        records: whether autograd records
        level: the depth of torch.func's transforms
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    statistics: str = "none"
    running: Running = dataclasses.field(default_factory=lambda: Running(None, None, 0.0))
    eps: float = 1e-5
    activation: str = "identity"
    slope: float = 0.0
    pool: bool = False
    records: bool = dataclasses.field(default_factory=torch.is_grad_enabled)
    level: int | None = dataclasses.field(default_factory=func_level)

    def computed(self) -> Tensor:
        """The result."""
        with contextlib.ExitStack() as stack:
            while func_level() != self.level:  # needed within a transform that has begun since
                stack.enter_context(outside_transform())
            stack.enter_context(without_function_modes())
            stack.enter_context(torch.set_grad_enabled(self.records))
            if self.statistics == "none" and not self.pool:
                return F.relu(self.x) if self.activation == "relu" else F.leaky_relu(self.x, self.slope)
            return self._by_kernel()

    def _by_kernel(self) -> Tensor:
        given = (self.running.mean, self.running.var) if self.statistics == "given" else (None, None)
        tensors = [None if t is None else t.unsqueeze(0) for t in (self.x, self.weight, self.bias, *given)]
        options: dict[str, Any] = {"activation": self.activation, "slope": self.slope, "pool": self.pool}
        y, mean, var = task_norm_act_pool(*tensors, statistics=self.statistics, eps=self.eps, **options)  # type: ignore[arg-type]
        if self.statistics == "batch":
            self.running.move(mean.squeeze(0), var.squeeze(0), self.x.numel() // self.x.shape[1])
        return y.squeeze(0)


class Pending:
    """Stands for a tensor until something other than the next layer needs it; then for the computed one.

    It passes as a tensor with isinstance, operators, methods, attributes and functions of PyTorch.
    """

    __slots__ = ("__weakref__", "_computed", "_recipe")

    def __init__(self, recipe: Recipe) -> None:
        self._recipe: Recipe | None = recipe
        self._computed: Tensor | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*tensors_of(args), **tensors_of(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        return getattr(tensor_of(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Pending.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(tensor_of(self), name, value)

    def relu(self) -> Any:
        """As Tensor.relu."""
        return F.relu(self)  # type: ignore[arg-type]

    def relu_(self) -> Any:
        """As Tensor.relu_."""
        return F.relu(self, inplace=True)  # type: ignore[arg-type]

    def __copy__(self) -> Any:
        return copy.copy(tensor_of(self))

    __hash__ = object.__hash__


#: Special methods that Pending has itself, and those of the class rather than of an object.
_OWN = frozenset(vars(Pending)) | {
    *("__new__", "__getattribute__", "__delattr__", "__init_subclass__", "__subclasshook__", "__dict__"),
    *("__torch_dispatch__", "__getstate__"),
}


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: Pending, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor_of(self), name)(*tensors_of(args), **kwargs)

    return method


for _name in dir(Tensor):
    if _name.startswith("__") and _name.endswith("__") and _name not in _OWN and callable(getattr(Tensor, _name)):
        setattr(Pending, _name, _forwarded(_name))


def recipe_of(value: Any) -> Recipe | None:
    """The recipe of a Pending that has not been computed; None for anything else."""
    return value._recipe if type(value) is Pending else None


def tensor_of(value: Any) -> Any:
    """The tensor that a Pending stands for, computed if need be; any other value itself."""
    if type(value) is not Pending:
        return value
    recipe = value._recipe
    if recipe is not None:
        value._computed = recipe.computed()
        value._recipe = None
    return value._computed


def tensors_of(tree: Any) -> Any:
    """A tree with tensors in place of every Pending."""
    return pytree.tree_map(tensor_of, tree)
