"""Memory of LearnedOptimizer for coordinatewise rules: many parameters in one piece, stepped by one launch.

Axis legend: U coordinates of one row of the rule's packed state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metakern.core.memo import outside_modes
from metakern.core.torch_private import foreach_copy_, foreach_mul_
from metakern.rules.coordinatewise import CoordinatewiseRule


@dataclass(eq=False, slots=True)
class Slot:
    """The place of one parameter in an arena: whole rows, so that its state is a contiguous slice of the arena's."""

    arena: Arena
    param: Tensor
    first: int  # row
    last: int  # row behind the last
    params: Tensor  # view of the arena's in the shape of the parameter; likewise grads
    grads: Tensor
    state: dict[str, Tensor]  # views [last - first, ...]
    entry: dict[str, Any]  # state[param] of the optimizer

    def serves(self, p: Tensor, entry: dict[str, Any] | None, rule: Any, layout: Any) -> bool:
        """Whether nothing changed since the slot was made: the parameter's kind and shape, its state, the rule's."""
        for name, x in self.state.items():
            if self.entry.get(name) is not x:
                return False
        view, members = self.params, self.arena
        return (
            self.param is p
            and self.entry is entry
            and view.shape == p.shape
            and view.dtype == p.dtype
            and view.device == p.device
            and members.rule is rule
            and members.layout == layout
        )

    def adopt(self, entry: dict[str, Any]) -> None:
        """Move the state of ``entry`` in, casting it, or start at zero; ``entry`` then shows this slot's memory."""
        for name, x in self.state.items():
            if name in entry:
                x.copy_(entry[name])
        if not entry:
            entry.update(step=0, numel=self.param.numel())
        entry.update(self.state)
        self.entry = entry


class Arena:
    """Flat parameters, flat gradients and packed state of parameters of one dtype and device, one slot after another.

    Lanes between a parameter's last coordinate and the end of its last row compute on zeros and are never read.
    """

    def __init__(self, rule: CoordinatewiseRule, members: Sequence[Tensor]) -> None:
        self.rule, self.count, self.unit, self.device = rule, len(members), rule.unit, members[0].device
        with outside_modes():  # they are kept for later steps
            rows = sum(self._rows(p) for p in members)
            self.params = members[0].new_zeros(rows * self.unit, requires_grad=False)
            self.grads = torch.zeros_like(self.params)
            self.state = rule.init_state(self.params)
        self.layout = rule.state_layout()
        self._tensors = rule.packed(self.state)

    def slots(self, members: Iterable[Tensor]) -> Iterator[Slot]:
        """One for each of the constructor's members, in order. The arena keeps none: a cycle would keep its memory."""
        first = 0
        for p in members:
            last, start = first + self._rows(p), first * self.unit
            params, grads = (x[start : start + p.numel()].view(p.shape) for x in (self.params, self.grads))
            state = {name: x[first:last] for name, x in self._tensors.items()}
            yield Slot(self, p, first, last, params, grads, state, {})
            first = last

    def step_(self, slots: Sequence[Slot], lr: float, weight_decay: float, loss: Tensor | None) -> None:
        """Update the parameters of ``slots``, which are in order: one launch for each run of neighbours."""
        params = [slot.param for slot in slots]
        views = [slot.params for slot in slots]
        foreach_copy_(views, params)
        if weight_decay:
            foreach_mul_(views, 1 - lr * weight_decay)
        foreach_copy_([slot.grads for slot in slots], [p.grad for p in params if p.grad is not None])
        if len(slots) == self.count:
            self.rule.step_(self.params, self.grads, self.state, lr, loss=loss)
        else:
            for first, last in _runs(slots):
                lanes = slice(first * self.unit, last * self.unit)
                tensors = {name: x[first:last] for name, x in self._tensors.items()}
                state = self.rule.from_packed(tensors, (last - first) * self.unit)
                self.rule.step_(self.params[lanes], self.grads[lanes], state, lr, loss=loss)
        foreach_copy_(params, views)
        for slot in slots:
            slot.entry["step"] += 1

    def _rows(self, p: Tensor) -> int:
        return -(-p.numel() // self.unit)


def check_state(rule: CoordinatewiseRule, entry: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where the state of a parameter is not one of this rule's."""
    for key, like in rule.packed(rule.init_coordinates(0, torch.float32, None)).items():
        if key not in entry or entry[key].shape[1:] != like.shape[1:]:
            got = list(entry[key].shape[1:]) if key in entry else "none"
            raise ValueError(
                f"rule must be of the kind and sizes of the state of {name}: {key} must have rows of "
                f"{list(like.shape[1:])}, got {got}; delete optimizer.state[parameter] to let it start anew"
            )


def _runs(slots: Sequence[Slot]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that neighbouring slots cover."""
    first, last = slots[0].first, slots[0].last
    for slot in slots[1:]:
        if slot.first != last:
            yield first, last
            first = slot.first
        last = slot.last
    yield first, last
