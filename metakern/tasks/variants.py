"""Variants of problems to optimise: noisy or sparse gradients, other scales, logarithms, sums.

Wichrowska et al. 2017, arXiv 1703.04813, section 4 and appendix, trains on such variants; random scales also follow Lv
et al. 2017, arXiv 1703.03633, section 4. Variants of one kind mix by :class:`MixedOptimizees`.

Axis legend: T problems, P parameters of one problem.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from metakern.core.task_params import flat_params, join_tasks, task_groups
from metakern.tasks.distribution import ShortRepr, check_num_tasks
from metakern.tasks.optimizee_groups import MixedOptimizees
from metakern.tasks.optimizees import Optimizees, ProblemBatch, check_params


class Variant(ShortRepr):
    """Base of distributions that change the problems of another; a subclass defines ``sample``."""

    problems: Any

    def split(self, name: str) -> Self:
        """The same variant on another split."""
        other = copy.copy(self)
        other.problems = self.problems.split(name)
        return other


class VariantBatch(ProblemBatch):
    """T problems made of other batches of T problems, ``parts``; by default the losses of the only part."""

    variant: ClassVar[str] = "a variant"

    def __init__(self, parts: Sequence[Any], generator: torch.Generator) -> None:
        super().__init__(parts[0].num_tasks, generator)
        self.parts = tuple(parts)

    @property
    def batch(self) -> Any:
        """The first part: the problems without the variant."""
        return self.parts[0]

    @property
    def has_held_out(self) -> bool:
        """Whether every part has held-out samples."""
        return all(getattr(part, "has_held_out", False) for part in self.parts)

    def select(self, tasks: slice | Tensor) -> Self:
        """Some of the problems: a slice, indices, or a mask [T]."""
        return super().select(tasks)._of([part.select(tasks) for part in self.parts])

    def to(self, device: torch.device | str) -> Self:
        """The same problems, with the same draws, on another device."""
        return super().to(device)._of([part.to(device) for part in self.parts])

    def replaced(self, index: Tensor, other: Self) -> Self:
        """The same problems, but those at ``index`` [n] are the n of ``other``."""
        pairs = zip(self.parts, other.parts, strict=True)
        return super().replaced(index, other)._of([part.replaced(index, new) for part, new in pairs])

    def export_state(self) -> dict[str, Any]:
        """The problems and the states of all draws as plain data."""
        return super().export_state() | {"parts": [part.export_state() for part in self.parts]}

    def import_state(self, saved: Mapping[str, Any]) -> Self:
        """The problems of :meth:`export_state`."""
        parts = saved.get("parts", ())
        if len(parts) != len(self.parts):
            raise ValueError(f"saved problems must have {len(self.parts)} parts, as {self}, got {len(parts)}")
        pairs = zip(self.parts, parts, strict=True)
        return super().import_state(saved)._of([part.import_state(state) for part, state in pairs])

    def init_params(self) -> Any:
        """Starting points of the problems."""
        params = self.batch.init_params()
        if isinstance(params, tuple):
            raise TypeError(
                f"the params of problems under {self.variant} must be those of one kind, got a tuple of groups; put "
                f"{self.variant} into MixedOptimizees, not around it"
            )
        return params

    def loss(self, params: Any) -> Tensor:
        """Losses [T] of params on the next minibatches."""
        losses: Tensor = self.batch.loss(params)
        return losses

    def full_loss(self, params: Any) -> Tensor:
        """Losses [T] of params on all data."""
        losses: Tensor = self.batch.full_loss(params)
        return losses

    def held_out_loss(self, params: Any) -> Tensor:
        """Losses [T] of params on held-out samples."""
        losses: Tensor = self.batch.held_out_loss(params)
        return losses

    def _of(self, parts: Sequence[Any]) -> Self:
        self.parts = tuple(parts)
        return self


class GradientNoise(Variant):
    """Adds noise to the gradients of problems: N(0, std²) for every parameter, drawn anew at every loss.

    The values of losses stay exact, and so do full losses and their gradients.

    Args:
        problems: problems of one kind; mix noisy and noiseless ones by :class:`MixedOptimizees`
        std: standard deviation of the noise

    Example:
        >>> problems = GradientNoise(ClassicFunction("ackley"), std=0.1)
    """

    def __init__(self, problems: Optimizees, std: float) -> None:
        if not 0 <= std < math.inf:
            raise ValueError(f"std must be finite and at least 0, got {std}")
        self.problems, self.std = problems, std

    def sample(self, num_tasks: int, generator: torch.Generator) -> NoisyBatch:
        """Draw ``num_tasks`` problems."""
        return NoisyBatch(self.problems.sample(num_tasks, generator), self.std, generator)


class NoisyBatch(VariantBatch):
    """T problems with noisy gradients; ``batch`` holds the same problems without noise."""

    variant = "GradientNoise"

    def __init__(self, batch: Any, std: float, generator: torch.Generator) -> None:
        super().__init__([batch], generator)
        self.std = std

    def loss(self, params: Any) -> Tensor:
        """Losses [T] of params on the next minibatches; only their gradients are noisy."""
        (tensors,) = task_groups(params)
        joined = join_tasks(tensors)
        noise = self.std * self.draw(torch.randn, joined.shape[1]).to(joined.dtype)
        return super().loss(params) + ((joined - joined.detach()) * noise).sum(1)


class SparseGradients(Variant):
    """Sets each entry of the gradients to 0 with a probability, anew at every loss; values stay exact.

    Args:
        problems: problems of one kind
        keep: probability that an entry stays, above 0

    Example:
        >>> problems = SparseGradients(Quadratics(), keep=0.1)
    """

    def __init__(self, problems: Optimizees, keep: float = 0.01) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
        self.problems, self.keep = problems, keep

    def sample(self, num_tasks: int, generator: torch.Generator) -> SparseBatch:
        """Draw ``num_tasks`` problems."""
        return SparseBatch(self.problems.sample(num_tasks, generator), self.keep, generator)


class SparseBatch(VariantBatch):
    """T problems with sparse gradients."""

    variant = "SparseGradients"

    def __init__(self, batch: Any, keep: float, generator: torch.Generator) -> None:
        super().__init__([batch], generator)
        self.keep = keep

    def loss(self, params: Any) -> Tensor:
        """Losses [T] of params on the next minibatches; only their gradients are sparse."""

        def sparse(p: Tensor) -> Tensor:
            kept = self.draw(torch.rand, *p.shape[1:]) < self.keep
            return torch.where(kept, p, p.detach())

        return super().loss(_mapped(sparse, params))


#: What shares a random scale: a whole problem, each of its tensors, or nothing (every coordinate has its own).
SCALE_SHARES = ("problem", "tensor", "coordinate")


class Reparametrised(Variant):
    """Problems in other coordinates: loss(s ⊙ φ), started at φ_0 = θ_0/s. The scales s = exp(U(-spread, spread)).

    A rule that is trained on them meets gradients of all scales.

    Args:
        problems: problems of one kind, or a mixture, whose kinds are then reparametrised one by one
        share: one of :data:`SCALE_SHARES`
        spread: largest |log s|

    Example:
        >>> problems = Reparametrised(DigitsMLP(), "coordinate")  # as RNNProp's training
    """

    def __new__(cls, problems: Any = None, share: str = "problem", spread: float = 3.0) -> Any:
        """For a mixture the mixture of reparametrised kinds."""
        if isinstance(problems, MixedOptimizees):
            kinds = [cls(kind, share, spread) for kind in problems.distributions]
            return MixedOptimizees(kinds, problems.weights, even=problems.even)
        return super().__new__(cls)

    def __init__(self, problems: Optimizees, share: str = "problem", spread: float = 3.0) -> None:
        if share not in SCALE_SHARES:
            raise ValueError(f"share must be one of {', '.join(SCALE_SHARES)}, got {share!r}")
        if not 0 <= spread < math.inf:
            raise ValueError(f"spread must be finite and at least 0, got {spread}")
        self.problems, self.share, self.spread = problems, share, spread

    def sample(self, num_tasks: int, generator: torch.Generator) -> ReparametrisedBatch:
        """Draw ``num_tasks`` problems and their scales."""
        return ReparametrisedBatch(self.problems.sample(num_tasks, generator), self.share, self.spread, generator)


class ReparametrisedBatch(VariantBatch):
    """T problems in other coordinates."""

    per_task = ("scales",)
    variant = "Reparametrised"

    def __init__(self, batch: Any, share: str, spread: float, generator: torch.Generator) -> None:
        super().__init__([batch], generator)
        # For the shapes: a selection's draws leave the batch's alone.
        start = VariantBatch([batch.select(slice(None))], generator.clone_state()).init_params()
        self.share, self.spread = share, spread
        common = self.draw(torch.rand, 1)

        def scale(p: Tensor) -> Tensor:
            ones = [1] * (p.dim() - 1)
            if share == "problem":
                uniform = common.view(-1, *ones)
            else:
                uniform = self.draw(torch.rand, *(p.shape[1:] if share == "coordinate" else ones))
            return (spread * (2 * uniform - 1)).exp()

        self.scales = _mapped(scale, start)

    def init_params(self) -> Any:
        """Starting points θ_0/s."""
        return self._scaled(torch.div, super().init_params())

    def loss(self, params: Any) -> Tensor:
        """Losses [T] of s ⊙ params on the next minibatches."""
        return super().loss(self._scaled(torch.mul, params))

    def full_loss(self, params: Any) -> Tensor:
        """Losses [T] of s ⊙ params on all data."""
        return super().full_loss(self._scaled(torch.mul, params))

    def held_out_loss(self, params: Any) -> Tensor:
        """Losses [T] of s ⊙ params on held-out samples."""
        return super().held_out_loss(self._scaled(torch.mul, params))

    def _scaled(self, function: Callable[[Tensor, Tensor], Tensor], params: Any) -> Any:
        if isinstance(self.scales, dict):
            named = check_params(params, self.scales)
            return {name: function(p, self.scales[name].to(p.dtype)) for name, p in named.items()}
        leaves, rebuild = flat_params(params)
        scales = flat_params(self.scales)[0]
        return rebuild([function(p, scale.to(p.dtype)) for p, scale in zip(leaves, scales, strict=True)])


class LogObjective(Variant):
    """Problems with the loss log(f + 1e-6) - log 1e-6, for losses f that are nowhere negative.

    Example:
        >>> problems = LogObjective(Quadratics())
    """

    def __init__(self, problems: Optimizees) -> None:
        self.problems = problems

    def sample(self, num_tasks: int, generator: torch.Generator) -> LogBatch:
        """Draw ``num_tasks`` problems."""
        return LogBatch([self.problems.sample(num_tasks, generator)], generator)


class LogBatch(VariantBatch):
    """T problems with logarithmic losses."""

    variant = "LogObjective"

    def loss(self, params: Any) -> Tensor:
        """log(f + 1e-6) - log 1e-6, [T], on the next minibatches."""
        return _log(super().loss(params))

    def full_loss(self, params: Any) -> Tensor:
        """The same on all data."""
        return _log(super().full_loss(params))

    def held_out_loss(self, params: Any) -> Tensor:
        """The same on held-out samples."""
        return _log(super().held_out_loss(params))


def _log(losses: Tensor) -> Tensor:
    return torch.log1p(losses / 1e-6)


class SumOfProblems(Variant):
    """Problems of several kinds solved as one: its loss is the sum of theirs, its params are all of theirs.

    The params of the kind at index i have the prefix ``i.``.

    Args:
        kinds: distributions whose problems have params by name

    Example:
        >>> problems = SumOfProblems([Quadratics(), Bowls()])
    """

    def __init__(self, kinds: Sequence[Optimizees]) -> None:
        self.problems = tuple(kinds)
        if not self.problems:
            raise ValueError("kinds must hold at least one distribution, got none")

    def split(self, name: str) -> Self:
        """The same sums on another split."""
        other = copy.copy(self)
        other.problems = tuple(kind.split(name) for kind in self.problems)
        return other

    def sample(self, num_tasks: int, generator: torch.Generator) -> SumBatch:
        """Draw ``num_tasks`` problems, each the sum of one of every kind."""
        check_num_tasks(num_tasks)
        return SumBatch([kind.sample(num_tasks, generator) for kind in self.problems], generator)


class SumBatch(VariantBatch):
    """T sums of problems."""

    def __init__(self, parts: Sequence[Any], generator: torch.Generator) -> None:
        super().__init__(parts, generator)
        self.names = tuple(self.select(slice(None)).init_params())  # a selection's draws leave the batch's alone

    def init_params(self) -> dict[str, Tensor]:
        """Starting points of all parts, by name."""
        starts = [part.init_params() for part in self.parts]
        return {f"{index}.{name}": p for index, start in enumerate(starts) for name, p in start.items()}

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Sums of losses [T] on the next minibatches."""
        return self._sum("loss", params)

    def full_loss(self, params: dict[str, Tensor]) -> Tensor:
        """Sums of losses [T] on all data."""
        return self._sum("full_loss", params)

    def held_out_loss(self, params: dict[str, Tensor]) -> Tensor:
        """Sums of losses [T] on held-out samples."""
        return self._sum("held_out_loss", params)

    def _sum(self, name: str, params: dict[str, Tensor]) -> Tensor:
        params = check_params(params, self.names)
        losses = []
        for index, part in enumerate(self.parts):
            prefix = f"{index}."
            of_part = {full.removeprefix(prefix): params[full] for full in self.names if full.startswith(prefix)}
            losses.append(getattr(part, name)(of_part))
        total: Tensor = torch.stack(losses).sum(0)
        return total


def _mapped(function: Callable[[Tensor], Tensor], params: Any) -> Any:
    """A tree of params with ``function`` applied to each tensor."""
    leaves, rebuild = flat_params(params)
    return rebuild([function(p) for p in leaves])
