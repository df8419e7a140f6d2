"""Episodes, reprs, and that a meta-learner learns from episodes of every kind."""

import pytest
import torch
from torch import nn

from metakern.learners import MAMLLearner
from metakern.tasks import (
    SPLITS,
    ClassicFunction,
    Digits,
    DigitsMLP,
    Episodes,
    GradientNoise,
    MixedOptimizees,
    Quadratics,
    Sinusoid,
    mixture,
)
from metakern.tasks.distribution import check_num_tasks, check_split
from tests.conformance.tasks.rows import Decays
from tests.tasks.draws import generator


def batch(modes=True):
    x = torch.arange(24.0).view(4, 3, 2)
    y = torch.arange(12).view(4, 3)
    return Episodes(x, y, x + 100, y + 100, torch.arange(4) % 2 if modes else None)


def test_support_and_query_are_pairs():
    episodes = batch()
    assert episodes.num_tasks == 4
    assert episodes.support == (episodes.support_x, episodes.support_y)
    assert episodes.query == (episodes.query_x, episodes.query_y)


@pytest.mark.parametrize("tasks", [slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])])
def test_tasks_are_selected_by_slice_indices_or_mask(tasks):
    part = batch().select(tasks)
    assert part.num_tasks == 2
    for name in ("support_x", "support_y", "query_x", "query_y", "modes"):
        assert torch.equal(getattr(part, name), getattr(batch(), name)[1:3])
    assert batch(modes=False).select(tasks).modes is None


def test_integers_keep_their_type_where_numbers_are_converted():
    converted = batch().to(torch.float64)
    assert converted.support_x.dtype == converted.query_x.dtype == torch.float64
    assert converted.support_y.dtype == converted.modes.dtype == torch.int64
    assert batch().to("meta").query_y.device.type == "meta"


@pytest.mark.parametrize("name", ["support_y", "query_x", "query_y", "modes"])
def test_every_tensor_has_the_task_axis_first(name):
    tensors = {"support_x": torch.zeros(4, 3), "support_y": torch.zeros(4, 3), "query_x": torch.zeros(4, 1)}
    tensors |= {"query_y": torch.zeros(4, 1), "modes": torch.zeros(4)}
    message = rf"{name} must have the task axis of support_x, \[4, 3\], first, got \[5\]"
    with pytest.raises(ValueError, match=message):
        Episodes(**tensors | {name: torch.zeros(5)})


def test_numbers_of_tasks_and_names_of_splits_are_checked():
    check_num_tasks(1)
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        check_num_tasks(0)
    for name in SPLITS:
        check_split(name)
    with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'val'"):
        check_split("val")


@pytest.mark.parametrize(
    ("tasks", "inputs", "outputs", "loss", "lr"),
    [
        (Decays(), 1, 1, nn.functional.mse_loss, 0.1),
        (Sinusoid(noise=0), 1, 1, nn.functional.mse_loss, 0.01),
        (mixture(3), 1, 1, nn.functional.mse_loss, 0.01),
        (Digits(ways=3, query=5, domains=["identity", "blurred"]), 64, 3, nn.functional.cross_entropy, 0.5),
    ],
    ids=["own", "sinusoid", "mixture", "digits"],
)
def test_a_meta_learner_learns_from_every_distribution(tasks, inputs, outputs, loss, lr):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))
    learner = MAMLLearner(model, loss=loss, steps=3, inner_lr=lr)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    held_out = tasks.split("valid").sample(100, generator())
    before = learner.evaluate(held_out)["loss"].mean()
    draws = generator(1)
    for _ in range(40):
        for losses in learner.meta_losses(tasks.sample(16, draws)):
            assert losses.shape == (16,)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    after = learner.evaluate(held_out)["loss"].mean()
    assert after < 0.95 * before, (before, after)


def test_inputs_of_several_tensors_and_no_targets():
    x = torch.arange(24.0).view(4, 3, 2)
    episodes = Episodes((x, x[..., 0]), {"a": x, "b": x[:, :, :1]}, {"ids": x.long(), "mask": x > 3}, None)
    assert episodes.num_tasks == 4
    part = episodes.select(torch.tensor([2, 0])).to(torch.float64)
    assert [tensor.dtype for tensor in part.support_x] == [torch.float64] * 2
    assert torch.equal(part.support_x[1], x[[2, 0], :, 0].double())
    assert torch.equal(part.support_y["b"], x[[2, 0], :, :1].double())
    assert part.query_x["ids"].dtype == torch.int64
    assert part.query_x["mask"].dtype == torch.bool
    assert part.query_y is None
    with pytest.raises(ValueError, match=r"support_x\[1\] must have the task axis of support_x, \[4, 3, 2\], first"):
        Episodes((x, x[:2]), None, x, None)
    with pytest.raises(TypeError, match=r"query_x\['ids'\] must be a tensor, got NoneType"):
        Episodes(x, None, {"ids": None}, None)
    with pytest.raises(TypeError, match=r"support_x must be a tensor, or a tuple or a dict of tensors, got list"):
        Episodes([x], None, x, None)


def test_reprs_are_short():
    assert repr(batch(modes=False)) == (
        "Episodes(support_x=[4, 3, 2], support_y=[4, 3], query_x=[4, 3, 2], query_y=[4, 3])"
    )
    x = torch.zeros(2, 3, 1)
    several = Episodes((x, x), None, {"a": x}, None)
    assert repr(several) == "Episodes(support_x={'[0]': [2, 3, 1], '[1]': [2, 3, 1]}, query_x={\"['a']\": [2, 3, 1]})"
    expected = {
        "Sinusoid(support=5, query=5, noise=0.3)": Sinusoid(),
        "Mixture(components=(Sinusoid(support=5, query=5, noise=0), Linear(support=5, query=5, noise=0)))": mixture(
            2, noise=0
        ),
        "Digits(ways=5, support=1, query=15, flat=True)": Digits(),
        "GradientNoise(problems=Quadratics(dim=3), std=0.1)": GradientNoise(Quadratics(3), 0.1),
        "DigitsMLP(hidden_size=20, activation='sigmoid', batch_size=128)": DigitsMLP(),
    }
    for text, tasks in expected.items():
        assert repr(tasks) == text
    problems = MixedOptimizees([ClassicFunction("booth"), Quadratics(2)])
    assert repr(problems) == (
        "MixedOptimizees(distributions=(ClassicFunction(name='booth', dim=2), Quadratics(dim=2)))"
    )
    assert len(repr(problems.sample(8, generator(0)))) < 120
    assert repr(Digits().classes["test"]).startswith("ImageClasses(classes=8, images=[")
