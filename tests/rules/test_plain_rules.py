"""Specifics of gradient descent, momentum and Adam: forms of rates, arguments, saving."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.rules import Adam, GradientDescent, Momentum
from tests.conftest import assert_same_bits


def step(rule: Any, params: Any, grads: Any, *, tasks: bool = False) -> Any:
    return rule(params, grads, rule.init_state(params, tasks=tasks))[0]


PARAMS = {"head.weight": torch.randn(2, 3), "head.bias": torch.randn(3), "scale": torch.randn(())}
GRADS = {name: torch.randn_like(p) for name, p in PARAMS.items()}


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        (0.5, (0.5, 0.5, 0.5)),
        (torch.tensor([0.5]), (0.5, 0.5, 0.5)),
        ({"head.*": 0.1, "scale": torch.tensor(0.3)}, (0.1, 0.1, 0.3)),
        ({"head.bias": 0.2, "head.*": 0.1, "*": 0.4}, (0.1, 0.2, 0.4)),
        ([0.1, torch.full((3,), 0.2), 0.3], (0.1, 0.2, 0.3)),
    ],
    ids=["number", "tensor", "by name", "by pattern", "by order"],
)
def test_rates_in_every_form(lr: Any, expected: tuple[float, ...]) -> None:
    new = step(GradientDescent(lr), PARAMS, GRADS)
    for (name, p), rate in zip(PARAMS.items(), expected, strict=True):
        assert_same_bits(name, new[name], p - rate * GRADS[name])


def test_gradients_flow_through_rates_that_were_computed() -> None:
    """A tensor that is no parameter keeps its graph."""
    raw = torch.tensor(-2.0, requires_grad=True)
    new = step(GradientDescent(raw.exp()), PARAMS, GRADS)
    loss = sum(p.sum() for p in new.values())
    (got,) = torch.autograd.grad(loss, raw)
    torch.testing.assert_close(got, -raw.exp() * sum(g.sum() for g in GRADS.values()))


def test_rates_by_step_end_after_the_last() -> None:
    rule = GradientDescent.lslr(PARAMS.items(), steps=2)
    params, state = PARAMS, rule.init_state(PARAMS)
    for _ in range(2):
        params, state = rule(params, GRADS, state)
    with pytest.raises(ValueError, match="step must be less than the 2 inner steps"):
        rule(params, GRADS, state)


def test_the_norm_of_one_task_is_clipped_without_a_task_axis() -> None:
    new = step(GradientDescent(1.0, clip_norm=0.5), PARAMS, GRADS)
    moved = torch.cat([(new[name] - p).flatten() for name, p in PARAMS.items()])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GradientDescent(math.nan), ValueError, "lr must be finite, got nan"),
        (lambda: GradientDescent("fast"), TypeError, "lr must be a number or a tensor, got str"),
        (lambda: GradientDescent(torch.ones(2)), ValueError, r"lr as one tensor must have 1 element, got shape \[2\]"),
        (lambda: GradientDescent({"a": math.inf}), ValueError, "lr must be finite, got inf"),
        (lambda: GradientDescent(0.1, clip_norm=0), ValueError, "clip_norm must be positive and finite, got 0"),
        (lambda: GradientDescent(0.1, steps=0), ValueError, "steps must be at least 1, got 0"),
        (lambda: Momentum(-1), ValueError, "lr must be finite and at least 0, got -1"),
        (lambda: Momentum(0.1, 1.0), ValueError, "momentum must be finite and at least 0 and less than 1, got 1.0"),
        (lambda: Momentum(0.1, nesterov=1), TypeError, "nesterov must be a bool, got 1"),
        (lambda: Adam("x"), TypeError, r"lr must be a number or a tensor \[\], got str"),
        (
            lambda: Adam(beta1=torch.ones(1)),
            ValueError,
            r"beta1 must be a number or a floating tensor \[\], got .* \[1\]",
        ),
        (lambda: Adam(eps=-1e-8), ValueError, "eps must be finite and at least 0, got -1e-08"),
        (lambda: Adam(beta2=True), TypeError, "beta2 must be a number"),
    ],
)
def test_bad_arguments_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"scale": 0.1}, "missing"),
        ([0.1], "lr must have one entry an adapted parameter, 3, got 1"),
        (
            {"head.weight": torch.ones(3, 2), "*": 0.1},
            r"lr\['head.weight'\] must have shape \[\] or \[2, 3\], got \[3, 2\]",
        ),
    ],
)
def test_rates_that_do_not_fit_the_params(lr: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(GradientDescent(lr), PARAMS, GRADS)


def test_rates_by_order_are_saved(tmp_path: Path) -> None:
    rule = GradientDescent([nn.Parameter(torch.rand_like(p)) for p in PARAMS.values()], clip_norm=2.0)
    rule.save_pretrained(tmp_path)
    loaded = metakern.rules.load(tmp_path)
    for (name, got), expected in zip(
        step(loaded, PARAMS, GRADS).items(), step(rule, PARAMS, GRADS).values(), strict=True
    ):
        assert_same_bits(name, got.detach(), expected.detach())


def test_numbers_by_name_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lr must be a number or hold tensors to be saved, got numbers for \['\*'\]"):
        GradientDescent({"*": 0.1}).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_adam_counts_the_steps_of_every_task() -> None:
    """Tasks may restart: a fresh task beside an old one takes the first step of Adam."""
    rule, params = Adam(0.1), {"w": torch.randn(2, 3)}
    _, state = rule(params, params, rule.init_state(params, tasks=True))
    fresh = rule.init_state(params, tasks=True)
    mixed = torch.utils._pytree.tree_map(lambda a, b: torch.stack([a[0], b[1]]), state, fresh)
    assert mixed.per_tensor[0]["count"].tolist() == [1, 0]
    new, _ = rule(params, params, mixed)
    old, _ = rule(params, params, state)
    first, _ = rule(params, params, fresh)
    assert_same_bits("the old task", new["w"][0], old["w"][0])
    assert_same_bits("the fresh task", new["w"][1], first["w"][1])


def test_the_second_step_of_adam_keeps_its_digits_in_float32() -> None:
    """1 − 0.999² loses four digits if it is computed in float32."""
    grads = torch.full((4,), 0.3)
    runs = []
    for dtype in (torch.float32, torch.float64):
        rule, p = Adam(1.0), torch.zeros(4, dtype=dtype)
        state = rule.init_state(p)
        for _ in range(2):
            p, state = rule(p, grads.to(dtype), state)
        runs.append(p.double())
    torch.testing.assert_close(runs[0], runs[1], rtol=5e-7, atol=0)


def test_complex_params_step_by_their_parts() -> None:
    z, g = torch.randn(5, dtype=torch.complex64), torch.randn(5, dtype=torch.complex64)
    for rule in (Adam(0.1), Momentum(0.1, nesterov=True)):
        expected = torch.view_as_complex(step(rule, torch.view_as_real(z), torch.view_as_real(g)))
        assert_same_bits("params", step(rule, z, g), expected)
    assert_same_bits("params", step(GradientDescent(0.1), z, g), z - 0.1 * g)


def test_learned_numbers_move_the_result() -> None:
    lr = nn.Parameter(torch.tensor(0.1))
    rule = Adam(lr)
    new: Tensor = step(rule, PARAMS["head.bias"], GRADS["head.bias"])
    (got,) = torch.autograd.grad(new.sum(), lr)
    assert got.isfinite()
    assert got != 0
    assert [name for name, _ in rule.named_parameters()] == ["lr"]
