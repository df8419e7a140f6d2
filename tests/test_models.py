"""The models of the literature: their shapes, their sizes, and what they refuse."""

import pytest
import torch

import metakern
from metakern.models import conv4, mlp


def test_an_mlp_has_the_widths_that_it_is_given_and_relu_between():
    net = mlp(1, 40, 40, 1)
    assert [tuple(p.shape) for p in net.parameters()] == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]
    assert [type(layer).__name__ for layer in net] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_the_fused_inner_loop_serves_an_mlp():
    x = torch.randn(2, 5, 3)
    metakern.adapt(mlp(3, 4, 1), x, x[..., :1].contiguous(), backend="cpp")  # raises where it does not serve


def test_conv4_classifies_omniglot_and_mini_imagenet():
    """Vinyals et al. 2016: four blocks that halve the image each; 64 filters leave 64 numbers of 28x28 pixels."""
    assert conv4((1, 28, 28), 64, 5)(torch.randn(2, 1, 28, 28)).shape == (2, 5)
    assert conv4((1, 28, 28), 64, 5)[-1].in_features == 64
    assert conv4((3, 84, 84), 32, 5)[-1].in_features == 32 * 5 * 5


def test_conv4_normalises_by_the_batch_that_it_sees():
    net = conv4((1, 16, 16), 4, 3).eval()
    x = torch.randn(6, 1, 16, 16)
    assert not torch.allclose(net(x)[:2], net(x[:2]))
    assert not list(net.buffers())


@pytest.mark.parametrize("widths", [(), (3,), (3, 0, 1)])
def test_an_mlp_without_layers_is_refused(widths):
    with pytest.raises(ValueError, match="widths must be inputs, hidden layers, outputs, at least 1 each, got"):
        mlp(*widths)


@pytest.mark.parametrize("shape", [(28, 28), (1, 8, 8), (0, 28, 28)])
def test_images_that_four_poolings_leave_nothing_of_are_refused(shape):
    with pytest.raises(ValueError, match="shape must be channels, height and width of 16 pixels or more, got"):
        conv4(shape, 4, 5)


def test_a_conv4_of_no_filters_is_refused():
    with pytest.raises(ValueError, match="filters and outputs must be at least 1, got 0 and 5"):
        conv4((1, 28, 28), 0, 5)
