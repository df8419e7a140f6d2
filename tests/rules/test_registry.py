"""Rules by name, and rules of a user's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.optim import LearnedOptimizer
from metakern.rules import Adam, CoordinatewiseLSTM, GradientDescent, Momentum, PretrainedRule, Rule, RuleState
from metakern.rules import registry as table
from tests.conformance.rules import added_rule, rows


@pytest.fixture(autouse=True)
def kept_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(table, "_rules", dict(table._rules))
    monkeypatch.setattr(table, "_variants", dict(table._variants))
    return


class LossScaled(PretrainedRule):
    """θ' = θ − α · L · g, with the loss L of each task."""

    needs_loss = True

    def __init__(self, lr: float | Tensor = 0.1) -> None:
        super().__init__()
        self.lr = lr

    def init_state(self, params: Any, *, tasks: bool = False) -> RuleState:
        return RuleState(({},) * len(params), {}, tasks)

    def forward(self, params: Any, grads: Any, state: RuleState, *, loss: Tensor | None = None) -> Any:
        assert loss is not None
        new = {}
        for name, p in params.items():
            new[name] = p - self.lr * loss.view(-1, *[1] * (p.dim() - 1) if state.tasks else ()) * grads[name]
        return new, state


def test_every_rule_is_known_by_name() -> None:
    for rule in (Adam, CoordinatewiseLSTM, GradientDescent, Momentum):
        assert metakern.rules.get(rule.__name__) is rule
        assert table.name_of(rule) == rule.__name__


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of Adam, CoordinatewiseLSTM, .*, got 'Nobody'"):
        metakern.rules.get("Nobody")


def test_a_rule_of_ones_own_is_saved_and_loaded_once_it_is_registered(tmp_path: Path) -> None:
    LossScaled(0.25).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*got 'LossScaled'; metakern.rules.register"):
        metakern.rules.load(tmp_path)
    assert LossScaled.from_pretrained(tmp_path).lr == 0.25
    metakern.rules.register(LossScaled)
    loaded = metakern.rules.load(tmp_path, lr=0.5)
    assert type(loaded) is LossScaled
    assert loaded.lr == 0.5


def test_a_name_may_be_chosen(tmp_path: Path) -> None:
    @metakern.rules.register(name="my-lstm")
    class Mine(CoordinatewiseLSTM):
        pass

    Mine(4, 1).save_pretrained(tmp_path)
    assert type(metakern.rules.load(tmp_path)) is Mine
    with pytest.raises(ValueError, match="must have rule 'CoordinatewiseLSTM' in its metadata, got 'my-lstm'"):
        CoordinatewiseLSTM.from_pretrained(tmp_path)


def test_two_classes_do_not_share_a_name() -> None:
    class Adam(Rule):
        pass

    with pytest.raises(ValueError, match=r"name 'Adam' is that of metakern\.rules\.adam\.Adam"):
        metakern.rules.register(Adam)
    assert metakern.rules.get("Adam") is not Adam
    again = type("LossScaled", (LossScaled,), {"__module__": __name__, "__qualname__": "LossScaled"})
    metakern.rules.register(LossScaled)
    metakern.rules.register(again)  # a cell of a notebook that runs again
    assert metakern.rules.get("LossScaled") is again


@pytest.mark.parametrize(("given", "got"), [(nn.Linear, "Linear"), (Adam(), "a Adam"), (3, "a int")])
def test_only_rules_are_registered(given: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"rule must be a subclass of metakern\.rules\.Rule, got {got}"):
        metakern.rules.register(given)


@pytest.mark.parametrize("name", ["coordinatewise-lstm", "CoordinatewiseLSTM", "coordinatewise_lstm"])
def test_make_takes_names_in_kebab_case_and_of_classes(name: str) -> None:
    rule = metakern.rules.make(name, {"hidden_size": 4, "num_layers": 1})
    assert type(rule) is CoordinatewiseLSTM
    assert rule.hidden_size == 4


def test_make_knows_every_class_and_the_short_names() -> None:
    metakern.rules.register(LossScaled)
    assert metakern.rules.names() == sorted(metakern.rules.names())
    assert {"adam", "coordinatewise-lstm", "loss-scaled", "lslr", "meta-sgd", "sgd"} <= set(metakern.rules.names())
    assert type(metakern.rules.make("LossScaled", {"lr": 0.5})) is LossScaled
    assert table.options_of("momentum") == ["lr", "momentum", "nesterov"]


def test_make_makes_every_rule() -> None:
    params = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    for name in metakern.rules.names():
        options = {"steps": 2} if name == "lslr" else None
        rule = metakern.rules.make(name, options, params=params)
        state = rule.init_state(params)
        new, _ = rule(params, params, state, loss=torch.ones(()))
        assert new.keys() == params.keys(), name


def test_make_gives_rules_for_a_models_parameters() -> None:
    params = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    rates = metakern.rules.make("meta-sgd", {"lr": 0.5}, params=params)
    assert {name: list(p.shape) for name, p in rates.named_parameters()} == {"rates.weight": [2, 3], "rates.bias": [2]}
    by_step = metakern.rules.make("lslr", {"steps": 4}, params=params)
    assert [list(p.shape) for p in by_step.parameters()] == [[4], [4]]


@pytest.mark.parametrize(("name", "learned"), [("sgd", 0.01), ("momentum", 0.01), ("adam", 0.001)])
def test_make_learns_the_rate_of_rules_without_weights(name: str, learned: float) -> None:
    assert [*metakern.rules.make(name).parameters()] == []
    ((_, rate),) = metakern.rules.make(name, learned=True).named_parameters()
    assert rate.item() == pytest.approx(learned)
    lstm = metakern.rules.make("coordinatewise-lstm", {"hidden_size": 4}, learned=True)
    assert "lr" not in dict(lstm.named_parameters())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("adamw", {}, ValueError, r"rule must be one of adam, .*sgd, .*got 'adamw'"),
        (3, {}, TypeError, "rule must be a name, got int"),
        ("adam", {"beta": 1}, ValueError, "options of rule 'adam' are lr, beta1, beta2, eps; got 'beta'"),
        ("adam", {"lr": -1.0}, ValueError, "lr must be"),
        ("meta-sgd", {}, ValueError, "params must be given for rule 'meta-sgd', which has rates for every parameter"),
    ],
)
def test_make_names_what_does_not_fit(name: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        metakern.rules.make(name, options)
    with pytest.raises(ValueError, match="options of rule 'lslr' must hold 'steps', got none"):
        metakern.rules.make("lslr", params={"w": torch.zeros(2)})


def test_a_rule_around_the_lstm_is_one_short_file_and_one_row() -> None:
    """The suite runs on it; nothing else in the project names it."""
    source = Path(added_rule.__file__)
    assert len(source.read_text().splitlines()) < 150
    assert Path(rows.__file__).read_text().count("NormalisedLSTM(") == 1
    root = Path(__file__).parents[2]
    named = [
        p
        for folder in ("metakern", "bench")
        for p in (root / folder).rglob("*.py")
        if "NormalisedLSTM" in p.read_text()
    ]
    assert named == []


# --------------------------------------------------------------------------------------------- rules that need losses


def test_the_optimizer_gives_the_rule_the_closures_loss() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = LearnedOptimizer([p], LossScaled(0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == 5
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, -2.0]) - 0.1 * 5 * torch.tensor([2.0, -4.0]))
    before = p.detach().clone()
    with pytest.raises(ValueError, match="closure must return the loss, a tensor, as LossScaled needs it, got None"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_coordinates_of_a_task_meet_its_loss() -> None:
    met = []

    class Watching(CoordinatewiseLSTM):
        needs_loss = True

        def step_coordinates(self, params: Tensor, grads: Tensor, state: Any, loss: Tensor | None = None) -> Any:
            met.append(loss)
            return super().step_coordinates(params, grads, state)

    rule, params = Watching(4, 1), {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    state = rule.init_state(params, tasks=True)
    rule(params, params, state, loss=torch.tensor([5.0, 7.0]))
    assert met[0].tolist() == [5, 5, 5, 7, 7, 7, 5, 7]
    with pytest.raises(ValueError, match=r"loss must be given to Watching: a tensor \[T\] with a task axis"):
        rule(params, params, state)


def test_a_learned_initialisation_is_offered() -> None:
    assert Adam().initialisation() is None
