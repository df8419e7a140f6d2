"""Problems for learned optimizers (optimizees): T of one kind side by side, with params [T, *shape].

Andrychowicz et al. 2016, arXiv 1606.04474, section 3, trains on such problems. Axis legend: T problems, P parameters
of one problem.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from metakern.core.torch_private import pytree
from metakern.tasks.distribution import ShortRepr, check_num_tasks, check_split


class OptimizeeBatch(Protocol):
    """T problems, each with its data, solved side by side.

    Params are a tree of tensors with the task axis first: a dict ``{name: [T, *shape]}`` for metakern's own problems;
    user-defined problems may use a single tensor [T, P]. Problems of different shapes form groups: their params are a
    tuple of such trees, one per group, and the T problems are in the groups' order.

    Example:
        >>> batch = Quadratics().sample(8, generator)
        >>> params = batch.init_params()
        >>> losses = batch.loss(params)
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
    """A distribution of problems; any class with these two methods is one.

    Example:
        >>> problems = Quadratics()  # or a class of your own with sample and split
        >>> batch = problems.split("valid").sample(8, generator)
    """

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

    Subclasses list their tensors, or dicts of tensors, with a task axis in ``per_task``, and tensors that all tasks
    share in ``shared``.

    Example:
        >>> batch = Quadratics().sample(8, generator)
        >>> isinstance(batch, ProblemBatch), batch.select(slice(0, 4)).num_tasks
        (True, 4)
    """

    @property
    def has_held_out(self) -> bool:
        """Whether there is a method ``held_out_loss(params)``: losses [T] on samples that ``loss`` never uses."""
        return False

    per_task: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_tasks: int, generator: torch.Generator) -> None:
        check_num_tasks(num_tasks)
        self.num_tasks = self._sampled = num_tasks
        self._rows, self._device = torch.arange(num_tasks), torch.device("cpu")
        self._generator = generator.clone_state()
        generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))  # leaves the batch's stream

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

    def replaced(self, index: Tensor, other: Self) -> Self:
        """The same problems, but those at ``index`` [n] are the n of ``other``; the draws go on as before.

        Args:
            index: integers
            other: problems of the same kind
        """
        changed = self._with((), lambda tensor: tensor)
        for name in self.per_task:
            pairs = zip(*(pytree.tree_leaves(getattr(batch, name)) for batch in (self, other)), strict=True)
            merged = [old.index_copy(0, index.to(old.device), new.to(old.device)) for old, new in pairs]
            setattr(changed, name, pytree.tree_unflatten(merged, pytree.tree_structure(getattr(self, name))))
        return changed

    def export_state(self) -> dict[str, Any]:
        """The problems and the state of their draws as plain data, for a checkpoint."""
        return {
            "rows": self._rows,
            "sampled": self._sampled,
            "generator": self._generator.get_state(),
            "tensors": {name: pytree.tree_leaves(getattr(self, name)) for name in self.per_task},
        }

    def import_state(self, saved: Mapping[str, Any]) -> Self:
        """The problems of :meth:`export_state`; this batch, of the same distribution, gives what all problems share.

        Raises:
            ValueError: for a state of problems of another kind.
        """
        restored = self._with((), lambda tensor: tensor)
        try:
            restored._rows, restored._sampled = saved["rows"], int(saved["sampled"])
            restored.num_tasks = len(restored._rows)
            restored._generator.set_state(saved["generator"])
            tensors = {name: list(saved["tensors"][name]) for name in self.per_task}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"saved problems must be as export_state of {type(self).__name__} gives them") from error
        for name, found in tensors.items():
            own, structure = pytree.tree_flatten(getattr(self, name))
            shapes = [x.shape[1:] for x in own]
            if [x.shape[1:] for x in found] != shapes or any(len(x) != restored.num_tasks for x in found):
                got = [list(x.shape) for x in found]
                raise ValueError(f"saved {name} must be {restored.num_tasks} of {shapes} of {self}, got {got}")
            moved = [new.to(like) for new, like in zip(found, own, strict=True)]
            setattr(restored, name, pytree.tree_unflatten(moved, structure))
        return restored

    def _with(self, names: tuple[str, ...], function: Callable[[Tensor], Tensor]) -> Self:
        changed = copy.copy(self)
        changed._generator = self._generator.clone_state()
        for name in names:
            setattr(changed, name, pytree.tree_map_only(Tensor, function, getattr(self, name)))
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
    """f(x) = ‖Wx - y‖², the entries of W [dim, dim] and y [dim] drawn from N(0, 1). Params are ``{"x": [T, dim]}``.

    Example:
        >>> batch = Quadratics(dim=10).sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(self, dim: int = 10) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim

    def sample(self, num_tasks: int, generator: torch.Generator) -> QuadraticBatch:
        """Draw W and y of ``num_tasks`` problems."""
        check_num_tasks(num_tasks)
        generator = self._stream(generator)
        weight = torch.randn(num_tasks, self.dim, self.dim, generator=generator)
        return self._batch(weight, torch.randn(num_tasks, self.dim, generator=generator), generator)

    def _batch(self, weight: Tensor, target: Tensor, generator: torch.Generator) -> QuadraticBatch:
        return QuadraticBatch(weight, target, generator)


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
