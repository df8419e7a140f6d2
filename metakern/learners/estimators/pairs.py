"""Evolution strategies on antithetic pairs: truncations of problems that outlive meta-batches.

For each of T slots a problem is solved twice, with rules of weights w + σε and w - σε, on the same data and the same
draws; the difference of their losses gives the slot's meta-gradient. Problems begin desynchronised, live for a
log-uniform number of steps, and are then replaced by the problem of the same slot in the newest meta-batch, also in the
middle of a truncation. Vicol, Metz & Sohl-Dickstein 2021, arXiv 2112.13835.

The antithetic pairs are 2T problems of one batch: one call gives all their losses and gradients, and one launch steps
them all, each with weights of its own; see ``copies.py``.

Axis legend: T slots, 2T problems in pairs, W weights of the rule, K steps of a truncation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.inner_loop.loop import InnerLoop
from metakern.learners.estimators.copies import Copies, flat_weights
from metakern.learners.estimators.flight import Flight, in_pairs
from metakern.learners.estimators.noise import Noise
from metakern.learners.objectives import Objective
from metakern.learners.unroll import Optimized
from metakern.tasks import MixedBatch


class Pairs(nn.Module):
    """Meta-gradients of a rule from antithetic pairs; its extra state holds the problems in flight.

    Args:
        noise: the kind of estimator
        unroll: K
        steps: longest life of a problem
        min_steps: shortest
        sigma: σ
        max_difference: largest difference of a pair's losses in size; None: no limit
        objective: objective of a truncation
        held_out: whether losses are taken on held-out samples
    """

    def __init__(
        self,
        noise: type[Noise],
        *,
        unroll: int,
        steps: int,
        min_steps: int,
        sigma: float,
        max_difference: float | None,
        objective: Objective,
        held_out: bool,
    ) -> None:
        super().__init__()
        self.unroll, self.steps, self.min_steps = unroll, steps, min_steps
        self.sigma, self.max_difference, self.held_out = sigma, max_difference, held_out
        self._kind, self._objective = noise, objective
        self._copies: Copies | None = None
        self._flight: Flight | None = None
        self._noise = noise()
        self._saved: dict[str, Any] | None = None  # what a checkpoint held, until the next meta-batch
        self._shares: list[Any] | None = None  # the states of all processes
        self._rank, self._world = 0, 1

    @torch.no_grad()
    def estimate(self, rule: Any, batch: Any, tasks: Any = None) -> tuple[Tensor, Tensor]:
        """One truncation.

        Args:
            rule: the rule, at w
            batch: T new problems for the slots whose problem ends; in the first call, for all
            tasks: the distribution of the problems, which restoring a checkpoint needs

        Returns:
            losses [T], the mean of each pair over the truncation, and meta-gradients [T, W]
        """
        check_batch(batch)
        center = flat_weights(rule)
        if self._copies is None or not self._copies.serves(rule, batch.num_tasks):
            self._copies = Copies(rule, batch.num_tasks)
        copies, self._shares = self._copies, None
        if self._saved is not None:
            self._restore(copies, batch, tasks)
        if self._flight is not None and self._flight.num_slots != batch.num_tasks:
            raise ValueError(
                f"batch must have a problem for each of {self._flight.num_slots} slots, got {batch.num_tasks}"
            )
        self._noise.begin(lambda: batch.draw(torch.randn, center.numel()).to(center))
        copies.perturb(rule, self.sigma * self._noise.epsilon)
        uniform = batch.draw(torch.rand, 3).tolist()
        lengths = [self._length(share) for share, _, _ in uniform]
        fresh = in_pairs(batch)
        if self._flight is None:
            # The first problems are as if they had been under way: they end after a random part of their lives.
            left = [max(1, math.ceil(part * self._length(share))) for _, share, part in uniform]
            self._flight = Flight.begin(in_pairs(batch), copies, left)
            fresh.init_params()  # those that end in this truncation begin again elsewhere, on the same problem
        return self._truncation(rule, copies, self._flight, fresh, lengths)

    def _length(self, share: float) -> int:
        """A length between ``min_steps`` and ``steps``, log-uniform for a uniform share."""
        return round(self.min_steps * math.exp(share * math.log(self.steps / self.min_steps)))

    def _truncation(
        self, rule: Any, copies: Copies, flight: Flight, fresh: Any, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        noise = self._noise
        scores = _Scores(self._objective, self.unroll, self.held_out, flight)
        gradients, step = torch.zeros_like(noise.epsilon), 0
        while step < self.unroll:
            ended = flight.ended()
            if ended:
                gradients[ended] += self._part(scores.take(ended), ended)
                before = noise.epsilon
                noise.restart(ended)
                if noise.epsilon is not before:
                    copies.perturb(rule, self.sigma * noise.epsilon)
                flight.restart(ended, fresh, copies, [lengths[slot] for slot in ended])
            stop = min(self.unroll, step + flight.steps_to_next_end())
            problem = scores.problem(step)
            loop = InnerLoop(copies.steps_of(flight.members()), [True] * (stop - step))
            params, states, _ = loop.run(problem, flight.params, flight.states)
            flight.advance(params, states, stop - step)
            step = stop
        every = list(range(flight.num_slots))
        gradients += self._part(scores.take(every), every)
        if noise.keeps_positive:
            flight.keep_positive(copies)
        return scores.values(), gradients

    def _part(self, difference: Tensor, slots: Sequence[int]) -> Tensor:
        """(L⁺ - L⁻)·A/(2σ) of some slots, [n, W]; a difference that is not finite counts as 0. A is in units of σ."""
        difference = torch.where(difference.isfinite(), difference, torch.zeros_like(difference))
        if self.max_difference is not None:
            difference = difference.clamp(-self.max_difference, self.max_difference)
        factor = self._noise.factor[list(slots)]
        return (difference.to(factor) / (2 * self.sigma)).unsqueeze(1) * factor

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def process_state(self) -> dict[str, Any] | None:
        """The problems of this process in flight, as plain data; None if there are none."""
        if self._saved is not None:
            return self._saved
        if self._flight is None or self._copies is None:
            return None
        noise = {"epsilon": self._noise.epsilon, "factor": self._noise.factor}
        return {"kind": self._kind.__name__, "flight": self._flight.export_state(self._copies), "noise": noise}

    def set_process(self, rank: int, world: int) -> None:
        """Which of the processes' states is this process's own."""
        self._rank, self._world = rank, world

    def set_process_states(self, states: list[Any]) -> None:
        """The states of all processes, for the next checkpoint."""
        self._shares = states

    def get_extra_state(self) -> dict[str, Any]:
        """The states of all processes where they are known, else that of this one."""
        own = self.process_state()
        return {"shares": self._shares if self._shares is not None else [] if own is None else [own]}

    def set_extra_state(self, state: Any) -> None:
        """Take this process's problems at the next meta-batch.

        Raises:
            ValueError: for states of another estimator, or of another number of processes.
        """
        shares = state.get("shares") if isinstance(state, Mapping) else None
        if not isinstance(shares, list) or not all(isinstance(share, dict) for share in shares):
            raise ValueError("the problems in flight must be a list of states, one for each process")
        if len(shares) not in (0, self._world):
            raise ValueError(
                f"the problems in flight are those of {len(shares)} processes, and this run has {self._world}: start "
                f"{len(shares)}"
            )
        for share in shares:
            if share.get("kind") != self._kind.__name__ or not {"flight", "noise"} <= share.keys():
                raise ValueError(f"the problems in flight must be of {self._kind.__name__}, got {share.get('kind')!r}")
        self._flight, self._noise = None, self._kind()
        self._saved = shares[self._rank] if shares else None
        self._shares = shares or None

    def _restore(self, copies: Copies, batch: Any, tasks: Any) -> None:
        assert self._saved is not None
        noise = [self._saved["noise"][name].to(copies.rows, copy=True) for name in ("epsilon", "factor")]
        if any(x.shape != (len(copies.rows) // 2, copies.rows.shape[1]) for x in noise):
            raise ValueError(
                f"the perturbations in flight must have shape {[len(copies.rows) // 2, copies.rows.shape[1]]}, got "
                f"{list(noise[0].shape)}"
            )
        self._flight = Flight.import_state(self._saved["flight"], copies, batch, tasks)
        self._noise.load(*noise)
        self._saved = None


class _Scores:
    """Sums of a truncation's losses since its beginning, or since a problem's restart in it."""

    def __init__(self, objective: Objective, unroll: int, held_out: bool, flight: Flight) -> None:
        self.objective, self.unroll, self.held_out, self.flight = objective, unroll, held_out, flight
        self._sums = self._values = torch.zeros(())

    def problem(self, step: int) -> _Scored:
        """The problems for the inner loop from ``step`` of the truncation on."""
        return _Scored(self, step)

    def add(self, losses: Tensor, step: int, starts: bool) -> None:
        """Count losses [2T] before an update, in the order of the flight's problems.

        Args:
            losses: of the flight's problems
            step: of the truncation
            starts: whether problems may begin at this step
        """
        losses = self.flight.in_slots(losses)
        first = self.flight.first_losses(losses, starts)
        if self.objective.last and step != self.unroll - 1:
            return
        number = 1 if self.objective.last else self.unroll
        self._sums = self._sums + self.objective.value(losses, first) / number
        self._values = self._values + losses / number

    def take(self, slots: Sequence[int]) -> Tensor:
        """Differences L⁺ - L⁻ [n] of some slots; their sums begin anew."""
        if not self._sums.dim():
            return self._sums.new_zeros(len(slots))
        pairs = self._sums.view(-1, 2)[list(slots)]
        index = torch.tensor([2 * slot + sign for slot in slots for sign in (0, 1)], device=pairs.device)
        self._sums = self._sums.index_fill(0, index, 0.0)
        return pairs[:, 0] - pairs[:, 1]

    def values(self) -> Tensor:
        """Mean losses [T] of the pairs; where one is not finite, the mean of the others'."""
        values = self._values.view(-1, 2).mean(1)
        finite = values.isfinite()
        mean = values[finite].mean() if bool(finite.any()) else values.new_tensor(torch.nan)
        return torch.where(finite, values, mean)


class _Scored(Optimized):
    """Problems for the inner loop whose losses count for the estimate."""

    def __init__(self, scores: _Scores, first_step: int) -> None:
        super().__init__(scores.flight.batch())
        self.scores, self.first_step = scores, first_step

    def gradients(self, params: Any, step: int, first_order: bool) -> tuple[Tensor, Any]:
        """Losses [2T] on the next minibatches, and gradients like params."""
        losses, grads = super().gradients(params, step, first_order)
        counted = self.batch.held_out_loss(params) if self.scores.held_out else losses
        self.scores.add(counted, self.first_step + step, step == 0)
        return losses, grads


def check_batch(batch: Any) -> None:
    """Raise TypeError for a batch whose problems cannot be kept, replaced and solved twice."""
    for group in [each for _, each in batch.kinds()] if isinstance(batch, MixedBatch) else [batch]:
        if not all(hasattr(group, name) for name in ("draw", "replaced", "export_state", "import_state")):
            raise TypeError(
                "batch must be of problems derived from metakern.tasks.ProblemBatch, which evolution strategies keep, "
                f"replace and solve in pairs, got {type(group).__name__}; estimator 'tbptt' takes any"
            )
