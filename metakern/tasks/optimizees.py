"""Problems for learned optimizers (optimizees): T of one kind side by side, with params [T, *shape].

Andrychowicz et al. 2016, arXiv 1606.04474, section 3, trains on such problems; noisy gradients follow Wichrowska et
al. 2017, arXiv 1703.04813. Axis legend: T problems, P parameters of one problem.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from metakern.core.task_params import join_tasks, task_groups
from metakern.tasks.distribution import ShortRepr, check_num_tasks, check_split


class OptimizeeBatch(Protocol):
    """T problems, each with its data, solved side by side.

    Params are a tree of tensors with the task axis first: a dict ``{name: [T, *shape]}`` for metakern's own problems;
    user-defined problems may use a single tensor [T, P]. Problems of different shapes form groups: their params are a
    tuple of such trees, one per group, and the T problems are in the groups' order.
    """

    num_tasks: int

    def init_params(self) -> Any:
        """Draw starting points, new ones in every call."""
        ...

    def loss(self, params: Any) -> Tensor:
        """Losses [T] of ``params`` on the next minibatch of each problem."""
        ...

    def full_loss(self, params: Any) -> Tensor:
        """Losses [T] of ``params`` on all data of each problem."""
        ...

    def select(self, tasks: slice) -> OptimizeeBatch:
        """Some of the problems, with the same starting points and minibatches as in the whole batch."""
        ...


class Optimizees(Protocol):
    """A distribution of problems; any class with these two methods is one."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> OptimizeeBatch:
        """Draw ``num_tasks`` problems; all randomness comes from ``generator``."""
        ...

    def split(self, name: str) -> Optimizees:
        """The same distribution on the data of one split, "train", "valid" or "test"."""
        ...


class ProblemBatch(ShortRepr):
    """Base of problem batches: selection, devices, and draws that do not depend on the selection.

    Draws are made on the CPU for all sampled problems, and a selection takes its rows, so processes that select parts
    of one batch get the numbers that a single process would. A batch draws from its own stream, which begins at the
    generator's state; a selection draws from a copy of that stream. Neither moves the generator that the batch was
    sampled with.

    Subclasses list their tensors with a task axis in ``per_task``, and tensors that all tasks share in ``shared``.
    """

    per_task: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_tasks: int, generator: torch.Generator) -> None:
        check_num_tasks(num_tasks)
        self.num_tasks = self._sampled = num_tasks
        self._rows, self._device = torch.arange(num_tasks), torch.device("cpu")
        self._generator = generator.clone_state()
        generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))  # away from the batch's stream

    def select(self, tasks: slice | Tensor) -> Self:
        """Some of the problems: a slice, indices, or a mask [T].

        Raises:
            ValueError: where no problem is left.
        """
        tasks = tasks.cpu() if isinstance(tasks, Tensor) else tasks
        rows = self._rows[tasks]
        if not len(rows):
            raise ValueError(f"tasks must select at least one of the {self.num_tasks} problems, got {tasks}")
        chosen = self._with(self.per_task, lambda tensor: tensor[tasks])
        chosen._rows, chosen.num_tasks = rows, len(rows)
        return chosen

    def to(self, device: torch.device | str) -> Self:
        """The same problems, with the same draws, on another device."""
        moved = self._with(self.per_task + self.shared, lambda tensor: tensor.to(device))
        moved._device = torch.device(device)
        return moved

    def draw(self, function: Callable[..., Tensor], *shape: int) -> Tensor:
        """Random numbers [T, *shape] from ``function``, which is called like ``torch.randn``."""
        whole = function((self._sampled, *shape), generator=self._generator)
        return whole[self._rows].to(self._device)

    def _with(self, names: tuple[str, ...], function: Callable[[Tensor], Tensor]) -> Self:
        changed = copy.copy(self)
        changed._generator = self._generator.clone_state()
        for name in names:
            setattr(changed, name, function(getattr(self, name)))
        return changed


def check_params(params: Any, names: Collection[str]) -> dict[str, Tensor]:
    """Check that params are a dict with exactly these names, and return them.

    Raises:
        TypeError: for params that are not a dict
        ValueError: for a dict with other names
    """
    expected = f"params must be a dict of {', '.join(names)}, as init_params returns it"
    if not isinstance(params, dict):
        raise TypeError(f"{expected}, got {type(params).__name__}")
    if params.keys() != set(names):
        raise ValueError(f"{expected}, got {', '.join(map(str, params)) or 'an empty one'}")
    return params


class EndlessProblems(ShortRepr):
    """Base of distributions over infinitely many problems: every split has a random stream of its own."""

    _split = "train"

    def split(self, name: str) -> Self:
        """The same kind of problems; no two splits share one, even from generators of one seed."""
        check_split(name)
        split = copy.copy(self)
        split._split = name
        return split

    def _stream(self, generator: torch.Generator) -> torch.Generator:
        """Generator of a sample: ``generator`` itself for "train", else one seeded by a draw from it and the split."""
        if self._split == "train":
            return generator
        draw = int(torch.randint(2**63 - 1, (), generator=generator))
        digest = hashlib.sha256(f"{self._split} {draw}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Quadratics(EndlessProblems):
    """f(x) = ‖Wx - y‖², the entries of W [dim, dim] and y [dim] drawn from N(0, 1). Params are ``{"x": [T, dim]}``."""

    def __init__(self, dim: int = 10) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim

    def sample(self, num_tasks: int, generator: torch.Generator) -> QuadraticBatch:
        """Draw W and y of ``num_tasks`` problems."""
        check_num_tasks(num_tasks)
        generator = self._stream(generator)
        weight = torch.randn(num_tasks, self.dim, self.dim, generator=generator)
        return QuadraticBatch(weight, torch.randn(num_tasks, self.dim, generator=generator), generator)


class QuadraticBatch(ProblemBatch):
    """T quadratics; there are no minibatches."""

    per_task = ("weight", "target")

    def __init__(self, weight: Tensor, target: Tensor, generator: torch.Generator) -> None:
        super().__init__(weight.shape[0], generator)
        self.weight = weight  # [T, dim, dim]
        self.target = target  # [T, dim]

    def init_params(self) -> dict[str, Tensor]:
        """Standard normal starting points: x [T, dim]."""
        return {"x": self.draw(torch.randn, self.target.shape[1])}

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Losses [T] at x [T, dim]."""
        x = check_params(params, ("x",))["x"]
        return (torch.bmm(self.weight, x.unsqueeze(-1)).squeeze(-1) - self.target).square().sum(-1)

    full_loss = loss


class GradientNoise(ShortRepr):
    """Adds noise to the gradients of problems: N(0, std²) for every parameter, drawn anew at every loss.

    The values of losses stay exact, and so do full losses and their gradients.

    Args:
        problems: problems of one kind; mix noisy and noiseless ones by :class:`MixedOptimizees`
        std: standard deviation of the noise
    """

    def __init__(self, problems: Optimizees, std: float) -> None:
        if not 0 <= std < math.inf:
            raise ValueError(f"std must be finite and at least 0, got {std}")
        self.problems, self.std = problems, std

    def split(self, name: str) -> GradientNoise:
        """The same noise on another split."""
        return GradientNoise(self.problems.split(name), self.std)

    def sample(self, num_tasks: int, generator: torch.Generator) -> NoisyBatch:
        """Draw ``num_tasks`` problems."""
        return NoisyBatch(self.problems.sample(num_tasks, generator), self.std, generator)


class NoisyBatch(ProblemBatch):
    """T problems with noisy gradients; ``batch`` holds the same problems without noise."""

    def __init__(self, batch: Any, std: float, generator: torch.Generator) -> None:
        super().__init__(batch.num_tasks, generator)
        self.batch, self.std = batch, std

    def select(self, tasks: slice | Tensor) -> Self:
        """Some of the problems: a slice, indices, or a mask [T]."""
        chosen = super().select(tasks)
        chosen.batch = self.batch.select(tasks)
        return chosen

    def to(self, device: torch.device | str) -> Self:
        """The same problems, with the same draws, on another device."""
        moved = super().to(device)
        moved.batch = self.batch.to(device)
        return moved

    def init_params(self) -> Any:
        """Starting points of the problems."""
        params = self.batch.init_params()
        if isinstance(params, tuple):
            raise TypeError(
                "the params of problems under GradientNoise must be those of one kind, got a tuple of groups; put "
                "GradientNoise into MixedOptimizees, not around it"
            )
        return params

    def loss(self, params: Any) -> Tensor:
        """Losses [T] of params on the next minibatches; only their gradients are noisy."""
        (tensors,) = task_groups(params)
        joined = join_tasks(tensors)
        noise = self.std * self.draw(torch.randn, joined.shape[1]).to(joined.dtype)
        losses: Tensor = self.batch.loss(params)
        return losses + ((joined - joined.detach()) * noise).sum(1)

    def full_loss(self, params: Any) -> Tensor:
        """Losses [T] of params on all data, without noise."""
        losses: Tensor = self.batch.full_loss(params)
        return losses
