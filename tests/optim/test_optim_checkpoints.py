"""LearnedOptimizer's state: memory, checkpoints, copies, changing parameters and rules."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from metakern.ops import pack_state
from metakern.ops.lstm_step.state import TILE_LANES
from metakern.optim import FORMAT_VERSION, HEADER, LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM
from tests.conftest import assert_same_bits
from tests.optimizers import (
    BFLOAT16_STATE,
    ODD_SHAPES,
    all_at_once,
    assert_same,
    by_hand,
    make_params,
    make_rule,
    roundtrip,
    run,
    seeded,  # noqa: F401  # a fixture
    set_grads,
    small_rule,  # noqa: F401  # a fixture
)

# -------------------------------------------------------------------------------------------------------------- memory


def test_state_lives_in_one_arena_and_takes_no_memory_for_frozen_parameters(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(33,), (5,), (1000,)])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [[True, True, False]])
    first, second = (optimizer.state[p]["lstm"] for p in params[:2])
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.shape == (2, 2, 2, 6, TILE_LANES)
    assert first.untyped_storage().nbytes() == 3 * 2 * 2 * 6 * TILE_LANES * 4
    assert params[2] not in optimizer.state
    before = first.clone()
    run(optimizer, [[False, True, True]])  # the third joins: a new arena, the same state
    assert_same([optimizer.state[params[0]]["lstm"][:, :, :, :, 0]], [before[:, :, :, :, 0]])
    assert optimizer.state[params[2]]["step"] == 1


def test_bfloat16_state_takes_half_the_memory() -> None:
    sizes = []
    for options in ({}, BFLOAT16_STATE):
        params = make_params([(33,), (5,)])
        optimizer = LearnedOptimizer(params, make_rule(**options))
        run(optimizer, [None])
        sizes.append(optimizer.state[params[0]]["lstm"].untyped_storage().nbytes())
    assert sizes[0] == 2 * sizes[1] == 3 * 2 * 2 * 6 * TILE_LANES * 4


def test_an_outgrown_arena_is_freed_at_once(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(33,), (5,)])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [[True, False]])
    gc.disable()
    try:
        memory = weakref.ref(optimizer.state[params[0]]["lstm"]._base)
        run(optimizer, [[True, True]])
        assert memory() is None
    finally:
        gc.enable()


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("options", [{}, BFLOAT16_STATE], ids=["float32", "bfloat16"])
def test_resumes_to_the_same_bits(options: dict[str, Any]) -> None:
    rule = make_rule(**options)
    patterns = [None, [i % 3 > 0 for i in range(len(ODD_SHAPES))], None, [i % 2 > 0 for i in range(len(ODD_SHAPES))]]
    params = make_params(ODD_SHAPES)
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.5}]
    optimizer = LearnedOptimizer(groups, rule)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    run(optimizer, patterns)
    scheduler.step()
    saved, weights = roundtrip(optimizer.state_dict()), [p.detach().clone() for p in params]
    run(optimizer, patterns, first=4)

    resumed = [nn.Parameter(w) for w in weights]
    fresh = LearnedOptimizer([{"params": resumed[:4]}, {"params": resumed[4:]}], copy.deepcopy(rule))
    fresh.load_state_dict(saved)
    assert [group["lr"] for group in fresh.param_groups] == [0.9, 0.45]
    run(fresh, patterns, first=4)
    assert_same(resumed, params)
    for key, entry in optimizer.state_dict()["state"].items():
        other = fresh.state_dict()["state"][key]
        assert entry["step"] == other["step"]
        assert entry["h"].dtype == (torch.bfloat16 if rule.bfloat16_state else torch.float32)
        assert_same([entry["h"], entry["c"]], [other["h"], other["c"]])


def test_a_checkpoint_is_a_copy_with_a_header(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,)])  # one tile, where unpacking alone gives a view
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None])
    saved = optimizer.state_dict()
    assert saved[HEADER] == {"format_version": FORMAT_VERSION, "hidden_size": 6, "num_layers": 2}
    assert set(saved["state"][0]) == {"step", "h", "c"}
    kept = copy.deepcopy(saved)
    run(optimizer, [None], first=1)
    assert_same([saved["state"][0]["h"], saved["state"][0]["c"]], [kept["state"][0]["h"], kept["state"][0]["c"]])
    optimizer.load_state_dict(saved)
    run(optimizer, [None], first=1)
    assert_same([saved["state"][0]["h"], saved["state"][0]["c"]], [kept["state"][0]["h"], kept["state"][0]["c"]])


@pytest.mark.parametrize("options", [{}, BFLOAT16_STATE], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_of_the_optimizer(duplicate: Callable[[Any], Any], options: dict[str, Any]) -> None:
    rule = make_rule(**options)
    params = make_params([(5,), (0,), (40,)])
    optimizer = LearnedOptimizer(params, rule, lr=0.5)
    run(optimizer, [None, [True, True, False]])
    model, twin = duplicate((params, optimizer))
    assert all(p is q for p, q in zip(model, twin.param_groups[0]["params"], strict=True))
    for o in (optimizer, twin):
        run(o, [None] * 2, first=2)
    assert_same(model, params)
    assert twin.rule is not rule
    saved = roundtrip(twin.state_dict())
    assert saved["state"][0]["step"] == 4
    twin.load_state_dict(saved)
    run(twin, [None], first=4)
    run(optimizer, [None], first=4)
    assert_same(model, params)


def test_pickle_holds_the_state_once(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(40,)] * 30)
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None])
    state = 30 * 64 * 2 * 2 * 6 * 4
    assert len(pickle.dumps(optimizer)) < 1.5 * state


# --------------------------------------------------------------------------- parameters and state that change meanwhile


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str
)
def test_dtype_changes_between_checkpoint_and_load(
    rule: CoordinatewiseLSTM, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    params = make_params([(5,), (40,)])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None] * 3)
    saved = optimizer.state_dict()
    converted = [nn.Parameter(p.detach().to(dtype)) for p in params]
    expected = [p.detach().clone() for p in converted]
    other = LearnedOptimizer(converted, rule)
    other.load_state_dict(saved)
    loaded = other.state_dict()["state"]
    for i in range(2):
        for key in ("h", "c"):
            assert loaded[i][key].dtype == state_dtype
            assert_same([loaded[i][key]], [saved["state"][i][key].to(state_dtype)])  # no bit of the state is lost
    states = [s.to(state_dtype) for s in by_hand(rule, make_params([(5,), (40,)]), [None] * 3)[1]]
    run(other, [None], first=3)
    with torch.no_grad():
        for i, p in enumerate(converted):
            expected[i], _ = rule(expected[i], p.grad, states[i])
    assert_same(converted, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_changes_in_mid_run_as_by_module_to(rule: CoordinatewiseLSTM, dtype: torch.dtype) -> None:
    model = nn.Linear(5, 3)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    params = list(model.parameters())
    run(optimizer, [None] * 2)
    saved = optimizer.state_dict()
    model.to(dtype)
    twin = copy.deepcopy(model)
    other = LearnedOptimizer(twin.parameters(), rule)
    other.load_state_dict(saved)
    for o in (optimizer, other):
        run(o, [[True, False], None], first=2)
    assert_same(params, list(twin.parameters()))
    assert params[0].dtype == dtype
    assert all(
        e["lstm"].dtype == (torch.float64 if dtype.itemsize == 8 else torch.float32) for e in optimizer.state.values()
    )


@pytest.mark.parametrize(
    ("before", "after", "dtype", "state_dtype"),
    [
        ({}, BFLOAT16_STATE, torch.float32, torch.bfloat16),
        (BFLOAT16_STATE, {"backend": "reference"}, torch.float32, torch.float32),
        (BFLOAT16_STATE, BFLOAT16_STATE, torch.float16, torch.bfloat16),
        (BFLOAT16_STATE, BFLOAT16_STATE, torch.float64, torch.float64),
    ],
    ids=["to bfloat16", "from bfloat16", "bfloat16 for float16", "bfloat16 for float64"],
)
def test_bfloat16_state_changes_between_checkpoint_and_load(
    before: dict[str, Any], after: dict[str, Any], dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    params = make_params([(64,), (4, 8)])
    first, second = make_rule(**before), make_rule(**after)
    second.load_state_dict(first.state_dict())
    optimizer = LearnedOptimizer(params, first)
    run(optimizer, [None] * 3)
    saved = roundtrip(optimizer.state_dict())
    converted = [nn.Parameter(p.detach().to(dtype)) for p in params]
    other = LearnedOptimizer(converted, second)
    other.load_state_dict(saved)
    state = pack_state(*(torch.cat([saved["state"][i][key] for i in range(2)], 1).to(state_dtype) for key in "hc"))
    assert_same_bits("state", torch.cat([other.state[p]["lstm"] for p in converted]), state.data)
    expected, state = all_at_once(second, converted, 2, first=3, state=state)
    run(other, [None] * 2, first=3)
    for p, q in zip(converted, expected, strict=True):
        assert_same_bits("params", p, q)
    assert_same_bits("state", torch.cat([other.state[p]["lstm"] for p in converted]), state.data)


def test_bfloat16_state_survives_a_float32_checkpoint() -> None:
    params = make_params(ODD_SHAPES)
    narrow, wide = (LearnedOptimizer(params, make_rule(**options)) for options in (BFLOAT16_STATE, {}))
    run(narrow, [None] * 2)
    saved = narrow.state_dict()
    wide.load_state_dict(saved)
    narrow.load_state_dict(wide.state_dict())
    again = narrow.state_dict()
    for i in range(len(params)):
        for key in "hc":
            assert_same_bits(key, again["state"][i][key], saved["state"][i][key])


def test_bfloat16_state_turned_on_and_off_in_mid_run() -> None:
    rule, params = make_rule(backend="reference"), make_params([(33,), (5,)])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None])
    for first, bfloat16_state in ((1, True), (3, False)):
        rule.bfloat16_state = bfloat16_state
        twin = LearnedOptimizer([nn.Parameter(p.detach().clone()) for p in params], rule)
        twin.load_state_dict(optimizer.state_dict())
        for o in (optimizer, twin):
            run(o, [[True, False], None], first=first)
        assert_same(params, twin.param_groups[0]["params"])
        state_dtype = torch.bfloat16 if bfloat16_state else torch.float32
        assert all(entry["lstm"].dtype == state_dtype for entry in optimizer.state.values())
    assert [optimizer.state[p]["step"] for p in params] == [5, 3]


def test_new_memory_and_new_shape_of_a_parameter_keep_its_state(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(4, 10)])
    expected, _ = by_hand(rule, [params[0].view(40)], [None] * 3)
    optimizer = LearnedOptimizer(params, rule)
    for step, shape in enumerate([(4, 10), (40,), (5, 8)]):
        params[0].grad = None
        params[0].data = params[0].data.clone().view(shape)
        set_grads(params, step)
        optimizer.step()
    assert_same([params[0].view(40)], expected)


def test_a_parameter_that_grew_is_refused_until_its_state_is_deleted(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(20,), (3,)])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None])
    params[0].grad = None
    params[0].data = torch.randn(25)  # as many tiles as before
    before = params[1].detach().clone()
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 \[25\] must keep the 20 coordinates .* got 25"):
        run(optimizer, [None], first=1)
    assert_same([params[1]], [before])
    del optimizer.state[params[0]]
    run(optimizer, [None], first=1)
    assert [optimizer.state[p]["step"] for p in params] == [1, 2]


def test_state_replaced_by_the_caller_is_used(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(20,), (3,)])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None])
    start = [p.detach().clone() for p in params]
    optimizer.state.clear()
    run(optimizer, [None])
    assert_same(params, by_hand(rule, start, [None])[0])
    start = [p.detach().clone() for p in params]
    for entry in optimizer.state.values():
        entry["lstm"] = torch.zeros_like(entry["lstm"])
    run(optimizer, [None])
    assert_same(params, by_hand(rule, start, [None])[0])


# --------------------------------------------------------------------------------------------------- broken checkpoints


#: What spoils a checkpoint, in place, and the message that it earns.
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "empty": (lambda s: s.clear(), "must be a checkpoint of LearnedOptimizer .* got nothing for 'state'"),
    "no header": (lambda s: s.pop(HEADER), "got nothing for 'learned_optimizer'"),
    "no groups": (lambda s: s.pop("param_groups"), "got nothing for 'param_groups'"),
    "state is a list": (lambda s: s.update(state=[]), "got list for 'state'"),
    "version": (lambda s: s[HEADER].update(format_version=99), "must have format_version 1, 2 or 3, got 99"),
    "H": (lambda s: s[HEADER].update(hidden_size=20), "must have hidden_size 6, got 20"),
    "L": (lambda s: s[HEADER].pop("num_layers"), "must have num_layers 2, got None"),
    "number of groups": (lambda s: s["param_groups"].append({}), "must have 1 parameter groups, got 2"),
    "group without lr": (lambda s: s["param_groups"][0].pop("lr"), r"group 0 of .* keys .* got"),
    "group is a list": (lambda s: s.update(param_groups=[[]]), "group 0 of .* got list"),
    "group lr": (lambda s: s["param_groups"][0].update(lr=-1), "lr of group 0 of state_dict must be finite"),
    "group lr type": (lambda s: s["param_groups"][0].update(lr="x"), "lr of group 0 .* must be a number"),
    "group size": (lambda s: s["param_groups"][0]["params"].pop(), "must have 2 parameters, got 1"),
    "foreign state": (lambda s: s["state"].update({7: {}}), "state of 7 must belong to a parameter"),
    "no c": (lambda s: s["state"][1].pop("c"), r"state of parameter 1 .* keys .* got"),
    "entry": (lambda s: s["state"].update({1: 3}), "state of parameter 1 .* got int"),
    "step": (lambda s: s["state"][0].update(step=-1), "step of parameter 0 .* must be an integer"),
    "numel": (
        lambda s: s["state"][1].update(h=torch.zeros(2, 39, 6)),
        r"h of parameter 1 of group 0 \[40\] must be .*= \[2, 40, 6\], got torch.float32 torch.strided \[2, 39, 6\]",
    ),
    "dtype": (lambda s: s["state"][1].update(c=torch.zeros(2, 40, 6).half()), "c of .* got torch.float16"),
    "no tensor": (lambda s: s["state"][1].update(c=1.0), "c of parameter 1 .* got float"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused_and_change_nothing(rule: CoordinatewiseLSTM, name: str) -> None:
    change, message = BROKEN[name]
    params = make_params([(5,), (40,)])
    optimizer = LearnedOptimizer(params, rule, lr=0.5)
    run(optimizer, [None] * 2)
    good = copy.deepcopy(optimizer.state_dict())
    spoilt = copy.deepcopy(good)
    change(spoilt)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(spoilt)
    now = optimizer.state_dict()
    assert now["param_groups"] == good["param_groups"]
    for i in range(2):
        assert_same([now["state"][i][key] for key in "hc"], [good["state"][i][key] for key in "hc"])
    expected = [p.detach().clone() for p in params]
    twin = LearnedOptimizer([nn.Parameter(p) for p in expected], rule)
    twin.load_state_dict(good)
    run(optimizer, [None], first=2)
    run(twin, [None], first=2)
    assert_same(params, twin.param_groups[0]["params"])


def test_a_checkpoint_of_another_optimizer(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,)])
    with pytest.raises(ValueError, match=r"state_dict must be a dict as .* makes it, got list"):
        LearnedOptimizer(params, rule).load_state_dict([1, 2])  # type: ignore[arg-type]
    adam = torch.optim.Adam(params)
    set_grads(params, 0)
    adam.step()
    with pytest.raises(ValueError, match="must be a checkpoint of LearnedOptimizer"):
        LearnedOptimizer(params, rule).load_state_dict(adam.state_dict())


def test_a_checkpoint_of_a_rule_of_another_size(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,)])
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, [None])
    with pytest.raises(ValueError, match="must have hidden_size 7, got 6"):
        LearnedOptimizer(params, CoordinatewiseLSTM(7, 2)).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="must have num_layers 1, got 2"):
        LearnedOptimizer(params, CoordinatewiseLSTM(6, 1)).load_state_dict(optimizer.state_dict())
