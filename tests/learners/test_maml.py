"""MAMLLearner, also clustered: evaluation changes no buffer; inputs and outputs of any structure; learned rates."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import meta_loss
from metakern.evaluation.adaptation import measure_adaptation
from metakern.learners import ClusteredLearner, MAMLLearner
from metakern.maml import PerStepBatchNorm
from metakern.tasks import Episodes, Sinusoid
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loop.test_data import Frozen, Model, ModelOutput, logits_of, loss_of
from tests.inner_loops import hand_written, mlp, regression

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


def episodes(tasks: int = 4, seed: int = 0, modes: bool = True) -> Episodes:
    made = regression(tasks, 6, 5, 2, 1, seed)
    return Episodes(*made.support, *made.query, torch.arange(tasks) % 2 if modes else None)


# ------------------------------------------------------------------------------------ what looks does not move


class Writing(nn.Module):
    """Writes into buffers, one in place and one by assignment, in train() and eval()."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        return x


NORMS = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "per step": lambda: PerStepBatchNorm(4, steps=3),
    "own": lambda: Writing(4),
}


def network(norm: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), NORMS[norm](), nn.ReLU(), nn.Linear(4, 1)).double()


def clusters(learner: MAMLLearner, **options: Any) -> ClusteredLearner:
    made = ClusteredLearner(learner, 2, begin=1, refresh=50, pool=16, **options).train(learner.training)

    class Pool:
        def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
            return episodes(num_tasks)

    before = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
    made.on_iteration(0, Pool(), torch.Generator())
    made.iteration.fill_(10)  # by losses, not by embeddings
    for index, each in enumerate(made.learners):
        with torch.no_grad():
            each.model[0].bias.add_(index)  # learners that differ
        for name, buffer in each.model.named_buffers():
            assert_same_bits(name, buffer, before[name])
    return made


LOOKS = {
    "evaluate": lambda learner, batch: learner.evaluate(batch),
    "predict": lambda learner, batch: learner.predict(batch),
    "predict 0": lambda learner, batch: learner.predict(batch, 0),
    "predict 1": lambda learner, batch: learner.predict(batch, 1),
    "support losses": lambda learner, batch: learner.support_losses(batch),
    "measure": lambda learner, batch: learner.measure(learner.predict(batch, 2), batch.query_y),
}
OF_MAML = {
    "adapt_to": lambda learner, batch: learner.adapt_to(batch)(batch.query_x),
    "displacements": lambda learner, batch: learner.displacements(batch),
    "gradients": lambda learner, batch: learner.support_gradients(batch),
    "approach": lambda learner, batch: learner.approach(batch),
}
OF_CLUSTERS = {
    "assign": lambda learner, batch: learner.assign(batch),
    "responsibilities": lambda learner, batch: learner.responsibilities(batch, 0.5),
}


def buffers_of(learner: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in learner.named_buffers()}


def assert_unmoved(learner: nn.Module, before: dict[str, Tensor]) -> None:
    for name, buffer in learner.named_buffers():
        assert_same_bits(name, buffer, before[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_looking_leaves_every_buffer(norm: str, vectorize: bool, training: bool) -> None:
    learner = MAMLLearner(network(norm), steps=3, vectorize=vectorize).train(training)
    batch = episodes()
    before = buffers_of(learner)
    for look in (LOOKS | OF_MAML).values():
        look(learner, batch)
        assert_unmoved(learner, before)
    for options in ({}, {"eval_temperature": 0.5}, {"assign": "modes"}, {"assign": "embedding"}):
        many = clusters(learner, **options)
        before = buffers_of(many)
        for name, look in (LOOKS | OF_CLUSTERS).items():
            if name != "responsibilities" or options.get("assign") is None:
                look(many, batch)
                assert_unmoved(many, before)


@pytest.mark.parametrize("training", [True, False])
def test_training_moves_the_statistics_of_every_step(training: bool) -> None:
    learner = MAMLLearner(network("per step"), steps=3).train(training)
    before = buffers_of(learner)
    next(learner.meta_losses(episodes())).mean().backward()
    moved = [bool((buffer != before[name]).any()) for name, buffer in learner.named_buffers() if "running" in name]
    assert moved == [training, training]


def test_losses_on_the_support_sets_do_not_depend_on_who_looked_before() -> None:
    learner = MAMLLearner(network("per step"), steps=2)
    batch = episodes()
    expected = meta_loss(network("per step"), batch.support, batch.support, steps=2).detach()
    for _ in range(2):
        assert_close("losses", learner.support_losses(batch), expected, 1e-13)


# ------------------------------------------------------------------------------------ structures


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("kind", [Tensor, tuple, dict, OrderedDict, Frozen, ModelOutput])
def test_outputs_of_every_kind(kind: Any, vectorize: bool) -> None:
    """Also for two tasks, which could be confused with a tuple of two outputs."""
    batch = episodes(tasks=2)
    learner = MAMLLearner(Model(kind), loss=loss_of, steps=2, inner_lr=0.1, vectorize=vectorize)
    plain = MAMLLearner(Model(), steps=2, inner_lr=0.1, vectorize=vectorize)
    model = learner.model
    expected = hand_written(Unpacked(Model(kind)), regression(2, 6, 5, 2, 1), 2, lambda *_: 0.1)
    assert_close("evaluation", learner.evaluate(batch)["loss"], expected, 1e-12)
    assert_close("training", next(learner.meta_losses(batch)), expected, 1e-12)
    assert_close("support losses", learner.support_losses(batch), plain.support_losses(batch), 1e-12)
    prediction = learner.predict(batch, 0)
    assert type(prediction) is (kind if kind is not Tensor else Tensor)
    assert_close("no step", logits(prediction), Model()(batch.query_x), 1e-13)
    assert len(list(model.parameters())) == 6


class Unpacked(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model.second.requires_grad_(False)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.model(x))


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else logits_of(output)


class Classifier(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = mlp(2, 5, 3), kind

    def forward(self, x: Tensor) -> Any:
        scores = self.net(x)
        if self.kind == "tensor":
            return scores
        return {"logits": scores, "level": scores.sum(-1)} if self.kind == "dict" else (scores, scores.sum(-1))


def classes(output: Any, y: Tensor, ignore_index: int = -100) -> Tensor:
    scores = output["logits"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output
    return F.cross_entropy(scores, y, ignore_index=ignore_index)


def labelled(tasks: int = 4) -> Episodes:
    batch = episodes(tasks)
    y = [torch.randint(3, part.shape[:2], generator=torch.Generator().manual_seed(1)) for part in batch.support]
    return Episodes(batch.support_x, y[0], batch.query_x, y[0][:, :5], batch.modes)


def test_accuracy_is_of_scores_that_are_known() -> None:
    batch = labelled()
    plain = MAMLLearner(Classifier("tensor"), loss=classes, steps=1, inner_lr=0.1).evaluate(batch)
    by_hand = MAMLLearner(Classifier("tensor"), loss=F.cross_entropy, steps=1, inner_lr=0.1).predict(batch)
    expected = (by_hand.argmax(2) == batch.query_y).float().mean(1)
    assert_close("accuracy", plain["accuracy"], expected, 0)
    named = MAMLLearner(Classifier("dict"), loss=classes, steps=1, inner_lr=0.1).evaluate(batch)
    assert_close("accuracy", named["accuracy"], expected, 0)
    assert_close("loss", named["loss"], plain["loss"], 1e-12)
    unnamed = MAMLLearner(Classifier("tuple"), loss=classes, steps=1, inner_lr=0.1).evaluate(batch)
    assert list(unnamed) == ["loss"]
    assert_close("loss", unnamed["loss"], plain["loss"], 1e-12)


def test_labels_that_the_loss_ignores_do_not_count() -> None:
    learner = MAMLLearner(Classifier("tensor"), loss=nn.CrossEntropyLoss(ignore_index=7))
    prediction = torch.eye(3, dtype=F64)[torch.tensor([[0, 1, 2, 0]])]
    measures = learner.measure(prediction, torch.tensor([[0, 7, 1, 7]]))
    assert measures["accuracy"].tolist() == [0.5]
    dense = learner.measure(
        prediction.unsqueeze(-1).expand(1, 4, 3, 2), torch.tensor([[[0, 0], [7, 1], [1, 2], [7, 0]]])
    )
    assert_close("accuracy", dense["accuracy"], torch.tensor([5 / 6]), 1e-6)


@pytest.mark.parametrize("kind", ["tensor", "dict", "tuple"])
def test_clusters_choose_and_average_structures(kind: str) -> None:
    batch, loss = labelled(), classes
    chosen = MAMLLearner(Classifier(kind), loss=loss, steps=1, inner_lr=0.1)
    for temperature in (0.0, 0.5):
        many = ClusteredLearner(chosen, 2, begin=1, pool=16, eval_temperature=temperature)
        many.active.fill_(2)
        with torch.no_grad():
            many.learners[1].model.net[2].bias[0] += 2
        parts = [learner.predict(batch) for learner in many.learners]
        losses = many.support_losses(batch)
        if temperature and kind == "tuple":
            with pytest.raises(TypeError, match=r"averages of class predictions need .* logits, got a tuple"):
                many.predict(batch)
            continue
        got = many.predict(batch)
        assert type(got) is type(parts[0])
        leaves = [[part] if kind == "tensor" else list(part.values() if kind == "dict" else part) for part in parts]
        found = [got] if kind == "tensor" else list(got.values() if kind == "dict" else got)
        for index, tensor in enumerate(found):
            both = torch.stack([part[index] for part in leaves])
            if temperature:
                shares = (-losses / temperature).softmax(0).view(2, 4, *[1] * (both.dim() - 2))
                scores = both.softmax(3) if index == 0 else both
                expected = (scores * shares).sum(0)
                expected = expected.log() if index == 0 else expected
            else:
                expected = both[losses.argmin(0), torch.arange(4)]
            assert_close(f"part {index}", tensor, expected, 1e-12)
        assert many.evaluate(batch)["loss"].shape == (4,)


@pytest.mark.parametrize("by_name", [False, True])
def test_several_inputs_and_no_target(by_name: bool) -> None:
    batch = episodes()
    generator = torch.Generator().manual_seed(5)
    scales = [torch.randn(x.shape, generator=generator, dtype=F64) for x in (batch.support_x, batch.query_x)]
    x = [
        {"x": x, "scale": scale} if by_name else (x, scale)
        for x, scale in zip((batch.support_x, batch.query_x), scales, strict=True)
    ]
    sets = Episodes(x[0], batch.support_y, x[1], batch.query_y, batch.modes)
    learner = MAMLLearner(Model(), steps=2, inner_lr=0.1)
    assert_close("loss", learner.evaluate(sets)["loss"], next(learner.meta_losses(sets)), 1e-12)
    some = learner.evaluate(sets.select(torch.tensor([3, 1])).to(torch.float64))
    assert_close("selected", some["loss"], learner.evaluate(sets)["loss"][[3, 1]], 1e-12)

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    without = Episodes(x[0], None, x[1], None)
    learner = MAMLLearner(Model(), steps=2, inner_lr=0.1, loss=loss)
    assert_close("loss", learner.evaluate(without)["loss"], next(learner.meta_losses(without)), 1e-12)
    many = ClusteredLearner(learner, 2, begin=1, pool=16)
    many.active.fill_(2)
    assert_close("clusters", many.evaluate(without)["loss"], learner.evaluate(without)["loss"], 1e-12)


# ------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("rates", ["lslr", "meta_sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_learned_rates_are_of_their_parameters_kind(rates: str, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).to(dtype)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output - y).abs().square().mean()

    learner = MAMLLearner(net, loss=loss, steps=2, inner_lr=0.1, rates=rates)
    made = regression(3, 4, 4, 2, 1)
    batch = Episodes(*(t.to(dtype) for t in (*made.support, *made.query)))
    real = dtype.to_real() if dtype.is_complex else dtype
    assert {rate.dtype for rate in learner.rates.values()} == {real}
    fixed = MAMLLearner(net, loss=loss, steps=2, inner_lr=0.1)
    losses = next(learner.meta_losses(batch))
    assert_close("losses", losses, next(fixed.meta_losses(batch)), 1e-5 if real == torch.float32 else 1e-12)
    losses.mean().backward()
    assert all(rate.grad is not None and bool(rate.grad.isfinite().all()) for rate in learner.rates.values())
    assert {rate.device.type for rate in MAMLLearner(net.to("meta"), rates=rates).rates.values()} == {"meta"}


def test_rates_by_pattern_and_numbers_of_numpy() -> None:
    batch = episodes()
    for rates in ("fixed", "lslr", "meta_sgd"):
        lr = {"2.*": np.float32(0.5), "*": 0.125}
        learner = MAMLLearner(mlp(2, 5, 1), steps=np.int64(2), inner_lr=lr, rates=rates)
        names = {"0.weight": 0.125, "0.bias": 0.125, "2.weight": 0.5, "2.bias": 0.5}
        expected = meta_loss(mlp(2, 5, 1), batch.support, batch.query, steps=2, lr=names)
        assert_close("losses", next(learner.meta_losses(batch)), expected, 1e-12)


@pytest.mark.parametrize("rates", ["fixed", "lslr", "meta_sgd"])
def test_no_step(rates: str) -> None:
    batch = episodes()
    learner = MAMLLearner(mlp(2, 5, 1), steps=0, rates=rates)
    expected = (mlp(2, 5, 1)(batch.query_x) - batch.query_y).square().mean((1, 2))
    assert_close("losses", next(learner.meta_losses(batch)), expected, 1e-12)
    assert_close("evaluation", learner.evaluate(batch)["loss"], expected, 1e-12)
    assert learner.support_losses(batch).shape == (4,)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        MAMLLearner(mlp(2, 5, 1), steps=-1)


@pytest.mark.parametrize("targets", [torch.int64, torch.int32, torch.bool])
@pytest.mark.parametrize("loss", [F.mse_loss, nn.L1Loss(), partial(F.huber_loss, delta=2.0)])
def test_class_labels_need_a_loss(loss: Any, targets: torch.dtype) -> None:
    batch = labelled()
    batch = Episodes(batch.support_x, batch.support_y.to(targets), batch.query_x, batch.query_y.to(targets))
    learner = MAMLLearner(mlp(2, 5, 3), loss=loss)
    for look in (learner.evaluate, learner.support_losses, learner.predict, lambda b: next(learner.meta_losses(b))):
        with pytest.raises(TypeError, match=rf"loss= must be given for targets of {targets}, F.cross_entropy"):
            look(batch)


@pytest.mark.parametrize("loss", [F.mse_loss, nn.SmoothL1Loss(), nn.PoissonNLLLoss(), F.kl_div, F.soft_margin_loss])
def test_targets_that_would_be_broadcast(loss: Any) -> None:
    batch = episodes()
    flat = Episodes(batch.support_x, batch.support_y.squeeze(-1), batch.query_x, batch.query_y.squeeze(-1))
    message = r"targets must have the shape of the predictions of a task, \[6, 1\], for [a-z0-9_]+, got \[6\], which"
    for vectorize in (True, False):
        learner = MAMLLearner(mlp(2, 5, 1), loss=loss, vectorize=vectorize)
        with pytest.raises(ValueError, match=message):
            next(learner.meta_losses(flat))


def test_counts_are_no_class_labels() -> None:
    batch = episodes()
    counts = batch.support_y.abs().round().long()
    sets = (batch.support_x, counts), (batch.query_x, batch.query_y.abs().round().long())
    exact = [(x, y.double()) for x, y in sets]
    losses = [meta_loss(mlp(2, 5, 1), *each, loss=nn.PoissonNLLLoss(), lr=0.01) for each in (sets, exact)]
    assert_close("losses", losses[0], losses[1], 1e-13)


def test_reprs_are_short() -> None:
    learner = MAMLLearner(mlp(2, 5, 1), steps=3, rates="lslr")
    assert repr(learner) == "MAMLLearner(Sequential of 21 parameters, steps=3, eval_steps=3, rates='lslr')"
    many = ClusteredLearner(learner, 4)
    assert repr(many) == f"ClusteredLearner({learner!r}, 0 of 4 clusters in use, assign='losses')"
    adapted = learner.adapt_to(episodes())
    assert repr(adapted) == "Adapted(Sequential, tasks=4, steps=3, parameters=4)"


def test_measures_by_step() -> None:
    """The measure after no step is that of the model itself, and looking at all steps moves no statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    learner = MAMLLearner(net, steps=2)
    before = buffers_of(learner)
    measured = measure_adaptation(learner, Sinusoid(), num_tasks=4)
    assert measured.measures["loss"].shape == (3, 4)
    assert_unmoved(learner, before)


def test_old_names_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="lr is now inner_lr") as caught:
        learner = MAMLLearner(nn.Linear(3, 2), lr=0.5)
    assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(DeprecationWarning, match=r"MAMLLearner.lr is now inner_lr"):
        assert learner.lr == learner.inner_lr == 0.5
    with pytest.warns(DeprecationWarning, match=r"MAMLLearner.lr is now inner_lr"):
        learner.lr = 0.25
    assert learner.inner_lr == 0.25
    batch = Sinusoid(5, 5).sample(2, torch.Generator().manual_seed(0))
    learner = MAMLLearner(nn.Linear(1, 1), inner_lr=0.5)
    with pytest.warns(DeprecationWarning, match=r"MAMLLearner.adapt is now adapt_to") as caught:
        adapted = learner.adapt(batch)
    assert {warning.filename for warning in caught} == {__file__}
    assert_same_bits("weight", adapted.parameters["weight"], learner.adapt_to(batch).parameters["weight"])


@pytest.mark.filterwarnings("ignore:plain PyTorch serves this small MLP")
@pytest.mark.parametrize(
    ("rule", "learned"),
    [("sgd", ["rule.lr"]), ("adam", ["rule.lr"]), ("meta-sgd", ["rule.rates.2/weight", "rule.rates.2/bias"])],
)
def test_a_rule_given_by_name_learns_its_rates(rule: str, learned: list[str]) -> None:
    learner = MAMLLearner(mlp(2, 4, 1), steps=2, rule=rule, parameters="2.*")
    next(learner.meta_losses(episodes())).mean().backward()
    grads = {name: p.grad for name, p in learner.named_parameters() if name.startswith("rule.")}
    assert list(grads) == learned
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


def test_what_is_no_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of adam, .*, got 'lion'"):
        MAMLLearner(mlp(2, 4, 1), rule="lion")
    with pytest.raises(TypeError, match="rule must be a rule or its name, got float"):
        MAMLLearner(mlp(2, 4, 1), rule=0.1)
