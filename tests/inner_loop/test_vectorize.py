"""vectorize="auto": models that torch.vmap cannot run are looped over, with one warning and the same values."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from metakern import adapt, meta_loss
from metakern.learners import MAMLLearner
from metakern.maml import PerStepBatchNorm, meta_backward
from metakern.tasks import Episodes
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import Episode, assert_same, hand_written, mlp, regression

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


class Around(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(2, 3), function, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


class Recurrent(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.cells, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.unflatten(0, (2, -1)))[0].flatten(0, 1))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return 2 * cotangents[0] * ctx.saved_tensors[0]


class Straight(torch.autograd.Function):
    """torch.vmap can run its forward, but not its backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return cotangents[0] * (1 - output**2) if cotangents[0].abs().sum() > 0 else cotangents[0]


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nn.LSTM": (lambda: Recurrent(nn.LSTM), r"module 'cells' \(LSTM\): RuntimeError: Batching rule not implemented"),
    "nn.GRU": (lambda: Recurrent(nn.GRU), r"module 'cells' \(GRU\)"),
    "nn.RNN": (lambda: Recurrent(nn.RNN), r"module 'cells' \(RNN\)"),
    "checkpoint": (
        lambda: Around(lambda h: checkpoint(torch.sin, h, use_reentrant=False)),
        r"RuntimeError: Either your tensor may have escaped|RuntimeError",
    ),
    "autograd.Function": (lambda: Around(Square.apply), r"the model \(Around\): RuntimeError: In order to use an auto"),
    "backward of a function": (lambda: Around(Straight.apply), r"the model or the loss: RuntimeError: vmap: It looks"),
    "spectral norm": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(3, 2))),
        r"module '2\.parametrizations\.weight\.0' \(_SpectralNorm\)",
    ),
    "branch": (lambda: Around(lambda h: h if h.sum() > 0 else 2 * h.tanh()), r"data-dependent control flow"),
    "number": (lambda: Around(lambda h: h * h.detach().abs().max().item()), r"calling \.item\(\)"),
    "numpy": (lambda: Around(lambda h: h + torch.from_numpy(h.detach().numpy().cumsum(1))), "data pointer"),
    "rows": (lambda: Around(lambda h: h * len(h[h[:, 0] > 0])), "dynamic shape"),
    "hook of a tensor": (lambda: Around(lambda h: (h.register_hook(lambda g: g / 2), h.tanh())[1]), "register a hook"),
    ".data": (lambda: Around(lambda h: h.tanh() + (h.sign() - h).data), "accessing `data`"),
}


def problem(make: Callable[[], nn.Module]) -> tuple[nn.Module, Episode]:
    torch.manual_seed(0)
    return make().double(), regression(3, 4, 6, 2, 2)


def caught(call: Callable[[], Any]) -> tuple[Any, list[warnings.WarningMessage]]:
    """A call's result, and the package's warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [w for w in found if "evaluated one after another" in str(w.message)]


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_falls_back_with_one_warning_and_the_right_values(kind: str) -> None:
    make, cause = UNSUPPORTED[kind]
    model, episode = problem(make)

    def call(**options: Any) -> Tensor:
        # The fused inner loop serves some of them.
        return meta_loss(model, episode.support, episode.query, steps=2, lr=0.1, backend="reference", **options)

    losses, found = caught(call)
    assert len(found) == 1
    assert found[0].filename == __file__
    with pytest.warns(UserWarning, match=cause):
        warnings.warn_explicit(found[0].message, UserWarning, __file__, 0)
    assert_same(losses, hand_written(model, episode, 2, lambda *_: 0.1), list(model.parameters()))
    again, found = caught(call)
    assert not found
    assert_same_bits("again", again, losses)
    with pytest.raises(RuntimeError, match=cause) as error:
        call(vectorize=True)
    assert 'pass vectorize="auto" or False' in str(error.value)
    assert not caught(lambda: call(vectorize=False))[1]


def test_one_warning_for_each_mode_and_loss_that_take_turns() -> None:
    model, episode = problem(UNSUPPORTED["branch"][0])

    def turn() -> None:
        for training in (True, False):
            for loss in (F.mse_loss, nn.L1Loss()):
                meta_loss(model.train(training), episode.support, episode.query, loss=loss, lr=0.1)

    assert len(caught(turn)[1]) == 4
    assert not caught(turn)[1]


def test_the_warning_is_of_the_line_that_calls() -> None:
    model, episode = problem(UNSUPPORTED["branch"][0])
    learner = MAMLLearner(model, inner_lr=0.1)
    batch = Episodes(*episode.support, *episode.query)
    adapted, found = caught(lambda: adapt(model, *episode.support))
    assert [w.filename for w in found] == [__file__]
    assert not caught(
        lambda: (adapted(episode.query[0]), learner.predict(batch), next(iter(learner.meta_losses(batch))))
    )[1]
    for call in (
        lambda learner: learner.predict(batch),
        lambda learner: next(iter(learner.meta_losses(batch))),
        lambda learner: meta_backward(learner.model, episode.support, episode.query),
    ):
        fresh = MAMLLearner(problem(UNSUPPORTED["branch"][0])[0], inner_lr=0.1)
        assert [w.filename for w in caught(lambda: call(fresh))[1]] == [__file__]  # noqa: B023
    with pytest.raises(RuntimeError, match="vectorize=True cannot run the model"):
        MAMLLearner(model, inner_lr=0.1, vectorize=True).predict(batch)


def test_predictions_fall_back_by_themselves() -> None:
    """The mode may differ from adaptation's, and with it whether torch.vmap can run the model."""

    class OnlyInTraining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if self.training or x.sum() > 0 else 2 * self.layer(x)

    model, episode = problem(OnlyInTraining)
    adapted, found = caught(lambda: adapt(model, *episode.support, lr=0.1, checkpoint_every=1))
    assert not found
    model.eval()
    predictions, found = caught(lambda: adapted(episode.query[0]))
    assert len(found) == 1
    assert not caught(lambda: adapted(episode.query[0]))[1]
    scale = torch.where(episode.query[0].sum((1, 2), keepdim=True) > 0, 1.0, 2.0)
    weight, bias = adapted.parameters["layer.weight"], adapted.parameters["layer.bias"]
    expected = scale * torch.baddbmm(bias.unsqueeze(1), episode.query[0], weight.mT)
    assert_close("predictions", predictions, expected, 1e-12)
    assert not caught(lambda: adapt(model.train(), *episode.support, lr=0.1))[1]


def test_a_failed_try_leaves_random_numbers_and_statistics_alone() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dropout, self.layer = PerStepBatchNorm(2, steps=2), nn.Dropout(), nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            h = self.dropout(self.norm(x))
            return self.layer(h) if h.sum() > 0 else 2 * self.layer(h)

    results = []
    for vectorize in ("auto", False):
        model, episode = problem(Drawing)
        torch.manual_seed(1)
        options: dict[str, Any] = {"steps": 2, "lr": 0.1, "vectorize": vectorize, "checkpoint_every": 1}
        losses, _ = caught(lambda: meta_loss(model, episode.support, episode.query, **options))  # noqa: B023
        gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
        results.append([losses, *gradients, *model.buffers(), torch.get_rng_state().double()])
    for index, (a, b) in enumerate(zip(*results, strict=True)):
        assert_same_bits(f"result {index}", a, b)
    model, episode = problem(Drawing)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="data-dependent"):
        meta_loss(model, episode.support, episode.query, vectorize=True)
    assert torch.equal(state, torch.get_rng_state())
    assert_same_bits("running mean", model.norm.running_mean, torch.zeros(3, 2, dtype=F64))


def test_a_change_of_the_model_is_tried_again() -> None:
    model, episode = problem(UNSUPPORTED["nn.LSTM"][0])
    kinds = []
    for change in (lambda: None, model.eval, lambda: setattr(model, "cells", Plain().double()), model.train):
        change()
        kinds.append(len(caught(lambda: adapt(model, *episode.support))[1]))
        kinds.append(len(caught(lambda: adapt(model, *episode.support))[1]))
    assert kinds == [1, 0, 1, 0, 0, 0, 0, 0]
    branching = lambda prediction, y: F.mse_loss(prediction, y) * (2 if prediction.sum() > 0 else 1)  # noqa: E731
    assert len(caught(lambda: adapt(model, *episode.support, loss=branching))[1]) == 1
    assert not caught(lambda: adapt(model, *episode.support))[1]


class Plain(nn.Module):
    """In place of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x),)


def test_errors_of_the_model_are_its_own() -> None:
    """Errors that also occur in a loop are raised unchanged: no warning, one try with and without torch.vmap."""

    class Failing(nn.Linear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            Failing.calls += 1
            raise KeyError("of the user")

    for vectorize in ("auto", True, False):
        Failing.calls = 0
        options: dict[str, Any] = {"vectorize": vectorize, "backend": "reference"}
        with pytest.raises(KeyError, match="of the user") as error:
            adapt(Failing(2, 2).double(), *regression(3, 4, 4, 2, 2).support, **options)
        assert error.value.__cause__ is None
        assert not hasattr(error.value, "__notes__")
        assert Failing.calls == (1 if vectorize is False else 2)


def test_transforms_take_auto_for_true() -> None:
    model, episode = problem(UNSUPPORTED["branch"][0])
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        torch.func.jacrev(lambda lr: meta_loss(model, episode.support, episode.query, lr=lr))(torch.tensor(0.1))
    compiled = torch.compile(meta_loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"ata-dependent (control flow|branching)"):
        compiled(model, episode.support, episode.query)


def test_other_values_are_refused() -> None:
    with pytest.raises(TypeError, match="vectorize must be True, False or 'auto', got 'yes'"):
        adapt(mlp(2, 2), *regression(3, 4, 4, 2, 2).support, vectorize="yes")


class Cyclic(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = Around(function)
        self.inner.__dict__["parent"] = self

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_no_model_is_kept_alive() -> None:
    """Neither by the cache of models that torch.vmap cannot run, nor by leftovers of a failed try."""

    for function in (torch.tanh, lambda h: h if h.sum() > 0 else 2 * h.tanh()):
        for vectorize in ("auto", False):
            alive = evaluated_once(function, vectorize)
            gc.collect()
            assert alive() is None


def evaluated_once(function: Callable[[Tensor], Tensor], vectorize: bool | str) -> weakref.ref[nn.Module]:
    model, episode = problem(lambda: Cyclic(function))

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(prediction, y) if model.training else y.sum()

    options: dict[str, Any] = {"loss": loss, "vectorize": vectorize}
    caught(lambda: meta_loss(model, episode.support, episode.query, **options))
    adapt(model, *episode.support, **options)(episode.query[0])
    return weakref.ref(model)


# -------------------------------------------------------------------------------------------------------------- hooks


def hooked(register: Callable[[nn.Sequential], Any]) -> Callable[[], nn.Sequential]:
    def make() -> nn.Sequential:
        net = mlp(2, 3, 2)
        register(net)
        return net

    return make


@pytest.mark.parametrize(
    ("register", "name"),
    [
        (lambda net: net[1].register_full_backward_hook(lambda m, gi, go: (gi[0] / 2,)), r"module '1' \(Tanh\)"),
        (lambda net: net[2].register_full_backward_pre_hook(lambda m, go: (go[0] / 2,)), r"module '2' \(Linear\)"),
        (lambda net: net.register_full_backward_hook(lambda m, gi, go: None), r"the model \(Sequential\)"),
    ],
)
def test_backward_hooks_are_called_by_a_loop(register: Callable[[nn.Sequential], Any], name: str) -> None:
    net, episode = problem(hooked(register))
    losses, found = caught(lambda: meta_loss(net, episode.support, episode.query, steps=2, lr=0.1))
    assert len(found) == 1
    with pytest.warns(UserWarning, match=f"{name} has a backward hook, which torch.vmap does not call"):
        warnings.warn_explicit(found[0].message, UserWarning, __file__, 0)
    assert_same(losses, hand_written(net, episode, 2, lambda *_: 0.1), list(net.parameters()))
    assert not caught(lambda: adapt(net, *episode.support))[1]
    with pytest.raises(RuntimeError, match=f"vectorize=True cannot run the model: {name} has a backward hook"):
        adapt(net, *episode.support, vectorize=True)
    with pytest.raises(RuntimeError, match=f"torch.func cannot transform the model: {name} has a backward hook"):
        torch.func.jacrev(lambda lr: meta_loss(net, episode.support, episode.query, lr=lr))(torch.tensor(0.1))


def test_hooks_of_a_loss_and_of_all_modules() -> None:
    net, episode = problem(lambda: mlp(2, 3, 2))
    loss = nn.MSELoss()
    loss.register_full_backward_hook(lambda m, gi, go: (gi[0] / 2, gi[1]))
    losses, found = caught(
        lambda: meta_loss(net, episode.support, episode.query, lr=0.1, loss=loss, backend="reference")
    )
    assert "module 'loss' (MSELoss)" in str(found[0].message)
    expected = hand_written(net, episode, 1, lambda *_: 0.05)
    assert_close("losses", losses, expected, 1e-12)
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, gi, go: None)
    try:
        assert len(caught(lambda: adapt(net, *episode.support, clip_norm=1.0))[1]) == 1
    finally:
        handle.remove()
    assert not caught(lambda: adapt(net, *episode.support, clip_norm=1.0))[1]


# ------------------------------------------------------------------------------------------------- writes of a model


@pytest.mark.parametrize("vectorize", ["auto", True, False])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_writes_into_its_parameters_is_refused(frozen: bool, tasks: int, vectorize: bool | str) -> None:
    class Clamped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return super().forward(input)

    net = nn.Sequential(Clamped(2, 3), nn.Linear(3, 2)).double()
    net[0].weight.requires_grad_(not frozen)
    with pytest.raises(RuntimeError, match=r"must not write into its parameters, but .* \['0\.weight'\] in place"):
        adapt(net, *regression(tasks, 4, 4, 2, 2).support, vectorize=vectorize)
