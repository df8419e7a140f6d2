"""Contiguous memory for LearnedOptimizer with coordinatewise rules: one launch steps many parameters.

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
    """One parameter's rows in an arena; they are whole, so its state is a contiguous slice of the arena's."""

    arena: Arena
    param: Tensor
    first: int  # row
    last: int  # exclusive
    params: Tensor  # view into the arena, in the parameter's shape; likewise grads
    grads: Tensor
    state: dict[str, Tensor]  # views [last - first, ...]
    entry: dict[str, Any]  # state[param] of the optimizer

    def serves(self, p: Tensor, entry: dict[str, Any] | None, rule: Any, layout: Any) -> bool:
        """Whether the slot is still valid: same parameter (shape, dtype, device), state tensors, rule and layout."""
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
        """Copy (and cast) the state of ``entry`` into this slot, or start at zero; ``entry`` then views the slot."""
        for name, x in self.state.items():
            if name in entry:
                x.copy_(entry[name])
        if not entry:
            entry.update(step=0, numel=self.param.numel())
        entry.update(self.state)
        self.entry = entry


class Arena:
    """Flat parameters, gradients and packed state for parameters of one dtype and device, one slot after another.

    Padding lanes at the end of a parameter's last row compute on zeros and are never read.
    """

    def __init__(self, rule: CoordinatewiseRule, members: Sequence[Tensor]) -> None:
        self.rule, self.count, self.unit, self.device = rule, len(members), rule.unit, members[0].device
        with outside_modes():  # later steps reuse these tensors
            rows = sum(self._rows(p) for p in members)
            self.params = members[0].new_zeros(rows * self.unit, requires_grad=False)
            self.grads = torch.zeros_like(self.params)
            self.state = rule.init_state(self.params)
        self.layout = rule.state_layout()
        self._tensors = rule.packed(self.state)

    def slots(self, members: Iterable[Tensor]) -> Iterator[Slot]:
        """One slot per constructor member, in order. The arena does not keep them: a cycle would hold its memory."""
        first = 0
        for p in members:
            last, start = first + self._rows(p), first * self.unit
            params, grads = (x[start : start + p.numel()].view(p.shape) for x in (self.params, self.grads))
            state = {name: x[first:last] for name, x in self._tensors.items()}
            yield Slot(self, p, first, last, params, grads, state, {})
            first = last

    def step_(self, slots: Sequence[Slot], lr: float, weight_decay: float, loss: Tensor | None) -> None:
        """Update the parameters of ``slots``, sorted by row: one launch per run of adjacent slots."""
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
    """Raise ValueError where a parameter's state does not fit this rule."""
    for key, like in rule.packed(rule.init_coordinates(0, torch.float32, None)).items():
        if key not in entry or entry[key].shape[1:] != like.shape[1:]:
            got = list(entry[key].shape[1:]) if key in entry else "none"
            raise ValueError(
                f"rule must be of the kind and sizes of the state of {name}: {key} must have rows of "
                f"{list(like.shape[1:])}, got {got}; delete optimizer.state[parameter] to let it start anew"
            )


def _runs(slots: Sequence[Slot]) -> Iterator[tuple[int, int]]:
    """Row ranges [first, last) covered by runs of adjacent slots."""
    first, last = slots[0].first, slots[0].last
    for slot in slots[1:]:
        if slot.first != last:
            yield first, last
            first = slot.first
        last = slot.last
    yield first, last
