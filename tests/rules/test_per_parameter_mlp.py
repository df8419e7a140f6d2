"""PerParameterMLP: published weights and settings, decays, and arguments that do not fit.

What every rule must do is in tests/conformance/rules, the operator in tests/ops/mlp_update_step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM, PerParameterMLP, make
from metakern.rules.per_parameter_mlp import BASE_DECAYS, MULO_OFFSETS
from tests.conftest import assert_same_bits

PARAMS = {"weight": torch.tensor([[1.0, -2.0, 0.5]]), "bias": torch.tensor([0.25, -1.0])}
GRADS = {"weight": torch.tensor([[0.5, 0.25, -1.0]]), "bias": torch.tensor([1.0, 2.0])}


def published_weights(size: int = 32, linears: int = 1) -> dict[str, Tensor]:
    """Random weights with the published names and shapes."""
    shapes = {"input": (size, 39), **{f"linear_{i}": (size, size) for i in range(linears)}, "output": (2, size)}
    weights = {}
    for layer, shape in shapes.items():
        weights[f"network.{layer}.weight"] = torch.randn(shape)
        weights[f"network.{layer}.bias"] = torch.randn(shape[0])
    return weights


def write(folder: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    content = {"input_size": 39, "hidden_size": 32, "hidden_layers": 1, **config}
    (folder / "config.json").write_text(json.dumps({name: x for name, x in content.items() if x is not None}))
    return folder


@pytest.mark.parametrize(("size", "linears"), [(32, 1), (4, 0), (64, 3)])
def test_published_weights_load_by_their_names(size: int, linears: int, tmp_path: Path) -> None:
    weights = published_weights(size, linears)
    folder = write(tmp_path / "mlp", weights, hidden_size=size, hidden_layers=linears)
    rule = PerParameterMLP.from_published(folder, step_mult=0.5)
    assert (rule.hidden_size, rule.hidden_layers, rule.step_mult) == (size, linears + 1, 0.5)
    state = rule.state_dict()
    assert_same_bits("decay_offsets", state.pop("decay_offsets"), torch.zeros(7))
    assert state.keys() == weights.keys()
    for name, x in weights.items():
        assert_same_bits(name, state[name], x)


def test_published_weights_keep_the_settings_of_the_rule(tmp_path: Path) -> None:
    folder = write(tmp_path / "mlp", published_weights())
    rule = PerParameterMLP.mulo(weight_decay=0.1).load_published(folder)
    assert rule.weight_decay == 0.1
    assert_same_bits("offsets", rule.decay_offsets, torch.tensor(MULO_OFFSETS))
    with pytest.raises(ValueError, match=r"has hidden_size 32 and 2 hidden layers; the rule must .* got 8 and 2"):
        PerParameterMLP(8).load_published(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network.output.bias": None}, "missing are network.output.bias, unexpected are none"),
        ({"network.linear_1.bias": torch.zeros(32)}, "missing are none, unexpected are network.linear_1.bias"),
        ({"network.input.bias": torch.zeros(31)}, r"network.input.bias must be floating, \[32\], got"),
        ({"network.input.bias": torch.full((32,), torch.nan)}, "network.input.bias must be finite, got NaN"),
    ],
    ids=["missing", "extra", "shape", "NaN"],
)
def test_published_weights_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    weights = {name: x for name, x in (published_weights() | change).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        PerParameterMLP.from_published(write(tmp_path / "mlp", weights))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"input_size": 38}, "input_size must be 39, got 38"),
        ({"hidden_size": None}, "hidden_size must be an integer of at least 0, got None"),
        ({"hidden_layers": True}, "hidden_layers must be an integer of at least 0, got True"),
        ({"hidden_size": 16}, r"network.input.weight must be floating, \[16, 39\]"),
    ],
    ids=["inputs", "no size", "layers", "another size"],
)
def test_a_published_configuration_that_does_not_fit(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        PerParameterMLP.from_published(write(tmp_path / "mlp", published_weights(), **config))


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json is missing"):
        PerParameterMLP.from_published(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is damaged or no configuration"):
        PerParameterMLP.from_published(tmp_path)


def test_decays_are_the_formulas() -> None:
    rule = PerParameterMLP()
    assert_same_bits("without offsets", rule.decays(), torch.tensor(BASE_DECAYS, dtype=torch.float64))
    # By hand: 1 - exp(log(0.1) + 1.5216392) = 1 - 0.1 * 4.579726 = 0.5420274
    mulo = PerParameterMLP.mulo().decays()
    assert mulo[0].item() == pytest.approx(1 - 0.1 * 2.718281828459045**1.5216392, rel=1e-6)
    assert mulo[5].item() == pytest.approx(1 - 0.01 * 2.718281828459045**-1.0864615, rel=1e-6)
    rule = PerParameterMLP(learned_decays=True)
    with torch.no_grad():
        rule.decay_offsets.copy_(torch.tensor([9.0, -9, 0, 0, 0, 0, 0]))
    decays = rule.decays()
    assert decays[0].item() == 0  # clipped
    assert decays[1].item() == pytest.approx(1)
    (grad,) = torch.autograd.grad(decays.sum(), rule.decay_offsets)
    assert grad[2].item() == pytest.approx(-10 * (1 - 0.999), rel=1e-6)  # dβ/dδ = -10 (1 - β)


def test_decays_can_be_set() -> None:
    rule = PerParameterMLP().set_decays((0.5, 0.99, 0.0), 0.25, (0.9, 0.1, 0.75))
    wanted = torch.tensor([0.5, 0.99, 0, 0.25, 0.9, 0.1, 0.75], dtype=torch.float64)
    torch.testing.assert_close(rule.decays(), wanted, rtol=0, atol=1e-6)
    for arguments, message in (
        (((0.5, 0.5), 0.5, (0.5,) * 3), "momentum must hold 3 decays, got 2"),
        (
            ((0.5, 0.5, 1.0), 0.5, (0.5,) * 3),
            "decays of momentum must be numbers of at least 0 .* got 1.0",
        ),
        (((0.5,) * 3, -0.1, (0.5,) * 3), "decays of square must be numbers of at least 0 .* got -0.1"),
        (((0.5,) * 3, 0.1, (0.5, 0.5, "a")), "decays of factors must be numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.set_decays(*arguments)
    torch.testing.assert_close(rule.decays(), wanted, rtol=0, atol=1e-6)


def test_the_width_multiplier_divides_the_rate_of_matrices_alone() -> None:
    torch.manual_seed(0)
    rule = PerParameterMLP(4, backend="reference")
    wide = PerParameterMLP(4, backend="reference", width_multiplier=4.0)
    wide.load_state_dict(rule.state_dict())
    new, _ = rule(PARAMS, GRADS, rule.init_state(PARAMS))
    other, _ = wide(PARAMS, GRADS, wide.init_state(PARAMS))
    torch.testing.assert_close(other["weight"] - PARAMS["weight"], (new["weight"] - PARAMS["weight"]) / 4)
    assert_same_bits("bias", other["bias"], new["bias"])


@pytest.mark.parametrize("decay_update", [True, False])
def test_weight_decay_is_decoupled(decay_update: bool) -> None:
    torch.manual_seed(0)
    rule = PerParameterMLP(4, lr=0.5, backend="reference")
    new, _ = rule(PARAMS, GRADS, rule.init_state(PARAMS))
    rule.weight_decay, rule.decay_update = 0.2, decay_update
    decayed, _ = rule(PARAMS, GRADS, rule.init_state(PARAMS))
    for name, p in PARAMS.items():
        torch.testing.assert_close(decayed[name], new[name] - 0.1 * (new[name] if decay_update else p))


def test_the_settings_by_name() -> None:
    sizes = {"small-fc-lopt": (4, 2, 0.001, True), "mulo": (32, 2, 0.01, False), "elo": (32, 2, 1.0, False)}
    for name, expected in sizes.items():
        rule: Any = make(name)
        assert (rule.hidden_size, rule.hidden_layers, rule.step_mult, rule.learned_decays) == expected
    assert make("mulo", {"weight_decay": 0.1, "hidden_layers": 3}).weight_decay == 0.1
    with pytest.raises(ValueError, match=r"options of rule 'elo' are hidden_size, hidden_layers, lr, .*; got 'depth'"):
        make("elo", {"depth": 2})
    assert sum(p.numel() for p in make("mulo").parameters()) == 2402
    assert sum(p.numel() for p in make("per-parameter-mlp", {"hidden_size": 4}).parameters()) == 190


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 2)])
@pytest.mark.parametrize("tasks", [False, True])
def test_ranks_that_it_has_no_factors_for_are_refused_by_name(shape: tuple[int, ...], tasks: bool) -> None:
    params = {"good": torch.zeros(2, 2), "bad": torch.zeros((2, *shape) if tasks else shape)}
    with pytest.raises(ValueError, match=f"1 to 4 axes besides that of tasks, got {len(shape)} for 'bad'"):
        PerParameterMLP(4, backend="reference").init_state(params, tasks=tasks)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 3}, ValueError, "hidden_size must be 4 to 64, got 3"),
        ({"hidden_size": 65}, ValueError, "hidden_size must be 4 to 64, got 65"),
        ({"hidden_layers": 0}, ValueError, "hidden_layers must be 1 to 4, got 0"),
        ({"hidden_size": 4.0}, TypeError, "hidden_size must be an integer"),
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, got -1.0"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite"),
        ({"width_multiplier": 0}, ValueError, "width_multiplier must be greater than 0"),
        ({"step_mult": "1"}, TypeError, "step_mult must be a number"),
        ({"learned_decays": 1}, TypeError, "learned_decays must be a bool"),
        ({"backend": "fast"}, ValueError, "backend must be"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else None,
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PerParameterMLP(**options)


def test_states_that_do_not_fit_are_refused() -> None:
    rule = PerParameterMLP(4, backend="reference")
    state = rule.init_state(PARAMS)
    bad: list[tuple[Any, type[Exception], str]] = [
        ({}, TypeError, "state must be a RuleState as init_state makes it, got dict"),
        (rule.init_state({"weight": PARAMS["weight"]}), ValueError, "state must be that of params, 2 tensors, got 1"),
        (CoordinatewiseLSTM().init_state(PARAMS), TypeError, "state must be a RuleState"),
        (make("momentum").init_state(PARAMS), ValueError, "state.shared must be of PerParameterMLP"),
        (
            rule.init_state({name: p.view(-1) for name, p in PARAMS.items()}),
            *(ValueError, "state of tensor 0 must be of PerParameterMLP for these params"),
        ),
    ]
    for wrong, error, message in bad:
        with pytest.raises(error, match=message):
            rule(PARAMS, GRADS, wrong)
    tasks = {name: torch.stack([p, p]) for name, p in PARAMS.items()}
    with pytest.raises(ValueError, match="for these params, with"):
        rule(tasks, tasks, rule.init_state({name: torch.stack([p] * 3) for name, p in PARAMS.items()}, tasks=True))
    rule(PARAMS, GRADS, state)


def test_the_step_count_goes_on_for_parameters_without_a_gradient() -> None:
    """As in the published optimizers: t is that of the optimizer, not of the parameter."""
    params = [torch.nn.Parameter(p.clone()) for p in PARAMS.values()]
    optimizer = LearnedOptimizer(params, PerParameterMLP(4, backend="reference"))
    params[0].grad = GRADS["weight"].clone()
    optimizer.step()
    params[1].grad = GRADS["bias"].clone()
    optimizer.step()
    assert optimizer.shared[0]["count"].item() == 2
