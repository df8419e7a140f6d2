"""Batch norm, activation and pooling of the batched inner loop in one kernel, against the loop by hand in PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_loss
from metakern.inner_loop import pending, task_layers, task_norms
from metakern.maml import per_step_batch_norm
from metakern.rules import MetaLSTM
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loop.test_task_layers import CLASSES, F64, OPTIONS, episode, explained, net
from tests.inner_loops import check

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = 2, 7, 5


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_layers, "KERNEL_PRODUCTS", 0)
    monkeypatch.setattr(task_norms, "KERNEL_ELEMENTS", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """Statistics, activation and pooling of every call of the operator by the inner loop."""
    found, operator = [], pending.task_norm_act_pool

    def counted(*args: Any, **options: Any) -> Any:
        found.append((options["statistics"], options["activation"], options["pool"]))
        return operator(*args, **options)

    monkeypatch.setattr(pending, "task_norm_act_pool", counted)
    return found


def conv(channels: int = 2, outputs: int = 4) -> nn.Module:
    """A convolution without bias, whose gradient before batch norm is zero but for rounding."""
    return nn.Conv2d(channels, outputs, 3, padding=1, bias=False)


class Functional(nn.Module):
    """A convolution, a function of it with a batch norm, and a linear layer of the channels' means."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.function = conv(), nn.BatchNorm2d(4), function
        self.head = nn.Linear(channels, CLASSES)
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.norm, self.conv(x)).flatten(2).square().mean(2))


# ---------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    ("layers", "shape", "served"),
    [
        ([nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)], (2, 7, 5), ("batch", "relu", True)),
        ([nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)], (2, 6, 4), ("batch", "relu", True)),
        (
            [nn.BatchNorm2d(4, affine=False), nn.LeakyReLU(0.1), nn.MaxPool2d(2)],
            (2, 3, 2),
            ("batch", "leaky_relu", True),
        ),
        ([nn.BatchNorm2d(4), nn.LeakyReLU(0.2, inplace=True)], (2, 1, 5), ("batch", "leaky_relu", False)),
        ([nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()], (2, 5, 5), ("batch", "relu", False)),
        ([nn.BatchNorm2d(4)], (2, 5, 3), ("batch", "identity", False)),
        ([nn.BatchNorm2d(4), nn.MaxPool2d(2)], (2, 5, 4), ("batch", "identity", True)),
        ([nn.ReLU(), nn.MaxPool2d(2)], (2, 7, 4), ("none", "relu", True)),
        ([nn.Tanh(), nn.MaxPool2d(2, stride=2)], (2, 4, 7), ("none", "identity", True)),
    ],
)
def test_sequences_of_layers(
    layers: list[nn.Module], shape: tuple[int, ...], served: tuple[str, str, bool], first_order: bool, calls: list[Any]
) -> None:
    model = net(conv(), *copy.deepcopy(layers), shape=shape)
    check(model, episode(*shape), 2, 0.3, first_order=first_order, **OPTIONS)
    assert calls == [served] * 3


def test_two_blocks_of_conv4_and_explain(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [
        conv(),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(4, 3),
        nn.BatchNorm2d(3, affine=False),
        nn.ReLU(),
    ]
    model, data = net(*blocks, shape=SHAPE), episode(*SHAPE)
    check(model, data, 3, 0.3, **OPTIONS)
    assert calls == [("batch", "relu", True), ("batch", "relu", False)] * 4
    line = explained(model, data, capsys)
    assert "task_conv2d serves 0, 4; task_norm_act_pool serves 1, a batch norm of 3 channels;" in line


def test_evaluation_mode_takes_the_running_statistics(calls: list[Any]) -> None:
    model = net(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), shape=SHAPE)
    model[1].running_mean.normal_()
    check(model.eval(), episode(*SHAPE), 2, 0.3, **OPTIONS)
    assert calls == [("given", "relu", True)] * 3


def test_float32_is_within_rounding() -> None:
    layers = conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    model, data = net(*layers, shape=SHAPE), episode(*SHAPE)
    expected = torch.autograd.grad(
        meta_loss(model, data.support, data.query, **OPTIONS).sum(), list(model.parameters())
    )
    support, query = ((x.float(), y) for x, y in (data.support, data.query))
    losses = meta_loss(model.float(), support, query, **OPTIONS)
    for got, want in zip(torch.autograd.grad(losses.sum(), list(model.parameters())), expected, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


# ------------------------------------------------------------------------------------------ what the model does next


class Residual(nn.Module):
    """A block with a shortcut: its first result serves the next convolution and the sum."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList([conv(2), conv(4), conv(4)]), nn.ModuleList(map(nn.BatchNorm2d, [4] * 3))
        self.activation, self.pool = nn.LeakyReLU(0.1, inplace), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.activation(self.norms[0](self.convs[0](x)))
        y = self.activation(self.norms[1](self.convs[1](first)))
        return self.pool(self.activation(self.norms[2](self.convs[2](y)) + first))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_result_that_is_used_twice_is_computed_once(inplace: bool, calls: list[Any]) -> None:
    model = net(Residual(inplace), shape=SHAPE)
    check(model, episode(*SHAPE), 1, 0.3, **OPTIONS)
    pooled = ("none", "identity" if inplace else "leaky_relu", True)
    once = [("batch", "leaky_relu", False)] * 2 + [("batch", "identity", False), pooled]
    assert calls == once * 2


def in_place_for_all(norm: nn.Module, x: Tensor) -> Tensor:
    y = norm(x)
    F.relu(y, inplace=True)  # y is another tensor from now on
    return y + F.max_pool2d(y, 2).mean()


def changed_input(norm: nn.Module, x: Tensor) -> Tensor:
    x = x * 1
    y = norm(x)
    x.mul_(2)  # after the batch norm
    return F.relu(y) + x


def changed_alias(norm: nn.Module, x: Tensor) -> Tensor:
    x = x * 1
    alias = x[:1]
    y = norm(x)
    alias.add_(1)
    return F.relu(y)


def without_gradient(norm: nn.Module, x: Tensor) -> Tensor:
    y = norm(x)
    with torch.no_grad():
        scale = x.square().mean()
    return F.relu(y) * scale


def inspected(norm: nn.Module, x: Tensor) -> Tensor:
    y = norm(x)
    assert isinstance(y, Tensor)
    assert torch.is_tensor(y)
    assert (y.shape, y.dim(), len(y), y.dtype) == (x.shape, 4, len(x), F64)
    assert "tensor" in repr(y).lower()
    assert {y: 1}[y] == 1
    return y.relu()


def with_running_statistics(norm: nn.Module, x: Tensor) -> Tensor:
    y = norm(x)
    return F.relu(y) * norm.running_var.reshape(-1, 1, 1) + norm.running_mean.reshape(-1, 1, 1)


FUNCTIONS: list[Callable[[nn.Module, Tensor], Tensor]] = [
    lambda norm, x: x + norm(x),
    lambda norm, x: 1 - norm(x) * 2 + norm(x) ** 2,
    lambda norm, x: torch.where(norm(x) > 0, norm(x), x),
    lambda norm, x: torch.cat([norm(x), F.relu(norm(x))], 2),
    lambda norm, x: norm(x)[:, :, 1:, ::2],
    lambda norm, x: norm(x).flatten(2),
    lambda norm, x: F.relu(F.relu(norm(x))),
    lambda norm, x: norm(norm(x)),
    lambda norm, x: torch.relu_(norm(x)),
    lambda norm, x: norm(x).relu_(),
    lambda norm, x: F.relu(F.max_pool2d(norm(x), 2)),
    lambda norm, x: F.leaky_relu(norm(x), -0.5),
    lambda norm, x: F.max_pool2d(norm(x), 3, stride=1, padding=1),
    lambda norm, x: F.max_pool2d(norm(x), 2, ceil_mode=True),
    lambda norm, x: F.max_pool2d(F.relu(norm(x)), 2, return_indices=True)[0],
    lambda norm, x: F.max_pool2d(F.max_pool2d(norm(x), 2), (2, 2)),
    lambda norm, x: F.relu(norm(x), inplace=True) + norm(x),
    in_place_for_all,
    without_gradient,
    inspected,
    with_running_statistics,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_whatever_follows_gives_pytorch_s_values(
    function: Callable[[nn.Module, Tensor], Tensor], calls: list[Any]
) -> None:
    check(Functional(function), episode(2, 7, 6), 2, 0.1, **OPTIONS)
    assert calls


@pytest.mark.parametrize("function", [changed_input, changed_alias])
def test_later_changes_of_the_input_do_not_count(
    function: Callable[[nn.Module, Tensor], Tensor], calls: list[Any]
) -> None:
    """Without a gradient, as PyTorch's batch norm keeps its input for the backward, too."""
    model, data = Functional(function).requires_grad_(False), episode(*SHAPE)
    model.head.requires_grad_(True)
    options: dict[str, Any] = {"loss": F.cross_entropy, "lr": 0.3}
    both = [adapt(model, *data.support, **options, vectorize=way)(data.query[0]) for way in (True, False)]
    assert_close("predictions", *both, 1e-10)
    assert calls


def test_it_can_be_the_output_and_its_parts(calls: list[Any]) -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(2, CLASSES), nn.BatchNorm2d(CLASSES)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.norm(self.conv(x))
            return {"scores": y, "all": [F.relu(y)]}

    torch.manual_seed(0)
    model, data = Outputs().to(F64), episode(*SHAPE)

    def loss(output: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(output["scores"].mean((2, 3)), y) + output["all"][0].mean()

    check(model, data, 1, 0.3, loss=loss, vectorize=True)
    both = [adapt(model, *data.support, loss=loss, lr=0.3, vectorize=way)(data.query[0]) for way in (True, False)]
    assert type(both[0]["scores"]) is Tensor
    assert type(both[0]["all"][0]) is Tensor
    assert_close("scores", both[0]["scores"], both[1]["scores"], 1e-10)
    assert_close("in a list", both[0]["all"][0], both[1]["all"][0], 1e-10)
    assert calls


def test_a_function_of_autograd_takes_the_tensor() -> None:
    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    check(Functional(lambda norm, x: Square.apply(norm(x))), episode(*SHAPE), 2, 0.1, **OPTIONS)


def test_a_transform_within_the_model(calls: list[Any]) -> None:
    def slopes(norm: nn.Module, x: Tensor) -> Tensor:
        return F.relu(norm(x)) + torch.func.grad(lambda z: F.max_pool2d(F.relu(z), 2).square().sum())(x)

    check(Functional(slopes), episode(*SHAPE), 1, 0.1, **OPTIONS)
    assert calls == [("batch", "relu", False)] * 2


# --------------------------------------------------------------------------------------------------------- options


def block(dtype: torch.dtype = F64) -> nn.Sequential:
    return net(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), shape=SHAPE, dtype=dtype)


@pytest.mark.parametrize("options", [{"checkpoint_every": 2}, {"accumulate": 2}, {"step_weights": [0.2, 0.3, 0.5]}])
def test_other_options(options: dict[str, Any], calls: list[Any]) -> None:
    model, data, found = block(), episode(*SHAPE), []
    for way in (True, False):
        own = {**OPTIONS, **options, "vectorize": way}
        losses = meta_loss(model, data.support, data.query, steps=3, lr=0.3, **own)
        found.append((losses, *torch.autograd.grad(losses.sum(), list(model.parameters()))))
    for a, b in zip(*found, strict=True):
        assert_close("meta-gradients", a, b, 1e-10)
    assert calls


def test_a_learned_rule(calls: list[Any]) -> None:
    model, data, found = block(), episode(*SHAPE), []
    rule = MetaLSTM(hidden_size=3).double()
    for way in (True, False):
        losses = meta_loss(model, data.support, data.query, steps=2, rule=rule, **{**OPTIONS, "vectorize": way})
        found.append((losses, *torch.autograd.grad(losses.sum(), [*model.parameters(), *rule.parameters()])))
    for a, b in zip(*found, strict=True):
        assert_close("with a rule", a, b, 1e-10)
    assert calls


def test_per_step_batch_norm_is_joined_and_moves_as_in_the_loop(calls: list[Any]) -> None:
    data, found = episode(*SHAPE), []
    for way in (True, False):
        model = per_step_batch_norm(block(), steps=2)
        losses = meta_loss(model, data.support, data.query, steps=2, lr=0.3, **{**OPTIONS, "vectorize": way})
        grads = torch.autograd.grad(losses.sum(), list(model.parameters()))
        found.append((losses, *grads, model[1].running_mean.clone(), model[1].running_var.clone()))
    for a, b in zip(*found, strict=True):
        assert_close("per-step batch norm", a, b, 1e-10)
    assert calls == [("batch", "relu", True)] * 3


def test_torch_func(calls: list[Any]) -> None:
    model, data = block(), episode(*SHAPE)

    def total(factor: Tensor) -> Tensor:
        support = data.support[0] * factor, data.support[1]
        return meta_loss(model, support, data.query, steps=2, lr=0.3, **OPTIONS).sum()

    leaf = torch.tensor(0.7, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    calls.clear()
    assert_close("grad", torch.func.grad(total)(leaf.detach()), expected, 1e-10)
    assert calls
    calls.clear()
    tangent = torch.func.jvp(total, (leaf.detach(),), (torch.ones((), dtype=F64),))[1]
    assert_close("jvp, by PyTorch", tangent, expected, 1e-10)
    assert not calls


# ---------------------------------------------------------------------------------------------- what PyTorch keeps


def test_one_value_a_channel_is_pytorch_s_error() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, CLASSES)).to(F64)
    data = episode(2, 3, 3, samples=(1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        meta_loss(model, data.support, data.query, **OPTIONS)


def test_the_reference_backend_and_autocast_are_pytorch_s(calls: list[Any], capsys: Any) -> None:
    line = explained(block(), episode(*SHAPE), capsys, backend="reference")
    assert "PyTorch runs 0: backend 'reference' is plain PyTorch; PyTorch runs 1: backend 'reference'" in line
    with torch.autocast("cpu", torch.bfloat16):
        line = explained(block(torch.float32), episode(*SHAPE, dtype=torch.float32), capsys)
    assert "PyTorch runs 1: " in line
    assert not calls


def test_a_pooling_of_too_small_images_is_pytorch_s_error() -> None:
    model, data = Functional(lambda norm, x: F.max_pool2d(norm(x), 2)), episode(2, 1, 5)
    with pytest.raises(RuntimeError, match=r"(?i)output size is too small"):
        meta_loss(model, data.support, data.query, **OPTIONS)


# ------------------------------------------------------------------------------------------------------------ bits


def test_a_nan_stays_in_its_task() -> None:
    model, data = block(), episode(*SHAPE)
    clean = adapt(model, *data.support, steps=2, lr=0.3, **OPTIONS).parameters
    x = data.support[0].clone()
    x[0, 0, 0, 0, 0] = math.nan
    spoilt = adapt(model, x, data.support[1], steps=2, lr=0.3, **OPTIONS).parameters
    for name, tensor in spoilt.items():
        assert tensor[0].isnan().any(), name
        assert_same_bits(name, tensor[1:], clean[name][1:])


def test_running_statistics_of_the_model_stay() -> None:
    """Evaluations discard them, as without the kernel; predictions in train() mode do, too."""
    model, data = block(), episode(*SHAPE)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    adapt(model, *data.support, steps=2, lr=0.3, **OPTIONS)(data.query[0])
    for name, buffer in model.named_buffers():
        assert_same_bits(name, buffer, before[name])
