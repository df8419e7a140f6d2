"""Functions whose derivative under torch.vmap, or second derivative, is wrong in PyTorch, mainly embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_loss
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import Episode, assert_same, check, hand_written, mlp, regression

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(*shape: int, rows: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


def episode(*sample: int, tasks: int = 3) -> Episode:
    labels = tokens(tasks, 4, rows=2, seed=2), tokens(tasks, 6, rows=2, seed=3)
    return Episode((tokens(tasks, 4, *sample), labels[0]), (tokens(tasks, 6, *sample, seed=1), labels[1]))


def classifier(embedding: nn.Module, width: int) -> nn.Sequential:
    torch.manual_seed(0)
    for p in embedding.parameters():
        nn.init.normal_(p)
    return nn.Sequential(embedding, nn.Flatten(), nn.Tanh(), nn.Linear(width, 2)).double()


# ------------------------------------------------------------------------------------------------------- nn.Embedding


def test_no_task_adapts_the_padding_row() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2)).double()
    x, y = torch.tensor([[[0, 1], [2, 0]]] * 3), torch.tensor([[0, 1]] * 3)
    losses = meta_loss(net, (x, y), (x, y), loss=F.cross_entropy, steps=3, lr=1.0)
    assert_same_bits("losses of identical tasks", losses, losses[:1].expand(3).contiguous())
    adapted = adapt(net, x, y, loss=F.cross_entropy, lr=1.0).parameters["0.weight"]
    assert_same_bits("padding rows", adapted[:, 0], torch.zeros(3, 3, dtype=F64))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}])
def test_embedding(options: dict[str, Any], vectorize: bool, first_order: bool) -> None:
    net = classifier(nn.Embedding(5, 3, **options), 6)
    check(net, episode(2), 3, 0.7, loss=F.cross_entropy, vectorize=vectorize, first_order=first_order)


class Functional(nn.Module):
    """A table that ``look_up(x, weight)`` reads."""

    def __init__(self, look_up: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.look_up = nn.Parameter(torch.empty(5, 3)), look_up

    def forward(self, x: Tensor) -> Tensor:
        return self.look_up(x, self.weight)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    "look_up",
    [
        lambda x, weight: F.embedding(x, weight, padding_idx=2),
        lambda x, weight: torch.embedding(weight, x, 2),
        lambda x, weight: torch.embedding(weight, x),
        lambda x, weight: F.embedding(x, weight.tanh(), 2, None, 2.0, False),
        lambda x, weight: F.embedding(x.int(), weight, padding_idx=-3),
    ],
)
def test_functional_embedding(look_up: Callable[..., Tensor], vectorize: bool) -> None:
    check(classifier(Functional(look_up), 6), episode(2), 2, 0.7, loss=F.cross_entropy, vectorize=vectorize)


def test_frozen_and_shared_tables() -> None:
    """Tables that are not adapted are shared by all tasks and use other batching rules."""
    for names in (["3.weight"], ["0.weight"]):
        net = classifier(nn.Embedding(5, 3, padding_idx=1), 6)
        check(net, episode(2), 2, 0.7, loss=F.cross_entropy, parameters=names, names=names)
    net[0].requires_grad_(False)
    check(net, episode(2), 2, 0.7, loss=F.cross_entropy)


def counted(weight: Tensor, x: Tensor) -> Tensor:
    """The weight, of which each row's gradient is divided by how often ``x`` holds it."""
    scale = torch.bincount(x.flatten(), minlength=len(weight)).clamp(min=1).to(weight).unsqueeze(1)
    return weight / scale + (weight - weight / scale).detach()


def scaled(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return F.embedding(x, counted(weight, x), **options)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("first_order", [False, True])
def test_scale_grad_by_freq(first_order: bool, vectorize: bool, padding_idx: int | None) -> None:
    """Counted over the samples of each task. PyTorch forgets the counts in second derivatives."""
    data = episode(2)
    net = classifier(nn.Embedding(5, 3, padding_idx=padding_idx, scale_grad_by_freq=True), 6)
    plain = classifier(Functional(lambda x, weight: scaled(x, weight, padding_idx=padding_idx)), 6)
    options: dict[str, Any] = {"loss": F.cross_entropy, "first_order": first_order}
    losses = meta_loss(net, data.support, data.query, steps=2, lr=0.7, vectorize=vectorize, **options)
    expected = hand_written(plain, data, 2, lambda *_: 0.7, **options)
    assert_close("query losses", losses, expected, 1e-12)
    got, want = (torch.autograd.grad(x.sum(), list(m.parameters())) for x, m in ((losses, net), (expected, plain)))
    for a, b in zip(got, want, strict=True):
        assert_close("meta-gradient", a, b, 1e-12)
    if first_order:  # of PyTorch itself this much is right
        assert_close("by PyTorch", losses, hand_written(net, data, 2, lambda *_: 0.7, **options), 1e-12)


@pytest.mark.parametrize("vectorize", [True, False])
def test_sparse_gradients_are_taken_as_dense_ones(vectorize: bool) -> None:
    data, results = episode(2), []
    for sparse in (True, False):
        net = classifier(nn.Embedding(5, 3, sparse=sparse), 6)
        options: dict[str, Any] = {"loss": F.cross_entropy, "steps": 2, "lr": 0.7, "vectorize": vectorize}
        losses = meta_loss(net, data.support, data.query, **options)
        results.append((losses, *torch.autograd.grad(losses.sum(), list(net.parameters()))))
    for a, b in zip(*results, strict=True):
        assert_same_bits("sparse", a, b)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    "embedding",
    [
        nn.Embedding(5, 3, max_norm=0.1),
        nn.EmbeddingBag(5, 3, max_norm=0.1),
        Functional(lambda x, weight: F.embedding(x, weight, None, 0.1)),
        Functional(lambda x, weight: F.embedding(x, torch.embedding_renorm_(weight.detach(), x.flatten(), 0.1, 2.0))),
    ],
)
def test_max_norm_is_refused_before_it_writes(embedding: nn.Module, vectorize: bool) -> None:
    net = classifier(embedding, 3 if isinstance(embedding, nn.EmbeddingBag) else 6)
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"must not have max_norm, got 0\.1: .* set max_norm=None"):
        adapt(net, *episode(2).support, loss=F.cross_entropy, vectorize=vectorize)
    assert_same_bits("weight", embedding.weight, before)


def test_embedding_in_transforms_and_compiled() -> None:
    data, net = episode(2), classifier(nn.Embedding(5, 3, padding_idx=2), 6)
    rate = torch.tensor(0.7, dtype=F64)

    def losses(lr: Tensor) -> Tensor:
        return meta_loss(net, data.support, data.query, loss=F.cross_entropy, lr=lr)

    def by_hand(lr: Tensor) -> Tensor:
        return hand_written(net, data, 1, lambda *_: lr, loss=F.cross_entropy)

    assert_close("jacrev", torch.func.jacrev(losses)(rate), torch.autograd.functional.jacobian(by_hand, rate), 1e-12)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    assert_same(compiled(rate), by_hand(rate), list(net.parameters()), 1e-12)


# ---------------------------------------------------------------------------------------------------- nn.EmbeddingBag


def bag(x: Tensor, weight: Tensor, mode: str, padding_idx: int | None = None) -> Tensor:
    """EmbeddingBag as one writes it with an embedding: PyTorch's has no second derivative."""
    rows = F.embedding(x, weight, padding_idx)
    bags = [r if padding_idx is None else r[i != padding_idx] for r, i in zip(rows, x, strict=True)]
    empty = torch.zeros_like(weight[0])
    return torch.stack([empty if not len(r) else r.amax(0) if mode == "max" else getattr(r, mode)(0) for r in bags])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode: str, padding_idx: int | None, vectorize: bool, first_order: bool) -> None:
    data = episode(2)
    data.support[0][1, 0] = 2  # a bag of padding alone
    net = classifier(nn.EmbeddingBag(5, 3, mode=mode, padding_idx=padding_idx), 3)
    plain = classifier(Functional(lambda x, weight: bag(x, weight, mode, padding_idx)), 3)
    plain.load_state_dict(net.state_dict())
    options: dict[str, Any] = {"loss": F.cross_entropy, "first_order": first_order}
    losses = meta_loss(net, data.support, data.query, steps=2, lr=0.7, vectorize=vectorize, **options)
    expected = hand_written(plain, data, 2, lambda *_: 0.7, **options)
    assert_close("query losses", losses, expected, 1e-12)
    got, want = (torch.autograd.grad(x.sum(), list(m.parameters())) for x, m in ((losses, net), (expected, plain)))
    for a, b in zip(got, want, strict=True):
        assert_close("meta-gradient", a, b, 1e-12)
    if first_order:
        assert_close("by PyTorch", losses, hand_written(net, data, 2, lambda *_: 0.7, **options), 1e-12)


class Ragged(nn.Module):
    """Bags that lie one after another, the weights of their members learned."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.weight = options, nn.Parameter(torch.empty(5, 3))
        self.members = nn.Parameter(torch.empty(8)) if options.get("mode") == "sum" else None

    def forward(self, x: Tensor) -> Tensor:
        starts = torch.tensor([0, 3, 3, 4] + [8] * self.options.get("include_last_offset", False))
        return F.embedding_bag(x.flatten(), self.weight, starts, per_sample_weights=self.members, **self.options)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sum"},
        {"mode": "mean", "include_last_offset": True},
        {"mode": "max"},
        {"mode": "mean", "padding_idx": 2},
    ],
)
def test_bags_of_different_lengths(options: dict[str, Any], vectorize: bool) -> None:
    """First derivatives, which PyTorch has, against the loop; the others follow from the same formulas."""
    net, data = classifier(Ragged(**options), 3), Episode(episode(2).support, episode(2).support)
    check(net, data, 2, 0.7, loss=F.cross_entropy, first_order=True, vectorize=vectorize)
    meta_loss(net, data.support, data.query, loss=F.cross_entropy, vectorize=vectorize).sum().backward()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_with_gradients_scaled_by_frequency(mode: str, vectorize: bool) -> None:
    """PyTorch reads the counts of other rows there: for bag [3, 3, 1, 4, 4, 4, 0] row 4 gets 1.5 in place of 1."""
    data = episode(4)
    net = classifier(nn.EmbeddingBag(5, 3, mode=mode, scale_grad_by_freq=True), 3)
    plain = classifier(Functional(lambda x, weight: bag(x, counted(weight, x), mode)), 3)
    plain.load_state_dict(net.state_dict())
    losses = meta_loss(net, data.support, data.query, loss=F.cross_entropy, steps=2, lr=0.7, vectorize=vectorize)
    expected = hand_written(plain, data, 2, lambda *_: 0.7, loss=F.cross_entropy)
    assert_close("query losses", losses, expected, 1e-12)
    got, want = (torch.autograd.grad(x.sum(), list(m.parameters())) for x, m in ((losses, net), (expected, plain)))
    for a, b in zip(got, want, strict=True):
        assert_close("meta-gradient", a, b, 1e-12)


def test_arguments_that_do_not_fit_are_for_pytorch_to_name() -> None:
    data = episode(2)
    for look_up, message in (
        (lambda x, weight: F.embedding_bag(x, weight, mode="most"), "mode has to be one of"),
        (lambda x, weight: F.embedding_bag(x, weight, torch.zeros(1)), "if input is 2D, then offsets has to be None"),
        (lambda x, weight: F.embedding(x, weight, padding_idx=5), "Padding_idx must be within"),
        (lambda x, weight: F.embedding(x.double(), weight), r"Expected tensor for argument #1 .indices."),
    ):
        for vectorize in (True, False):
            with pytest.raises((ValueError, AssertionError, RuntimeError), match=message):
                adapt(classifier(Functional(look_up), 6), *data.support, loss=F.cross_entropy, vectorize=vectorize)


# ------------------------------------------------------------------------------------------------------ other functions


class Scattered(nn.Module):
    """A function of a table, a row and a number, each of them adapted or the same for all tasks."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.table, self.row = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
        self.number = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.function(self.table, self.row, self.number).tanh()


@pytest.mark.parametrize("names", [None, ["table"], ["row"], ["number"], ["table", "row"], ["row", "number"]])
@pytest.mark.parametrize(
    "function",
    [
        lambda table, row, number: torch.select_scatter(table, row, 1, -1) * number,
        lambda table, row, number: table.select_scatter(row[:3] * number, dim=0, index=2),
        lambda table, row, number: torch.index_fill(table, -1, torch.tensor([0, 2]), number) * row[:, None],
        lambda table, row, number: table.index_fill(0, torch.tensor([3]), number) * row[:, None],
        lambda table, row, number: table.index_fill(0, torch.tensor([3]), 2.0) * row[:, None] * number,
        lambda table, row, number: table.slice_scatter(row[:, None] * number, 1, 1, 2),
        lambda table, row, number: table.diagonal_scatter(row[:3] * number),
    ],
)
def test_scattered(function: Callable[..., Tensor], names: list[str] | None) -> None:
    torch.manual_seed(0)
    net, x = Scattered(function).double(), torch.randn(2, 3, 5, 4, dtype=F64)
    data = Episode((x[0], torch.randn(3, 5, 3, dtype=F64)), (x[1], torch.randn(3, 5, 3, dtype=F64)))
    check(net, data, 2, 0.3, parameters=names, names=names)


@pytest.mark.parametrize("vectorize", ["auto", True])
def test_one_hot(vectorize: bool | str) -> None:
    """torch.vmap would return zeros for a class out of range."""
    data = episode(2)
    net = classifier(Functional(lambda x, weight: F.one_hot(x, 5).to(weight) @ weight), 6)
    check(net, data, 2, 0.7, loss=F.cross_entropy, vectorize=vectorize)
    data.support[0][1, 2, 0] = 5
    with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
        adapt(net, *data.support, loss=F.cross_entropy, vectorize=vectorize)


def test_a_model_sees_whether_its_input_requires_a_gradient() -> None:
    """torch.vmap hides it, so that a model that checks would take another branch than in a loop."""

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h.tanh() if h.requires_grad and not x.requires_grad else h

    torch.manual_seed(0)
    net, x = Looking().double(), torch.randn(2, 3, 4, 2, dtype=F64)
    check(net, Episode((x[0], x[1]), (x[1], x[0])), 2)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has none")
@pytest.mark.parametrize("vectorize", [True, False])
def test_cross_entropy_in_chunks_has_a_second_derivative(vectorize: bool) -> None:
    torch.manual_seed(0)
    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    head = torch.randn(2, 2, dtype=F64)
    net, x, y = nn.Linear(2, 2).double(), torch.randn(2, 3, 4, 2, dtype=F64), tokens(2, 3, 4, rows=2)
    data = Episode((x[0], y[0]), (x[1], y[1]))

    def loss(prediction: Tensor, labels: Tensor, options: Any = chunks) -> Tensor:
        return F.linear_cross_entropy(prediction, head, labels, options=options)

    losses = meta_loss(net, data.support, data.query, loss=loss, steps=2, lr=0.7, vectorize=vectorize)
    expected = hand_written(net, data, 2, lambda *_: 0.7, loss=lambda p, labels: F.cross_entropy(p @ head.T, labels))
    assert_same(losses, expected, list(net.parameters()), 1e-12)


# -------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(4),
        lambda: nn.LayerNorm(4),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.InstanceNorm1d(1, affine=True), nn.Flatten()),
        lambda: Normed(lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False)),
        lambda: Normed(lambda x, w, b: torch.instance_norm(x[..., None] * b, w, b, None, None, True, 0.1, 1e-5, False)),
        lambda: Normed(lambda x, w, b: torch.layer_norm(x, (4,), w, b, 1e-5)),
        lambda: Normed(lambda x, w, b: F.layer_norm(x * w, (4,), eps=0.1) + b),
    ],
)
def test_norms_to_second_order_in_transforms(norm: Callable[[], nn.Module]) -> None:
    """Within torch.vmap autograd takes means and variances of a norm's gradient for constants."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), norm(), nn.Flatten(), nn.Tanh(), nn.LazyLinear(2)).double()
    x, y = torch.randn(2, 3, 5, 3, dtype=F64), torch.randn(2, 3, 5, 2, dtype=F64)
    net(x[0, 0])
    data, rate = Episode((x[0], y[0]), (x[1], y[1])), torch.tensor(0.3, dtype=F64)

    def losses(lr: Tensor) -> Tensor:
        return meta_loss(net, data.support, data.query, steps=3, lr=lr)

    def by_hand(lr: Tensor) -> Tensor:
        return hand_written(net, data, 3, lambda *_: lr)

    assert_close("jacrev", torch.func.jacrev(losses)(rate), torch.autograd.functional.jacobian(by_hand, rate), 1e-12)


class Normed(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def test_norms_to_second_order_compiled() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x, y = torch.randn(2, 3, 5, 3, dtype=F64), torch.randn(2, 3, 5, 2, dtype=F64)
    data = Episode((x[0], y[0]), (x[1], y[1]))
    compiled = torch.compile(meta_loss, fullgraph=True, backend="aot_eager")
    losses = compiled(net, data.support, data.query, steps=2, lr=0.3)
    cancelled = net[0].bias  # which batch norm takes away again
    assert_same(losses, hand_written(net, data, 2, lambda *_: 0.3), [p for p in net.parameters() if p is not cancelled])


def test_norms_whose_statistics_are_wanted_too_are_refused_in_transforms() -> None:
    net = Normed(lambda x, w, b: torch.native_layer_norm(x, (4,), w, b, 1e-5)[0]).double()
    x = torch.randn(3, 5, 4, dtype=F64)
    with pytest.raises(RuntimeError, match=r"use torch\.nn\.functional\.layer_norm"):
        torch.func.jacrev(lambda lr: meta_loss(net, (x, x), (x, x), lr=lr))(torch.tensor(0.1, dtype=F64))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", ["mse_loss", "leaky_relu"])
def test_functions_that_were_wrapped_run_once(name: str, vectorize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **options: 3 * original(*args, **options))
    net, episode = mlp(2, 4, 1, activation=nn.LeakyReLU), regression(3, 4, 4, 2, 1)
    expected = hand_written(net, episode, 2, lambda *_: 0.1, loss=lambda p, y: F.mse_loss(p, y))
    options: dict[str, Any] = {"vectorize": vectorize, "loss": lambda p, y: F.mse_loss(p, y)}
    losses = meta_loss(net, episode.support, episode.query, steps=2, lr=0.1, **options)
    assert_same(losses, expected, list(net.parameters()))
