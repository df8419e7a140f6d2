"""Problems in flight: pairs of problems that are under way, kept from one meta-batch to the next.

Axis legend: T slots, 2T problems in the order +, - of slot 0, +, - of slot 1, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from metakern.core.task_params import flat_params
from metakern.learners.estimators.copies import Copies
from metakern.learners.starts import starting_params
from metakern.tasks import MixedBatch


@dataclass(frozen=True)
class Part:
    """Pairs of problems of one kind that are evaluated as one batch.

    Attributes:
        kind: the kind's place in the mixture, () where there is none
        slots: the slot of each pair
        batch: the problems, two for each slot
        params: their params
        states: theirs, as ``Copies.steps_of`` keeps them
    """

    kind: tuple[int, ...]
    slots: tuple[int, ...]
    batch: Any
    params: Any
    states: Any

    @property
    def members(self) -> list[int]:
        """Indices of the problems among all 2T."""
        return [2 * slot + sign for slot in self.slots for sign in (0, 1)]

    @classmethod
    def start(cls, kind: tuple[int, ...], slots: Sequence[int], batch: Any, copies: Copies) -> Self:
        """Problems at their starting points; a rule that learns these starts each pair at those of its two copies."""
        part = cls(kind, tuple(slots), batch, None, None)
        params = batch.init_params()
        rules = [copies.rules[member] for member in part.members]
        if getattr(rules[0], "initialisation", lambda: None)() is not None:
            alone = [batch.select(torch.tensor([row])) for row in range(len(rules))]
            starts = [flat_params(starting_params(rule, one))[0] for rule, one in zip(rules, alone, strict=True)]
            params = flat_params(params)[1]([torch.cat(rows) for rows in zip(*starts, strict=True)])
        (states,) = copies.steps_of([part.members]).init_state((params,))
        return replace(part, params=params, states=states)


class Flight:
    """The problems of all slots.

    A distribution of one kind makes one part, in which problems are replaced, and an even mixture one of each kind. In
    any other mixture a slot's next problem may be of another kind, so its pair leaves its part and makes a new one with
    those that begin at the same time.

    Attributes:
        parts: all pairs
        ages: steps taken by each slot's problem
        lengths: steps after which it ends
    """

    def __init__(self, parts: Sequence[Part], ages: Sequence[int], lengths: Sequence[int]) -> None:
        self.parts, self.ages, self.lengths = list(parts), list(ages), list(lengths)
        self.first: Tensor | None = None  # f_0 [2T]

    @classmethod
    def begin(cls, fresh: Any, copies: Copies, lengths: Sequence[int]) -> Self:
        """New problems in all slots.

        Args:
            fresh: 2T problems, in pairs
            copies: the perturbed rules
            lengths: of each slot's problem
        """
        parts = [Part.start(kind, slots, batch, copies) for kind, slots, batch in _kinds(fresh, range(len(lengths)))]
        return cls(parts, [0] * len(lengths), lengths)

    @property
    def num_slots(self) -> int:
        """T."""
        return len(self.ages)

    @property
    def params(self) -> tuple[Any, ...]:
        """Params of all parts."""
        return tuple(part.params for part in self.parts)

    @property
    def states(self) -> tuple[Any, ...]:
        """States of all parts."""
        return tuple(part.states for part in self.parts)

    def members(self) -> list[list[int]]:
        """Indices among the 2T of the problems of each part."""
        return [part.members for part in self.parts]

    def in_slots(self, losses: Tensor) -> Tensor:
        """Bring numbers of problems, part after part, into the order of the slots."""
        order = [member for members in self.members() for member in members]
        if order == list(range(len(order))):
            return losses
        return losses[torch.tensor(order).argsort().to(losses.device)]

    def batch(self) -> MixedBatch:
        """All problems as one batch."""
        return MixedBatch([part.batch for part in self.parts], torch.arange(2 * self.num_slots))

    def ended(self) -> list[int]:
        """Slots whose problem has come to its end."""
        return [slot for slot, age in enumerate(self.ages) if age >= self.lengths[slot]]

    def steps_to_next_end(self) -> int:
        """Steps until a problem ends."""
        return min(length - age for age, length in zip(self.ages, self.lengths, strict=True))

    def advance(self, params: Sequence[Any], states: Sequence[Any], steps: int) -> None:
        """Take over what ``steps`` inner steps gave."""
        new = zip(self.parts, params, states, strict=True)
        self.parts = [replace(part, params=p, states=s) for part, p, s in new]
        self.ages = [age + steps for age in self.ages]

    def first_losses(self, losses: Tensor, starts: bool) -> Tensor:
        """f_0 [2T], the loss where each problem began: that of ``losses`` [2T] where it begins now, if ``starts``.

        The two of a pair share it: it is no part of what the weights change.
        """
        if starts or self.first is None:
            shared = losses.view(-1, 2).mean(1).repeat_interleave(2)
            begins = torch.tensor([age == 0 for age in self.ages for _ in (0, 1)], device=losses.device)
            self.first = shared if self.first is None else torch.where(begins, shared, self.first)
        return self.first

    def keep_positive(self, copies: Copies) -> None:
        """Both of every pair go on from the positive one's params and state."""
        steps = copies.steps_of(self.members())
        for index, part in enumerate(self.parts):
            leaves, rebuild = flat_params(part.params)
            params = rebuild([leaf[0::2].repeat_interleave(2, 0) for leaf in leaves])
            states = steps.select(index, part.states, [row - row % 2 for row in range(len(part.members))])
            self.parts[index] = replace(part, params=params, states=states)

    def restart(self, slots: Sequence[int], fresh: Any, copies: Copies, lengths: Sequence[int]) -> None:
        """Put new problems into some slots.

        Args:
            slots: ascending
            fresh: 2T problems in pairs, of which these slots take theirs
            copies: the perturbed rules
            lengths: of the new problems
        """
        for slot, length in zip(slots, lengths, strict=True):
            self.ages[slot], self.lengths[slot] = 0, length
        rows = torch.tensor([2 * slot + sign for slot in slots for sign in (0, 1)])
        started = [Part.start(kind, own, batch, copies) for kind, own, batch in _kinds(fresh.select(rows), slots)]
        if not isinstance(fresh, MixedBatch) or fresh.even:
            by_kind = {part.kind: part for part in started}
            self.parts = [
                _replaced(part, by_kind[part.kind], copies) if part.kind in by_kind else part for part in self.parts
            ]
            return
        kept = [_without(part, set(slots), copies) for part in self.parts]
        self.parts = [part for part in kept if part is not None] + started
        copies.keep_rules_of(self.members())

    def export_state(self, copies: Copies) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        steps = copies.steps_of(self.members())
        parts = [
            {
                "kind": list(part.kind),
                "slots": list(part.slots),
                "batch": part.batch.export_state(),
                "params": flat_params(part.params)[0],
                "states": steps.export_state(index, part.states),
            }
            for index, part in enumerate(self.parts)
        ]
        return {"parts": parts, "ages": list(self.ages), "lengths": list(self.lengths), "first": self.first}

    @classmethod
    def import_state(cls, saved: Mapping[str, Any], copies: Copies, batch: Any, tasks: Any) -> Self:
        """The problems of :meth:`export_state`.

        Args:
            saved: from there
            copies: the perturbed rules
            batch: T problems of the same distribution
            tasks: the distribution; may be None unless it is a mixture

        Raises:
            ValueError: for other problems or states of another rule.
        """
        device = copies.rows.device
        parts = [
            _restored(part, copies, _template(tuple(part["kind"]), batch, tasks, device)) for part in saved["parts"]
        ]
        flight = cls(parts, saved["ages"], saved["lengths"])
        slots = sorted(slot for part in parts for slot in part.slots)
        if slots != list(range(flight.num_slots)) or flight.num_slots != batch.num_tasks:
            raise ValueError(f"the problems in flight must fill {batch.num_tasks} slots, got {slots}")
        if saved["first"] is not None:
            flight.first = saved["first"].to(flat_params(parts[0].params)[0][0].device)
        return flight


def in_pairs(batch: Any) -> Any:
    """Each problem of a batch twice, with the same draws."""
    return batch.select(torch.arange(batch.num_tasks).repeat_interleave(2))


def _kinds(batch: Any, slots: Sequence[int]) -> list[tuple[tuple[int, ...], list[int], Any]]:
    """The kind, the slots and the batch of each group of pairs."""
    found, start = [], 0
    for kind, group in batch.kinds() if isinstance(batch, MixedBatch) else [((), batch)]:
        stop = start + group.num_tasks // 2
        found.append((kind, list(slots[start:stop]), group))
        start = stop
    return found


def _replaced(old: Part, new: Part, copies: Copies) -> Part:
    """A part with new problems in the slots of another part of the same kind."""
    rows = [2 * old.slots.index(slot) + sign for slot in new.slots for sign in (0, 1)]
    index = torch.tensor(rows)
    leaves, rebuild = flat_params(old.params)
    merged = zip(leaves, flat_params(new.params)[0], strict=True)
    params = rebuild([leaf.index_copy(0, index.to(leaf.device), other) for leaf, other in merged])
    states = copies.steps_of([old.members]).replaced(0, old.states, rows, new.states)
    return replace(old, batch=old.batch.replaced(index, new.batch), params=params, states=states)


def _without(part: Part, slots: set[int], copies: Copies) -> Part | None:
    """A part without some slots; None if nothing is left."""
    kept = [place for place, slot in enumerate(part.slots) if slot not in slots]
    if len(kept) == len(part.slots):
        return part
    if not kept:
        return None
    rows = [2 * place + sign for place in kept for sign in (0, 1)]
    index = torch.tensor(rows)
    leaves, rebuild = flat_params(part.params)
    return replace(
        part,
        slots=tuple(part.slots[place] for place in kept),
        batch=part.batch.select(index),
        params=rebuild([leaf[index.to(leaf.device)] for leaf in leaves]),
        states=copies.steps_of([part.members]).select(0, part.states, rows),
    )


def _template(kind: tuple[int, ...], batch: Any, tasks: Any, device: torch.device) -> Any:
    """A problem of a kind, which gives what all problems of that kind share."""
    if not kind:
        return batch
    if tasks is None:
        raise RuntimeError("on_iteration must be called before the first meta-batch, to restore problems of a mixture")
    for place in kind:
        tasks = tasks.distributions[place]
    return tasks.sample(1, torch.Generator()).to(device)


def _restored(saved: Mapping[str, Any], copies: Copies, template: Any) -> Part:
    batch = template.import_state(saved["batch"])
    part = Part(tuple(saved["kind"]), tuple(saved["slots"]), batch, None, None)
    start = batch.select(slice(None)).init_params()  # a selection's draws leave the batch's alone
    leaves, rebuild = flat_params(start)
    params = rebuild(_like(saved["params"], leaves, "params"))
    steps = copies.steps_of([part.members])
    (fresh,) = steps.init_state((params,))
    pairs = zip(saved["states"], steps.export_state(0, fresh), strict=True)
    states = [_like(own, like, "the rule's state") for own, like in pairs]
    return replace(part, params=params, states=steps.import_state(0, fresh, states))


def _like(saved: Sequence[Any], own: Sequence[Any], name: str) -> list[Tensor]:
    """Saved tensors, if they have the shapes and dtypes of ``own``."""
    found = [(list(x.shape), x.dtype) for x in saved]
    wanted = [(list(x.shape), x.dtype) for x in own]
    if found != wanted:
        raise ValueError(f"{name} of the problems in flight must be {wanted}, got {found}")
    return [x.to(like.device, copy=True) for x, like in zip(saved, own, strict=True)]
