"""Base class of coordinatewise rules: the same formula for every coordinate, all in one kernel call.

Axis legend: N coordinates, U coordinates of one row of the packed state.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from metakern.ops.lstm_step.state import pack_rows, unpack_rows
from metakern.rules.pretrained import PretrainedRule
from metakern.rules.protocol import (
    Params,
    State,
    check_loss,
    check_saved,
    coordinates_of_tasks,
    flatten,
    loss_of_coordinates,
    matched_leaves,
    tensor_leaves,
    unflatten,
)


class CoordinatewiseRule(PretrainedRule):
    """Base class: flattens params to one tensor [N]; subclasses define :meth:`step_coordinates` on it.

    The state is packed: tensors [ceil(N/U), ..., U], whose first axis counts rows of U coordinates and whose last axis
    runs within a row. So LearnedOptimizer can keep the states of many parameters in one piece of memory and step any
    run of adjacent ones. Lanes after the N-th coordinate carry no meaning.

    Attributes:
        unit: U
    """

    unit: ClassVar[int] = 1

    @abstractmethod
    def init_coordinates(self, number: int, dtype: torch.dtype, device: torch.device | None) -> State:
        """The state of N coordinates before the first step.

        Args:
            number: N
            dtype: float64 if any tensor of params is, else float32
            device: of params; None if there are none
        """

    @abstractmethod
    def step_coordinates(
        self, params: Tensor, grads: Tensor, state: State, loss: Tensor | None
    ) -> tuple[Tensor, State]:
        """One step of params [N]; ``loss`` [N] is that of each coordinate's task, or None if the rule needs none."""

    def packed(self, state: State) -> dict[str, Tensor]:
        """The tensors of a state by name, without copies. By default the state itself is this dict."""
        tensors: dict[str, Tensor] = state
        return tensors

    def from_packed(self, tensors: Mapping[str, Tensor], number: int) -> State:
        """The state of N coordinates made of these tensors; the inverse of :meth:`packed`."""
        del number
        return dict(tensors)

    def init_state(self, params: Params, *, tasks: bool = False) -> State:
        """The initial state; see :meth:`Rule.init_state`. Coordinates of all tasks are treated alike."""
        leaves = tensor_leaves(params, tasks=tasks)
        wide = any(leaf.dtype == torch.float64 for leaf in leaves)
        number = sum(leaf.numel() for leaf in leaves)
        return self.init_coordinates(
            number, torch.float64 if wide else torch.float32, leaves[0].device if leaves else None
        )

    def forward(
        self, params: Params, grads: Params, state: State, *, loss: Tensor | None = None
    ) -> tuple[Params, State]:
        """One step for every coordinate, in one launch; see :meth:`Rule.forward`."""
        self.check_state(state)
        leaves, grad_leaves, rebuild = matched_leaves(params, grads)
        losses = check_loss(self, loss)
        if not leaves:
            return params, state
        if losses is not None:
            losses = loss_of_coordinates(losses, leaves)
        flat, new_state = self.step_coordinates(flatten(leaves), flatten(grad_leaves), state, losses)
        return rebuild(unflatten(flat, leaves)), new_state

    def select_tasks(self, state: State, index: Tensor, params: Params) -> State:
        """The state of some tasks; see :meth:`Rule.select_tasks`."""
        places = coordinates_of_tasks(index, tensor_leaves(params, tasks=True))
        number = sum(p.numel() for p in tensor_leaves(params))
        selected = {
            name: pack_rows(unpack_rows(x, number)[..., places], self.unit) for name, x in self.packed(state).items()
        }
        return self.from_packed(selected, len(places))

    def check_state(self, state: State) -> None:
        """Raise TypeError unless ``state`` is a dict; rules with another kind of state override this."""
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict of tensors as init_state makes it, got {type(state).__name__}")

    def state_layout(self) -> Hashable:
        """The options that determine shapes and dtypes of the packed state."""
        return None

    def export_state(self, tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """See :meth:`metakern.rules.Rule.export_state`; [..., numel] each."""
        return {name: unpack_rows(x, number) for name, x in tensors.items()}

    def import_state(self, saved: Mapping[str, Any], param: Tensor, name: str) -> dict[str, Tensor]:
        """See :meth:`metakern.rules.Rule.import_state`."""
        fresh = self.packed(self.init_state(param))
        likes = self.export_state(fresh, param.numel())
        return {key: pack_rows(check_saved(saved, key, like, name).to(like), self.unit) for key, like in likes.items()}
