"""The classic test functions: they are the published formulas, shifted; minima are where they are known to be."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from metakern.tasks import ClassicFunction
from metakern.tasks.classic_functions import FUNCTIONS
from tests.tasks.draws import generator

every_function = pytest.mark.parametrize("name", FUNCTIONS)


def published(name: str, x: Tensor) -> float:
    """The formula as it stands in the literature, of one point [D]."""
    point, d = x.tolist(), len(x)
    first, second = point[:2]
    if name == "ackley":
        waves = sum(math.cos(2 * math.pi * v) for v in point) / d
        return -20 * math.exp(-0.2 * math.sqrt(sum(v * v for v in point) / d)) - math.exp(waves) + 20 + math.e
    if name == "beale":
        return sum((c - first + first * second**k) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625)))
    if name == "booth":
        return (first + 2 * second - 7) ** 2 + (2 * first + second - 5) ** 2
    if name == "branin":
        valley = second - 5.1 / (4 * math.pi**2) * first**2 + 5 / math.pi * first - 6
        return valley**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(first) + 10
    if name == "log_sum_exp":
        return math.log(math.exp(first + 3 * second) + math.exp(first - 3 * second) + math.exp(-first))
    if name == "matyas":
        return 0.26 * (first**2 + second**2) - 0.48 * first * second
    if name == "michalewicz":
        return -sum(math.sin(v) * math.sin(i * v * v / math.pi) ** 20 for i, v in enumerate(point, 1))
    if name == "rosenbrock":
        return sum(100 * (b - a * a) ** 2 + (1 - a) ** 2 for a, b in itertools.pairwise(point))
    return sum(v**4 - 16 * v**2 + 5 * v for v in point) / 2


#: What is added to the published formula in D dimensions: less the published minimum, but D for Michalewicz.
SHIFTS = {
    "branin": lambda d: -0.39788735772973816,
    "log_sum_exp": lambda d: -1.5 * math.log(2),
    "michalewicz": lambda d: d,
    "styblinski_tang": lambda d: 39.16616570377142 * d,
}


@every_function
@pytest.mark.parametrize("dim", [2, 5])
def test_values_are_the_published_formula_shifted(name, dim):
    if dim > 2 and not FUNCTIONS[name].any_dim:
        with pytest.raises(ValueError, match=f"dim of {name} must be 2, got {dim}"):
            ClassicFunction(name, dim)
        return
    batch = ClassicFunction(name, dim).sample(20, generator())
    points = batch.init_params()["x"].double()
    expected = torch.tensor([published(name, x) + SHIFTS.get(name, lambda d: 0.0)(dim) for x in points])
    torch.testing.assert_close(batch.loss({"x": points}).float(), expected, rtol=1e-6, atol=1e-6)


@every_function
def test_the_least_value_is_where_it_is_known_to_be(name):
    function = FUNCTIONS[name]
    at = torch.tensor(function.minima, dtype=torch.float64).requires_grad_()
    values = function.value(at)
    torch.testing.assert_close(values, torch.full_like(values, function.least), rtol=0, atol=1e-9)
    (grads,) = torch.autograd.grad(values.sum(), at)
    assert grads.abs().max() < 1e-5
    axes = [torch.linspace(low, high, 301, dtype=torch.float64) for low, high in function.box]
    grid = function.value(torch.cartesian_prod(*axes))
    assert grid.min() >= function.least
    assert grid.min() < function.least + 0.02 * (grid.max() - function.least)


@every_function
def test_no_value_is_negative_not_even_by_rounding_or_outside_the_box(name):
    function = FUNCTIONS[name]
    minimum = torch.tensor(function.minima[0], dtype=torch.float32).repeat(2000, 1)
    near = minimum + 1e-3 * torch.randn(minimum.shape, generator=generator())
    far = 30 * torch.randn(minimum.shape, generator=generator())
    for points in (minimum, near, far):
        assert function.value(points).min() >= 0


@every_function
def test_starting_points_fill_the_box(name):
    box = torch.tensor(FUNCTIONS[name].box)
    points = ClassicFunction(name).sample(2000, generator()).init_params()["x"]
    low, high = points.amin(0), points.amax(0)
    width = box[:, 1] - box[:, 0]
    assert (low >= box[:, 0]).all()
    assert (high <= box[:, 1]).all()
    assert ((high - low) > 0.99 * width).all()


def test_gradients_are_finite_where_ackley_has_a_cusp():
    point = torch.zeros(1, 2, requires_grad=True)
    (grads,) = torch.autograd.grad(FUNCTIONS["ackley"].value(point).sum(), point)
    assert torch.equal(grads, torch.zeros(1, 2))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"name must be one of ackley, beale, .*, got 'sphere'"):
        ClassicFunction("sphere")
    with pytest.raises(ValueError, match="dim of ackley must be at least 2, got 1"):
        ClassicFunction("ackley", 1)
