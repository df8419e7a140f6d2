"""Warnings of the inner loop point at the user's line, for every kind of call."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import MAML, FallbackWarning, MetaSGD, adapt, meta_backward, meta_loss
from metakern.inner_loop.engines import missed as _missed
from metakern.learners import MAMLLearner
from metakern.rules import Momentum
from metakern.tasks import Episodes
from tests.inner_loops import mlp, regression

pytestmark = pytest.mark.usefixtures("one_thread", "forgotten")

EPISODE = regression(2, 3, 4, 2, 1)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_missed, "_said", set())


class Branch(nn.Module):
    """torch.vmap cannot run it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if bool(x.sum() > 0) else -self.layer(x)


def softplus() -> nn.Module:
    return mlp(2, 4, 1, activation=nn.Softplus)


def episodes() -> Episodes:
    return Episodes(*EPISODE.support, *EPISODE.query)


def learner(model: nn.Module, **options: Any) -> MAMLLearner:
    return MAMLLearner(model, **options)


#: One call per line; its warning must name that line.
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "adapt": lambda model: adapt(model, *EPISODE.support),
    "adapt, a pair": lambda model: adapt(model, EPISODE.support),
    "adapt, by a rule": lambda model: adapt(model, EPISODE.support, rule=Momentum(0.1)),
    "meta_loss": lambda model: meta_loss(model, EPISODE.support, EPISODE.query),
    "meta_loss, without gradients": torch.no_grad()(lambda model: meta_loss(model, EPISODE.support, EPISODE.query)),
    "meta_loss, in parts": lambda model: meta_loss(model, EPISODE.support, EPISODE.query, accumulate=2),
    "meta_backward": lambda model: meta_backward(model, EPISODE.support, EPISODE.query),
    "meta_losses": lambda model: next(learner(model).meta_losses(episodes())),
    "evaluate": lambda model: learner(model).evaluate(episodes()),
    "predict": lambda model: learner(model).predict(episodes()),
    "support_losses": lambda model: learner(model).support_losses(episodes()),
    "approach": lambda model: learner(model).approach(episodes()),
}


def line_of(call: Callable[..., Any]) -> tuple[str, int]:
    code = getattr(call, "__wrapped__", call).__code__
    return code.co_filename, code.co_firstlineno


def caught(call: Callable[..., Any], *args: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call(*args)
    return list(found)


@pytest.mark.parametrize("name", CALLS)
def test_a_small_mlp_that_misses_its_engine(name: str) -> None:
    (warning,) = [w for w in caught(CALLS[name], softplus()) if w.category is FallbackWarning]
    assert "plain PyTorch serves this small MLP" in str(warning.message)
    assert (warning.filename, warning.lineno) == line_of(CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_torch_vmap_cannot_run(name: str) -> None:
    found = caught(CALLS[name], Branch())
    (warning,) = [w for w in found if "one after another" in str(w.message)]
    assert (warning.filename, warning.lineno) == line_of(CALLS[name])


def test_adapted_models() -> None:
    adapted, x = adapt(nn.Sequential(Branch()), *EPISODE.support, vectorize=False), EPISODE.query[0]
    adapted._model.vectorization.wanted = "auto"
    call = lambda: adapted(x)  # noqa: E731 -- its line is what is asked for
    (warning,) = caught(call)
    assert (warning.filename, warning.lineno) == line_of(call)


class Holder(nn.Module):
    """Keeps a layer where PyTorch does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(2, 4).double(), [nn.Linear(4, 1).double()]

    def forward(self, x: Tensor) -> Tensor:
        return self.rest[0](self.first(x))


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
def test_learners_of_one_task(kind: Any) -> None:
    x, y = (tensor[0] for tensor in EPISODE.support)

    def parameters_that_are_not_registered() -> None:
        clone = kind(Holder(), lr=0.1).clone()
        clone.adapt(F.mse_loss(clone(x), y))

    (warning,) = caught(parameters_that_are_not_registered)
    assert "are not registered in the model" in str(warning.message)
    assert (warning.filename, warning.lineno) == (__file__, line_of(parameters_that_are_not_registered)[1] + 2)


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
def test_compiled_models(kind: Any) -> None:
    call = lambda: kind(torch.compile(nn.Linear(2, 1), backend="eager"), lr=0.1)  # noqa: E731
    (warning,) = [w for w in caught(call) if "without torch.compile" in str(w.message)]
    assert (warning.filename, warning.lineno) == line_of(call)
    assert "torch._dynamo" in sys.modules
