"""LearnedOptimizer's state for tensorwise rules: every parameter has its own tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metakern.core.memo import outside_modes
from metakern.core.torch_private import foreach_copy_, pytree
from metakern.rules import Rule, RuleState
from metakern.rules.protocol import named_state


@dataclass(eq=False, slots=True)
class TensorSlot:
    """One parameter, and the structure of its state."""

    arena: Tensorwise
    param: Tensor
    name: str
    fresh: dict[str, Tensor]  # initial state; empty once the entry has one
    structure: pytree.TreeSpec  # of the state
    keys: tuple[str, ...]  # names of the state's tensors in the entry
    kind: tuple[Any, ...]
    entry: dict[str, Any]  # state[param] of the optimizer

    def serves(self, p: Tensor, entry: dict[str, Any] | None, rule: Rule, layout: Any) -> bool:
        """Whether the slot is still valid: same parameter (shape, dtype, device), state dict and rule.

        Tensors in that dict may be replaced: every step looks them up.
        """
        del layout  # the state's tensors are checked when the slot is made
        return self.param is p and self.entry is entry and self.kind == _kind(p) and self.arena.rule is rule

    def adopt(self, entry: dict[str, Any]) -> None:
        """Cast the state in ``entry`` to the parameter's current dtype and device, or initialize it."""
        for name, x in self.fresh.items():
            entry[name] = entry[name].to(x) if name in entry else x
        entry.setdefault("step", 0)
        entry.setdefault("numel", self.param.numel())
        self.fresh, self.entry = {}, entry


class Tensorwise:
    """The parameters of one group; one call of the rule steps all of them that have a gradient.

    A state that is no RuleState cannot be split by parameter; then each parameter has its own state and its own call.

    Args:
        rule: the rule
        members: the parameters, by their names for the rule
        shared: state tensors shared by the group; filled by :meth:`slots`
    """

    def __init__(self, rule: Rule, members: Mapping[str, Tensor], shared: dict[str, Tensor]) -> None:
        self.rule, self._names, self._shared = rule, list(members), shared
        self.device = next(iter(members.values())).device
        self._joint = True

    def slots(self, members: Sequence[Tensor]) -> Iterator[TensorSlot]:
        """One slot per constructor member, in order."""
        for name, p in zip(self._names, members, strict=True):
            with outside_modes(), torch.no_grad():  # an initial state may be learned
                state = self.rule.init_state({name: p.detach()})
            if isinstance(state, RuleState):
                for key, x in state.shared.items():
                    self._shared.setdefault(key, x)
            else:
                self._joint = False
            fresh = named_state(state)
            yield TensorSlot(self, p, name, fresh, pytree.tree_structure(state), tuple(fresh), _kind(p), {})

    def points(self, slots: Sequence[TensorSlot]) -> list[Tensor]:
        """Where the rule wants the next gradients of ``slots``."""
        if self._joint:
            params = {slot.name: slot.param.detach() for slot in slots}
            tensors = tuple({key: slot.entry[key] for key in slot.keys} for slot in slots)
            return list(self.rule.gradient_points(params, RuleState(tensors, self._shared, tasks=False)).values())
        states = [pytree.tree_unflatten([slot.entry[key] for key in slot.keys], slot.structure) for slot in slots]
        pairs = zip(slots, states, strict=True)
        return [self.rule.gradient_points({s.name: s.param.detach()}, state)[s.name] for s, state in pairs]

    def step_(self, slots: Sequence[TensorSlot], lr: float, weight_decay: float, loss: Tensor | None) -> None:
        """Update the parameters of ``slots``."""
        params = {slot.name: slot.param.detach() for slot in slots}
        if weight_decay:  # on copies, as the rule may raise
            params = {name: p * (1 - lr * weight_decay) for name, p in params.items()}
        grads = {slot.name: slot.param.grad.detach() for slot in slots if slot.param.grad is not None}
        if self._joint:
            tensors = tuple({key: slot.entry[key] for key in slot.keys} for slot in slots)
            self.rule.step_(params, grads, RuleState(tensors, self._shared, tasks=False), lr, loss=loss)
        else:
            for slot in slots:
                state = pytree.tree_unflatten([slot.entry[key] for key in slot.keys], slot.structure)
                self.rule.step_({slot.name: params[slot.name]}, {slot.name: grads[slot.name]}, state, lr, loss=loss)
        if weight_decay:
            foreach_copy_([slot.param for slot in slots], list(params.values()))
        for slot in slots:
            slot.entry["step"] += 1


def check_state(rule: Rule, entry: Mapping[str, Any], p: Tensor, name: str) -> None:
    """Raise ValueError where a parameter's state does not fit this rule."""
    like = named_state(rule.init_state({"": p.detach()}))
    got = {key: list(entry[key].shape) for key in entry if isinstance(entry[key], Tensor)}
    wanted = {key: list(x.shape) for key, x in like.items()}
    if got != wanted:
        raise ValueError(
            f"rule must be of the kind and sizes of the state of {name}, which has {got}, while the rule keeps "
            f"{wanted}; delete optimizer.state[parameter] to let it start anew"
        )


def _kind(p: Tensor) -> tuple[Any, ...]:
    return p.shape, p.dtype, p.device
