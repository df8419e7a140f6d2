"""Problems for learned optimizers: quadratics, and noisy gradients."""

from __future__ import annotations

import math

import pytest
import torch

from metakern.tasks import GradientNoise, MixedOptimizees, Quadratics
from metakern.tasks.variants import NoisyBatch
from tests.conformance.tasks.contents import gradients
from tests.tasks.draws import generator


def test_quadratics_are_the_squared_distance():
    batch = Quadratics(4).sample(2, generator())
    params = batch.init_params()
    expected = [(w @ x - y).square().sum() for w, x, y in zip(batch.weight, params["x"], batch.target, strict=True)]
    torch.testing.assert_close(batch.loss(params), torch.stack(expected))


def test_noise_is_added_to_gradients_and_to_nothing_else():
    clean, noisy = Quadratics(50).sample(40, generator()), GradientNoise(Quadratics(50), 0.5).sample(40, generator())
    point = clean.init_params()
    assert torch.equal(noisy.init_params()["x"], point["x"])
    assert torch.equal(noisy.loss(point), clean.loss(point))
    expected = gradients(clean, point)[1]["x"]
    noise = [gradients(noisy, point)[1]["x"] - expected for _ in range(2)]
    for each in noise:
        assert abs(each.mean()) < 0.05
        assert each.std() == pytest.approx(0.5, rel=0.05)
    correlation = (noise[0] * noise[1]).mean() / 0.25
    assert abs(correlation) < 0.1  # drawn anew
    assert torch.equal(gradients(noisy, point, "full_loss")[1]["x"], expected)


def test_every_tensor_of_a_problem_has_noise_of_its_own():
    """It is drawn in the order of the tensors, as for one tensor [T, P]."""

    class Sums:
        """Σ over all parameters, of which the gradient is 1."""

        num_tasks = 40

        def init_params(self):
            return {"weight": torch.zeros(40, 5, 4), "bias": torch.zeros(40), "scale": torch.zeros(40, 3)}

        def loss(self, params):
            return sum(tensor.reshape(40, -1).sum(1) for tensor in params.values())

    class Flat(Sums):
        def init_params(self):
            return torch.zeros(40, 24)

        def loss(self, params):
            return params.sum(1)

    batch, flat = (NoisyBatch(kind(), 0.5, generator()) for kind in (Sums, Flat))
    noise = {name: g - 1 for name, g in gradients(batch, batch.init_params())[1].items()}
    assert {name: g.shape for name, g in noise.items()} == {"weight": (40, 5, 4), "bias": (40,), "scale": (40, 3)}
    joined = torch.cat([g.reshape(40, -1) for g in noise.values()], 1)
    assert torch.equal(joined, gradients(flat, flat.init_params())[1] - 1)
    assert joined.std() == pytest.approx(0.5, rel=0.05)
    assert len(joined.unique()) == joined.numel()


def test_noise_around_a_mixture_is_refused():
    noisy = GradientNoise(MixedOptimizees([Quadratics(2)]), 0.1).sample(2, generator())
    with pytest.raises(
        TypeError, match=r"must be those of one kind, got a tuple of groups; put GradientNoise into Mixed"
    ):
        noisy.init_params()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quadratics(0), "dim must be at least 1, got 0"),
        (lambda: GradientNoise(Quadratics(), -1.0), "std must be finite and at least 0, got -1.0"),
        (lambda: GradientNoise(Quadratics(), math.nan), "std must be finite and at least 0, got nan"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
