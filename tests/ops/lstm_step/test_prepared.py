"""Small graph-free steps of a rule with cached packed weights."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from metakern import build_info
from metakern.core.backend import _C, is_compiled
from metakern.ops import LSTMState, lstm_step, lstm_step_
from metakern.ops.lstm_step.prepared import MAX_COORDINATES, PreparedStep
from metakern.rules import CoordinatewiseLSTM

pytestmark = pytest.mark.skipif(not is_compiled(), reason="only the compiled kernels have prepared steps")

OPTIONS = ("log_sign", 10.0, "highest")


def problem(n, **settings):
    torch.manual_seed(n)
    rule = CoordinatewiseLSTM(**settings)
    params, grads = torch.randn(n), torch.randn(n)
    state = rule.init_state(params)
    return rule, params, grads, LSTMState(torch.randn_like(state.data), n)


def expected(rule, params, grads, state):
    """The operator's step, which packs the weights at every call."""
    options = {name: getattr(rule, name) for name in ("preprocess", "preprocess_scale", "output_scale", "precision")}
    with torch.no_grad():
        return lstm_step(params, grads, state, [w.detach().clone() for w in rule.weights()], **options)


def serves(rule, params, grads, state):
    """Whether the prepared step takes a call of the rule."""
    prepared = PreparedStep(rule.hidden_size, rule.num_layers, OPTIONS)
    return prepared(params, grads, state, rule.weights(), 0.1) is not None


@torch.no_grad()
def check(rule, params, grads, state):
    new_params, new_state = rule(params, grads, state)
    right_params, right_state = expected(rule, params, grads, state)
    assert torch.equal(new_params, right_params)
    n = params.numel()  # lanes behind the last coordinate carry no meaning
    lanes = [x.movedim(-1, 1).flatten(0, 1)[:n] for x in (new_state.data, right_state.data)]
    assert torch.equal(*lanes)
    return new_params, new_state


@pytest.mark.parametrize("capability", build_info().get("cpu_capabilities", ()))
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 32, 33, 100, 257, 1000])
def test_the_bits_are_those_of_the_operator(n, capability):
    before = _C.cpu_capability()
    _C.set_cpu_capability(capability)
    try:
        rule, params, grads, state = problem(n)
        assert serves(rule, params, grads, state)
        for _ in range(3):
            params, state = check(rule, params, grads, state)
    finally:
        _C.set_cpu_capability(before)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": 1, "num_layers": 1},
        {"hidden_size": 7, "num_layers": 3, "preprocess": "log_and_clip"},
        {"hidden_size": 64, "num_layers": 2, "preprocess": "none"},
        {"preprocess_scale": 5.0, "output_scale": -0.5},
    ],
    ids=str,
)
def test_every_size_and_option(settings):
    check(*problem(50, **settings))


@pytest.mark.parametrize("capability", build_info().get("cpu_capabilities", ()))
@pytest.mark.parametrize("n", [1, 16, 33, 300])
@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_a_step_in_place_has_the_bits_of_the_operator(n, lr, capability):
    before = _C.cpu_capability()
    _C.set_cpu_capability(capability)
    try:
        rule, params, grads, state = problem(n)
        prepared = PreparedStep(rule.hidden_size, rule.num_layers, OPTIONS)
        ours, theirs = (LSTMState(state.data.clone(), n) for _ in range(2))
        p, right = params.clone(), params.clone()
        versions = p._version, ours.data._version
        assert prepared.step_(p, grads, ours, rule.weights(), 0.1 * lr)
        assert (p._version, ours.data._version) == (versions[0] + 1, versions[1] + 1)
        lstm_step_(right, grads, theirs, rule.weights(), output_scale=0.1 * lr)
        assert torch.equal(p, right)
        assert torch.equal(ours.data, theirs.data)
        rule.step_(params, grads, state, lr)
        assert torch.equal(params, right)
    finally:
        _C.set_cpu_capability(before)


def test_gradients_may_be_the_parameters_memory_and_nothing_else_may_be_shared():
    rule, params, _, state = problem(40)
    right, _ = check(rule, params, params.clone(), state)
    rule.step_(params, params, state)
    assert torch.equal(params, right)
    memory = torch.randn(100)
    for p, g, s in (
        (memory[:40], memory[1:41], state),
        (state.data.view(-1)[:40], torch.randn(40), state),
        (torch.randn(40), state.data.view(-1)[:40], state),
    ):
        prepared, kept = PreparedStep(20, 2, OPTIONS), state.data.clone()
        assert not prepared.step_(p, g, s, rule.weights(), 0.1)
        with pytest.raises(RuntimeError, match="share"):
            rule.step_(p, g, s)
        assert torch.equal(state.data, kept)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, "1", None])
def test_an_output_scale_that_the_operator_refuses_is_left_to_it(scale):
    rule, params, grads, state = problem(9)
    check(rule, params, grads, state)
    rule.output_scale = scale
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match="output_scale"):
        rule(params, grads, state)


def test_padding_is_zero_as_the_operator_leaves_it():
    rule, params, grads, state = problem(20)
    with torch.no_grad():
        assert not rule(params, grads, state)[1].data[..., 20:].any()


def edits():
    """Ways to change a rule's weights, with and without changing version counters."""

    def swap(rule):
        rule.lstm.weight_hh_l0 = nn.Parameter(torch.randn_like(rule.lstm.weight_hh_l0))

    def other_memory(rule):
        rule.head.weight.data = torch.randn_like(rule.head.weight)

    def same_memory_in_another_order(rule):
        memory = rule.lstm.weight_hh_l1.data.clone()
        rule.lstm.weight_hh_l1.data = memory
        rule(*problem(9)[1:])
        rule.lstm.weight_hh_l1.data = memory[:1].expand(80, 20)

    return {
        "in place": lambda rule: rule.lstm.weight_ih_l0.mul_(2),
        "past the version counter": lambda rule: rule.lstm.bias_hh_l1.data.add_(1),
        "one element": lambda rule: rule.head.bias.data.fill_(3),
        "through numpy": lambda rule: rule.head.weight.detach().numpy().__setitem__((0, 5), 9),
        "another parameter": swap,
        "other memory": other_memory,
        "same memory": same_memory_in_another_order,
        "a state_dict": lambda rule: rule.load_state_dict(CoordinatewiseLSTM().state_dict()),
        "an option": lambda rule: setattr(rule, "output_scale", 0.7),
        "its preprocessing's scale": lambda rule: setattr(rule, "preprocess_scale", 3.0),
    }


@pytest.mark.parametrize("edit", edits())
def test_a_change_of_the_rule_is_seen(edit):
    rule, params, grads, state = problem(9)
    before, _ = check(rule, params, grads, state)
    with torch.no_grad():
        edits()[edit](rule)
    after, _ = check(rule, params, grads, state)
    assert not torch.equal(before, after)


def test_weights_of_another_shape_or_dtype_are_refused_as_ever():
    rule, params, grads, state = problem(9)
    check(rule, params, grads, state)
    rule.lstm.weight_ih_l0.data = torch.zeros(80, 1)
    with torch.no_grad(), pytest.raises(ValueError, match="weight_ih_l0"):
        rule(params, grads, state)
    rule, params, grads, state = problem(9)
    rule.head.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    with torch.no_grad(), pytest.raises(TypeError, match=r"head\.bias"):
        rule(params, grads, state)


def test_an_option_out_of_range_is_refused_as_ever():
    rule, params, grads, state = problem(9)
    check(rule, params, grads, state)
    rule.preprocess_scale = -1.0
    with torch.no_grad(), pytest.raises(ValueError, match="preprocess_scale"):
        rule(params, grads, state)


@pytest.mark.parametrize(
    "other",
    [
        lambda p, g, s: (p[:-1], g, s),
        lambda p, g, s: (p, g.double(), s),
        lambda p, g, s: (p, g, LSTMState(s.data[:, :1], s.num_coordinates)),
        lambda p, g, s: (p, g, LSTMState(s.data, s.num_coordinates + 1)),
    ],
)
def test_arguments_that_do_not_fit_are_left_to_the_operators_checks(other):
    rule, params, grads, state = problem(40)
    arguments = other(params, grads, state)
    assert not serves(rule, *arguments)
    with torch.no_grad(), pytest.raises((ValueError, TypeError)):
        rule(*arguments)


def test_what_is_not_plain_goes_the_operators_way():
    rule, params, grads, state = problem(40)
    plain = state.data.contiguous()
    every_other = torch.stack([params, grads], 1)[:, 0]
    assert not every_other.is_contiguous()
    negated = torch._neg_view(params)
    large = torch.zeros(MAX_COORDINATES + 1)
    strided = LSTMState(plain.transpose(2, 3).contiguous().transpose(2, 3), 40)
    for arguments in (
        (every_other, grads, state),
        (negated, grads, state),
        (params, negated, state),
        (params, grads, strided),
        (large, large, rule.init_state(large)),
        (params[:0], grads[:0], rule.init_state(params[:0])),
    ):
        assert not serves(rule, *arguments)
        check(rule, *arguments)


@torch.no_grad()
def test_modes_and_transforms_go_the_operators_way():
    rule, params, grads, state = problem(40)
    right, _ = check(rule, params, grads, state)
    seen = []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Functions():
        assert torch.equal(rule(params, grads, state)[0], right)
    assert seen
    batched = torch.func.vmap(lambda g: rule(params, g, state)[0])(grads.expand(2, -1))
    torch.testing.assert_close(batched, right.expand(2, -1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(rule(params, grads, state)[0]) is not torch.Tensor
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        rule(forward_ad.make_dual(params, grads), grads, state)


def test_a_graph_is_recorded_where_it_is_wanted():
    rule, params, grads, state = problem(40)
    check(rule, params, grads, state)
    new_params, _ = rule(params, grads, state)
    new_params.sum().backward()
    assert all(p.grad is not None for p in rule.parameters())


def test_copies_of_a_rule_prepare_for_themselves():
    rule, params, grads, state = problem(40)
    right, _ = check(rule, params, grads, state)
    for copied in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert torch.equal(check(copied, params, grads, state)[0], right)
        with torch.no_grad():
            copied.head.bias.add_(1)
        assert not torch.equal(check(copied, params, grads, state)[0], right)
    assert torch.equal(check(rule, params, grads, state)[0], right)
    assert not any("prepared" in name for name in rule.state_dict())


def test_threads_share_a_rule():
    rule, params, grads, state = problem(600)
    right, _ = check(rule, params, grads, state)
    equal = []

    @torch.no_grad()
    def work():
        equal.append(all(torch.equal(rule(params, grads, state)[0], right) for _ in range(200)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 4


def test_the_kernel_wants_its_weights():
    kernel = _C.PreparedLstmStep(20, 2, 1, 10.0)
    with pytest.raises(ValueError, match="set before"):
        kernel.run(1, 0.1, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="10 addresses, got 1"):
        kernel.set_weights([0])
