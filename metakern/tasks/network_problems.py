"""Training any torch network on its data, as a problem for learned optimizers: T networks side by side.

Axis legend: T networks, B samples of a minibatch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from metakern.core.torch_private import ConvNd
from metakern.tasks.distribution import ShortRepr
from metakern.tasks.optimizees import ProblemBatch, check_params


class NetworkProblem(ShortRepr):
    """Networks of one architecture that learn from one data set; they differ in starting points and minibatches.

    Minibatches are drawn with replacement. Params are the networks' parameters by their names and in the order of
    ``named_parameters``, [T, *shape] each. Weights and biases of linear and convolution layers start as torch draws
    them, U(±1/√fan_in); any other parameter starts as ``make`` leaves it, which must be the same number throughout (as
    in a normalisation).

    Args:
        make: makes the network, which maps inputs [B, ...] to outputs [B, ...] without randomness or running statistics
        data: maps the name of a split to its inputs [n, ...] and targets [n, ...]
        loss: mean loss of the outputs and targets of one network, such as ``torch.nn.functional.cross_entropy``
        batch_size: B
        split: ``"train"``, ``"valid"`` or ``"test"``

    Raises:
        ValueError: for a batch size below 1, networks without parameters, and parameters that it cannot initialise.

    Example:
        >>> def data(split):
        ...     return torch.linspace(-3, 3, 50).view(50, 1), torch.linspace(-3, 3, 50).view(50, 1).sin()
        >>> make = lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> problems = NetworkProblem(make, data, loss=F.mse_loss)
        >>> batch = problems.sample(8, torch.Generator().manual_seed(0))
        >>> losses = batch.loss(batch.init_params())
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        data: Callable[[str], tuple[Tensor, Tensor]],
        *,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        batch_size: int = 128,
        split: str = "train",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.data, self.loss, self.batch_size = data, loss, batch_size
        self._split = split
        self.inputs, self.targets = data(split)
        self._held_share: float | None = None
        self.held_out: tuple[Tensor, Tensor] | None = None
        with torch.random.fork_rng(devices=[]):
            self.network = make()
        self.shapes = {name: parameter.shape for name, parameter in self.network.named_parameters()}
        if not self.shapes:
            raise ValueError(f"make must give networks with parameters, got a {type(self.network).__name__} of none")
        self.starts = {name: _start(self.network, name) for name in self.shapes}

    def split(self, name: str) -> Self:
        """The same networks on the data of another split."""
        other = copy.copy(self)
        other._split = name
        other.inputs, other.targets = self.data(name)
        return other._hold_out()

    def hold_out(self, share: float = 0.25) -> Self:
        """The same networks, which learn from the first samples of each split only.

        The last ones are kept for ``held_out_loss``, on which a meta-objective can be taken.

        Args:
            share: of the samples that are held out, between 0 and 1

        Raises:
            ValueError: for a share that leaves no sample on one side.
        """
        other = copy.copy(self)
        other._held_share = share
        other.inputs, other.targets = self.data(self._split)
        return other._hold_out()

    def _hold_out(self) -> Self:
        """Set the held-out samples apart."""
        if self._held_share is None:
            return self
        number = len(self.inputs)
        kept = number - round(number * self._held_share) if 0 < self._held_share < 1 else 0
        if not 0 < kept < number:
            raise ValueError(f"share must leave samples on both sides of {number}, got {self._held_share}")
        self.held_out = self.inputs[kept:], self.targets[kept:]
        self.inputs, self.targets = self.inputs[:kept], self.targets[:kept]
        return self

    def sample(self, num_tasks: int, generator: torch.Generator) -> NetworkBatch:
        """Draw ``num_tasks`` networks."""
        return NetworkBatch(self, num_tasks, generator)

    def losses(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Losses [T] of params on inputs [T, B, ...] and targets [T, B, ...]."""
        return vmap(self._loss_of_one)(check_params(params, self.shapes), inputs, targets)

    def _loss_of_one(self, weights: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(functional_call(self.network, weights, (inputs,)), targets)


class NetworkBatch(ProblemBatch):
    """T networks with parameters {name: [T, *shape]}."""

    shared = ("inputs", "targets", "held_out")

    def __init__(self, problem: NetworkProblem, num_tasks: int, generator: torch.Generator) -> None:
        super().__init__(num_tasks, generator)
        self.problem, self.inputs, self.targets = problem, problem.inputs, problem.targets
        self.held_out = problem.held_out

    @property
    def has_held_out(self) -> bool:
        """Whether the problem holds samples out."""
        return self.held_out is not None

    def init_params(self) -> dict[str, Tensor]:
        """Starting points: every parameter by its name, [T, *shape]."""
        params = {}
        for name, shape in self.problem.shapes.items():
            bound, value = self.problem.starts[name]
            if bound is None:
                params[name] = torch.full((self.num_tasks, *shape), value, device=self._device)
            else:
                params[name] = (2 * self.draw(torch.rand, *shape) - 1) * bound
        return params

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Losses [T] of params on the next minibatch of each network."""
        return self._minibatch_loss(params, self.inputs, self.targets)

    def held_out_loss(self, params: dict[str, Tensor]) -> Tensor:
        """Losses [T] of params on the next minibatch of held-out samples; see :meth:`NetworkProblem.hold_out`."""
        if self.held_out is None:
            raise ValueError(
                "problems must hold samples out, by hold_out, to have held-out losses; these hold out none"
            )
        return self._minibatch_loss(params, *self.held_out)

    def _minibatch_loss(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        index = self.draw(functools.partial(torch.randint, len(inputs)), self.problem.batch_size)
        return self.problem.losses(params, inputs[index], targets[index])

    def full_loss(self, params: dict[str, Tensor]) -> Tensor:
        """Losses [T] of params on all data of the split."""
        inputs, targets = (data.expand(self.num_tasks, *data.shape) for data in (self.inputs, self.targets))
        return self.problem.losses(params, inputs, targets)


def _start(network: nn.Module, name: str) -> tuple[float | None, float]:
    """Initial distribution of a parameter: (bound of a uniform draw, or None; the constant used then)."""
    owner, parameter = network.get_submodule(name.rpartition(".")[0]), network.get_parameter(name)
    if isinstance(owner, (nn.Linear, ConvNd)):
        return owner.weight[0].numel() ** -0.5, 0.0
    if parameter.unique().numel() > 1:
        raise ValueError(
            f"make must give networks whose drawn parameters are those of linear and convolution layers, got {name} of "
            f"{type(owner).__name__}; build it of nn.Linear"
        )
    return None, parameter.flatten()[0].item()
