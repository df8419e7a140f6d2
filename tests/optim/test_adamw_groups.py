"""LearnedOptimizer's groups with ``rule=None``, which AdamW steps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakern.optim import HEADER, LearnedOptimizer, adamw
from metakern.rules import Adam, CoordinatewiseLSTM, Momentum
from tests.conftest import assert_same_bits
from tests.optimizers import set_grads

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def drawn(*shapes: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def make(dtype: torch.dtype = torch.float32, rule: Any = None, **options: Any) -> tuple[Any, list[nn.Parameter]]:
    """An optimizer with a group of the rule, two tensors, and a group of AdamW, two tensors."""
    params = drawn((5, 7), (3,), (4, 3), (2,), dtype=dtype)
    rule = Momentum(0.1) if rule is None else rule
    groups = [{"params": params[:2]}, {"params": params[2:], "rule": None, **OPTIONS, **options}]
    return LearnedOptimizer(groups, rule), params


def assert_same(got: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for index, (p, q) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(f"parameter {index}", p.detach(), q.detach())


# ------------------------------------------------------------------------------------------------------------ stepping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_group_without_a_rule_steps_as_adamw_and_the_others_as_before(dtype: torch.dtype) -> None:
    optimizer, params = make(dtype)
    alone, others = drawn((5, 7), (3,), dtype=dtype), drawn((5, 7), (3,), (4, 3), (2,), dtype=dtype)[2:]
    by_rule, by_torch = LearnedOptimizer(alone, Momentum(0.1)), torch.optim.AdamW(others, **OPTIONS, fused=True)
    for step in range(4):
        set_grads(params, step)
        for own, other in zip((*alone, *others), params, strict=True):
            own.grad = None if other.grad is None else other.grad.clone()
        for each in (optimizer, by_rule, by_torch):
            each.step()
    assert_same(params, [*alone, *others])
    assert optimizer.state[params[2]]["exp_avg"].dtype is dtype


def test_where_torch_has_no_fused_kernels_lists_of_tensors_are_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "fused_or_foreach", lambda *_, **__: (False, True))
    optimizer, params = make()
    others = drawn((5, 7), (3,), (4, 3), (2,))[2:]
    by_torch = torch.optim.AdamW(others, **OPTIONS, foreach=True)
    for step in range(3):
        set_grads(params, step)
        for own, other in zip(others, params[2:], strict=True):
            own.grad = None if other.grad is None else other.grad.clone()
        optimizer.step()
        by_torch.step()
    assert_same(params[2:], others)


def test_missing_options_are_those_of_torchs_adamw() -> None:
    first, second = drawn((3,), (3,))
    optimizer = LearnedOptimizer([first], Momentum(0.1), lr=0.5, weight_decay=0.25)
    optimizer.add_param_group({"params": [second], "rule": None})
    known = torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert {key: optimizer.param_groups[1][key] for key in OPTIONS} == {key: known[key] for key in OPTIONS}
    run(optimizer, [first, second], range(2))
    assert optimizer.state[second]["step"].item() == 2


def test_parameters_without_a_gradient_stay() -> None:
    optimizer, params = make()
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    params[3].grad = None
    optimizer.step()
    assert_same_bits("parameter", params[3].detach(), before[3])
    assert not torch.equal(params[2].detach(), before[2])
    assert params[3] not in optimizer.state


def test_schedulers_a_closure_and_a_scaler_work_as_for_other_groups() -> None:
    optimizer, params = make()
    others = drawn((5, 7), (3,), (4, 3), (2,))[2:]
    by_torch = torch.optim.AdamW(others, **OPTIONS, fused=True)
    optimizers = (optimizer, by_torch)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in optimizers]
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in optimizers]

    def closure() -> Tensor:
        set_grads(params, 0)
        return torch.tensor(3.0)

    for step in range(3):
        if step == 0:
            assert optimizer.step(closure).item() == 3
            for own, other in zip(others, params[2:], strict=True):
                own.grad = None if other.grad is None else other.grad.clone()
            by_torch.step()
        for of_one, each, scaler in zip((params, others), optimizers, scalers, strict=True):
            each.zero_grad()
            loss = sum((p.square().sum() for p in of_one), torch.zeros(()))
            factor = float("inf") if step == 1 else 1.0  # the scaler then skips the step
            scaler.scale(loss * factor).backward()
            scaler.step(each)
            scaler.update()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[1]["lr"] == OPTIONS["lr"] / 8
    assert_same(params[2:], others)


def test_a_rule_may_be_named() -> None:
    params, others = drawn((3, 2)), drawn((3, 2))
    run(LearnedOptimizer(params, "adam"), params, range(2))
    run(LearnedOptimizer(others, Adam()), others, range(2))
    assert_same(params, others)
    with pytest.raises(ValueError, match="rule must be trained or a rule without weights, got the name 'coordinat"):
        LearnedOptimizer(params, "coordinatewise-lstm")
    with pytest.raises(ValueError, match=r"rule must be one of adam, .*, got 'adan'"):
        LearnedOptimizer(params, "adan")


# --------------------------------------------------------------------------------------------------------- checkpoints


def by_file(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", [lambda: CoordinatewiseLSTM(4, 1), lambda: Adam(0.1)])
def test_a_checkpoint_resumes_to_the_same_bits(rule: Callable[[], Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kept = rule()
    optimizer, params = make(dtype, kept)
    run(optimizer, params, range(3))
    saved = by_file(optimizer)
    assert saved[HEADER]["format_version"] == 3
    assert set(saved["state"][2]) == {"step", *adamw.MOMENTS}
    again, others = make(dtype, kept, lr=5.0)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    again.load_state_dict(saved)
    for each, of_one in ((optimizer, params), (again, others)):
        run(each, of_one, range(3, 6))
    assert_same(params, others)
    assert again.param_groups[1]["lr"] == OPTIONS["lr"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_with_the_same_bits(copied: Callable[[Any], Any]) -> None:
    optimizer, params = make()
    run(optimizer, params, range(2))
    twin = copied(optimizer)
    run(optimizer, params, range(2, 4))
    own = [p for group in twin.param_groups for p in group["params"]]
    run(twin, own, range(2, 4))
    assert_same(params, own)


def test_checkpoints_without_adamw_keep_their_format() -> None:
    params = drawn((5, 7), (3,))
    optimizer = LearnedOptimizer(params, Momentum(0.1))
    run(optimizer, params, range(2))
    saved = optimizer.state_dict()
    assert saved[HEADER]["format_version"] == 2
    assert set(saved["param_groups"][0]) == {"params", "lr", "weight_decay"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["param_groups"][1].pop("betas"), r"group 1 of state_dict must be a dict with the keys .*'betas'"),
        (lambda d: d["param_groups"][1].pop("rule"), "group 1 of state_dict must be stepped by rule=None, AdamW, as"),
        (lambda d: d["param_groups"][0].update(rule=None), "group 0 of state_dict must be stepped by the rule, as the"),
        (lambda d: d["state"][2].pop("exp_avg"), r"exp_avg of parameter 0 of group 1 \[4, 3\] must be a dense tensor"),
        (lambda d: d["state"][2].update(exp_avg=torch.zeros(3)), r"exp_avg of .* \[4, 3\], got torch.float32 \[3\]"),
        (lambda d: d["state"][2].update(step=1.5), "step of parameter 0 of group 1 .* must be an integer"),
        (lambda d: d["param_groups"][1].update(betas=(0.9, 1.0)), "betas of group 1 of state_dict must be at least 0"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(change: Callable[[Any], Any], message: str) -> None:
    optimizer, params = make()
    run(optimizer, params, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = {key: x.clone() for key, x in optimizer.state[params[2]].items() if isinstance(x, Tensor)}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    for key, x in before.items():
        assert_same_bits(key, optimizer.state[params[2]][key], x)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"rule": "adamw"},
            TypeError,
            "rule of group 1 must be None, for AdamW, or left out, for the",
        ),
        ({"rule": Momentum()}, TypeError, "rule of group 1 must be None, .*, got Momentum"),
        (
            {"rule": None, "momentum": 0.9},
            ValueError,
            r"group 1 must hold the options rule, lr, betas, .*\['momentum'\]",
        ),
        ({"rule": None, "amsgrad": True}, ValueError, r"got \['amsgrad'\], which AdamW"),
        ({"rule": None, "betas": 0.9}, TypeError, "betas of group 1 must be a pair of numbers, got 0.9"),
        ({"rule": None, "betas": (0.9, 1.0)}, ValueError, "betas of group 1 must be at least 0 and less than 1"),
        ({"rule": None, "betas": (float("nan"), 0.9)}, ValueError, "betas of group 1 must be at least 0"),
        ({"rule": None, "eps": -1.0}, ValueError, "eps of group 1 must be finite and at least 0, got -1"),
        ({"rule": None, "lr": float("nan")}, ValueError, "lr of group 1 must be finite and at least 0, got nan"),
        ({"rule": None, "weight_decay": "no"}, TypeError, "weight_decay of group 1 must be a number, got 'no'"),
        ({"betas": (0.9, 0.99)}, ValueError, r"group 1 must hold the options lr, weight_decay alone, got \['betas'\]"),
    ],
)
def test_options_that_do_not_fit_are_named(options: Any, error: type[Exception], message: str) -> None:
    first, second = drawn((3,), (2,))
    optimizer = LearnedOptimizer([first], Momentum(0.1))
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [second], **options})
    assert len(optimizer.param_groups) == 1


def test_what_does_not_fit_any_more_is_named_before_any_parameter_changes() -> None:
    optimizer, params = make()
    run(optimizer, params, range(1))
    before = [p.detach().clone() for p in params]

    def refuses(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            optimizer.step()
        for index, (p, q) in enumerate(zip(params, before, strict=True)):
            assert_same_bits(f"parameter {index}", p.detach(), q)

    set_grads(params, 1)
    optimizer.param_groups[1]["betas"] = (0.9, 2.0)
    refuses(ValueError, "betas of group 1 must be at least 0 and less than 1")
    optimizer.param_groups[1]["betas"] = (0.9, 0.99)
    params[2].grad = params[2].detach().to_sparse()
    refuses(TypeError, r"gradient of parameter 0 of group 1 \[4, 3\] must be dense, got torch.sparse_coo")
    set_grads(params, 1)
    del optimizer.state[params[3]]["exp_avg_sq"]
    refuses(ValueError, r"rule=None needs the state of AdamW for parameter 1 of group 1 \[2\], exp_avg and exp_avg_sq")
    del optimizer.state[params[3]]
    optimizer.param_groups[1].pop("rule")
    for key in ("betas", "eps"):
        optimizer.param_groups[1].pop(key)
    refuses(ValueError, "rule must be of the kind and sizes of the state of parameter 0 of group 1")
