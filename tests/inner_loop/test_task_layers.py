"""Convolutions of the batched inner loop by kernels for all tasks, against the loop by hand in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_loss
from metakern.inner_loop import task_layers
from metakern.maml import per_step_batch_norm
from metakern.rules import MetaLSTM
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import Episode, assert_same, check, hand_written

F64 = torch.float64
T, S, Q, CLASSES = 3, 4, 5, 3

pytestmark = pytest.mark.usefixtures("one_thread")


def episode(*shape: int, samples: tuple[int, int] = (S, Q), dtype: torch.dtype = F64, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)

    def sets(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(T, count, *shape, generator=generator, dtype=dtype)
        return x, torch.randint(CLASSES, (T, count), generator=generator)

    return Episode(sets(samples[0]), sets(samples[1]))


def net(*layers: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = F64) -> nn.Sequential:
    """Layers and a linear one."""
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    body = nn.Sequential(*layers, nn.Flatten())
    width = body(torch.zeros(2, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, CLASSES)).to(dtype)


def small(shape: tuple[int, ...] = (2, 7, 5), dtype: torch.dtype = F64) -> nn.Sequential:
    """Two convolutions on odd images that are not square."""
    convolutions = nn.Conv2d(shape[0], 4, 3, padding=1), nn.Conv2d(4, 3, (3, 1), stride=2, bias=False)
    return net(convolutions[0], nn.Tanh(), convolutions[1], nn.Tanh(), shape=shape, dtype=dtype)


def dilated() -> nn.Sequential:
    """The same with a first convolution that no kernel serves."""
    convolutions = nn.Conv2d(2, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 3, (3, 1), stride=2, bias=False)
    return net(convolutions[0], nn.Tanh(), convolutions[1], nn.Tanh(), shape=(2, 7, 5))


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_layers, "KERNEL_PRODUCTS", 0)


OPTIONS: dict[str, Any] = {"loss": F.cross_entropy, "vectorize": True}


def explained(model: nn.Module, data: Episode, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    meta_loss(model, data.support, data.query, explain=True, **{**OPTIONS, **options})
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    ("shape", "samples", "convolution"),
    [
        ((1, 5, 7), (1, 1), lambda: nn.Conv2d(1, 1, 3)),
        ((3, 8, 5), (2, 3), lambda: nn.Conv2d(3, 5, 5, stride=2, padding=2)),
        ((2, 9, 9), (3, 1), lambda: nn.Conv2d(2, 3, 7, stride=(2, 1), padding=(3, 0), bias=False)),
        ((5, 4, 6), (1, 4), lambda: nn.Conv2d(5, 2, 1, stride=2)),
        ((2, 6, 4), (2, 2), lambda: nn.Conv2d(2, 3, (3, 5), padding="same")),
        ((2, 3, 3), (2, 2), lambda: nn.Conv2d(2, 3, 3, padding="valid")),
        ((2, 5, 6), (2, 2), lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")),
    ],
)
def test_sizes(
    shape: tuple[int, ...],
    samples: tuple[int, int],
    convolution: Callable[[], nn.Module],
    first_order: bool,
    capsys: Any,
) -> None:
    model, data = net(convolution(), nn.Tanh(), shape=shape), episode(*shape, samples=samples)
    check(model, data, 2, 0.3, first_order=first_order, **OPTIONS)
    assert "task_conv2d serves 0;" in explained(model, data, capsys, first_order=first_order)


def test_float32_is_within_rounding() -> None:
    model, data = small(dtype=torch.float32), episode(2, 7, 5, dtype=torch.float32)
    losses = meta_loss(model, data.support, data.query, steps=3, lr=0.3, **OPTIONS)
    double = small()
    double.load_state_dict(model.state_dict())
    wide = Episode(*((x.double(), y) for x, y in (data.support, data.query)))
    expected = hand_written(double, wide, 3, lambda *_: 0.3, loss=F.cross_entropy)
    for got, want in zip(
        torch.autograd.grad(losses.sum(), list(model.parameters())),
        torch.autograd.grad(expected.sum(), list(double.parameters())),
        strict=True,
    ):
        assert (got - want).norm() <= 1e-5 * want.norm()


# --------------------------------------------------------------------------------------------------------- options


def test_rates_that_are_learned() -> None:
    """Meta-SGD, a rate of every element; LSLR, a rate of every tensor and step."""
    model, data = small(), episode(2, 7, 5)
    elements = {n: torch.full_like(p, 0.2, requires_grad=True) for n, p in model.named_parameters()}
    check(model, data, 2, elements, lambda name, step: elements[name], **OPTIONS)
    steps = {n: torch.tensor([0.3, 0.1], dtype=F64, requires_grad=True) for n, _ in model.named_parameters()}
    check(model, data, 2, steps, lambda name, step: steps[name][step], **OPTIONS)


@pytest.mark.parametrize("names", [["5.weight", "5.bias"], ["2.weight"], ["0.bias"]])
def test_parameters_that_the_tasks_share(names: list[str]) -> None:
    check(small(), episode(2, 7, 5), 2, 0.3, parameters=names, names=names, **OPTIONS)


def test_a_convolution_that_the_tasks_share_is_pytorch_s(capsys: pytest.CaptureFixture[str]) -> None:
    line = explained(small(), episode(2, 7, 5), capsys, parameters="5.*")
    assert "task_conv2d serves" not in line
    assert "PyTorch runs 0: the tasks share its weight" in line


def test_masks() -> None:
    model, data = small(), episode(2, 7, 5)
    mask = torch.tensor([[True] * S, [True, False, True, False], [False, True, True, True]])
    losses = meta_loss(model, data.support, data.query, steps=2, lr=0.3, support_mask=mask, **OPTIONS)
    masks = mask, torch.ones(T, Q, dtype=torch.bool)
    expected = hand_written(model, data, 2, lambda *_: 0.3, loss=F.cross_entropy, masks=masks)
    assert_same(losses, expected, list(model.parameters()))


@pytest.mark.parametrize(
    "options",
    [{"checkpoint_every": 2}, {"accumulate": 2}, {"step_weights": [0.2, 0.3, 0.5]}, {"clip_norm": 0.1}],
)
def test_other_options(options: dict[str, Any]) -> None:
    check(small(), episode(2, 7, 5), 3, 0.3, **OPTIONS, **options)


def test_a_learned_rule() -> None:
    model, data = small(), episode(2, 7, 5)
    rule = MetaLSTM(hidden_size=3).double()
    found = []
    for vectorize in (True, False):
        options = {**OPTIONS, "vectorize": vectorize}
        losses = meta_loss(model, data.support, data.query, steps=2, rule=rule, **options)
        found.append((losses, *torch.autograd.grad(losses.sum(), [*model.parameters(), *rule.parameters()])))
    for a, b in zip(*found, strict=True):
        assert_close("with a rule", a, b, 1e-10)


def test_per_step_batch_norm() -> None:
    """Running statistics of every step, too, are those of the loop."""
    data, found = episode(2, 7, 5), []
    for vectorize in (True, False):
        model = per_step_batch_norm(
            net(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), shape=(2, 7, 5)), steps=2
        )
        losses = meta_loss(model, data.support, data.query, steps=2, lr=0.3, loss=F.cross_entropy, vectorize=vectorize)
        grads = torch.autograd.grad(losses.sum(), list(model.parameters()))
        found.append((losses, *grads, model[1].running_mean.clone(), model[1].running_var.clone()))
    for a, b in zip(*found, strict=True):
        assert_close("per-step batch norm", a, b, 1e-10)


# ------------------------------------------------------------------------------------------------------ transforms


def scaled_loss(model: nn.Module, data: Episode) -> Callable[[Tensor], Tensor]:
    """The sum of the query losses by a factor of the support images."""

    def total(factor: Tensor) -> Tensor:
        support = data.support[0] * factor, data.support[1]
        return meta_loss(model, support, data.query, steps=2, lr=0.3, **OPTIONS).sum()

    return total


def test_torch_func() -> None:
    total, factor = scaled_loss(small(), episode(2, 7, 5)), torch.tensor(0.7, dtype=F64)
    leaf = factor.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    assert_close("grad", torch.func.grad(total)(factor), expected, 1e-10)
    factors = torch.tensor([0.7, 0.7], dtype=F64)
    assert_close("vmap of grad", torch.func.vmap(torch.func.grad(total))(factors), expected.expand(2), 1e-10)
    tangent = torch.func.jvp(total, (factor,), (torch.ones_like(factor),))[1]
    assert_close("jvp, by PyTorch", tangent, expected, 1e-10)


def test_compiled_whole() -> None:
    """Compiled calls leave convolutions to PyTorch."""
    model, data = small(), episode(2, 7, 5)

    def losses() -> Tensor:
        return meta_loss(model, data.support, data.query, steps=2, lr=0.3, loss=F.cross_entropy)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    assert_same(compiled(), losses(), list(model.parameters()))


# --------------------------------------------------------------------------------------- what PyTorch keeps, errors


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Conv2d(2, 4, 3, groups=2), "it has 2 groups"),
        (lambda: nn.Conv2d(2, 3, 2, dilation=2), "it has dilation (2, 2)"),
        (lambda: nn.Conv2d(2, 3, 2, padding="same"), "its padding 'same' is not that of task_conv2d"),
    ],
)
def test_other_convolutions_are_pytorch_s(layer: Callable[[], nn.Module], reason: str, capsys: Any) -> None:
    model, data = net(layer(), nn.Tanh(), shape=(2, 5, 6)), episode(2, 5, 6)
    check(model, data, 2, 0.3, **OPTIONS)
    assert f"PyTorch runs 0: {reason}" in explained(model, data, capsys)


def test_the_reference_backend_is_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    line = explained(small(), episode(2, 7, 5), capsys, backend="reference")
    assert "PyTorch runs 0: backend 'reference' is plain PyTorch" in line


def test_a_call_of_the_function_is_named_by_its_weight(capsys: pytest.CaptureFixture[str]) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 2, 3, 3, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(x, self.kernel), self.kernel[:, :1].expand(3, 3, 3, 3) * 2).mean((2, 3))

    model, data = Calls(), episode(2, 7, 5)
    check(model, data, 2, 0.3, **OPTIONS)
    line = explained(model, data, capsys)
    assert "task_conv2d serves kernel, a convolution of weight [3, 3, 3, 3]" in line


def test_channels_last_and_non_contiguous_images() -> None:
    model, data = small(), episode(2, 7, 5)
    expected = meta_loss(model, data.support, data.query, steps=2, lr=0.3, **OPTIONS)
    x = data.support[0].flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, S))
    turned = data.query[0].transpose(3, 4).contiguous().transpose(3, 4)
    losses = meta_loss(model, (x, data.support[1]), (turned, data.query[1]), steps=2, lr=0.3, **OPTIONS)
    assert_same_bits("losses", losses, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "error"),
    [((3, 7, 5), F64, ValueError), ((2, 2, 5), F64, RuntimeError), ((2, 7, 5), torch.float32, TypeError)],
)
def test_images_that_do_not_fit(shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception]) -> None:
    """Channels, an image smaller than the kernel, a dtype: as without the kernels."""
    convolution = net(nn.Conv2d(2, 4, 3), nn.Tanh(), shape=(2, 7, 5))
    data = episode(*shape, dtype=dtype)
    with pytest.raises(error) as raised:
        meta_loss(convolution, data.support, data.query, loss=F.cross_entropy)
    with pytest.raises(error) as plain:
        meta_loss(convolution, data.support, data.query, loss=F.cross_entropy, backend="reference")
    assert str(raised.value) == str(plain.value)


def test_under_autocast_pytorch_runs_them(capsys: pytest.CaptureFixture[str]) -> None:
    data = episode(2, 7, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert "PyTorch runs 0: autocast is on" in explained(small(dtype=torch.float32), data, capsys)


# ------------------------------------------------------------------------------------------------------------ bits


def meta_gradients(model: nn.Module, data: Episode) -> list[Tensor]:
    losses = meta_loss(model, data.support, data.query, steps=2, lr=0.3, **OPTIONS)
    return [losses.detach(), *torch.autograd.grad(losses[1:].sum(), list(model.parameters()))]


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    model, data, found = small(dtype=torch.float32), episode(2, 7, 5, dtype=torch.float32), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(meta_gradients(model, data))
    torch.set_num_threads(before)
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert_same_bits("meta-gradients", a, b)


def test_a_nan_stays_in_its_task() -> None:
    model, data = small(), episode(2, 7, 5)
    clean = adapt(model, *data.support, steps=2, lr=0.3, **OPTIONS).parameters
    x = data.support[0].clone()
    x[0, 0, 0, 0, 0] = math.nan
    spoilt = adapt(model, x, data.support[1], steps=2, lr=0.3, **OPTIONS).parameters
    for name, tensor in spoilt.items():
        assert tensor[0].isnan().any(), name
        assert_same_bits(name, tensor[1:], clean[name][1:])


def test_predictions_are_served_too() -> None:
    model, data = small(), episode(2, 7, 5)
    predictions = [
        adapt(model, *data.support, loss=F.cross_entropy, lr=0.3, vectorize=way)(data.query[0]) for way in (True, False)
    ]
    assert_close("predictions", *predictions, 1e-12)


# ------------------------------------------------------------------------------------------------------------ auto


def test_auto_takes_the_loop_for_large_convolutions_without_a_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call notices, later ones take the loop at once; vectorize=True never does. The values are the same."""
    model, data = dilated(), episode(2, 7, 5)
    at_once = meta_loss(model, data.support, data.query, **OPTIONS)
    monkeypatch.setattr(task_layers, "LOOP_PRODUCTS", S * 35 * 72)
    for _ in range(2):
        losses = meta_loss(model, data.support, data.query, loss=F.cross_entropy, explain=True)
        assert "one task after another, which is faster for convolutions of this size" in capsys.readouterr().out
        assert_close("losses", losses, at_once, 1e-12)
    assert "all tasks at once" in explained(model, data, capsys)


def test_auto_keeps_smaller_and_served_convolutions_at_once_and_transforms_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = dilated(), episode(2, 7, 5)
    monkeypatch.setattr(task_layers, "LOOP_PRODUCTS", Q * 35 * 72 + 1)
    assert "all tasks at once" in explained(model, data, capsys, vectorize="auto")
    monkeypatch.setattr(task_layers, "LOOP_PRODUCTS", 0)
    assert "all tasks at once" in explained(small(), data, capsys, vectorize="auto")  # the kernel serves it
    adapted = adapt(dilated(), *data.support, loss=F.cross_entropy)  # a model of its own: this one takes the loop
    predict = torch.func.vmap(lambda shift: adapted(data.query[0] + shift))
    assert predict(torch.zeros(2, dtype=F64)).shape == (2, T, Q, CLASSES)


def test_small_convolutions_stay_with_pytorch(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(task_layers, "KERNEL_PRODUCTS", 2**19)
    assert "PyTorch runs 0: it is too small for a kernel" in explained(small(), episode(2, 7, 5), capsys)
