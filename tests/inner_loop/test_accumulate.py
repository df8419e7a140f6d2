"""Support sets in parts, and another set for every step: values and meta-gradients of whole sets, in less memory."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_backward, meta_loss
from metakern.learners import MAMLLearner
from metakern.maml import PerStepBatchNorm
from metakern.tasks import Episodes
from tests.conftest import assert_close
from tests.inner_loop.test_masks import CASES, IDS, MASKS, WEIGHT, sets
from tests.inner_loops import Episode, assert_same, evaluate, hand_written, mlp, regression

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:There is a performance drop")
@pytest.mark.parametrize(("kind", "loss", "model"), CASES, ids=IDS)
def test_parts_make_up_the_whole(kind: str, loss: Any, model: nn.Module) -> None:
    """First and second order; with masks that leave some parts of a task without a sample."""
    episode, leaves = sets(kind), list(model.parameters())
    masks = {"support_mask": MASKS[0], "query_mask": MASKS[1]}
    for first_order in (True, False):
        if isinstance(loss, nn.MultiMarginLoss) and not first_order:
            continue  # PyTorch has no second derivative of it
        options: dict[str, Any] = {"loss": loss, "first_order": first_order}
        by_hand = hand_written(model, episode, 2, lambda *_: 0.1, **options)
        masked = hand_written(model, episode, 2, lambda *_: 0.1, masks=MASKS, **options)
        options |= {"steps": 2, "lr": 0.1, "backend": "reference"}
        for parts in (2, 4, 9):
            # PyTorch's smoothed and weighted mean has no batching rule; the query loss goes as the parts do.
            whole = {"query_mask": torch.ones(3, 5).bool()}
            losses = meta_loss(model, episode.support, episode.query, accumulate=parts, **whole, **options)
            assert_same(losses, by_hand, leaves)
            losses = meta_loss(model, episode.support, episode.query, accumulate=parts, **masks, **options)
            assert_same(losses, masked, leaves)


@pytest.mark.parametrize(
    "options",
    [
        {"vectorize": False},
        {"checkpoint_every": 2},
        {"clip_norm": 0.3},
        {"first_order": [True, False, False]},
        {"step_weights": [0.2, 0.3, 0.5]},
    ],
)
def test_with_other_options(options: dict[str, Any]) -> None:
    net, episode = mlp(2, 4, 3), sets("labels")
    options = {"loss": nn.CrossEntropyLoss(WEIGHT), "steps": 3, "lr": 0.1, "backend": "reference", **options}
    whole = meta_loss(net, episode.support, episode.query, **options)
    assert_same(meta_loss(net, episode.support, episode.query, accumulate=3, **options), whole, list(net.parameters()))
    adapted = [
        adapt(net, *episode.support, accumulate=parts, **{k: v for k, v in options.items() if k != "step_weights"})
        for parts in (1, 3)
    ]
    for name, p in adapted[0].parameters.items():
        assert_close(name, adapted[1].parameters[name], p, 1e-12)


def test_meta_gradients_of_data_and_rates() -> None:
    episode, net = regression(3, 6, 5, 2, 1), mlp(2, 5, 1)
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    leaves = [lr, episode.support[0].requires_grad_(), *net.parameters()]
    losses = [
        meta_loss(net, episode.support, episode.query, steps=2, lr=lr, accumulate=parts, backend="reference")
        for parts in (1, 3)
    ]
    assert_same(losses[1], losses[0], leaves)


def test_parameters_that_are_shared_receive_meta_gradients() -> None:
    episode, net = regression(3, 6, 5, 2, 1), mlp(2, 5, 1)
    options: dict[str, Any] = {"steps": 2, "lr": 0.1, "parameters": "2.*", "backend": "reference"}
    losses = [meta_loss(net, episode.support, episode.query, accumulate=parts, **options) for parts in (1, 3)]
    assert_same(losses[1], losses[0], list(net.parameters()))
    meta_backward(net, episode.support, episode.query, accumulate=3, **options)
    for p, want in zip(net.parameters(), torch.autograd.grad(losses[0].mean(), list(net.parameters())), strict=True):
        assert_close("gradient", p.grad, want, 1e-10)


def test_dropout_draws_the_same_in_the_backward() -> None:
    """Numerically: the meta-gradient of a rate, with the draws of one seed."""
    net = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 1)).double()
    episode = regression(3, 6, 5, 2, 1)

    def losses(lr: Tensor) -> Tensor:
        torch.manual_seed(0)
        return meta_loss(net, episode.support, episode.query, steps=2, lr=lr, accumulate=3)

    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    got = torch.autograd.grad(losses(lr).sum(), lr)[0]
    step = 1e-6
    with torch.no_grad():
        expected = (losses(lr + step).sum() - losses(lr - step).sum()) / (2 * step)
    assert_close("gradient of the rate", got, expected, 1e-6)


def test_batch_norm_sees_a_part() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    episode = regression(3, 6, 5, 2, 1)
    losses = meta_loss(net, episode.support, episode.query, lr=0.1, accumulate=2)
    expected = []
    for task in range(3):
        (sx, sy), (qx, qy) = ([t[task] for t in part] for part in (episode.support, episode.query))
        params = dict(net.named_parameters())
        halves = [evaluate(net, params, (sx[i : i + 3], sy[i : i + 3]), F.mse_loss) for i in (0, 3)]
        found = torch.autograd.grad(sum(halves) / 2, list(params.values()), create_graph=True)
        stepped = {n: p - 0.1 * g for (n, p), g in zip(params.items(), found, strict=True)}
        expected.append(evaluate(net, stepped, (qx, qy), F.mse_loss))
    cancelled = id(net[0].bias)  # batch norm takes it away: its meta-gradient is rounding
    assert_same(losses, torch.stack(expected), [p for p in net.parameters() if id(p) != cancelled])


def test_statistics_of_every_step_move_once_a_part() -> None:
    def moved(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 4), PerStepBatchNorm(4, steps=2), nn.Linear(4, 1)).double()
        episode = regression(3, 6, 5, 2, 1)
        meta_loss(net, episode.support, episode.query, steps=2, lr=0.0, accumulate=2, **options).sum().backward()
        x = net[0](episode.support[0])
        mean = torch.zeros(4, dtype=F64)
        for half in (x[:, :3], x[:, 3:]):
            mean = mean.lerp(half.mean((0, 1)), 0.1)
        assert_close("row 0", net[1].running_mean[0], mean, 1e-12)
        return [net[1].running_mean, net[1].running_var]

    expected = moved(first_order=True)
    for options in ({}, {"checkpoint_every": 1}, {"vectorize": False}):
        for got, want in zip(moved(**options), expected, strict=True):
            assert_close("statistics", got, want, 1e-12)


# ------------------------------------------------------------------------------------ memory


def most_saved(**options: Any) -> tuple[int, int]:
    """Bytes that the graph keeps after a meta-loss, and the most at any time until its backward has ended."""
    alive: dict[int, list[int]] = {}  # storage: bytes, saved tensors in it
    most = [0]

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, storage = tensor, tensor.untyped_storage()
            entry = alive.setdefault(storage.data_ptr(), [storage.nbytes(), 0])
            entry[1] += 1
            most[0] = max(most[0], sum(size for size, _ in alive.values()))
            weakref.finalize(self, release, storage.data_ptr())

    def release(pointer: int) -> None:
        alive[pointer][1] -= 1
        if not alive[pointer][1]:
            del alive[pointer]

    episode, net = regression(2, 256, 4, 4, 1), mlp(4, 8, 8, 8, 1)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        losses = meta_loss(net, episode.support, episode.query, lr=0.01, backend="reference", **options)
        after = sum(size for size, _ in alive.values())
        losses.sum().backward()
    assert net[0].weight.grad is not None
    return after, most[0]


@pytest.mark.parametrize("vectorize", [True, False])
def test_one_parts_graph_is_alive_at_a_time(vectorize: bool) -> None:
    after, most = most_saved(steps=2, vectorize=vectorize)
    kept, peak = most_saved(steps=2, accumulate=16, vectorize=vectorize)
    assert kept < after / 8
    assert peak < most / 4
    assert peak > kept  # the backward did compute the parts again
    single = most_saved(steps=1, accumulate=16, vectorize=vectorize)[1]
    assert peak < 2 * single  # of two steps' parts one is alive


# ------------------------------------------------------------------------------------ what is refused


def test_losses_that_cannot_be_taken_in_parts() -> None:
    episode, net = sets("numbers"), mlp(2, 4, 3)

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction - y).square().mean()

    with pytest.raises(TypeError, match=r"whose mean over a part of a set is not known: leave accumulate out, or"):
        adapt(net, *episode.support, loss=loss, accumulate=2, backend="reference")
    weights = torch.rand(6, 3, dtype=F64)
    bits = sets("bits")
    by_sample = nn.BCEWithLogitsLoss(weight=weights)
    with pytest.raises(ValueError, match=r"an option for every sample with accumulate, but weight has shape \[6, 3\]"):
        adapt(net, *bits.support, loss=by_sample, accumulate=2)
    assert adapt(net, *bits.support, loss=by_sample).parameters
    scale = torch.ones((), dtype=F64, requires_grad=True)

    def scaled(prediction: Tensor, y: Tensor, reduction: str) -> Tensor:
        losses = scale * (prediction - y).square()
        return losses if reduction == "none" else losses.sum()

    learned = partial(scaled, reduction="sum")
    with pytest.raises(RuntimeError, match="accumulate recomputes from model, data and lr, but loss or model holds"):
        meta_loss(net, bits.support, bits.query, loss=learned, accumulate=2)
    meta_loss(net, bits.support, bits.query, loss=learned, accumulate=2, first_order=True)


def test_under_the_transforms_of_torch_func() -> None:
    episode, net = regression(3, 6, 5, 2, 1), mlp(2, 5, 1)

    def losses(lr: Tensor, parts: int = 3) -> Tensor:
        options: dict[str, Any] = {"steps": 2, "backend": "reference", "accumulate": parts}
        return meta_loss(net, episode.support, episode.query, lr=lr, **options)

    lr = torch.tensor(0.1, dtype=F64)
    expected = torch.func.jacrev(partial(losses, parts=1))(lr)
    assert_close("jacrev", torch.func.jacrev(losses)(lr), expected, 1e-12)


# ------------------------------------------------------------------------------------ another set for every step


def by_step(tasks: int = 3, steps: int = 3) -> tuple[Episode, Episode]:
    """Support sets [T, K, S, ...] with query sets, and the same support sets as tasks of their own, [T·K, S, ...]."""
    made = regression(tasks * steps, 4, 5, 2, 3)
    x, y = made.support
    spread = x.view(tasks, steps, *x.shape[1:]), y.view(tasks, steps, *y.shape[1:])
    return Episode(spread, (made.query[0][:tasks], made.query[1][:tasks])), made


def loop(net: nn.Module, episode: Episode, loss: Any, masks: tuple[Tensor, Tensor] | None = None) -> Tensor:
    losses = []
    for task in range(len(episode.support[0])):
        params = dict(net.named_parameters())
        for step in range(episode.support[0].shape[1]):
            data = tuple(part[task, step] for part in episode.support)
            data = tuple(part[masks[0][task, step]] for part in data) if masks else data
            found = torch.autograd.grad(evaluate(net, params, data, loss), list(params.values()), create_graph=True)
            params = {n: p - 0.1 * g for (n, p), g in zip(params.items(), found, strict=True)}
        query = tuple(part[task] for part in episode.query)
        query = tuple(part[masks[1][task]] for part in query) if masks else query
        losses.append(evaluate(net, params, query, loss))
    return torch.stack(losses)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"vectorize": False}, {"checkpoint_every": 2}, {"accumulate": 2}])
def test_another_set_for_every_step(options: dict[str, Any], masked: bool) -> None:
    episode, net = by_step()[0], mlp(2, 4, 3)
    labels = [part[1].argmax(-1) for part in (episode.support, episode.query)]
    loss = nn.CrossEntropyLoss(WEIGHT)
    masks = (torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.5, torch.ones(3, 5).bool())
    masks[0][..., 1] = True
    if masked:
        options = {**options, "support_mask": masks[0], "query_mask": masks[1]}
        episode.support[0][~masks[0]] = torch.nan
    episode = Episode((episode.support[0], labels[0]), (episode.query[0], labels[1]))
    expected = loop(net, episode, loss, masks if masked else None)
    call = partial(meta_loss, net, episode.support, episode.query, steps=3, lr=0.1, loss=loss, support_per_step=True)
    assert_same(call(**options), expected, list(net.parameters()))
    options.pop("query_mask", None)
    adapted = adapt(net, *episode.support, steps=3, lr=0.1, loss=loss, support_per_step=True, **options)
    query = torch.stack(
        [loss(p[m], y[m]) for p, y, m in zip(adapted(episode.query[0]), labels[1], masks[1], strict=True)]
    )
    assert_close("query losses", query, expected, 1e-12)


def test_another_set_for_every_step_is_taken_where_the_model_would_be_fused() -> None:
    episode, net = by_step()[0], mlp(2, 4, 3)
    expected = loop(net, episode, F.mse_loss)
    options: dict[str, Any] = {"steps": 3, "lr": 0.1, "support_per_step": True}
    for _ in range(3):  # the fused inner loop remembers calls
        assert_same(meta_loss(net, episode.support, episode.query, **options), expected, list(net.parameters()))
        losses = meta_backward(net, episode.support, episode.query, **options)
        assert_close("losses", losses, expected.detach(), 1e-12)
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: support_per_step brings another support set"):
        meta_loss(net, episode.support, episode.query, backend="cpp", **options)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (lambda x: x[:, 0], r"support_x must be \[T, K, S, ...\] for support_per_step=True, with K = 3 .*, got shape"),
        (lambda x: x[:, :2], r"support_x must be \[T, K, S, ...\] .* K = 3 .* got shape \[3, 2, 4, 2\]"),
    ],
)
def test_sets_that_do_not_fit_the_steps(support: Any, message: str) -> None:
    episode, net = by_step()[0], mlp(2, 4, 3)
    with pytest.raises(ValueError, match=message):
        adapt(net, support(episode.support[0]), support(episode.support[1]), steps=3, support_per_step=True)
    mask = torch.ones(3, 4).bool()
    with pytest.raises(ValueError, match=r"support_mask must be \[T, K, S\], \[3, 3, 4\], got \[3, 4\]"):
        adapt(net, *episode.support, steps=3, support_per_step=True, support_mask=mask)
    with pytest.raises(TypeError, match="support_per_step must be a bool, got 1"):
        adapt(net, *episode.support, steps=3, support_per_step=1)


@pytest.mark.parametrize("rates", ["fixed", "lslr"])
def test_learners(rates: str) -> None:
    episode, net = by_step()[0], mlp(2, 4, 3)
    batch = Episodes(*episode.support, *episode.query)
    expected = loop(net, episode, F.mse_loss)
    for parts in (1, 2):
        options: dict[str, Any] = {"support_per_step": True, "accumulate": parts, "rates": rates}
        learner = MAMLLearner(net, steps=3, inner_lr=0.1, **options)
        assert_same(next(learner.meta_losses(batch)), expected, list(net.parameters()))
        assert_close("evaluation", learner.evaluate(batch)["loss"], expected, 1e-12)
        first = Episode(tuple(part[:, 0] for part in episode.support), episode.query)
        by_hand = hand_written(net, first, 1, lambda *_: 0.1)
        one = learner.measure(learner.predict(batch, 1), batch.query_y)["loss"]
        assert_close("after one step", one, by_hand, 1e-12)
        assert_close("as it is", learner.predict(batch, 0), net(batch.query_x), 1e-13)
        support = learner.adapt_to(batch)(batch.support_x.flatten(1, 2))
        losses = (support - batch.support_y.flatten(1, 2)).square().mean((1, 2))
        assert_close("support losses", learner.support_losses(batch), losses, 1e-12)
        whole = (batch.support_x.flatten(1, 2), batch.support_y.flatten(1, 2))
        step = adapt(net, *whole, lr=1.0).parameters
        gradients = torch.cat([(p - step[n]).flatten(1) for n, p in net.named_parameters()], 1)
        assert_close("gradients", learner.support_gradients(batch), gradients, 1e-10)
