"""Problems for learned optimizers: shapes, draws, splits, and that each is the problem it says it is."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from metakern.tasks import DigitsMLP, Quadratics
from metakern.tasks.optimizees import DIGITS_SPLITS, load_digits


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "problems", [Quadratics(3), DigitsMLP(hidden_size=5, batch_size=7)], ids=["quadratic", "digits"]
)
@pytest.mark.parametrize("num_tasks", [1, 4])
def test_a_batch_gives_a_loss_for_every_problem(problems, num_tasks):
    batch = problems.sample(num_tasks, generator())
    params = batch.init_params()
    assert params.shape[0] == num_tasks == batch.num_tasks
    assert batch.loss(params).shape == batch.full_loss(params).shape == (num_tasks,)


@pytest.mark.parametrize("problems", [Quadratics(3), DigitsMLP(batch_size=7)], ids=["quadratic", "digits"])
def test_the_generator_decides_everything(problems):
    def draws(seed):
        batch = problems.sample(2, generator(seed))
        params = batch.init_params()
        return torch.stack([batch.loss(params), batch.loss(params)])

    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))


def test_problems_of_a_batch_do_not_touch_each_other():
    batch = DigitsMLP().sample(3, generator())
    params = batch.init_params().requires_grad_()
    (grads,) = torch.autograd.grad(batch.loss(params)[1], params)
    assert grads[1].abs().max() > 0
    assert grads[[0, 2]].abs().max() == 0


def test_quadratics_are_the_squared_distance():
    batch = Quadratics(4).sample(2, generator())
    params = batch.init_params()
    expected = [(w @ p - y).square().sum() for w, p, y in zip(batch.weight, params, batch.target, strict=True)]
    torch.testing.assert_close(batch.loss(params), torch.stack(expected))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_digit_classifiers_are_those_of_torch(activation):
    problems = DigitsMLP(hidden_size=6, activation=activation)
    batch = problems.sample(2, generator())
    params = batch.init_params()
    layer = {"sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[activation]
    network = torch.nn.Sequential(torch.nn.Linear(64, 6), layer(), torch.nn.Linear(6, 10))
    names = [name for name, _ in network.named_parameters()]
    for flat, loss in zip(params, batch.full_loss(params), strict=True):
        pieces = flat.split([p.numel() for p in network.parameters()])
        weights = {n: x.view(p.shape) for n, x, p in zip(names, pieces, network.parameters(), strict=True)}
        logits = functional_call(network, weights, (problems.images,))
        torch.testing.assert_close(loss, F.cross_entropy(logits, problems.labels))


def test_fresh_networks_start_within_the_bounds_of_nn_linear():
    params = DigitsMLP(hidden_size=20).sample(50, generator()).init_params()
    first, second = params[:, : 65 * 20], params[:, 65 * 20 :]
    assert 0.98 / 8 < first.abs().max() <= 1 / 8
    assert 0.98 / 20**0.5 < second.abs().max() <= 1 / 20**0.5


def test_splits_share_no_image_and_hold_all():
    images = {name: load_digits(name)[0] for name in DIGITS_SPLITS}
    assert {name: len(x) for name, x in images.items()} == {"train": 1000, "valid": 397, "test": 400}
    rows = torch.cat(list(images.values()))
    assert len(rows) == 1797
    assert len(torch.unique(rows, dim=0)) == 1797
    assert rows.min() == 0
    assert rows.max() == 1


def test_a_split_keeps_the_network():
    problems = DigitsMLP(hidden_size=7, activation="tanh", batch_size=9).split("test")
    assert (problems.hidden_size, problems.activation, problems.batch_size) == (7, "tanh", 9)
    assert len(problems.images) == 400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quadratics(0), "dim must be at least 1, got 0"),
        (lambda: DigitsMLP(hidden_size=0), "hidden_size and batch_size must be at least 1, got 0"),
        (lambda: DigitsMLP(activation="gelu"), "activation must be sigmoid, tanh or relu, got 'gelu'"),
        (lambda: DigitsMLP(split="all"), "split must be one of train, valid, test, got 'all'"),
        (lambda: Quadratics().split("all"), "split must be one of train, valid, test, got 'all'"),
        (lambda: Quadratics().sample(0, generator()), "num_tasks must be at least 1, got 0"),
        (lambda: DigitsMLP().sample(-1, generator()), "num_tasks must be at least 1, got -1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
