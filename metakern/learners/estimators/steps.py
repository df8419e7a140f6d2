"""Updates of the inner loop that step every problem of a batch by a rule of its own, and the states they keep.

Params and gradients of a batch are a tuple of parts: trees of n problems each, [n, *shape]. What the state of a part is
only these classes know; :class:`metakern.learners.estimators.flight.Part` keeps it.

Axis legend: n problems of a part, P parameters of one problem.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.core.task_params import flat_params, join_tasks
from metakern.core.torch_private import pytree
from metakern.inner_loop.updates import RuleUpdate
from metakern.rules.coordinatewise import CoordinatewiseRule
from metakern.rules.elementwise import ElementwiseRule


class _OwnRules:
    """What both updates share."""

    @property
    def weights(self) -> Any:
        """Nothing receives meta-gradients by autograd."""
        return ()

    def check_recomputable(self, params: Any, state: Any) -> None:
        """Never raises: no steps are recomputed."""

    def lock(self) -> Any:
        """The rules are the learner's own."""
        return contextlib.nullcontext()


class OneByOne(_OwnRules):
    """A launch for each problem. The state of a part is a list of n states.

    Args:
        updates: a rule for each problem of each part
    """

    def __init__(self, updates: Sequence[Sequence[RuleUpdate]]) -> None:
        self.updates = updates

    def init_state(self, params: Any) -> Any:
        """States of all problems."""
        of_parts = zip(self.updates, params, strict=True)
        return tuple(
            [update.init_state(row) for update, row in zip(updates, problems_of(tree), strict=True)]
            for updates, tree in of_parts
        )

    def points(self, params: Any, state: Any) -> Any:
        """Where the next losses and gradients are to be taken."""
        found = []
        for updates, tree, states in zip(self.updates, params, state, strict=True):
            rows = problems_of(tree)
            if updates[0].points(rows[0], states[0]) is rows[0]:
                found.append(tree)
                continue
            points = [update.points(row, own) for update, row, own in zip(updates, rows, states, strict=True)]
            found.append(joined(points, tree))
        return tuple(found)

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """A step of every problem's own rule."""
        del weights
        loss = iter(losses.split(1))
        new_params, new_state = [], []
        for updates, tree, grad, states in zip(self.updates, params, grads, state, strict=True):
            problems = zip(updates, problems_of(tree), problems_of(grad), states, strict=True)
            stepped = [update.step(None, p, g, s, next(loss), step) for update, p, g, s in problems]
            new_params.append(joined([p for p, _ in stepped], tree))
            new_state.append([s for _, s in stepped])
        return tuple(new_params), tuple(new_state)

    def select(self, part: int, state: list[Any], rows: Sequence[int]) -> list[Any]:
        """The states of some problems, which may repeat."""
        return [state[row] for row in rows]

    def replaced(self, part: int, state: list[Any], rows: Sequence[int], new: list[Any]) -> list[Any]:
        """``state`` with those of some problems replaced."""
        states = list(state)
        for row, own in zip(rows, new, strict=True):
            states[row] = own
        return states

    def export_state(self, part: int, state: list[Any]) -> list[list[Tensor]]:
        """The tensors of each problem's state."""
        return [pytree.tree_leaves(own) for own in state]

    def import_state(self, part: int, fresh: list[Any], saved: Sequence[Sequence[Tensor]]) -> list[Any]:
        """The state with these tensors.

        Args:
            part: the part's place
            fresh: a state of such problems
            saved: of the shapes of :meth:`export_state`
        """
        return [
            pytree.tree_unflatten(list(own), pytree.tree_structure(like))
            for like, own in zip(fresh, saved, strict=True)
        ]


class _Rows:
    """Several tensors of n problems as one, [n, P]; zeros at its end make P a multiple of ``unit``."""

    def __init__(self, leaves: Sequence[Tensor], unit: int) -> None:
        self.sizes = [leaf[0].numel() for leaf in leaves]
        missing = -sum(self.sizes) % unit
        self.padding = [leaves[0].new_zeros(len(leaves[0]), missing)] if missing else []
        self.pieces = [*self.sizes, missing] if missing else self.sizes

    def join(self, leaves: Sequence[Tensor]) -> Tensor:
        """One tensor of several."""
        return join_tasks([*leaves, *self.padding])

    def split(self, row: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like ``leaves``; the inverse of :meth:`join`."""
        pieces = row.split_with_sizes(self.pieces, 1)
        return [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=False)]


class Together(_OwnRules):
    """A launch for all problems of a part. The state of a part is that of a rule with n copies of its weights.

    A rule with a ``step_groups`` of its own steps all parts by that. A rule that treats all coordinates alike gets its
    params as one tensor [n, P], with zeros at the end of each row up to a multiple of the rule's unit.

    Args:
        updates: a rule for each problem of each part
        rule_of: makes the rule with copies that steps a part, or all parts for None
    """

    def __init__(self, updates: Sequence[Sequence[RuleUpdate]], rule_of: Callable[[int | None], Any]) -> None:
        self.updates = updates
        self.rule = updates[0][0].rule  # for what does not depend on the weights
        self.joins = isinstance(self.rule, CoordinatewiseRule | ElementwiseRule)
        self._at_once = len(updates) > 1 and self.rule.steps_groups_at_once()
        self._rule_of = functools.cache(rule_of)
        self._rows: dict[int, _Rows] = {}  # of each part
        self._last: dict[int, tuple[Any, Tensor]] = {}  # by part: params of the last step, and their row

    def init_state(self, params: Any) -> Any:
        """States of all problems."""
        return tuple(self._init_part(part, tree) for part, tree in enumerate(params))

    def _init_part(self, part: int, tree: Any) -> Any:
        if self.joins:
            leaves, _ = flat_params(tree)
            return self.rule.init_state(self._rows_of(part, leaves).join(leaves), tasks=True)
        # One by one: a rule may draw numbers for every problem, or learn its initial state.
        rows = problems_of(tree)
        states = [update.init_state(row) for update, row in zip(self.updates[part], rows, strict=True)]
        columns = zip(*map(pytree.tree_leaves, states), strict=True)
        return pytree.tree_unflatten([torch.cat(column) for column in columns], pytree.tree_structure(states[0]))

    def points(self, params: Any, state: Any) -> Any:
        """Where the next losses and gradients are to be taken."""
        if not self.rule.moves_gradients:
            return params
        return tuple(self.rule.gradient_points(tree, own) for tree, own in zip(params, state, strict=True))

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """A step of every problem's own rule."""
        del weights, step
        if self._at_once and _alike(params):
            new, kept = self._rule_of(None).step_groups(params, grads, state, loss=losses)
            return new, kept
        parts = losses.split([len(updates) for updates in self.updates]) if len(self.updates) > 1 else (losses,)
        new_params, new_state = [], []
        for part, of_part in enumerate(zip(params, grads, state, parts, strict=True)):
            rule, (tree, grad, own, loss) = self._rule_of(part), of_part
            if not self.joins:
                new, kept = rule(tree, grad, own, loss=loss)
            else:
                leaves, rebuild = flat_params(tree)
                rows = self._rows_of(part, leaves)
                last, row = self._last.get(part, (None, None))
                if row is None or last is not tree:
                    row = rows.join(leaves)
                moved, kept = rule(row, rows.join(flat_params(grad)[0]), own, loss=loss)
                new = rebuild(rows.split(moved, leaves))
                self._last[part] = new, moved
            new_params.append(new)
            new_state.append(kept)
        return tuple(new_params), tuple(new_state)

    def _rows_of(self, part: int, leaves: Sequence[Tensor]) -> _Rows:
        found = self._rows.get(part)
        if found is None:
            found = self._rows[part] = _Rows(leaves, getattr(self.rule, "unit", 1))
        return found

    def select(self, part: int, state: Any, rows: Sequence[int]) -> Any:
        """The state of some problems, which may repeat."""
        return self._mapped(lambda x, index: by_problem(x, self._number(part))[index].flatten(0, 1), state, rows)

    def replaced(self, part: int, state: Any, rows: Sequence[int], new: Any) -> Any:
        """``state`` with that of some problems replaced, where it can be in its memory."""
        rest = iter(pytree.tree_leaves(new))

        def replace(x: Tensor, index: Tensor) -> Tensor:
            others = by_problem(next(rest), len(rows))
            return by_problem(x, self._number(part)).index_copy_(0, index, others).flatten(0, 1)

        return self._mapped(replace, state, rows)

    def _number(self, part: int) -> int:
        return len(self.updates[part])

    def _mapped(self, change: Callable[[Tensor, Tensor], Tensor], state: Any, rows: Sequence[int]) -> Any:
        """A state with all its tensors changed; it may then be of another number of problems."""
        index = torch.tensor(list(rows))

        def changed(x: Tensor) -> Tensor:
            return change(x, index.to(x.device))

        rule = self.rule
        if not isinstance(rule, CoordinatewiseRule):
            return pytree.tree_map_only(Tensor, changed, state)
        tensors = {name: changed(x) for name, x in rule.packed(state).items()}
        return rule.from_packed(tensors, rule.unit * len(next(iter(tensors.values()))))

    def export_state(self, part: int, state: Any) -> list[list[Tensor]]:
        """The tensors of each problem's state."""
        number = self._number(part)
        rows = [by_problem(x, number).unbind() for x in pytree.tree_leaves(state)]
        return [[x.clone() for x in own] for own in zip(*rows, strict=True)] if rows else [[] for _ in range(number)]

    def import_state(self, part: int, fresh: Any, saved: Sequence[Sequence[Tensor]]) -> Any:
        """The state with these tensors; see :meth:`OneByOne.import_state`."""
        return pytree.tree_unflatten([torch.cat(x) for x in zip(*saved, strict=True)], pytree.tree_structure(fresh))


def _alike(parts: Sequence[Any]) -> bool:
    """Whether all parts have coordinates, of one dtype on one device."""
    leaves = [flat_params(tree)[0] for tree in parts]
    one_kind = len({(leaf.dtype, leaf.device) for own in leaves for leaf in own}) == 1
    return one_kind and all(any(leaf.numel() for leaf in own) for own in leaves)


def by_problem(x: Tensor, number: int) -> Tensor:
    """A tensor of a state, whose first axis holds n problems one after the other, as [n, rows, ...]."""
    return x.reshape(number, len(x) // number, *x.shape[1:])


def problems_of(tree: Any) -> list[Any]:
    """The params of each problem, trees [1, *shape], of a tree [n, *shape]."""
    leaves, rebuild = flat_params(tree)
    return [rebuild(row) for row in zip(*(leaf.split(1) for leaf in leaves), strict=True)]


def joined(rows: Sequence[Any], like: Any) -> Any:
    """The inverse of :func:`problems_of`, structured like a tree."""
    _, rebuild = flat_params(like)
    return rebuild([torch.cat(parts) for parts in zip(*(flat_params(row)[0] for row in rows), strict=True)])
