"""Errors for a model name the mismatched argument, what was expected, what came, and a way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_loss
from metakern.inner_loop.failures import explained
from metakern.maml import PerStepBatchNorm

both_ways = pytest.mark.parametrize("vectorize", ["auto", True, False])

pytestmark = pytest.mark.usefixtures("one_thread")


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers or (nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 2)))


def samples(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(3, 4, *shape, dtype=dtype)


@both_ways
def test_dtypes(vectorize: bool | str) -> None:
    single, double, pair = samples(2), samples(2, dtype=torch.float64), net()
    message = r"must have the dtype of the model's parameters, torch.float32, got torch.float64: pass {0}"
    with pytest.raises(TypeError, match="support_x " + message.format(r"support_x\.to\(torch.float32\), or convert")):
        adapt(pair, double, single, vectorize=vectorize)
    with pytest.raises(TypeError, match="query_x " + message.format("query_x")):
        meta_loss(pair, (single, single), (double, single), vectorize=vectorize)
    with pytest.raises(TypeError, match="query_x " + message.format("query_x")):
        adapt(pair, single, single, vectorize=vectorize)(double)
    with pytest.raises(
        TypeError, match=r"support_x must have the dtype .* torch.float64, got torch.float32: .*model\.to"
    ):
        adapt(net().double(), single, double, vectorize=vectorize)
    with pytest.raises(TypeError, match=r"support_x must have .* torch.float32, got torch.int64: pass support_x"):
        adapt(net(), single.long(), single, vectorize=vectorize)
    with pytest.raises(TypeError, match=r"support_x\['b'\] must have the dtype"):
        adapt(Two(), {"a": single, "b": double}, single, vectorize=vectorize)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(a) + self.layer(b)


@both_ways
@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            net(),
            (3,),
            r"support_x \[3, 4, 3\] must fit the model: module '0' \(Linear\) takes 2 features, got 3",
        ),
        (nn.Linear(2, 2), (3,), r"the model \(Linear\) takes 2 features, got 3 in an input of shape \[4, 3\]"),
        (net(nn.Conv2d(3, 2, 3)), (1, 8, 8), r"module '0' \(Conv2d\) takes 3 channels, got 1"),
        (net(nn.Conv2d(3, 2, 3)), (8,), r"module '0' \(Conv2d\) takes 3 or 4 axes, got 2"),
        (net(nn.ConvTranspose1d(3, 2, 3)), (1, 8), r"module '0' \(ConvTranspose1d\) takes 3 channels, got 1"),
        (
            net(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2)),
            (1, 9, 9),
            r"'2' \(Linear\) takes 72 .*, got 98",
        ),
        (net(nn.BatchNorm1d(3), nn.Linear(2, 2)), (2,), r"module '0' \(BatchNorm1d\) takes 3 channels, got 2"),
        (net(nn.GroupNorm(1, 3), nn.Linear(2, 2)), (2,), r"module '0' \(GroupNorm\) takes 3 channels, got 2"),
        (
            net(nn.LayerNorm([3]), nn.Linear(2, 2)),
            (2,),
            r"module '0' \(LayerNorm\) takes \[3\] as last axes",
        ),
        (net(nn.LSTMCell(3, 2)), (2,), r"module '0' \(LSTMCell\) takes 3 features, got 2"),
        (nn.GRU(3, 2), (5, 2), r"the model \(GRU\) takes 3 features, got 2"),
        (net(PerStepBatchNorm(3, 1), nn.Linear(2, 2)), (2,), r"input must be \[N, 3, \.\.\.\]"),
    ],
)
def test_widths(model: nn.Module, shape: tuple[int, ...], message: str, vectorize: bool | str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(model, samples(*shape), samples(2), vectorize=vectorize)


@pytest.mark.parametrize("index", [-1, 5])
@both_ways
def test_indices(index: int, vectorize: bool | str) -> None:
    x = samples(2).long()
    x[1, 0, 1] = index  # which torch.vmap would find in the table of another task
    message = rf"module '0' \(Embedding\) takes indices from 0 to 4, got {index}"
    with pytest.raises(ValueError, match=message) as error:
        adapt(net(nn.Embedding(5, 1), nn.Flatten()), x, samples(2), vectorize=vectorize)
    assert isinstance(error.value.__cause__, (IndexError, RuntimeError))


@both_ways
def test_errors_of_a_model_stay_what_they_are(vectorize: bool | str) -> None:
    class Failing(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).reshape(7, -1)

    with pytest.raises(RuntimeError, match=r"shape '\[7, -1\]' is invalid") as error:
        adapt(Failing(2, 2), samples(2), samples(2), vectorize=vectorize)
    assert not hasattr(error.value, "__notes__")


def test_devices() -> None:
    """Uses "meta", the only device always available besides the CPU; it holds no data."""
    data = {"support_x": torch.zeros(3, 4, 2), "support_y": torch.zeros(3, 4, 2, device="meta")}
    model, error, tried = net().to("meta"), RuntimeError("it failed"), []
    better = explained(error, model, data, lambda instead: not tried.append(instead))
    assert isinstance(better, ValueError)
    assert str(better).startswith("support_x must be on the device of the model's parameters, meta, got cpu: pass")
    assert [(key, new.device.type) for key, new in tried[0].items()] == [(id(data["support_x"]), "meta")]
    assert explained(error, model, data, lambda instead: False) is error


@both_ways
def test_data_of_another_dtype_are_not_the_cause_of_every_error(vectorize: bool | str) -> None:
    class Failing(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.to(self.weight.dtype)).reshape(7, -1)

    with pytest.raises(RuntimeError, match=r"shape '\[7, -1\]' is invalid"):
        adapt(Failing(2, 2), samples(2, dtype=torch.float64), samples(2), vectorize=vectorize)


@both_ways
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"model must hold .* got DataParallel, .*: pass model\.module"),
        (torch.jit.script, r"model must be a module in Python, got RecursiveScriptModule, .* pass the module that was"),
        (lambda model: torch.jit.trace(model, torch.zeros(1, 2)), r"got TopLevelTracedModule"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrapped_models(wrap: Any, message: str, vectorize: bool | str) -> None:
    model = wrap(net())
    for call in (
        lambda: adapt(model, samples(2), samples(2), vectorize=vectorize),
        lambda: meta_loss(model, (samples(2),) * 2, (samples(2),) * 2, vectorize=vectorize),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.jit.script, lambda m: torch.compile(m, backend="eager")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrapped_layers_adapt(wrap: Any) -> None:
    torch.manual_seed(0)
    plain, x = net().double(), torch.randn(2, 3, 4, 2, dtype=torch.float64)
    expected = adapt(plain, *x, steps=2, lr=0.1, loss=F.mse_loss).parameters.values()
    wrapped = adapt(nn.Sequential(wrap(plain)), *x, steps=2, lr=0.1).parameters.values()
    for a, b in zip(wrapped, expected, strict=True):
        assert torch.equal(a, b)
