"""The rules around LSTM cells without fused kernels: the baselines for speed-ups."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from metakern.core.torch_private import pytree
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.reference import gradient_features
from metakern.rules.protocol import Params, Rule, check_loss, flatten, loss_of_coordinates, tensor_leaves, unflatten

if TYPE_CHECKING:
    from metakern.rules.lstm_rule import LSTMRule
    from metakern.rules.staged_rule import StagedRule

PlainState = list[tuple[Tensor, Tensor]]


class PlainLSTM(Rule):
    """``nn.LSTMCell`` s and ``nn.Linear``, one launch per operation; called as :class:`CoordinatewiseLSTM`.

    Unlike there, an infinite gradient does not give NaN but saturates the gates.

    Args:
        rule: source of the weights (copied) and the options
    """

    def __init__(self, rule: LSTMRule) -> None:
        super().__init__()
        lstm, head = rule.to_modules()
        self.cells = nn.ModuleList()  # registered before the head, as CoordinatewiseLSTM orders its weights
        for layer in range(rule.num_layers):
            cell = nn.LSTMCell(lstm.input_size if layer == 0 else rule.hidden_size, rule.hidden_size)
            cell.load_state_dict({name: getattr(lstm, f"{name}_l{layer}") for name in cell.state_dict()})
            self.cells.append(cell)
        self.head = head
        self.preprocess, self.preprocess_scale = rule.preprocess, rule.preprocess_scale
        self.output_scale = rule.output_scale

    def init_state(self, params: Params, *, tasks: bool = False) -> PlainState:
        """Zero (h, c), each [N, H], of every layer."""
        leaves = tensor_leaves(params, tasks=tasks)
        n = sum(leaf.numel() for leaf in leaves)
        return [(leaves[0].new_zeros(n, self.head.in_features),) * 2 for _ in self.cells]

    def forward(
        self, params: Params, grads: Params, state: PlainState, *, loss: Tensor | None = None
    ) -> tuple[Any, PlainState]:
        """One step for every coordinate; arguments as for :meth:`CoordinatewiseLSTM.forward`."""
        del loss
        leaves, structure = pytree.tree_flatten(params)
        x = gradient_features(flatten(pytree.tree_leaves(grads)), self.preprocess, self.preprocess_scale)
        new_state = []
        for cell, (h, c) in zip(self.cells, state, strict=True):
            x, new_c = cell(x, (h, c))
            new_state.append((x, new_c))
        update = (self.output_scale * self.head(x)).squeeze(-1).split([leaf.numel() for leaf in leaves])
        new_leaves = [leaf + piece.view(leaf.shape) for leaf, piece in zip(leaves, update, strict=True)]
        return pytree.tree_unflatten(new_leaves, structure), new_state


class PlainStages(Rule):
    """The definition of :func:`metakern.ops.lstm_step_staged`, one launch per operation; called as the rule itself.

    Args:
        rule: source of the weights (copied) and the options
    """

    def __init__(self, rule: StagedRule) -> None:
        super().__init__()
        self.rule = copy.deepcopy(rule)

    def initialisation(self) -> Mapping[str, Tensor] | None:
        """Those of the rule."""
        return self.rule.initialisation()

    def init_state(self, params: Params, *, tasks: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Zero h and c, [L, N, H] each, and the stages' state [E, N]."""
        leaves, rule = tensor_leaves(params, tasks=tasks), self.rule
        n = sum(leaf.numel() for leaf in leaves)
        zeros = leaves[0].new_zeros(rule.num_layers, n, rule.hidden_size, dtype=rule.head.weight.dtype)
        rows = sum(stage.states for stage in rule.stages())
        return zeros, zeros, zeros.new_zeros(rows, n)

    def forward(
        self, params: Params, grads: Params, state: tuple[Tensor, Tensor, Tensor], *, loss: Tensor | None = None
    ) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
        """One step for every coordinate; see :meth:`Rule.forward`."""
        leaves, structure = pytree.tree_flatten(params)
        losses, rule = check_loss(self.rule, loss), self.rule
        given = state[2].new_zeros(0, state[2].shape[1])
        if losses is not None:
            given = loss_of_coordinates(losses, leaves).unsqueeze(0)
        scalars = reference.Scalars(**rule.stage_options())
        flat, h, c, rows = reference.staged_step(
            *(flatten(leaves), rule.fed(flatten(pytree.tree_leaves(grads))), *state, given, rule.own_weights()),
            *(*rule.stages(), scalars),
        )
        return pytree.tree_unflatten(unflatten(flat, leaves), structure), (h, c, rows)
