"""Copies of a rule with perturbed weights, one for each of an antithetic pair.

Most rules' kernels take one set of weights a launch. So each perturbed rule steps the coordinates of its own problem in
a launch of its own, on weights that are packed once a truncation; the losses and gradients of all pairs stay one batch.
A rule whose weights may have a task axis (``takes_weight_rows``) steps all problems of a group at once.

Axis legend: T problems, 2T perturbed rules in the order +, - of problem 0, +, - of problem 1, ...; W weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metakern.core.task_params import flat_params, join_tasks
from metakern.core.torch_private import pytree
from metakern.inner_loop.updates import RuleUpdate
from metakern.rules.coordinatewise import CoordinatewiseRule
from metakern.rules.elementwise import ElementwiseRule


def learned_weights(rule: nn.Module) -> list[nn.Parameter]:
    """The weights that are meta-learned.

    Raises:
        ValueError: for a rule without any.
    """
    weights = [p for p in rule.parameters() if p.requires_grad]
    if not weights:
        raise ValueError(f"rule must have weights to learn, got a {type(rule).__name__} without any")
    return weights


def flat_weights(rule: nn.Module) -> Tensor:
    """The learned weights as one vector [W]."""
    return torch.cat([p.reshape(-1) for p in learned_weights(rule)])


class Copies:
    """2T copies of a rule; their weights are rows of one tensor.

    Args:
        rule: the rule
        num_problems: T
    """

    def __init__(self, rule: nn.Module, num_problems: int) -> None:
        weights = learned_weights(rule)
        self.like = copy.deepcopy(rule)
        self.rows = torch.cat([p.detach().reshape(-1) for p in weights]).repeat(2 * num_problems, 1)  # [2T, W]
        self.rules: list[Any] = []
        for row in self.rows:
            perturbed = copy.deepcopy(rule)
            pieces = row.split([p.numel() for p in weights])
            for p, piece in zip(learned_weights(perturbed), pieces, strict=True):
                p.data = piece.view(p.shape)
            self.rules.append(perturbed.requires_grad_(False))
        self.updates = [RuleUpdate(each, redraws=True) for each in self.rules]

    def serves(self, rule: nn.Module, num_problems: int) -> bool:
        """Whether these are copies of such a rule."""
        center = flat_weights(rule)
        like = (2 * num_problems, center.numel()), center.dtype, center.device
        return type(self.rules[0]) is type(rule) and (self.rows.shape, self.rows.dtype, self.rows.device) == like

    def update(self, groups: Sequence[Sequence[int]]) -> PairUpdate | RowsUpdate:
        """The update of the inner loop for groups of problems, which are given by their indices among all 2T."""
        if getattr(self.rules[0], "takes_weight_rows", False):
            return RowsUpdate(self.rules[0], [self._weights(members) for members in groups])
        return PairUpdate([self.updates[member] for members in groups for member in members])

    def _weights(self, members: Sequence[int]) -> dict[str, Tensor]:
        """The learned weights of some copies, [n, *shape] each by name."""
        named = {name: p for name, p in self.like.named_parameters() if p.requires_grad}
        pieces = self.rows[list(members)].split([p.numel() for p in named.values()], 1)
        return {name: piece.view(-1, *p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)}

    @torch.no_grad()
    def perturb(self, rule: nn.Module, shifts: Tensor) -> None:
        """Set the weights to w + shift and w - shift.

        Args:
            rule: has w, and further tensors, which the copies take over
            shifts: [T, W]
        """
        center = flat_weights(rule).detach()
        self.rows[0::2] = center + shifts
        self.rows[1::2] = center - shifts
        tensors = [*rule.parameters(), *rule.buffers()]
        fixed = [position for position, x in enumerate(tensors) if not x.requires_grad]
        for each in self.rules if fixed else ():
            own = [*each.parameters(), *each.buffers()]
            for position in fixed:
                own[position].copy_(tensors[position])


class PairUpdate:
    """An update of the inner loop: every problem of a batch is stepped by a rule of its own.

    Params and gradients are a tuple of trees [n, *shape]; the state is a tuple of lists of n states, each of one
    problem. A rule that treats all coordinates alike gets a problem's params as one tensor [1, P], which saves most of
    a small step's overhead.

    Args:
        updates: a rule for each problem, in the order of the groups
    """

    def __init__(self, updates: Sequence[RuleUpdate]) -> None:
        self.updates = list(updates)
        self.joins = isinstance(self.updates[0].rule, CoordinatewiseRule | ElementwiseRule)

    @property
    def weights(self) -> Any:
        """Nothing receives meta-gradients by autograd."""
        return ()

    def init_state(self, params: Any) -> Any:
        """States of all problems."""
        rest = iter(self.updates)
        return tuple([next(rest).init_state(one) for one in self.rows(tree)] for tree in params)

    def points(self, params: Any, state: Any) -> Any:
        """Where the next losses and gradients are to be taken."""
        if self.joins:
            return params
        rest, found = iter(self.updates), []
        for tree, states in zip(params, state, strict=True):
            own = [next(rest) for _ in states]
            rows = self.rows(tree)
            points = [own[0].points(rows[0], states[0])]
            if points[0] is rows[0]:
                found.append(tree)
                continue
            others = zip(own[1:], rows[1:], states[1:], strict=True)
            found.append(self.joined(points + [update.points(row, state) for update, row, state in others], tree))
        return tuple(found)

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """A step of every problem's own rule."""
        del weights
        rest, loss = iter(self.updates), iter(losses.split(1))
        new_params, new_state = [], []
        for tree, grad, states in zip(params, grads, state, strict=True):
            stepped = [
                next(rest).step(None, p, g, s, next(loss), step)
                for p, g, s in zip(self.rows(tree), self.rows(grad), states, strict=True)
            ]
            new_params.append(self.joined([p for p, _ in stepped], tree))
            new_state.append([s for _, s in stepped])
        return tuple(new_params), tuple(new_state)

    def rows(self, tree: Any) -> list[Any]:
        """Split a tree of tensors [n, *shape] into the params of n problems: trees [1, *shape], or tensors [1, P]."""
        leaves, rebuild = flat_params(tree)
        if self.joins:
            return list(join_tasks(leaves).split(1))
        return [rebuild(row) for row in zip(*(leaf.split(1) for leaf in leaves), strict=True)]

    def joined(self, rows: Sequence[Any], like: Any) -> Any:
        """The inverse of :meth:`rows`, structured like a tree."""
        leaves, rebuild = flat_params(like)
        if not self.joins:
            trees = [flat_params(row)[0] for row in rows]
            return rebuild([torch.cat(parts) for parts in zip(*trees, strict=True)])
        pieces = torch.cat(list(rows)).split([leaf[0].numel() for leaf in leaves], 1)
        return rebuild([piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)])

    def gathered(self, states: tuple[list[Any], ...]) -> tuple[Any, ...]:
        """The states of a flight's problems as :meth:`step` takes them."""
        return states

    def scattered(self, states: tuple[Any, ...]) -> tuple[list[Any], ...]:
        """The inverse of :meth:`gathered`."""
        return states

    def check_recomputable(self, params: Any, state: Any) -> None:
        """Never raises: no steps are recomputed."""

    def lock(self) -> Any:
        """The copies are the learner's own."""
        return contextlib.nullcontext()


class RowsUpdate:
    """An update of the inner loop by a rule that takes weights with a task axis: one call steps a whole group.

    Args:
        rule: the rule
        weights: its learned weights for each group of n problems, [n, *shape] each by name
    """

    def __init__(self, rule: Any, weights: Sequence[dict[str, Tensor]]) -> None:
        self.rule, self.rows = rule, list(weights)

    @property
    def weights(self) -> Any:
        """Nothing receives meta-gradients by autograd."""
        return ()

    def init_state(self, params: Any) -> Any:
        """States of all groups."""
        return tuple(self.rule.init_state(tree, tasks=True) for tree in params)

    def points(self, params: Any, state: Any) -> Any:
        """The params themselves."""
        del state
        return params

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """A step of all groups."""
        del weights, losses, step
        groups = zip(self.rows, params, grads, state, strict=True)
        stepped = [functional_call(self.rule, rows, (p, g, s)) for rows, p, g, s in groups]
        return tuple(p for p, _ in stepped), tuple(s for _, s in stepped)

    def gathered(self, states: tuple[list[Any], ...]) -> tuple[Any, ...]:
        """The states of a flight's problems, one for each group."""
        return tuple(pytree.tree_map(lambda *rows: torch.cat(rows), *of_group) for of_group in states)

    def scattered(self, states: tuple[Any, ...]) -> tuple[list[Any], ...]:
        """The inverse of :meth:`gathered`."""
        found = []
        for state in states:
            leaves, structure = pytree.tree_flatten(state)
            rows = zip(*(leaf.split(1) for leaf in leaves), strict=True)
            found.append([pytree.tree_unflatten(list(row), structure) for row in rows])
        return tuple(found)

    def check_recomputable(self, params: Any, state: Any) -> None:
        """Never raises: no steps are recomputed."""

    def lock(self) -> Any:
        """The copies are the learner's own."""
        return contextlib.nullcontext()
