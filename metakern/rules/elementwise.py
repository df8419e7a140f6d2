"""Base class of elementwise rules in plain PyTorch, whose state has the shape of each parameter tensor.

Axis legend: T tasks, ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metakern.core.checks import is_number
from metakern.core.torch_private import pytree
from metakern.rules.pretrained import PretrainedRule
from metakern.rules.protocol import Params, RuleState, matched_leaves, tensor_leaves


class ElementwiseRule(PretrainedRule):
    """θ' = θ − α · d; a subclass computes the direction d from the tensor's gradient and state.

    The arithmetic and the state are float64 for float64 params and float32 for narrower ones. Real and imaginary parts
    of complex params are separate elements, [*shape, 2].

    Attributes:
        moments: names of the state tensors of the parameter's shape; all start at zero
        counts: whether the state counts steps: ``count``, int64, [T] with tasks and [] without
    """

    moments: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = False

    lr: float | Tensor

    @abstractmethod
    def direction(self, grad: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """d, and the new state of the tensor; ``count`` in ``state`` already includes this step."""

    def init_state(self, params: Params, *, tasks: bool = False) -> RuleState:
        """Zeros; see :meth:`metakern.rules.Rule.init_state`."""
        per_tensor = []
        for p in tensor_leaves(params, tasks=tasks):
            state = {name: torch.zeros_like(_real(p.detach())) for name in self.moments}
            if self.counts:
                state["count"] = torch.zeros(p.shape[:1] if tasks else (), dtype=torch.int64, device=p.device)
            per_tensor.append(state)
        return RuleState(tuple(per_tensor), {}, tasks)

    def forward(
        self, params: Params, grads: Params, state: RuleState, *, loss: Tensor | None = None
    ) -> tuple[Params, RuleState]:
        """One step; see :meth:`metakern.rules.Rule.forward`."""
        del loss
        return self._step(params, grads, state, 1.0)

    @torch.no_grad()
    def step_(
        self, params: Params, grads: Params, state: RuleState, lr: float = 1.0, *, loss: Tensor | None = None
    ) -> None:
        """One step in place, without a graph, α times ``lr``."""
        del loss
        new, new_state = self._step(params, grads, state, lr)
        for olds, news in ((params, new), (state, new_state)):
            for old, x in zip(pytree.tree_leaves(olds), pytree.tree_leaves(news), strict=True):
                old.copy_(x)

    def _step(self, params: Params, grads: Params, state: RuleState, factor: float) -> tuple[Params, RuleState]:
        leaves, grad_leaves, rebuild = matched_leaves(params, grads)
        if len(state.per_tensor) != len(leaves):
            raise ValueError(f"state must be that of params, {len(leaves)} tensors, got {len(state.per_tensor)}")
        new, per_tensor = [], []
        for p, g, old in zip(leaves, grad_leaves, state.per_tensor, strict=True):
            counted = {**old, "count": old["count"] + 1} if self.counts else old
            direction, kept = self.direction(_real(g), counted)
            start = _real(p)
            rate = self.number("lr", start)
            moved = start - (rate if factor == 1 else factor * rate) * direction
            new.append(torch.view_as_complex(moved) if p.is_complex() else moved.to(p.dtype))
            per_tensor.append({**counted, **kept})
        return rebuild(new), RuleState(tuple(per_tensor), state.shared, state.tasks)

    def number(self, name: str, like: Tensor) -> float | Tensor:
        """An option's value; a tensor is cast to the dtype of ``like``, and copies [T] broadcast against it."""
        value: float | Tensor = getattr(self, name)
        return per_task(value.to(like.dtype), like) if isinstance(value, Tensor) else value

    def set_number(self, name: str, value: Any, low: float, high: float) -> None:
        """Set an option to a number or a tensor []; an ``nn.Parameter`` is learned, without bounds.

        Raises:
            TypeError: for anything else
            ValueError: for a number that is not finite or not in [low, high), and a tensor of another shape
        """
        if isinstance(value, Tensor):
            if value.dim() or not value.is_floating_point():
                raise ValueError(
                    f"{name} must be a number or a floating tensor [], got {value.dtype} {list(value.shape)}"
                )
            held = self.register_parameter if isinstance(value, nn.Parameter) else self.register_buffer
            held(name, value)  # type: ignore[arg-type]  # each takes its kind
            return
        if not is_number(value):
            raise TypeError(f"{name} must be a number or a tensor [], got {type(value).__name__}")
        if not (math.isfinite(value) and low <= value < high):
            bound = f"at least {low}" if high == math.inf else f"at least {low} and less than {high}"
            raise ValueError(f"{name} must be finite and {bound}, got {value}")
        setattr(self, name, float(value))

    def extra_repr(self) -> str:
        """The options."""
        options = {name: getattr(self, name) for name in self.option_types()}
        return ", ".join(f"{n}={v.item() if isinstance(v, Tensor) else v}" for n, v in options.items())


def per_task(values: Tensor, like: Tensor) -> Tensor:
    """Append axes to ``values`` [T], so that it broadcasts against ``like`` [T, *shape]; [] stays."""
    return values.view(-1, *[1] * (like.dim() - 1)) if values.dim() else values


def _real(x: Tensor) -> Tensor:
    """Cast to the dtype of the arithmetic; complex tensors become real, with one more axis of 2."""
    return torch.view_as_real(x) if x.is_complex() else x.to(torch.promote_types(x.dtype, torch.float32))
