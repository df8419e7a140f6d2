"""adapt and meta_loss: all tasks at once, held to loops that are written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from metakern import adapt, meta_loss
from metakern.maml import multi_step_weights, reptile_step
from tests.conftest import GRADIENT_TOLERANCE, assert_close, assert_same_bits
from tests.inner_loops import Episode, assert_same, check, evaluate, hand_written, mlp, regression, sinusoids

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------ exact meta-gradients


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.sampled_from((1, 2, 7)),
    shots=st.integers(1, 6),
    steps=st.integers(1, 4),
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    activation=st.sampled_from((nn.Tanh, nn.ReLU, nn.Sigmoid, nn.GELU)),
    first_order=st.booleans(),
    every=st.sampled_from((None, 1, 2, 9)),
    backend=st.sampled_from(("vmap", "loop", "cpp")),
    seed=st.integers(0, 99),
)
def test_equals_a_hand_written_loop(
    tasks: int,
    shots: int,
    steps: int,
    widths: list[int],
    activation: type[nn.Module],
    first_order: bool,
    every: int | None,
    backend: str,
    seed: int,
) -> None:
    episode = regression(tasks, shots, 3, widths[0], widths[-1], seed)
    net = mlp(*widths, activation=activation, seed=seed)
    generic = {"backend": "reference", "vectorize": backend == "vmap"}
    options = {"backend": "cpp"} if backend == "cpp" else generic
    check(net, episode, steps, first_order=first_order, checkpoint_every=every, **options)


def test_float32() -> None:
    episode, net = regression(3, 5, 5, 2, 1), mlp(2, 16, 1)
    expected = meta_loss(net, episode.support, episode.query, steps=3, lr=0.1)
    exact = torch.autograd.grad(expected.mean(), list(net.parameters()))
    net = net.float()
    support, query = (tuple(t.float() for t in part) for part in (episode.support, episode.query))
    losses = meta_loss(net, support, query, steps=3, lr=0.1)
    for a, b in zip(torch.autograd.grad(losses.mean(), list(net.parameters())), exact, strict=True):
        assert_close("meta-gradient", a, b, GRADIENT_TOLERANCE[torch.float32])


def test_central_differences() -> None:
    episode, net = regression(2, 3, 3, 1, 1), mlp(1, 4, 1)
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    leaves = [lr, *net.parameters()]
    gradients = torch.autograd.grad(meta_loss(net, episode.support, episode.query, steps=2, lr=lr).mean(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for index in range(leaf.numel()):
            values = []
            for offset in (1e-5, -1e-5):
                with torch.no_grad():
                    leaf.view(-1)[index] += offset
                    values.append(meta_loss(net, episode.support, episode.query, steps=2, lr=lr).mean())
                    leaf.view(-1)[index] -= offset
            assert_close("derivative", gradient.view(-1)[index], (values[0] - values[1]) / 2e-5, 1e-6)


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), F.binary_cross_entropy_with_logits])
def test_losses_of_classification(loss: Any) -> None:
    episode, net = regression(3, 6, 6, 2, 4), mlp(2, 5, 4)
    if loss is F.binary_cross_entropy_with_logits:
        sets = [(x, (y > 0).double()) for x, y in (episode.support, episode.query)]
    else:
        sets = [(x, y.argmax(-1)) for x, y in (episode.support, episode.query)]
    check(net, Episode(*sets), 2, loss=loss)


def test_adapted_predicts_for_all_tasks() -> None:
    episode, net = regression(3, 5, 4, 2, 1), mlp(2, 5, 1)
    before = copy.deepcopy(net.state_dict())
    adapted = adapt(net, *episode.support, steps=2, lr=0.1)
    assert {name: p.shape[1:] for name, p in adapted.parameters.items()} == {
        n: p.shape for n, p in net.named_parameters()
    }
    prediction = adapted(episode.query[0])
    assert prediction.shape == (3, 4, 1)
    losses = (prediction - episode.query[1]).square().flatten(1).mean(1)
    assert_same(losses, hand_written(net, episode, 2, lambda *_: 0.1), list(net.parameters()))
    assert adapted(episode.query[0][:, :1]).shape == (3, 1, 1)
    for name, tensor in net.state_dict().items():
        assert_same_bits(name, tensor, before[name])


def test_no_grad_records_nothing() -> None:
    episode, net = regression(3, 5, 4, 2, 1), mlp(2, 5, 1)
    expected = adapt(net, *episode.support, steps=2, checkpoint_every=1)(episode.query[0])
    with torch.no_grad():
        adapted = adapt(net, *episode.support, steps=2, checkpoint_every=1)
        assert not any(p.requires_grad for p in adapted.parameters.values())
        assert_same_bits("prediction", adapted(episode.query[0]), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 1.0}, {"vectorize": False}, {"checkpoint_every": 1}, {"first_order": True}, {"parameters": "2.*"}],
    ids=str,
)
def test_nan_in_one_task_leaves_the_others_bits(options: dict[str, Any], value: float) -> None:
    episode, net = regression(3, 5, 4, 2, 1), mlp(2, 5, 1, activation=nn.GELU)
    episode.query[0].requires_grad_()
    others = torch.tensor([0, 2])

    def run() -> tuple[dict[str, Tensor], Tensor, Tensor]:
        losses = meta_loss(net, episode.support, episode.query, steps=2, **options)
        gradient = torch.autograd.grad(losses.sum(), episode.query[0])[0]
        return adapt(net, *episode.support, steps=2, **options).parameters, losses, gradient

    clean, losses, gradient = run()
    assert losses.isfinite().all()
    with torch.no_grad():
        episode.support[1][1, 2] = value
    parameters, got, got_gradient = run()
    for name, p in parameters.items():
        assert_same_bits(name, p[others], clean[name][others])
        assert p[1].isnan().any() or p[1].isinf().any()
    assert_same_bits("losses", got[others], losses[others])
    assert_same_bits("gradients of the data", got_gradient[others], gradient[others])
    assert not got[1].isfinite()


def test_nan_in_a_query_set_leaves_the_others_bits() -> None:
    episode, net = regression(3, 5, 4, 2, 1), mlp(2, 5, 1)
    options: dict[str, Any] = {"steps": 2, "step_weights": [0.5, 0.5]}
    losses = meta_loss(net, episode.support, episode.query, **options)
    episode.query[0][0, 1] = float("nan")
    got = meta_loss(net, episode.support, episode.query, **options)
    assert_same_bits("losses", got[1:], losses[1:])
    assert got[0].isnan()


def test_nan_in_a_learning_rate_comes_out() -> None:
    episode, net = regression(3, 5, 4, 2, 1), mlp(2, 5, 1)
    lr = torch.tensor(float("nan"), dtype=F64)
    assert meta_loss(net, episode.support, episode.query, lr=lr).isnan().all()


# ------------------------------------------------------------------------------------ options of the family


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("kind", ["number", "tensor", "per tensor", "meta-sgd", "lslr", "per step and parameter"])
def test_learning_rates(kind: str, every: int | None) -> None:
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    params = dict(net.named_parameters())

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, dtype=F64) * 0.2).requires_grad_()

    lr: Any = {
        "number": 0.1,
        "tensor": draw(1),
        "per tensor": {name: draw() for name in params},
        "meta-sgd": {name: draw(*p.shape) for name, p in params.items()},
        "lslr": {name: draw(3) for name in params},
        "per step and parameter": {name: draw(3, *p.shape) for name, p in params.items()},
    }[kind]
    per_step = kind in ("lslr", "per step and parameter")

    def rate(name: str, step: int) -> Any:
        found = lr[name] if isinstance(lr, dict) else lr
        return found[step] if per_step else found

    losses = check(net, episode, 3, lr, rate, checkpoint_every=every)
    if isinstance(lr, dict):
        in_order = meta_loss(net, episode.support, episode.query, steps=3, lr=nn.ParameterList(lr.values()))
        assert_same_bits("losses by a list of rates", in_order, losses)


def test_rates_of_a_step_or_a_parameter() -> None:
    """A bias of as many elements as there are steps: its rate is read as those of the other parameters are."""
    episode, net = regression(2, 4, 4, 2, 1), mlp(2, 3, 1)
    step_rates = {name: torch.rand(3, dtype=F64) / 5 for name, _ in net.named_parameters()}
    check(net, episode, 3, step_rates, lambda name, step: step_rates[name][step])
    parameter_rates = {name: torch.rand_like(p) / 5 for name, p in net.named_parameters()}
    check(net, episode, 3, parameter_rates, lambda name, _: parameter_rates[name])
    mixed: dict[str, Any] = {**parameter_rates, "0.bias": 0.1, "2.bias": step_rates["2.bias"]}
    check(net, episode, 3, mixed, lambda name, step: mixed[name][step] if name == "2.bias" else mixed[name])
    with pytest.raises(ValueError, match=r"lr\['0.bias'\] of shape \[3\] may mean one a parameter or one a step"):
        meta_loss(net, episode.support, episode.query, steps=3, lr={**mixed, "0.bias": step_rates["0.bias"]})


@pytest.mark.parametrize("every", [None, 2])
def test_anil(every: int | None) -> None:
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    names = ["2.weight", "2.bias"]
    check(net, episode, 3, parameters="2.*", names=names, checkpoint_every=every)
    check(net, episode, 3, parameters=names, names=names, checkpoint_every=every)
    assert list(adapt(net, *episode.support, parameters="2.*").parameters) == names


def test_derivative_order_annealing() -> None:
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    check(net, episode, 3, first_order=[True, False, True])


@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
def test_clipping(clip_norm: float) -> None:
    check(mlp(2, 5, 1), regression(3, 4, 4, 2, 1), 3, clip_norm=clip_norm)


@pytest.mark.parametrize("every", [None, 2])
def test_multi_step_loss(every: int | None) -> None:
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    weights = multi_step_weights(3, 1, 4)
    losses = check(net, episode, 3, step_weights=weights.tolist(), checkpoint_every=every)
    learned = weights.double().requires_grad_()
    got = meta_loss(net, episode.support, episode.query, steps=3, lr=0.1, step_weights=learned, checkpoint_every=every)
    assert_close("losses", got, losses, 1e-14)
    (gradient,) = torch.autograd.grad(got.sum(), learned)
    for step in range(3):
        after = meta_loss(net, episode.support, episode.query, steps=step + 1, lr=0.1)
        assert_close("gradient of a weight", gradient[step], after.sum(), 1e-13)
    last = meta_loss(net, episode.support, episode.query, steps=3, lr=0.1, step_weights=[0, 0, 1])
    assert_same_bits("last step alone", last, after)


def test_annealed_weights() -> None:
    assert multi_step_weights(1, 0, 10).tolist() == [1]
    assert_close("first epoch", multi_step_weights(4, 0, 10), torch.full((4,), 0.25), 1e-6)
    assert_close("later", multi_step_weights(4, 5, 10), torch.tensor([0.125, 0.125, 0.125, 0.625]), 1e-6)
    assert_close("in the end", multi_step_weights(4, 99, 10), torch.tensor([0.0075] * 3 + [1 - 0.0225]), 1e-6)


def test_reptile() -> None:
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        adapted = adapt(net, *episode.support, steps=3, lr=0.1)
    reptile_step(net, adapted, 0.5)
    for name, p in net.named_parameters():
        assert_close(name, p, before[name] + 0.5 * (adapted.parameters[name].mean(0) - before[name]), 1e-14)
    with pytest.raises(
        ValueError, match=r"model must be the one that was adapted: it has no 0.weight of shape \[5, 2\]"
    ):
        reptile_step(mlp(2, 6, 1), adapted, 0.5)


def test_reptile_equals_a_hand_written_loop() -> None:
    """Adapts only the head, with Meta-SGD's rates."""
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    lr = {"2.weight": torch.rand(1, 5, dtype=F64) / 5, "2.bias": torch.rand(1, dtype=F64) / 5}
    names = list(lr)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    ends = []
    for x, y in zip(*episode.support, strict=True):
        params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        for _ in range(3):
            grads = torch.autograd.grad(evaluate(net, params, (x, y), F.mse_loss), [params[name] for name in names])
            for name, g in zip(names, grads, strict=True):
                params[name] = (params[name] - lr[name] * g).detach().requires_grad_()
        ends.append(params)
    with torch.no_grad():
        reptile_step(net, adapt(net, *episode.support, steps=3, lr=lr, parameters="2.*"), 0.25)
    for name, p in net.named_parameters():
        mean = torch.stack([end[name] for end in ends]).mean(0)
        assert_close(name, p, before[name] + 0.25 * (mean - before[name]), 1e-13)
        assert (name in names) is bool((p != before[name]).any())


@pytest.mark.parametrize(("every", "vectorize"), [(None, True), (2, True), (2, False)])
@pytest.mark.parametrize("kind", ["meta-sgd", "lslr", "one rate"])
@pytest.mark.parametrize("order", ["first", "second", "annealed"])
@pytest.mark.parametrize("names", [["2.weight", "2.bias"], None], ids=["anil", "all"])
def test_the_options_of_the_family_work_together(
    names: list[str] | None, order: str, kind: str, every: int | None, vectorize: bool
) -> None:
    """MAML++'s multi-step loss with clipping, each order of derivatives, ANIL or not, and rates that are learned."""
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    params = {name: p for name, p in net.named_parameters() if names is None or name in names}
    torch.manual_seed(1)
    shapes = {"meta-sgd": {n: tuple(p.shape) for n, p in params.items()}, "lslr": dict.fromkeys(params, (3,))}
    lr: Any = torch.tensor(0.1, dtype=F64, requires_grad=True)
    if kind in shapes:
        lr = {name: (torch.rand(shape, dtype=F64) / 5).requires_grad_() for name, shape in shapes[kind].items()}

    def rate(name: str, step: int) -> Tensor:
        if kind == "one rate":
            return lr
        return lr[name][step] if kind == "lslr" else lr[name]

    options: dict[str, Any] = {"parameters": "2.*"} if names else {}
    options["first_order"] = {"first": True, "second": False, "annealed": [True, True, False]}[order]
    losses = check(
        net,
        episode,
        3,
        lr,
        rate,
        names=names,
        clip_norm=0.5,
        step_weights=[0.2, 0.3, 0.5],
        checkpoint_every=every,
        vectorize=vectorize,
        **options,
    )
    plain = meta_loss(net, episode.support, episode.query, steps=3, lr=lr, **options)
    assert (losses != plain).all()  # the multi-step loss and the clipping have their part


def test_orders_of_derivatives_differ() -> None:
    """First order, annealed and second order agree in the losses and not in the meta-gradients."""
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    gradients = []
    for order in (True, [True, False], False):
        losses = meta_loss(net, episode.support, episode.query, steps=2, lr=0.1, first_order=order)
        assert_close("losses", losses, hand_written(net, episode, 2, lambda *_: 0.1), 1e-13)
        gradients.append(torch.autograd.grad(losses.sum(), net[0].weight)[0])
    assert (gradients[0] != gradients[1]).all()
    assert (gradients[1] != gradients[2]).all()


def test_meta_gradients_of_the_data() -> None:
    episode, net = regression(2, 4, 4, 2, 1), mlp(2, 5, 1)
    episode.support[0].requires_grad_()
    gradients = []
    for every in (None, 1):
        losses = meta_loss(net, episode.support, episode.query, steps=2, lr=0.1, checkpoint_every=every)
        gradients.append(torch.autograd.grad(losses.sum(), episode.support[0])[0])
    expected = torch.autograd.grad(hand_written(net, episode, 2, lambda *_: 0.1).sum(), episode.support[0])[0]
    for gradient in gradients:
        assert_close("gradient of support_x", gradient, expected, 1e-12)


# ------------------------------------------------------------------------------------ ragged


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss(), F.cross_entropy])
def test_sets_of_different_sizes(loss: Any, every: int | None) -> None:
    episode, net = regression(3, 5, 4, 2, 3), mlp(2, 5, 3)
    masks = (torch.arange(5) < torch.tensor([[5], [1], [3]]), torch.arange(4) >= torch.tensor([[0], [1], [3]]))
    sets = []
    for (x, y), mask in zip((episode.support, episode.query), masks, strict=True):
        y = y.argmax(-1) if loss is F.cross_entropy else y
        x[~mask] = float("nan")  # padding may hold anything
        y[~mask] = -100
        sets.append((x, y))
    options = {"steps": 2, "lr": 0.1, "loss": loss, "support_mask": masks[0], "query_mask": masks[1]}
    losses = meta_loss(net, *sets, **options, checkpoint_every=every)
    expected = hand_written(net, Episode(*sets), 2, lambda *_: 0.1, loss=loss, masks=masks)
    assert_same(losses, expected, list(net.parameters()))


# ------------------------------------------------------------------------------------ training


def test_training_on_sinusoids() -> None:
    """MAML, 5-shot, Finn et al. 2017, section 5.1, shortened: the loss falls, along the path of the loop by hand."""
    net, twin = (mlp(1, 40, 40, 1, activation=nn.ReLU, seed=1) for _ in range(2))
    optimizer, twin_optimizer = (torch.optim.Adam(n.parameters(), 5e-3) for n in (net, twin))
    generator = torch.Generator().manual_seed(0)
    held_out = sinusoids(100, 5, generator, F64)
    before = meta_loss(net, held_out.support, held_out.query, lr=0.01).mean()
    for iteration in range(200):
        episode = sinusoids(16, 5, generator, F64)
        optimizer.zero_grad()
        meta_loss(net, episode.support, episode.query, lr=0.01).mean().backward()
        optimizer.step()
        if iteration < 3:
            twin_optimizer.zero_grad()
            hand_written(twin, episode, 1, lambda *_: 0.01).mean().backward()
            twin_optimizer.step()
            for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
                assert_close(f"{name} after {iteration + 1} meta-iterations", p, q, 1e-10)
    after = meta_loss(net, held_out.support, held_out.query, lr=0.01).mean()
    assert after < 0.75 * before
