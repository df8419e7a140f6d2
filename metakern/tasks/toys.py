"""Small analytic problems and their mixture, on which update rules are meta-trained without any network.

Wichrowska et al. 2017, arXiv 1703.04813, section 4 and appendix: quadratics, bowls, softmax regression, norms, the
classic test functions, and variants of them. Clipped bowls are the convex part of Lv et al. 2017, arXiv 1703.03633.

Axis legend: T problems, D coordinates, S samples, B samples of a minibatch.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.tasks.classic_functions import FUNCTIONS, ClassicFunction
from metakern.tasks.distribution import check_num_tasks
from metakern.tasks.optimizee_groups import MixedOptimizees
from metakern.tasks.optimizees import (
    EndlessProblems,
    Optimizees,
    ProblemBatch,
    QuadraticBatch,
    Quadratics,
    check_params,
)
from metakern.tasks.variants import GradientNoise, LogObjective, Reparametrised, SparseGradients, SumOfProblems


class Bowls(EndlessProblems):
    """f(x) = ½‖Ax‖² in two dimensions, A = diag(√κ, 1) · rotation. Params are ``{"x": [T, 2]}``.

    Args:
        condition: (low, high) of κ, which is drawn log-uniformly; the angle is uniform

    Example:
        >>> batch = Bowls().sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(self, condition: tuple[float, float] = (0.1, 100.0)) -> None:
        low, high = condition
        if not 0 < low <= high < math.inf:
            raise ValueError(f"condition must be positive, finite and ascending, got {condition}")
        self.condition = condition

    def sample(self, num_tasks: int, generator: torch.Generator) -> QuadraticBatch:
        """Draw ``num_tasks`` bowls."""
        check_num_tasks(num_tasks)
        generator = self._stream(generator)
        uniform, turn = torch.rand(2, num_tasks, generator=generator)
        low, high = map(math.log, self.condition)
        root, angle = (0.5 * (low + (high - low) * uniform)).exp(), 2 * math.pi * turn
        rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        scale = torch.stack([root, torch.ones_like(root)], 1)
        weight = scale.unsqueeze(2) * rotation / math.sqrt(2)
        return QuadraticBatch(weight, torch.zeros(num_tasks, 2), generator)


class Norms(Quadratics):
    """f(x) = (Σ_i (|Wx - y|_i + 1e-6)^p + 1e-6)^(1/p), W and y as for :class:`Quadratics`.

    Args:
        dim: D
        power: p

    Example:
        >>> batch = Norms().sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(self, dim: int = 10, power: float = 2.0) -> None:
        super().__init__(dim)
        if not 0 < power < math.inf:
            raise ValueError(f"power must be positive and finite, got {power}")
        self.power = power

    def _batch(self, weight: Tensor, target: Tensor, generator: torch.Generator) -> NormBatch:
        return NormBatch(weight, target, self.power, generator)


class NormBatch(QuadraticBatch):
    """T norms; there are no minibatches."""

    def __init__(self, weight: Tensor, target: Tensor, power: float, generator: torch.Generator) -> None:
        super().__init__(weight, target, generator)
        self.power = power

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Losses [T] at x [T, D]."""
        x = check_params(params, ("x",))["x"]
        distance = (torch.bmm(self.weight, x.unsqueeze(-1)).squeeze(-1) - self.target).abs()
        return ((distance + 1e-6).pow(self.power).sum(-1) + 1e-6).pow(1 / self.power)

    full_loss = loss


class ClippedBowls(EndlessProblems):
    """f(x) = mean_i min((x_i - a_i)², 10), a ~ U(-1, 1). Params are ``{"x": [T, dim]}``, started at N(0, 1).

    Args:
        dim: D

    Example:
        >>> batch = ClippedBowls().sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(self, dim: int = 20) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim

    def sample(self, num_tasks: int, generator: torch.Generator) -> ClippedBowlBatch:
        """Draw a of ``num_tasks`` problems."""
        check_num_tasks(num_tasks)
        generator = self._stream(generator)
        return ClippedBowlBatch(2 * torch.rand(num_tasks, self.dim, generator=generator) - 1, generator)


class ClippedBowlBatch(ProblemBatch):
    """T clipped bowls; there are no minibatches."""

    per_task = ("target",)

    def __init__(self, target: Tensor, generator: torch.Generator) -> None:
        super().__init__(len(target), generator)
        self.target = target  # [T, D]

    def init_params(self) -> dict[str, Tensor]:
        """Starting points: x [T, D]."""
        return {"x": self.draw(torch.randn, self.target.shape[1])}

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Losses [T] at x [T, D]."""
        return (check_params(params, ("x",))["x"] - self.target).square().clamp(max=10).mean(1)

    full_loss = loss


class SoftmaxRegressions(EndlessProblems):
    """Softmax regression on random data: inputs N(0, 1), labels of a random linear classifier, a tenth of them random.

    Params are ``{"weight": [T, classes, features], "bias": [T, classes]}``, started at U(±1/√features).

    Args:
        features: number of inputs
        classes: number of classes
        samples: S
        batch_size: B

    Example:
        >>> batch = SoftmaxRegressions().sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(self, features: int = 10, classes: int = 2, samples: int = 200, batch_size: int = 32) -> None:
        for name, value, least in (
            ("features", features, 1), ("classes", classes, 2), ("samples", samples, 1), ("batch_size", batch_size, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.features, self.classes, self.samples, self.batch_size = features, classes, samples, batch_size

    def sample(self, num_tasks: int, generator: torch.Generator) -> SoftmaxBatch:
        """Draw the data of ``num_tasks`` problems."""
        check_num_tasks(num_tasks)
        generator = self._stream(generator)
        inputs = torch.randn(num_tasks, self.samples, self.features, generator=generator)
        truth = torch.randn(num_tasks, self.features, self.classes, generator=generator)
        labels = torch.randint(self.classes, (num_tasks, self.samples), generator=generator)
        clean = torch.rand(num_tasks, self.samples, generator=generator) > 0.1
        targets = torch.where(clean, (inputs @ truth).argmax(2), labels)
        return SoftmaxBatch(inputs, targets, self.classes, self.batch_size, generator)


class SoftmaxBatch(ProblemBatch):
    """T softmax regressions, each with data of its own."""

    per_task = ("inputs", "targets")

    def __init__(
        self, inputs: Tensor, targets: Tensor, classes: int, batch_size: int, generator: torch.Generator
    ) -> None:
        super().__init__(len(inputs), generator)
        self.inputs, self.targets = inputs, targets  # [T, S, features], [T, S]
        self.classes, self.batch_size = classes, batch_size

    def init_params(self) -> dict[str, Tensor]:
        """Starting points: weight [T, classes, features] and bias [T, classes]."""
        features = self.inputs.shape[2]
        shapes = {"weight": (self.classes, features), "bias": (self.classes,)}
        return {name: (2 * self.draw(torch.rand, *shape) - 1) / math.sqrt(features) for name, shape in shapes.items()}

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Cross entropy [T] on the next minibatch of each problem."""
        samples = self.inputs.shape[1]
        index = self.draw(functools.partial(torch.randint, samples), self.batch_size)
        rows = torch.arange(self.num_tasks, device=index.device).unsqueeze(1)
        return self._entropy(params, self.inputs[rows, index], self.targets[rows, index])

    def full_loss(self, params: dict[str, Tensor]) -> Tensor:
        """Cross entropy [T] on all samples."""
        return self._entropy(params, self.inputs, self.targets)

    def _entropy(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        params = check_params(params, ("weight", "bias"))
        logits = torch.baddbmm(params["bias"].unsqueeze(1), inputs, params["weight"].mT)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(len(logits), -1).mean(1)


def toy_problems() -> MixedOptimizees:
    """The mixture of small problems and their variants, each kind with the same probability.

    The kinds are those of Wichrowska et al. 2017, scaled down; the paper trains on no neural network.

    Example:
        >>> problems = toy_problems()
    """
    functions = [ClassicFunction(name) for name in FUNCTIONS]
    sparse = [SparseGradients(Quadratics(20)), SparseGradients(SoftmaxRegressions())]
    logs = [LogObjective(problems) for problems in (ClassicFunction("rosenbrock"), Bowls(), Quadratics(5))]
    scaled = [Reparametrised(problems) for problems in (Quadratics(10), Bowls(), ClassicFunction("booth"))]
    kinds: list[Optimizees] = [
        *(GradientNoise(Quadratics(dim), std) for dim, std in ((10, 0.5), (20, 1.0), (30, 2.0))),
        Bowls(),
        GradientNoise(Bowls(), 0.1),
        SoftmaxRegressions(),
        *functions,
        GradientNoise(ClassicFunction("matyas"), 0.1),
        *sparse,
        *scaled,
        *logs,
        *(Norms(10, power) for power in (1.0, 2.0, 3.0)),
        SumOfProblems([Quadratics(5), ClassicFunction("booth"), Bowls()]),
    ]
    return MixedOptimizees(kinds)
