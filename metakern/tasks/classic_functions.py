"""Classic test functions of optimization, as problems for learned optimizers that differ in their starting points.

Wichrowska et al. 2017, arXiv 1703.04813, trains on these. Each is shifted to be nonnegative everywhere, and written
to stay nonnegative under rounding; all but Michalewicz's are 0 at their minima.

Axis legend: T problems, D coordinates (the parameters of a problem).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metakern.tasks.distribution import check_num_tasks
from metakern.tasks.optimizees import EndlessProblems, ProblemBatch, check_params


@dataclass(frozen=True)
class Function:
    """A test function.

    Attributes:
        value: maps points [T, D] to values [T]
        box: (low, high) of every coordinate; starting points are drawn from it
        minima: known global minimizers in the box, in two dimensions
        least: the value at the minima
        any_dim: whether the function is defined for any D; else D is 2
    """

    value: Callable[[Tensor], Tensor]
    box: tuple[tuple[float, float], ...]
    minima: tuple[tuple[float, float], ...]
    least: float = 0.0
    any_dim: bool = False


def _ackley(x: Tensor) -> Tensor:
    """Ackley 1987: 20 + e - 20·exp(-0.2·√(mean x²)) - exp(mean cos 2πx), by expm1."""
    # The norm's gradient at 0 is 0, where a square root's is not finite.
    root = torch.linalg.vector_norm(x, dim=1) / x.shape[1] ** 0.5
    waves = -2 * (math.pi * x).sin().square().mean(1)  # mean cos 2πx - 1
    return -20 * torch.expm1(-0.2 * root) - math.e * torch.expm1(waves)


def _beale(x: Tensor) -> Tensor:
    """Beale 1958: Σ_k (c_k - x + x·y^k)², c = 1.5, 2.25, 2.625."""
    x, y = x.unbind(1)
    return (1.5 - x + x * y).square() + (2.25 - x + x * y**2).square() + (2.625 - x + x * y**3).square()


def _booth(x: Tensor) -> Tensor:
    """(x + 2y - 7)² + (2x + y - 5)²."""
    x, y = x.unbind(1)
    return (x + 2 * y - 7).square() + (2 * x + y - 5).square()


_BRANIN_B, _BRANIN_C, _BRANIN_T = 5.1 / (4 * math.pi**2), 5 / math.pi, 1 / (8 * math.pi)


def _branin(x: Tensor) -> Tensor:
    """Branin 1972: (y - bx² + cx - 6)² + 10(1 - t)cos x + 10, less its minimum 10t."""
    x, y = x.unbind(1)
    return (y - _BRANIN_B * x**2 + _BRANIN_C * x - 6).square() + 20 * (1 - _BRANIN_T) * (x / 2).cos().square()


def _log_sum_exp(x: Tensor) -> Tensor:
    """log(e^(x+3y) + e^(x-3y) + e^-x), less its minimum 1.5·log 2 (Boyd & Vandenberghe 2004, equation 9.20)."""
    x, y = x.unbind(1)
    return (torch.stack([x + 3 * y, x - 3 * y, -x]).logsumexp(0) - 1.5 * math.log(2)).clamp(min=0)  # rounding


def _matyas(x: Tensor) -> Tensor:
    """0.26(x² + y²) - 0.48xy, as squares along its axes."""
    x, y = x.unbind(1)
    return 0.01 * (x + y).square() + 0.25 * (x - y).square()


def _michalewicz(x: Tensor) -> Tensor:
    """Michalewicz 1992: -Σ_i sin(x_i)·sin²⁰(i·x_i²/π), plus D: outside the box every term may come near -1."""
    index = torch.arange(1, x.shape[1] + 1, device=x.device)
    return (1 - x.sin() * (index * x.square() / math.pi).sin() ** 20).sum(1)


def _rosenbrock(x: Tensor) -> Tensor:
    """Rosenbrock 1960: Σ_i 100(x_{i+1} - x_i²)² + (1 - x_i)²."""
    left, right = x[:, :-1], x[:, 1:]
    return (100 * (right - left.square()).square() + (1 - left).square()).sum(1)


_STYBLINSKI_TANG = -2.903534027771177  # where 4x³ - 32x + 5 = 0


def _styblinski_tang(x: Tensor) -> Tensor:
    """Styblinski & Tang 1990: ½Σ_i x_i⁴ - 16x_i² + 5x_i, less its minimum, which leaves a double root at it."""
    a = _STYBLINSKI_TANG
    return 0.5 * ((x - a).square() * ((x + a).square() + 2 * a**2 - 16)).sum(1)


def _cube(half: float) -> tuple[tuple[float, float], ...]:
    return ((-half, half),) * 2


#: The functions by name.
FUNCTIONS = {
    "ackley": Function(_ackley, _cube(5), ((0, 0),), any_dim=True),
    "beale": Function(_beale, _cube(4.5), ((3, 0.5),)),
    "booth": Function(_booth, _cube(10), ((1, 3),)),
    "branin": Function(_branin, ((-5, 10), (0, 15)), ((-math.pi, 12.275), (math.pi, 2.275), (3 * math.pi, 2.475))),
    "log_sum_exp": Function(_log_sum_exp, _cube(2), ((-math.log(2) / 2, 0),)),
    "matyas": Function(_matyas, _cube(10), ((0, 0),)),
    "michalewicz": Function(
        _michalewicz, ((0, math.pi),) * 2, ((2.202905520, math.pi / 2),), 2 - 1.8013034100985537, any_dim=True
    ),
    "rosenbrock": Function(_rosenbrock, _cube(2.048), ((1, 1),), any_dim=True),
    "styblinski_tang": Function(_styblinski_tang, _cube(5), ((_STYBLINSKI_TANG, _STYBLINSKI_TANG),), any_dim=True),
}


class ClassicFunction(EndlessProblems):
    """One test function, to be minimised from points drawn uniformly from its customary box.

    Params are ``{"x": [T, D]}``. :class:`GradientNoise` around it adds noise to its gradients.

    Args:
        name: one of :data:`FUNCTIONS`
        dim: D; must be 2 except for ackley, michalewicz, rosenbrock and styblinski_tang

    Raises:
        ValueError: for an unknown name, and for a dimension that the function does not have.

    Example:
        >>> batch = ClassicFunction("rosenbrock", dim=4).sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(self, name: str, dim: int = 2) -> None:
        if name not in FUNCTIONS:
            raise ValueError(f"name must be one of {', '.join(FUNCTIONS)}, got {name!r}")
        self.name, self.dim, self.function = name, dim, FUNCTIONS[name]
        if dim < 2 or (dim > 2 and not self.function.any_dim):
            expected = "at least 2" if self.function.any_dim else "2"
            raise ValueError(f"dim of {name} must be {expected}, got {dim}")

    def sample(self, num_tasks: int, generator: torch.Generator) -> FunctionBatch:
        """``num_tasks`` problems, which differ in their starting points."""
        check_num_tasks(num_tasks)
        return FunctionBatch(self, num_tasks, self._stream(generator))


class FunctionBatch(ProblemBatch):
    """T minimisations of one function from different starting points; there are no minibatches."""

    def __init__(self, problem: ClassicFunction, num_tasks: int, generator: torch.Generator) -> None:
        super().__init__(num_tasks, generator)
        self.problem = problem

    def init_params(self) -> dict[str, Tensor]:
        """Starting points: x [T, D]."""
        box, share = self.problem.function.box, self.draw(torch.rand, self.problem.dim)
        low, high = share.new_tensor(box if self.problem.dim == 2 else box[:1] * self.problem.dim).T
        return {"x": torch.lerp(low, high, share)}

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Values [T] at x [T, D]."""
        return self.problem.function.value(check_params(params, ("x",))["x"])

    full_loss = loss
