"""The models of the literature: their shapes, their sizes, and what they refuse."""

import pytest
import torch

import metakern
from metakern.models import RESNET12_WIDE, RESNET12_WIDTHS, conv4, mlp, resnet12


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


def test_conv4_starts_from_glorot_s_uniform_distribution_and_zero_biases():
    """Bounds ±√(6 / (inputs + outputs)), so variances 2 / (inputs + outputs); a convolution has 9 of each a channel."""
    torch.manual_seed(0)
    net = conv4((3, 84, 84), 64, 50)
    for layer, both in ((net[0], 9 * (3 + 64)), (net[4], 9 * (64 + 64)), (net[-1], 64 * 25 + 50)):
        assert layer.weight.var().item() == pytest.approx(2 / both, rel=0.05)
        assert 0.99 * (6 / both) ** 0.5 < layer.weight.abs().max().item() <= (6 / both) ** 0.5
        assert abs(layer.weight.mean().item()) < 0.1 * layer.weight.std().item()
    assert not net[-1].bias.any()
    assert not net[1].bias.any()
    assert bool((net[1].weight == 1).all())


def test_resnet12_has_the_published_sizes():
    """Weights of the convolutions and batch norms: 8.0 million (512 filters) and 12.4 million (640)."""
    for widths, millions in ((RESNET12_WIDTHS, 8.0), (RESNET12_WIDE, 12.4)):
        net = resnet12((3, 84, 84), 5, widths)
        body = sum(p.numel() for block in net[:4] for p in block.parameters())
        assert round(body / 1e6, 1) == millions
        assert net[-1].in_features == widths[-1]


def test_a_block_of_resnet12_is_its_formula():
    """relu(norm(conv(relu(norm(conv(relu(norm(conv x))))))) + norm(shortcut x)), pooled; the slope is 0.1."""
    net = resnet12((2, 16, 16), 3, (3, 4, 5, 6)).double()
    x = torch.randn(5, 2, 16, 16, dtype=torch.float64)
    block = net[0]
    convolutions = [layer.weight for layer in block.body if isinstance(layer, torch.nn.Conv2d)]

    def normalised(y):
        return (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()

    def relu(y):
        return torch.where(y > 0, y, 0.1 * y)

    y = x
    for index, weight in enumerate(convolutions):
        y = normalised(torch.nn.functional.conv2d(y, weight, padding=1))
        y = relu(y) if index < 2 else y
    y = relu(y + normalised(torch.nn.functional.conv2d(x, block.shortcut[0].weight)))
    expected = y.unflatten(3, (8, 2)).unflatten(2, (8, 2)).amax((3, 5))
    torch.testing.assert_close(block(x), expected)
    assert net(x).shape == (5, 3)


def test_resnet12_starts_from_he_s_distribution_by_outputs():
    """Variances 2 / (outputs · k²), fourth moments those of a normal distribution; batch norms at one and zero."""
    torch.manual_seed(0)
    block = resnet12((3, 16, 16), 5, (64, 96, 64, 64))[1]
    for layer, size in ((block.body[0], 3), (block.body[3], 3), (block.shortcut[0], 1)):
        weight = layer.weight
        assert weight.var().item() == pytest.approx(2 / (96 * size**2), rel=0.05)
        assert (weight / weight.std()).pow(4).mean().item() == pytest.approx(3, rel=0.1)
    assert bool((block.body[1].weight == 1).all())
    assert not block.body[1].bias.any()


def test_resnet12_meta_trains_like_any_module():
    net = resnet12((1, 16, 16), 3, (2, 3, 4, 5)).double()
    x, y = torch.randn(2, 6, 1, 16, 16, dtype=torch.float64), torch.randint(3, (2, 6))
    losses = metakern.meta_loss(net, (x, y), (x, y), loss=torch.nn.functional.cross_entropy, lr=0.1)
    gradients = torch.autograd.grad(losses.mean(), list(net.parameters()))
    assert losses.shape == (2,)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("widths", [(), (3,), (3, 0, 1)])
def test_an_mlp_without_layers_is_refused(widths):
    with pytest.raises(ValueError, match="widths must be inputs, hidden layers, outputs, at least 1 each, got"):
        mlp(*widths)


@pytest.mark.parametrize("shape", [(28, 28), (1, 8, 8), (0, 28, 28)])
def test_images_that_four_poolings_leave_nothing_of_are_refused(shape):
    for make in (lambda: conv4(shape, 4, 5), lambda: resnet12(shape, 5)):
        with pytest.raises(ValueError, match="shape must be channels, height and width of 16 pixels or more, got"):
            make()


def test_a_conv4_of_no_filters_is_refused():
    with pytest.raises(ValueError, match="filters and outputs must be at least 1, got 0 and 5"):
        conv4((1, 28, 28), 0, 5)


@pytest.mark.parametrize(("widths", "outputs"), [((3, 4, 5), 2), ((3, 4, 5, 0), 2), ((3, 4, 5, 6), 0)])
def test_a_resnet12_of_other_than_four_blocks_is_refused(widths, outputs):
    with pytest.raises(ValueError, match="widths must be the filters of four blocks, and they and outputs at least 1"):
        resnet12((1, 16, 16), outputs, widths)
