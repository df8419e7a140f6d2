"""RNNProp: initial weights, options, steps counted by coordinate, states and arguments that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import metakern
from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM, MetaLSTM, RNNProp
from tests.conftest import assert_same_bits


def make_rule(**options: Any) -> RNNProp:
    torch.manual_seed(0)
    return RNNProp(**options)


def test_the_initial_weights_are_the_authors() -> None:
    rule = make_rule()
    one_bias = sum(p.numel() for name, p in rule.named_parameters() if "bias_hh" not in name)
    assert one_bias == 6641
    many = torch.cat([make_rule_of_seed(seed).inputs.weight.flatten() for seed in range(50)])
    assert many.abs().max() <= 0.2
    assert many.std().item() == pytest.approx(0.088, abs=0.003)  # a normal of std 0.1, cut off at two of them
    assert rule.head.weight.abs().max() <= 0.2
    assert not rule.head.bias.any()
    assert not rule.inputs.bias.any()


def make_rule_of_seed(seed: int) -> RNNProp:
    torch.manual_seed(seed)
    return RNNProp()


def test_the_other_public_code_swaps_the_inputs_and_has_another_scale() -> None:
    rule, other = make_rule(), make_rule(moment_first=True, output_scale=0.01)
    other.load_state_dict(rule.state_dict())
    with torch.no_grad():
        other.inputs.weight.copy_(rule.inputs.weight.flip(1))
    params, grads = torch.randn(40), torch.randn(40)
    first, second = (each(params, grads, each.init_state(params))[0] for each in (rule, other))
    torch.testing.assert_close(first - params, -10 * (second - params), rtol=1e-3, atol=1e-5)


def test_its_name_is_one_word() -> None:
    assert "rnnprop" in metakern.rules.names()
    assert "rnn-prop" not in metakern.rules.names()
    for name in ("rnnprop", "rnn-prop", "RNNProp"):
        assert type(metakern.rules.make(name, {"hidden_size": 4})) is RNNProp


def test_coordinates_of_different_ages_have_their_own_corrections() -> None:
    """As parameters of a LearnedOptimizer that had no gradient for some steps."""
    rule, params, states = make_rule(), [torch.randn(32), torch.randn(64)], []
    with torch.no_grad():
        for index, steps in enumerate((5, 1)):
            state = rule.init_state(params[index])
            for step in range(steps):
                params[index], state = rule(params[index], torch.sin(params[index] + step), state)
            states.append(state)
        grads = [p.cos() for p in params]
        alone = torch.cat([rule(p, g, s)[0] for p, g, s in zip(params, grads, states, strict=True)])
        packed = [rule.packed(state) for state in states]
        together = rule.from_packed({name: torch.cat([x[name] for x in packed]) for name in packed[0]}, 96)
        assert_same_bits("params", rule(torch.cat(params), torch.cat(grads), together)[0], alone)
    assert packed[0]["moments"][0, 2].unique().item() == pytest.approx(1 - 0.95**5, rel=1e-5)
    assert packed[1]["moments"][0, 2].unique().item() == pytest.approx(0.05, rel=1e-5)


class Launches(TorchDispatchMode):
    """Records the operators on tensors of at least 100 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Tensor) and x.numel() >= 100 for x in args):
            self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("rule", [RNNProp(), MetaLSTM()], ids=["RNNProp", "Meta-LSTM"])
def test_moments_gates_and_cells_step_in_one_launch(rule: Any) -> None:
    params, grads, loss = torch.randn(100), torch.randn(100), torch.tensor(2.0)
    state = rule.init_state(params)
    with torch.no_grad(), Launches() as launches:
        rule(params, grads, state, loss=loss)
    assert [name for name in launches.names if name.startswith("metakern")] == ["metakern::lstm_step_staged"]
    sized = {"aten::mul.Tensor", "aten::add.Tensor", "aten::div.Tensor", "aten::sqrt", "aten::copy_", "aten::clone"}
    assert not sized & set(launches.names)
    with Launches() as launches:  # in place, as LearnedOptimizer steps: nothing is copied
        rule.step_(params, grads, state, loss=loss)
    assert [name for name in launches.names if name.startswith("metakern")] == ["metakern::lstm_step_staged_"]
    assert not sized & set(launches.names)


@pytest.mark.parametrize("number", [1, 3], ids=["one step", "three steps"])
def test_an_update_is_never_larger_than_its_scale(number: int) -> None:
    rule = make_rule()
    with torch.no_grad():
        rule.head.bias.fill_(1e4)
    params, state = torch.zeros(33), rule.init_state(torch.zeros(33))
    for _ in range(number):
        params, state = rule(params, torch.full((33,), 1e-20), state)
    torch.testing.assert_close(params.detach(), torch.full((33,), -0.1 * number))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta1": 1.0}, ValueError, "beta1 must be at least 0 and less than 1, got 1.0"),
        ({"beta2": -0.1}, ValueError, "beta2 must be at least 0 and less than 1, got -0.1"),
        ({"beta1": float("nan")}, ValueError, "beta1 must be at least 0 and less than 1, got nan"),
        ({"beta2": "0.9"}, TypeError, "beta2 must be a number, got '0.9' of type str"),
        ({"output_scale": float("inf")}, ValueError, "output_scale must be finite in float32, got inf"),
        ({"moment_first": 1}, TypeError, "moment_first must be a bool, got 1"),
        ({"hidden_size": 65}, ValueError, "hidden_size must be 1 to 64, got 65"),
        ({"num_layers": 0}, ValueError, "num_layers must be 1 to 3, got 0"),
        ({"precision": "low"}, ValueError, "precision must be one of highest, high, medium, got 'low'"),
        ({"backend": "gpu"}, ValueError, "backend must be"),
        ({"horizon": 0}, ValueError, "horizon must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RNNProp(**options)
    with pytest.raises(error, match=message):
        metakern.rules.make("rnnprop", options)


@pytest.mark.parametrize("cls", [RNNProp, MetaLSTM])
def test_states_that_do_not_fit_are_refused_and_change_nothing(cls: Any) -> None:
    rule, tree = cls(hidden_size=5), {"a": torch.randn(3, 4), "b": torch.randn(3)}
    grads, loss = {name: p.cos() for name, p in tree.items()}, torch.rand(3)
    state = rule.init_state(tree, tasks=True)
    foreign = {CoordinatewiseLSTM: MetaLSTM, RNNProp: MetaLSTM, MetaLSTM: RNNProp}[cls](hidden_size=5)
    old = dict(state, lstm=type(state["lstm"])(state["lstm"].data, 15, layout=0))
    cases = [
        (foreign.init_state(tree), ValueError, f"state must be one of {cls.__name__}, with 'lstm' and"),
        (CoordinatewiseLSTM(5, 2).init_state(tree), TypeError, "state must be a dict"),
        (old, ValueError, "state has layout version 0"),
        (rule.init_state({"a": tree["a"]}), ValueError, "as many coordinates as params, 15, got 12"),
        (rule.init_state({n: p[:2] for n, p in tree.items()}), ValueError, "as many coordinates as params, 15, got 10"),
        (cls(hidden_size=6).init_state(tree), ValueError, f"{rule.num_layers} layers of 5 units, got .* of 6"),
        (cls(hidden_size=5, num_layers=3).init_state(tree), ValueError, "layers of 5 units, got 3 of 5"),
    ]
    for bad, error, message in cases:
        kept = {name: p.clone() for name, p in tree.items()}
        with pytest.raises(error, match=message):
            rule(tree, grads, bad, loss=loss)
        flat = torch.cat([p.flatten() for p in tree.values()])
        before = flat.clone()
        with pytest.raises(error, match=message):
            rule.step_(flat, flat.cos(), bad, loss=loss.sum())
        assert_same_bits("params in place", flat, before)
        for name, p in tree.items():
            assert_same_bits(name, p, kept[name])


def test_a_checkpoint_of_another_rule_is_refused() -> None:
    model = nn.Linear(3, 2)

    def trained(rule: Any) -> LearnedOptimizer:
        optimizer = LearnedOptimizer(model.parameters(), rule)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(lambda: torch.tensor(1.0))
        return optimizer

    saved = trained(MetaLSTM(num_layers=2)).state_dict()
    optimizer = trained(RNNProp())
    before = optimizer.state_dict()["state"][0]["moments"]
    with pytest.raises(ValueError, match="MetaLSTM"):
        optimizer.load_state_dict(saved)
    assert_same_bits("moments", optimizer.state_dict()["state"][0]["moments"], before)
