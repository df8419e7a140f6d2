"""Inner steps by rules, as users ask for them; values and gradients are those of tests/conformance/engines."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_backward, meta_loss
from metakern.inner_loop.loop import InnerLoop, Problem
from metakern.inner_loop.updates import RuleUpdate
from metakern.learners import MAMLLearner, RuleLearner
from metakern.rules import Adam, CoordinatewiseLSTM, GradientDescent, Momentum, Rule
from metakern.tasks import Mixture, Quadratics, Sinusoid
from tests.conformance.engines.test_engines import Inertia
from tests.conftest import assert_close
from tests.inner_loops import mlp, regression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:plain PyTorch serves this small MLP"),
]

RULES = {
    "LSTM": lambda model: CoordinatewiseLSTM(hidden_size=4).double(),
    "momentum": lambda model: Momentum(0.1),
    "Adam": lambda model: Adam(nn.Parameter(torch.tensor(0.1, dtype=torch.float64))),
    "descent": lambda model: GradientDescent(0.1, clip_norm=0.5),
    "LSLR": lambda model: GradientDescent.lslr(model.named_parameters(), 3, 0.1),
    "with a start": lambda model: Inertia(start=model),
}
every_rule = pytest.mark.parametrize("name", RULES)


def problem(name: str) -> tuple[nn.Module, Any, Any]:
    model = mlp(2, 4, 1, activation=nn.Softplus)
    return model, regression(3, 4, 5, 2, 1), RULES[name](model)


def grads(*modules: nn.Module) -> list[Tensor | None]:
    return [p.grad for module in modules for p in module.parameters()]


@every_rule
def test_meta_backward_fills_the_weights_of_the_rule(name: str) -> None:
    model, episode, rule = problem(name)
    losses = meta_loss(model, episode.support, episode.query, steps=3, rule=rule)
    losses.mean().backward()
    expected = grads(model, rule)
    for p in (*model.parameters(), *rule.parameters()):
        p.grad = None
    assert torch.equal(meta_backward(model, episode.support, episode.query, steps=3, rule=rule), losses.detach())
    assert any(g is not None and bool(g.any()) for g in expected)
    for got, want in zip(grads(model, rule), expected, strict=True):
        assert (got is None) == (want is None)
        assert want is None or torch.equal(got, want)  # type: ignore[arg-type]


@every_rule
def test_adapted_models_predict(name: str) -> None:
    model, episode, rule = problem(name)
    adapted = adapt(model, *episode.support, steps=3, rule=rule)
    losses = F.mse_loss(adapted(episode.query[0]), episode.query[1], reduction="none").mean((1, 2))
    assert_close("losses", losses, meta_loss(model, episode.support, episode.query, steps=3, rule=rule), 1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {}), ("Adam", {"first_order": True}), ("LSLR", {"clip_norm": 0.1}), ("with a start", {})],
    ids=str,
)
def test_torch_compile_and_torch_func(name: str, options: dict[str, Any]) -> None:
    model, episode, rule = problem(name)
    leaves = [*model.parameters(), *rule.parameters()]

    def losses(lr: Tensor) -> Tensor:
        scaled = [(x * lr, y) for x, y in (episode.support, episode.query)]
        return meta_loss(model, *scaled, steps=3, rule=rule, **options)

    def gradients(x: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(x.sum(), leaves, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)]

    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    expected = losses(one)
    of_one = torch.autograd.grad(expected.sum(), one, retain_graph=True)[0]
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")(one)
    assert_close("compiled losses", compiled, expected, 1e-12)
    for a, b in zip(gradients(compiled), gradients(expected), strict=True):
        assert_close("gradient", a, b, 1e-10)
    assert_close("torch.func", torch.func.grad(lambda x: losses(x).sum())(one.detach()), of_one, 1e-10)


def test_lr_belongs_to_gradient_descent() -> None:
    model, episode, rule = problem("momentum")
    for call in (adapt, meta_loss, meta_backward):
        sets = episode.support if call is adapt else (episode.support, episode.query)
        with pytest.raises(ValueError, match=r"lr and rule exclude each other: lr=0\.1"):
            call(model, *sets, lr=0.1, rule=rule)


@pytest.mark.parametrize(("name", "rule"), [("sgd", GradientDescent()), ("Momentum", Momentum()), ("adam", Adam())])
def test_rules_without_weights_may_be_named(name: str, rule: Rule) -> None:
    model, episode, _ = problem("momentum")
    named, expected = (meta_loss(model, episode.support, episode.query, steps=2, rule=each) for each in (name, rule))
    assert torch.equal(named, expected)
    for other, message in (("lion", "rule must be one of adam, .*, got 'lion'"), ("lslr", "rule must be trained or a")):
        with pytest.raises(ValueError, match=message):
            adapt(model, *episode.support, rule=other)


@pytest.mark.parametrize("rule", [0.1, torch.optim.SGD, nn.Linear(1, 1)], ids=["number", "class", "layer"])
def test_what_is_no_rule_is_refused_by_name(rule: Any) -> None:
    model, episode, _ = problem("momentum")
    with pytest.raises(TypeError, match="rule must be a module with init_state"):
        adapt(model, *episode.support, rule=rule)


def test_a_start_must_fit_the_model() -> None:
    model, episode, rule = problem("with a start")
    with pytest.raises(ValueError, match="rule must learn initial values for the adapted parameters"):
        adapt(model, *episode.support, rule=rule, parameters="0.*")
    with pytest.raises(ValueError, match=r"initialisation\(\) has"):
        adapt(mlp(2, 5, 1), *episode.support, rule=rule)


def test_rates_by_step_must_last() -> None:
    model, episode, rule = problem("LSLR")
    with pytest.raises(ValueError, match="rule must have rates for all 4 steps, got rates for 3"):
        adapt(model, *episode.support, rule=rule, steps=4)


class Captured(Rule):
    """Computes with a tensor that is no parameter of its own."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = [hidden]

    def init_state(self, params: Any, *, tasks: bool = False) -> Any:
        return {}

    def forward(self, params: Any, grads: Any, state: Any, *, loss: Any = None) -> Any:
        return {name: p - self.hidden[0] * grads[name] for name, p in params.items()}, state


def test_checkpoints_need_all_that_a_rule_computes_with() -> None:
    model, episode, _ = problem("momentum")
    rule = Captured(torch.tensor(0.1, dtype=torch.float64, requires_grad=True))
    meta_loss(model, episode.support, episode.query, steps=2, rule=rule).sum().backward()
    assert rule.hidden[0].grad is not None
    with pytest.raises(RuntimeError, match="the rule holds another tensor that requires a gradient"):
        meta_loss(model, episode.support, episode.query, steps=2, rule=rule, checkpoint_every=1)
    rule.hidden[0].requires_grad_(False)
    meta_loss(model, episode.support, episode.query, steps=2, rule=rule, checkpoint_every=1).sum().backward()


def test_a_rule_with_hooks_takes_its_steps_by_itself() -> None:
    model, episode, calls = mlp(2, 4, 1), regression(3, 4, 5, 2, 1), []
    rule = GradientDescent(0.1)
    rule.register_forward_hook(lambda *_: calls.append(1))
    losses = meta_loss(model, episode.support, episode.query, steps=3, rule=rule)
    assert len(calls) == 3
    assert_close("losses", losses, meta_loss(model, episode.support, episode.query, steps=3, lr=0.1), 1e-12)


def test_threads_may_recompute_with_one_rule() -> None:
    """The backward puts other tensors in the places of the rule's weights for a moment."""
    model, episode, rule = problem("LSTM")
    weights = list(rule.parameters())
    losses = meta_loss(model, episode.support, episode.query, steps=3, rule=rule, checkpoint_every=1)
    expected = torch.autograd.grad(losses.sum(), weights)
    found: list[Any] = []

    def run() -> None:
        for _ in range(5):
            each = meta_loss(model, episode.support, episode.query, steps=3, rule=rule, checkpoint_every=1)
            found.append(torch.autograd.grad(each.sum(), weights))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for each in found:
        for a, b in zip(each, expected, strict=True):
            assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------- learners


@pytest.mark.parametrize("start", [False, True])
def test_a_learner_trains_a_rule(start: bool) -> None:
    """Its weights, where they start among them, are meta-parameters, and the loss falls."""
    model = mlp(1, 8, 1).float()
    rule = Inertia(start=model if start else None).float()
    learner = MAMLLearner(model, steps=2, rule=rule)
    assert {id(p) for p in learner.parameters()} == {id(p) for m in (model, rule) for p in m.parameters()}
    optimizer, seen = torch.optim.Adam(learner.parameters(), 0.01), []
    before = [p.detach().clone() for p in rule.parameters()]
    for seed in range(60):
        batch = Mixture([Sinusoid()]).sample(8, torch.Generator().manual_seed(seed % 4))
        for losses in learner.meta_losses(batch):
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            seen.append(float(losses.detach().mean()))
    assert sum(seen[-4:]) < 0.9 * sum(seen[:4])
    assert all(not torch.equal(a, b) for a, b in zip(rule.parameters(), before, strict=True))
    assert set(learner.evaluate(batch)) == {"loss"}
    with pytest.raises(ValueError, match="rates and rule exclude each other"):
        MAMLLearner(model, rule=rule, rates="meta_sgd")


@pytest.mark.parametrize("second_order", [False, True])
def test_rule_learner_and_meta_loss_take_the_same_steps(second_order: bool) -> None:
    """The last value of a problem after an unroll is what the loop leads to, whoever runs it."""

    class Losses(Problem):
        def __init__(self, batch: Any) -> None:
            self.batch = batch

        def gradients(self, params: Any, step: int, first_order: bool) -> Any:
            with torch.enable_grad():
                x = params["x"].detach().requires_grad_()
                losses = self.batch.loss({"x": x})
                return losses.detach(), {"x": torch.autograd.grad(losses.sum(), x)[0]}

    batch = Quadratics(3).sample(4, torch.Generator().manual_seed(0))
    params, rule = batch.init_params(), CoordinatewiseLSTM(hidden_size=4)
    batch.init_params = lambda: params
    update = RuleUpdate(rule)
    with torch.no_grad():
        last, _, _ = InnerLoop(update, [True] * 5).run(Losses(batch), params, update.init_state(params))
    learner = RuleLearner(rule, steps=5, unroll=5, second_order=second_order)
    assert torch.equal(learner.evaluate(batch)["loss"], batch.full_loss(last))
