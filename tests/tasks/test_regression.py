"""Regression families and their mixtures: documented functions over documented ranges."""

import math

import pytest
import torch

from metakern.tasks import Abs, Family, Linear, Mixture, Quadratic, Sinusoid, Tanh, mixture
from metakern.tasks.distribution import SPLITS
from tests.tasks.draws import generator

FAMILIES = (Sinusoid, Linear, Quadratic, Tanh, Abs)


def fitted(basis, batch):
    """The coefficients [T, functions] and residuals [T, S + Q] of the best fit of each task by some functions of x."""
    x, y = (
        torch.cat([a, b], 1).double() for a, b in ((batch.support_x, batch.query_x), (batch.support_y, batch.query_y))
    )
    design = torch.cat([function(x) for function in basis], 2)
    coefficients = torch.linalg.lstsq(design, y).solution
    return coefficients.squeeze(2), (design @ coefficients - y).squeeze(2)


def assert_uniform(draws, low, high):
    """Within the range, near its ends, and with the mean of a uniform draw to five standard errors."""
    assert low - 1e-3 <= draws.min() <= low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) <= draws.max() <= high + 1e-3
    assert abs(draws.mean() - (low + high) / 2) < 5 * (high - low) / (12 * len(draws)) ** 0.5


@pytest.mark.parametrize("tasks", [*(family() for family in FAMILIES), mixture(5)], ids=lambda t: type(t).__name__)
def test_a_batch_is_four_float32_tensors_with_the_task_axis_first(tasks):
    batch = tasks.sample(7, generator())
    for tensor in (*batch.support, *batch.query):
        assert tensor.shape == (7, 5, 1)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()


def test_the_sizes_of_support_and_query_are_chosen():
    batch = Sinusoid(support=3, query=8).sample(2, generator())
    assert batch.support_x.shape == batch.support_y.shape == (2, 3, 1)
    assert batch.query_x.shape == batch.query_y.shape == (2, 8, 1)


def test_inputs_are_uniform_from_minus_5_to_5():
    batch = mixture(3, 10, 10).sample(200, generator())
    assert_uniform(batch.support_x.flatten(), -5, 5)
    assert_uniform(batch.query_x.flatten(), -5, 5)


def test_sinusoids_have_the_amplitudes_and_phases_of_finn():
    """A·sin(x - φ) is A·cos(φ)·sin(x) - A·sin(φ)·cos(x)."""
    coefficients, residuals = fitted([torch.sin, torch.cos], Sinusoid(10, 10, noise=0).sample(2000, generator()))
    assert residuals.abs().max() < 1e-5
    assert_uniform(coefficients.norm(dim=1), 0.1, 5)
    assert_uniform(torch.atan2(-coefficients[:, 1], coefficients[:, 0]), 0, math.pi)


def test_lines_have_slopes_and_intercepts_from_minus_3_to_3():
    coefficients, residuals = fitted([torch.clone, torch.ones_like], Linear(10, 10, noise=0).sample(2000, generator()))
    assert residuals.abs().max() < 1e-4
    for column in coefficients.T:
        assert_uniform(column, -3, 3)


def test_quadratics_have_both_signs_and_centres_and_offsets_from_minus_3_to_3():
    """a·(x - c)² + b is a·x² - 2ac·x + ac² + b."""
    basis = [torch.square, torch.clone, torch.ones_like]
    coefficients, residuals = fitted(basis, Quadratic(10, 10, noise=0).sample(2000, generator()))
    assert residuals.abs().max() < 1e-4
    a, slope, constant = coefficients.T
    centre = -slope / (2 * a)
    assert_uniform(a.abs(), 0.02, 0.15)
    assert 0.45 < (a > 0).double().mean() < 0.55
    assert_uniform(centre, -3, 3)
    assert_uniform(constant - a * centre**2, -3, 3)


@pytest.mark.parametrize(("family", "shape"), [(Tanh, torch.tanh), (Abs, torch.abs)])
def test_tanh_and_abs_have_factors_centres_and_offsets_from_minus_3_to_3(family, shape):
    """For each task the centre of a grid that fits best; it is near the true one, and a and b follow."""
    batch = family(20, 20, noise=0).sample(300, generator())
    grid = torch.linspace(-3, 3, 301).tolist()
    fits = [fitted([lambda x, c=c: shape(x - c), torch.ones_like], batch) for c in grid]
    errors = torch.stack([residuals.square().sum(1) for _, residuals in fits])  # [grid, T]
    best = errors.argmin(0)
    assert errors.min(0).values.max() < 0.05
    assert_uniform(torch.tensor(grid, dtype=torch.float64)[best], -3, 3)
    chosen = torch.stack([coefficients for coefficients, _ in fits])[best, torch.arange(300)]
    assert -3.05 < chosen[:, 0].min() < -2.8
    assert 2.8 < chosen[:, 0].max() < 3.05
    assert (chosen[:, 1].abs() < 3.2).all()


def test_the_noise_is_on_support_and_query_targets():
    exact, noisy = (Linear(5, 5, noise).sample(4000, generator()) for noise in (0.0, 0.3))
    for side in ("support", "query"):
        torch.testing.assert_close(getattr(noisy, f"{side}_x"), getattr(exact, f"{side}_x"))
        noise = getattr(noisy, f"{side}_y") - getattr(exact, f"{side}_y")
        assert 0.295 < noise.std() < 0.305
        assert noise.mean().abs() < 0.01


@pytest.mark.parametrize("tasks", [Sinusoid(noise=0), mixture(3, noise=0)], ids=["sinusoid", "mixture"])
def test_splits_share_no_task_even_from_one_seed(tasks):
    targets = [tasks.split(name).sample(50, generator()).query_y for name in SPLITS]
    assert torch.equal(targets[0], tasks.sample(50, generator()).query_y)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert ((targets[i] - targets[j]).abs().amax((1, 2)) > 1e-3).all()


def test_every_split_covers_the_whole_family():
    for name in SPLITS:
        coefficients, _ = fitted([torch.clone, torch.ones_like], Linear(5, 5, 0).split(name).sample(2000, generator()))
        assert_uniform(coefficients[:, 0], -3, 3)


@pytest.mark.parametrize(("num_modes", "families"), [(2, FAMILIES[:2]), (3, FAMILIES[:3]), (5, FAMILIES)])
def test_mixtures_are_those_of_mmaml(num_modes, families):
    tasks = mixture(num_modes, noise=0)
    assert [type(family) for family in tasks.components] == list(families)
    modes = tasks.sample(3000, generator()).modes
    assert modes.dtype == torch.int64
    assert modes.shape == (3000,)
    shares = modes.bincount(minlength=num_modes) / 3000
    assert ((shares - 1 / num_modes).abs() < 5 * (1 / num_modes / 3000) ** 0.5).all()


def test_modes_say_which_function_a_task_is():
    """In any batch only the lines fit as lines, and only the quadratics as quadratics."""
    batch = mixture(5, 10, 10, noise=0).sample(300, generator())
    lines = fitted([torch.clone, torch.ones_like], batch)[1].abs().amax(1) < 1e-4
    parabolas = fitted([torch.square, torch.clone, torch.ones_like], batch)[1].abs().amax(1) < 1e-4
    waves = fitted([torch.sin, torch.cos], batch)[1].abs().amax(1) < 1e-4
    assert torch.equal(lines, batch.modes == 1)
    assert torch.equal(parabolas & ~lines, batch.modes == 2)
    assert torch.equal(waves, batch.modes == 0)


def test_weights_are_the_shares_of_a_mixture():
    tasks = Mixture([Sinusoid(), Linear(), Abs()], weights=[3, 0, 1])
    for split in (tasks, tasks.split("test")):
        shares = split.sample(4000, generator()).modes.bincount(minlength=3) / 4000
        torch.testing.assert_close(shares, torch.tensor([0.75, 0, 0.25]), atol=0.03, rtol=0)


def test_components_keep_their_own_noise():
    batch = Mixture([Linear(10, 10, noise=0), Linear(10, 10, noise=1)]).sample(400, generator())
    residuals = fitted([torch.clone, torch.ones_like], batch)[1]
    assert residuals[batch.modes == 0].abs().max() < 1e-4
    assert residuals[batch.modes == 1].abs().amax(1).min() > 0.1


def test_a_family_of_ones_own_is_a_subclass():
    class Exponential(Family):
        shape = torch.exp
        factor = (1.0, 1.0)
        centre = (0.0, 0.0)
        offset = (0.0, 0.0)

    for tasks in (Exponential(noise=0), Mixture([Exponential(noise=0)])):
        batch = tasks.sample(3, generator())
        torch.testing.assert_close(batch.support_y, batch.support_x.exp())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sinusoid(support=0), "support and query must be at least 1, got 0 and 5"),
        (lambda: Linear(query=-1), "support and query must be at least 1, got 5 and -1"),
        (lambda: Tanh(noise=-0.1), "noise must be a standard deviation, 0 or more, got -0.1"),
        (lambda: Tanh(noise=math.nan), "noise must be a standard deviation, 0 or more, got nan"),
        (lambda: mixture(4), "num_modes must be 2, 3 or 5, got 4"),
        (lambda: Mixture([]), "components must hold at least one family, got none"),
        (lambda: Mixture([Abs(5), Tanh(6)]), r"the same support and query, got \[\(5, 5\), \(6, 5\)\]"),
        (lambda: Mixture([Abs(), Tanh()], [1]), r"weights must be 2 numbers of at least 0, .* got \[1\]"),
        (lambda: Mixture([Abs(), Tanh()], [1, -1]), r"weights must be 2 numbers of at least 0, .* got \[1, -1\]"),
        (lambda: Mixture([Abs(), Tanh()], [0, 0]), r"with a positive sum, got \[0, 0\]"),
        (lambda: Mixture([Abs(), Tanh()], [1, math.inf]), r"weights must be 2 numbers"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
