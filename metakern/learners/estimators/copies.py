"""Copies of a rule with perturbed weights, one for each of an antithetic pair.

The losses and gradients of all pairs are one batch. Steps are one launch, too, for rules that take weights of every
task's own (``metakern.rules.protocol.with_copies``): all that metakern ships but gradient descent with rates for every
step. Any other rule steps one problem after the other, each by a copy of its own.

Axis legend: T problems, 2T perturbed rules in the order +, - of problem 0, +, - of problem 1, ...; W weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.inner_loop.updates import RuleUpdate
from metakern.learners.estimators.steps import OneByOne, Together
from metakern.rules.protocol import Rule, with_copies


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
    """2T copies of a rule.

    Args:
        rule: the rule
        num_problems: T

    Attributes:
        rules: the copies
        updates: the same for the inner loop
    """

    def __init__(self, rule: nn.Module, num_problems: int) -> None:
        count = 2 * num_problems
        self._learned = [p.requires_grad for p in rule.parameters()]
        #: Every parameter of the rule, [2T, *shape]; those of the copies are views of them.
        self._stacks = [p.detach().expand(count, *p.shape).clone() for p in rule.parameters()]
        learned_weights(rule)  # raises if there are none
        self.rules: list[Any] = []
        for index in range(count):
            perturbed = copy.deepcopy(rule).requires_grad_(False)
            for p, stack in zip(perturbed.parameters(), self._stacks, strict=True):
                p.data = stack[index]
            self.rules.append(perturbed)
        self.updates = [RuleUpdate(each, redraws=True) for each in self.rules]
        self._takes_copies = isinstance(rule, Rule) and rule.can_take_copies()
        self._rules_of: dict[tuple[int, ...], Any] = {}  # rules that step several problems, by these

    @property
    def rows(self) -> Tensor:
        """The learned weights [2T, W]."""
        return torch.cat([stack.reshape(len(stack), -1) for stack in self._learned_stacks()], 1)

    def _learned_stacks(self) -> list[Tensor]:
        return [stack for stack, learned in zip(self._stacks, self._learned, strict=True) if learned]

    def serves(self, rule: nn.Module, num_problems: int) -> bool:
        """Whether these are copies of such a rule."""
        found = [((2 * num_problems, *p.shape), p.dtype, p.device) for p in learned_weights(rule)]
        return type(self.rules[0]) is type(rule) and found == [
            (tuple(stack.shape), stack.dtype, stack.device) for stack in self._learned_stacks()
        ]

    @torch.no_grad()
    def perturb(self, rule: nn.Module, shifts: Tensor) -> None:
        """Set the weights to w + shift and w - shift.

        Args:
            rule: has w, and further tensors, which the copies take over
            shifts: [T, W]
        """
        rest = iter(shifts.split([p.numel() for p in learned_weights(rule)], 1))
        for p, stack, learned in zip(rule.parameters(), self._stacks, self._learned, strict=True):
            if not learned:
                stack.copy_(p.expand(stack.shape))
                continue
            shift = next(rest).view(-1, *p.shape)
            stack[0::2] = p + shift
            stack[1::2] = p - shift
        buffers = list(rule.buffers())
        for each in [*self.rules, *self._rules_of.values()] if buffers else ():
            for own, x in zip(each.buffers(), buffers, strict=True):
                own.copy_(x)
        self._refresh()

    def _refresh(self) -> None:
        """Give the rules of several problems, whose weights are no views, the new weights."""
        for members, rule in self._rules_of.items():
            for p, stack in zip(rule.parameters(), self._stacks, strict=True):
                if p.data_ptr() != stack.data_ptr():
                    torch.index_select(stack, 0, torch.tensor(members, device=stack.device), out=p.data)

    def steps_of(self, parts: Sequence[Sequence[int]]) -> OneByOne | Together:
        """The update of problems in several parts.

        Args:
            parts: the problems of each part, as indices among the 2T
        """
        if not self._takes_copies:
            return OneByOne([[self.updates[member] for member in members] for members in parts])
        own = [[self.updates[member] for member in members] for members in parts]
        every = tuple(member for members in parts for member in members)
        return Together(own, lambda part: self._rule_of(every if part is None else tuple(parts[part])))

    def keep_rules_of(self, parts: Sequence[Sequence[int]]) -> None:
        """Drop the rules that step other problems than these parts."""
        kept = {tuple(members) for members in (*parts, [member for members in parts for member in members])}
        self._rules_of = {members: rule for members, rule in self._rules_of.items() if members in kept}

    def _rule_of(self, members: tuple[int, ...]) -> Any:
        """The rule that steps these problems, each with its own weights."""
        found = self._rules_of.get(members)
        if found is None:
            found = self._rules_of[members] = with_copies(self.rules[0], len(members))
            whole = members == tuple(range(len(self.rules)))
            for p, stack in zip(found.parameters(), self._stacks, strict=True):
                p.data = stack if whole else stack[torch.tensor(members, device=stack.device)]
        return found
