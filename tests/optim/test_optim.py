"""LearnedOptimizer against a handwritten loop around the rule, and against plain nn.LSTM and nn.Linear."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from metakern.ops.lstm_step.state import TILE_LANES
from metakern.optim import HEADER, LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM
from tests.conftest import assert_same_bits
from tests.optimizers import (
    BFLOAT16_STATE,
    ODD_SHAPES,
    all_at_once,
    assert_same,
    assert_state,
    by_hand,
    make_params,
    make_rule,
    run,
    seeded,  # noqa: F401  # a fixture
    set_grads,
    small_rule,  # noqa: F401  # a fixture
)

# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_equals_the_hand_written_loop_for_tensors_of_odd_sizes(rule: CoordinatewiseLSTM, dtype: torch.dtype) -> None:
    params = make_params(ODD_SHAPES, dtype)
    weights = [w.clone() for w in rule.parameters()]
    expected, states = by_hand(rule, params, [None] * 4)
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None] * 4)
    assert_same(params, expected)
    assert_state(optimizer, params, states)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(entry["lstm"].dtype == state_dtype for entry in optimizer.state.values())
    assert_same(list(rule.parameters()), weights)
    assert all(w.grad is None for w in rule.parameters())


def test_equals_plain_modules() -> None:
    """nn.LSTM and nn.Linear in eager code, straight from the paper's formulas."""
    lstm, head = nn.LSTM(2, 20, num_layers=2), nn.Linear(20, 1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    plain = copy.deepcopy(model)
    optimizer = LearnedOptimizer(model.parameters(), CoordinatewiseLSTM.from_modules(lstm, head))
    n = sum(p.numel() for p in model.parameters())
    hidden = (torch.zeros(2, n, 20), torch.zeros(2, n, 20))
    for _ in range(10):
        x = torch.randn(16, 4)
        for net in (model, plain):
            net.zero_grad()
            (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            grad = torch.cat([p.grad.view(-1) for p in plain.parameters()])
            large = grad.abs() >= math.exp(-10)
            log = torch.where(large, grad.abs().log() / 10, torch.tensor(-1.0))
            sign = torch.where(large, grad.sign(), grad * math.exp(10))
            out, hidden = lstm(torch.stack([log, sign], -1).unsqueeze(0), hidden)
            nn.utils.vector_to_parameters(
                nn.utils.parameters_to_vector(plain.parameters()) + 0.1 * head(out).view(-1), plain.parameters()
            )
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("preprocess", ["log_sign", "log_and_clip", "none"])
def test_serves_every_option_of_the_rule(backend: str, preprocess: str) -> None:
    rule = CoordinatewiseLSTM(3, 1, preprocess, preprocess_scale=5, output_scale=0.5, backend=backend)
    params = make_params([(5, 7), (40,)])
    expected, _ = by_hand(rule, params, [None] * 3)
    run(LearnedOptimizer(params, rule), [None] * 3)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_parameters_without_gradient_are_skipped_in_any_pattern(rule: CoordinatewiseLSTM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    patterns = [(torch.rand(len(ODD_SHAPES), generator=generator) < 0.5).tolist() for _ in range(8)]
    params = make_params(ODD_SHAPES)
    expected, states = by_hand(rule, params, patterns)
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, patterns)
    assert_same(params, expected)
    assert_state(optimizer, params, states)
    steps = [sum(pattern[i] for pattern in patterns) for i in range(len(params))]
    saved = optimizer.state_dict()["state"]
    assert [saved[i]["step"] if i in saved else 0 for i in range(len(params))] == steps


def test_launches_once_for_all_and_once_a_run_of_neighbours(
    rule: CoordinatewiseLSTM, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[int] = []
    step_ = CoordinatewiseLSTM.step_

    def counted(self: CoordinatewiseLSTM, params: Tensor, *args: Any, **options: Any) -> None:
        launches.append(params.numel() // TILE_LANES)
        step_(self, params, *args, **options)

    monkeypatch.setattr(CoordinatewiseLSTM, "step_", counted)
    params = make_params([(40,), (3,), (0,), (5,), (70,)])  # 2, 1, 0, 1 and 3 tiles
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None])
    assert launches == [7]
    for pattern, expected in (
        ([True, False, True, True, True], [2, 4]),
        ([False, True, True, True, False], [2]),
        ([True, True, False, True, True], [7]),  # the one between is empty
        ([True, False, False, False, True], [2, 3]),
        ([False] * 5, []),
    ):
        launches.clear()
        run(optimizer, [pattern])
        assert launches == expected


def test_non_contiguous_parameters(rule: CoordinatewiseLSTM) -> None:
    base = [torch.randn(5, 7), torch.randn(2, 3, 4, 5), torch.randn(40)]
    views = [base[0].t(), base[1].contiguous(memory_format=torch.channels_last), base[2][::2]]
    params = [nn.Parameter(view) for view in views]
    assert not any(p.is_contiguous() for p in params)
    expected, _ = by_hand(rule, [view.contiguous() for view in views], [None] * 3)
    skipped = base[2][1::2].clone()
    run(LearnedOptimizer(params, rule), [None] * 3)
    assert_same(params, expected)
    assert_same([base[2][1::2]], [skipped])


def test_gradients_may_be_non_contiguous_or_have_a_graph(rule: CoordinatewiseLSTM) -> None:
    (p,), (q,) = make_params([(4, 6)]), make_params([(4, 6)])
    q.data.copy_(p.data)
    grad = torch.randn(6, 4, requires_grad=True)
    p.grad, q.grad = grad.t(), grad.detach().t().contiguous()
    LearnedOptimizer([p], rule).step()
    LearnedOptimizer([q], rule).step()
    assert_same([p], [q])
    assert p.is_leaf
    assert p.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_affect_their_coordinates_only(rule: CoordinatewiseLSTM, bad: float) -> None:
    params = make_params([(33,), (5,)])
    clean, _ = by_hand(rule, params, [None] * 3)
    optimizer = LearnedOptimizer(params, rule)
    for step in range(3):
        set_grads(params, step)
        if step == 1:
            params[0].grad[32] = bad
        optimizer.step()
    assert params[0][32].isnan()
    assert_same([params[0][:32], params[1]], [clean[0][:32], clean[1]])


def test_mixed_dtypes_in_one_group(rule: CoordinatewiseLSTM) -> None:
    params = [*make_params([(5,), (33,)]), *make_params([(7,)], torch.float64), *make_params([(9,)], torch.bfloat16)]
    params = [params[2], params[0], params[3], params[1]]
    expected, states = by_hand(rule, params, [None, [True, False, True, True], None])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None, [True, False, True, True], None])
    assert_same(params, expected)
    assert_state(optimizer, params, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bfloat16_state_gives_the_bits_of_the_rule(dtype: torch.dtype) -> None:
    rule, params = make_rule(**BFLOAT16_STATE), make_params([(32,), (4, 16), (96,)], dtype)
    expected, state = all_at_once(rule, params, 4)
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None] * 4)
    for p, q in zip(params, expected, strict=True):
        assert_same_bits("params", p, q)
    assert_same_bits("state", torch.cat([optimizer.state[p]["lstm"] for p in params]), state.data)


def test_bfloat16_state_for_tensors_of_odd_sizes_and_skipped_parameters() -> None:
    rule, pattern = make_rule(**BFLOAT16_STATE), [i % 3 > 0 for i in range(len(ODD_SHAPES) + 1)]
    params = [*make_params(ODD_SHAPES), *make_params([(7,)], torch.float64)]
    expected, states = by_hand(rule, params, [None, pattern, None])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None, pattern, None])
    assert [optimizer.state[p]["lstm"].dtype for p in params] == [torch.bfloat16] * len(ODD_SHAPES) + [torch.float64]
    # Other bits of a matrix product may round to a neighbour in bfloat16, at most 2^-7 away.
    assert_same(params, expected, {"rtol": 0, "atol": 1e-3})
    assert_state(optimizer, params, states, {"rtol": 2**-7, "atol": 2**-8})


def test_bfloat16_state_on_a_backend_that_does_not_serve_it_raises_and_moves_nothing() -> None:
    params = make_params([(33,), (5,)])
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"backend 'cpp' cannot run: .* no bfloat16 state"):
        run(LearnedOptimizer(params, make_rule(backend="cpp", bfloat16_state=True)), [None])
    assert_same(params, before)


# ------------------------------------------------------------------------------------------------- optimizer interface


def test_is_a_torch_optimizer(rule: CoordinatewiseLSTM) -> None:
    optimizer = LearnedOptimizer(make_params([(3,)]), rule)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults["lr"] == optimizer.param_groups[0]["lr"] == 1.0
    assert "lr: 1.0" in repr(optimizer)


def test_step_without_gradients_does_nothing(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(3,), (4,)])
    before = [p.detach().clone() for p in params]
    optimizer = LearnedOptimizer(params, rule)
    assert optimizer.step() is None
    assert_same(params, before)
    assert not optimizer.state


def test_zero_grad(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(3,)])
    optimizer = LearnedOptimizer(params, rule)
    set_grads(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad is not None
    assert not params[0].grad.any()
    optimizer.zero_grad()
    assert params[0].grad is None


def test_closure_runs_with_gradients_and_its_value_is_returned(rule: CoordinatewiseLSTM) -> None:
    (p,) = make_params([(5,)])
    optimizer = LearnedOptimizer([p], rule)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(before.square().sum().item())
    q, state = before, rule.init_state(before)
    with torch.no_grad():
        q, state = rule(q, 2 * before, state)
    assert_same([p], [q])


def test_groups_have_multipliers_of_their_own(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,), (40,), (6,)])
    before = [p.detach().clone() for p in params]
    expected, _ = by_hand(rule, params, [None])
    optimizer = LearnedOptimizer([{"params": params[:2]}, {"params": params[2:], "lr": 0.25}], rule, lr=0.5)
    run(optimizer, [None])
    for p, q, start, lr in zip(params, expected, before, (0.5, 0.5, 0.25), strict=True):
        torch.testing.assert_close(p.detach() - start, lr * (q - start), rtol=1e-4, atol=1e-7)


def test_lr_zero_moves_the_state_only(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,)])
    before = [p.detach().clone() for p in params]
    _, states = by_hand(rule, params, [None])
    optimizer = LearnedOptimizer(params, rule, lr=0)
    run(optimizer, [None])
    assert_same(params, before)
    assert_state(optimizer, params, states)


def test_add_param_group_in_mid_run(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,), (40,)])
    optimizer = LearnedOptimizer(params[:1], rule)
    run(optimizer, [None] * 2)
    optimizer.add_param_group({"params": params[1], "lr": 1.0})
    late = copy.deepcopy(params[1])
    run(optimizer, [None] * 2, first=2)
    q, state = late.detach(), rule.init_state(late)
    with torch.no_grad():
        for step in (2, 3):
            generator = torch.Generator().manual_seed(1000 * step + 1)
            q, state = rule(q, torch.randn(40, generator=generator, dtype=torch.float64).float(), state)
    assert_same([params[1]], [q])
    assert [optimizer.state[p]["step"] for p in params] == [4, 2]


def test_parameters_appended_to_a_group_in_place(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,), (40,)])
    expected, _ = by_hand(rule, params, [[True, False], None])
    optimizer = LearnedOptimizer(params[:1], rule)
    run(optimizer, [[True]])
    optimizer.param_groups[0]["params"].append(params[1])
    run(optimizer, [None], first=1)
    assert_same(params, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5, eta_min=0.1),
        lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    ],
    ids=["StepLR", "CosineAnnealingLR", "LambdaLR"],
)
def test_schedulers_drive_the_multiplier(rule: CoordinatewiseLSTM, make: Callable[[Any], Any]) -> None:
    params = make_params([(5, 7)])
    q, state = params[0].detach().clone(), rule.init_state(params[0])
    optimizer = LearnedOptimizer(params, rule, lr=2.0)
    scheduler, multipliers = make(optimizer), []
    for step in range(6):
        lr = scheduler.get_last_lr()[0]
        multipliers.append(lr)
        set_grads(params, step)
        with torch.no_grad():
            new, state = rule(q, params[0].grad, state)
            q = q + lr * (new - q)
        optimizer.step()
        scheduler.step()
    assert len(set(multipliers)) > 2
    torch.testing.assert_close(params[0].detach(), q, rtol=1e-5, atol=1e-6)


def test_a_rule_shared_by_several_optimizers(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,), (40,)])
    expected, _ = by_hand(rule, params, [None] * 3)
    optimizers = [LearnedOptimizer([p], rule) for p in params]
    for step in range(3):
        set_grads(params, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_same(params, expected)
    with torch.no_grad():
        rule.head.weight.zero_()
        rule.head.bias.zero_()  # a rule that is trained meanwhile: the next step uses its new weights
    run(optimizers[0], [None])
    assert_same(params, expected)


def test_hooks_of_the_base_class(rule: CoordinatewiseLSTM) -> None:
    calls: list[str] = []
    optimizer = LearnedOptimizer(make_params([(3,)]), rule)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, saved: calls.append(f"saved {HEADER in saved}"))
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: {**saved, HEADER: {**saved[HEADER], "hidden_size": 6}})
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    run(optimizer, [None])
    everywhere.remove()
    saved = optimizer.state_dict()
    saved[HEADER]["hidden_size"] = 7  # the hook above mends it before it is checked
    optimizer.load_state_dict(saved)
    assert calls == ["pre", "post", "global", "save", "saved True", "loaded"]


def test_compiled_model_and_compiled_training_step(rule: CoordinatewiseLSTM) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 1))
    others = [copy.deepcopy(model) for _ in range(2)]

    def train(net: nn.Module, forward: Callable[[Tensor], Tensor], compiled: bool) -> None:
        optimizer = LearnedOptimizer(net.parameters(), rule)

        def training_step(x: Tensor) -> None:
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            optimizer.step()

        if compiled:
            training_step = torch.compile(training_step, backend="aot_eager")
        for step in range(3):
            training_step(torch.linspace(-1, 1, 48).view(8, 6) * (step + 1))
        assert all(entry["step"] == 3 for entry in optimizer.state.values())

    train(model, model, False)
    train(others[0], torch.compile(others[0], backend="aot_eager"), False)
    train(others[1], others[1], True)
    for other in others:
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_autocast_loop(rule: CoordinatewiseLSTM) -> None:
    model = nn.Linear(6, 3)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(4, 6)).float().square().mean()
        loss.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(entry["lstm"].dtype == torch.float32 for entry in optimizer.state.values())


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf, -math.inf])
def test_bad_learning_rates(rule: CoordinatewiseLSTM, lr: float) -> None:
    params = make_params([(3,), (4,)])
    with pytest.raises(ValueError, match=f"lr must be finite and at least 0, got {lr}"):
        LearnedOptimizer(params, rule, lr=lr)
    optimizer = LearnedOptimizer(params[:1], rule)
    with pytest.raises(ValueError, match="lr of group 1 must be finite and at least 0"):
        optimizer.add_param_group({"params": params[1:], "lr": lr})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:]})
    optimizer.param_groups[1]["lr"] = lr
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    with pytest.raises(ValueError, match="lr of group 1 must be finite and at least 0"):
        optimizer.step()
    assert_same(params, before)


@pytest.mark.parametrize("lr", ["0.1", None, torch.ones(2)], ids=["str", "None", "tensor"])
def test_learning_rates_of_another_type(rule: CoordinatewiseLSTM, lr: Any) -> None:
    with pytest.raises(TypeError, match="lr must be a number"):
        LearnedOptimizer(make_params([(3,)]), rule, lr=lr)


def test_learning_rate_as_a_tensor(rule: CoordinatewiseLSTM) -> None:
    params, others = make_params([(3,)]), make_params([(3,)])
    others[0].data.copy_(params[0].data)
    run(LearnedOptimizer(params, rule, lr=0.5), [None])
    run(LearnedOptimizer([{"params": others, "lr": torch.tensor(0.5)}], rule), [None])
    assert_same(params, others)


def test_a_rule_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"rule must be a metakern.rules.Rule, got Linear"):
        LearnedOptimizer(make_params([(3,)]), nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, dtype=torch.int64), "int64"),
        (torch.eye(3).to_sparse(), "sparse_coo"),
    ],
    ids=["complex", "integer", "sparse"],
)
def test_parameters_that_no_kernel_serves(rule: CoordinatewiseLSTM, tensor: Tensor, what: str) -> None:
    optimizer = LearnedOptimizer(make_params([(3,)]), rule)
    with pytest.raises(TypeError, match=rf"parameter 0 of group 1 .* must be dense and float32.*got torch\.{what}"):
        optimizer.add_param_group({"params": [tensor]})
    with pytest.raises(TypeError, match=r"parameter 'weight' .* must be dense and float32"):
        LearnedOptimizer([("weight", tensor)], rule)
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_before_anything_moves(rule: CoordinatewiseLSTM) -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 2), "table": nn.Embedding(10, 4, sparse=True)})
    optimizer = LearnedOptimizer(model.named_parameters(), rule)
    model["head"](model["table"](torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=r"gradient of parameter 'table.weight' \[10, 4\] must be dense.*sparse_coo"):
        optimizer.step()
    assert_same(list(model.parameters()), before)
    assert all(entry["step"] == 0 for entry in optimizer.state.values())


def test_parameters_of_another_device(rule: CoordinatewiseLSTM) -> None:
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* on the device of the rule, cpu, got meta"):
        LearnedOptimizer([nn.Parameter(torch.zeros(3, device="meta"))], rule)
    params = make_params([(3,)])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None])
    before = params[0].detach().clone()
    optimizer.rule.to("meta")
    with pytest.raises(ValueError, match="rule must be on the device of the parameters of group 0, cpu, got meta"):
        run(optimizer, [None])
    assert_same(params, [before])


def test_a_parameter_given_twice(rule: CoordinatewiseLSTM) -> None:
    (p,) = make_params([(3,)])
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="group 0 must hold each parameter once"),
    ):
        LearnedOptimizer([p, p], rule)
