"""lstm_step with other features and another head: every combination of stages against the float64 reference.

Axis legend: N coordinates, H hidden units, L layers, E rows of the stages' own state, K coordinate inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops import lstm_step_staged, lstm_step_staged_, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.staged import COMPILED
from metakern.ops.lstm_step.state import LSTMState, pack_rows, unpack_rows
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, assert_same_bits
from tests.problems import make_problem, state_dtype

FEATURES, HEADS = list(reference.FEATURES), list(reference.HEADS)

#: The pairs with stages of their own: RNNProp's and Meta-LSTM's.
OWN_PAIRS = [("moments", "tanh"), ("log_sign_with_loss", "gates")]

#: The pairs that the kernels are compiled for (csrc/lstm_step/stages.h).
PAIRS = [*((name, "add") for name in reference.PREPROCESS), *OWN_PAIRS]

SCALARS = reference.Scalars(features_scale=10.0, beta1=0.9, beta2=0.95, head_scale=0.1)


@dataclass
class Staged:
    """Arguments of one call, and the gradients of its results that backward starts from."""

    features: str
    head: str
    params: Tensor
    grads: Tensor
    h: Tensor
    c: Tensor
    stage_state: Tensor
    coordinate_inputs: Tensor
    weights: list[Tensor]
    cotangents: list[Tensor]  # of new params [N], new h, new c [L, N, H], new stage state [E, N]

    def stages(self) -> tuple[reference.FeaturesStage, reference.HeadStage]:
        return reference.FEATURES[self.features], reference.HEADS[self.head]

    def options(self) -> tuple[Any, ...]:
        return FEATURES.index(self.features), HEADS.index(self.head), *SCALARS, 0

    def keywords(self) -> dict[str, Any]:
        return {"features": self.features, "head": self.head, **SCALARS._asdict()}


def make_staged(
    n: int,
    features: str,
    head: str,
    dtype: torch.dtype = torch.float32,
    *,
    hidden: int = 20,
    layers: int = 2,
) -> Staged:
    """Random inputs; the state of the moments is one that gradients have led to, so v is positive."""
    kind = features if features in reference.PREPROCESS else "log_sign" if head == "gates" else "none"
    plain = make_problem(n, hidden, layers, dtype, preprocess=kind)
    first, last = reference.FEATURES[features], reference.HEADS[head]
    generator = torch.Generator().manual_seed(n)
    work = state_dtype(dtype)

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(work)

    weights = list(plain.weights)
    weights[0] = uniform(4 * hidden, first.inputs) * 0.3
    weights[-2:] = [uniform(last.outputs, hidden) * 0.3, uniform(last.outputs)]
    weights += [uniform(stage.weights) for stage in (first, last) if stage.weights]
    states = uniform(first.states + last.states, n)
    if features == "moments":
        steps = torch.arange(n, dtype=torch.float64) % 5 + 1  # every coordinate has its own number
        states[1] = states[1].square() + 0.01
        states[2:4] = torch.stack([1 - beta**steps for beta in SCALARS[1:3]]).to(work)
    losses = 10 ** (uniform(first.coordinate_inputs + last.coordinate_inputs, n) * 5)
    return Staged(
        *(features, head, plain.params, plain.grads, plain.h, plain.c, states, losses, weights),
        [*plain.cotangents, uniform(*states.shape)],
    )


def by_reference(staged: Staged) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Named results and gradients in float64."""
    names = ["params", "grads", "h", "c", "stage_state", "coordinate_inputs"]
    leaves = [getattr(staged, name).double().requires_grad_() for name in names]
    weights = [w.double().requires_grad_() for w in staged.weights]
    results = reference.staged_step(*leaves, weights, *staged.stages(), SCALARS)
    gradients = torch.autograd.grad(
        results, [*leaves, *weights], [x.double() for x in staged.cotangents], materialize_grads=True
    )
    return (
        dict(zip(["params", "h", "c", "stage_state"], results, strict=True)),
        dict(zip([*names, *(f"weights[{i}]" for i in range(len(weights)))], gradients, strict=True)),
    )


def raw_inputs(staged: Staged) -> list[Any]:
    """The tensors in the operators' form."""
    state = pack_state(staged.h, staged.c).data
    own = (pack_rows(staged.stage_state), staged.coordinate_inputs, staged.weights)
    return [staged.params, staged.grads, state, *own]


def by_operators(
    staged: Staged, tail: float = 0.0, operators: Any = torch.ops.metakern, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same by the compiled operators, or others; ``tail`` stands behind the last coordinate of the states."""
    n = staged.params.numel()
    inputs, grad_state = raw_inputs(staged), pack_state(*staged.cotangents[1:3]).data
    grad_stage_state = pack_rows(staged.cotangents[3])
    for data in (inputs[2], inputs[3], grad_state, grad_stage_state):
        data[-1:, ..., (n - 1) % 32 + 1 :] = tail
    params, new_state, stage_state = operators.lstm_step_staged(*inputs, *staged.options(), **options)
    assert not stage_state[-1:, :, (n - 1) % 32 + 1 :].any()
    h, c = unpack_state(LSTMState(new_state, n))
    *gradients, grad_weights = operators.lstm_step_staged_backward(
        *(staged.cotangents[0], grad_state, grad_stage_state, *inputs, *staged.options()), **options
    )
    grad_params, grad_grads, grad_state, grad_stage_state, grad_inputs = gradients
    grad_h, grad_c = unpack_state(LSTMState(grad_state, n))
    named = dict(zip(("params", "grads", "h", "c"), (grad_params, grad_grads, grad_h, grad_c), strict=True))
    named |= {"stage_state": unpack_rows(grad_stage_state, n), "coordinate_inputs": grad_inputs}
    named |= {f"weights[{i}]": w for i, w in enumerate(grad_weights)}
    return {"params": params, "h": h, "c": c, "stage_state": unpack_rows(stage_state, n)}, named


def assert_agree(staged: Staged, got: Sequence[dict[str, Tensor]]) -> None:
    for kind, ours, expected, tolerances in zip(
        ("new", "gradient of"), got, by_reference(staged), (FORWARD_TOLERANCE, GRADIENT_TOLERANCE), strict=True
    ):
        for name, value in expected.items():
            assert_close(f"{kind} {name}", ours[name], value, tolerances[ours[name].dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("features", "head"), PAIRS)
def test_every_pair_of_stages_equals_the_reference(
    features: str, head: str, dtype: torch.dtype, capability: str
) -> None:
    staged = make_staged(111, features, head, dtype)
    assert_agree(staged, by_operators(staged))


@pytest.mark.parametrize(("features", "head"), OWN_PAIRS)
@pytest.mark.parametrize(("n", "hidden", "layers"), [(1, 1, 1), (31, 1, 3), (33, 7, 3), (64, 64, 1), (1000, 5, 2)])
def test_sizes(features: str, head: str, n: int, hidden: int, layers: int, capability: str) -> None:
    staged = make_staged(n, features, head, torch.float64, hidden=hidden, layers=layers)
    assert_agree(staged, by_operators(staged))


@pytest.mark.parametrize(("features", "head"), OWN_PAIRS)
def test_no_coordinates(features: str, head: str) -> None:
    staged = make_staged(0, features, head)
    results, gradients = by_operators(staged)
    assert results["params"].shape == (0,)
    for name, gradient in gradients.items():
        assert not gradient.any(), name


@pytest.mark.parametrize("preprocess", reference.PREPROCESS)
def test_the_plain_stages_are_lstm_step_to_the_bit(preprocess: str, capability: str) -> None:
    staged = make_staged(333, preprocess, "add")
    results, gradients = by_operators(staged)
    state, options = (
        pack_state(staged.h, staged.c).data,
        (reference.PREPROCESS.index(preprocess), SCALARS.features_scale, SCALARS.head_scale, 0),
    )
    params, new_state = torch.ops.metakern.lstm_step(staged.params, staged.grads, state, staged.weights, *options)
    assert_same_bits("params", results["params"], params)
    h, _ = unpack_state(LSTMState(new_state, 333))
    assert_same_bits("h", results["h"], h)
    cotangents = (staged.cotangents[0], pack_state(*staged.cotangents[1:3]).data)
    grads, _, weights = torch.ops.metakern.lstm_step_backward(
        *cotangents, staged.grads, state, staged.weights, *options
    )
    assert_same_bits("gradient of grads", gradients["grads"], grads)
    assert_same_bits("gradient of params", gradients["params"], staged.cotangents[0])
    for i, w in enumerate(weights):
        assert_same_bits(f"gradient of weights[{i}]", gradients[f"weights[{i}]"], w)


@pytest.mark.parametrize(("features", "head"), OWN_PAIRS)
def test_what_stands_behind_the_last_coordinate_reaches_nothing(features: str, head: str, capability: str) -> None:
    staged = make_staged(45, features, head)
    for got, expected in zip(by_operators(staged, tail=float("nan")), by_operators(staged), strict=True):
        for name, value in expected.items():
            assert_same_bits(name, got[name], value)


@pytest.mark.parametrize("threads", [2])
def test_same_bits_for_any_number_of_threads(threads: int) -> None:
    staged = make_staged(20_000, "moments", "tanh")
    before = by_operators(staged)
    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        after = by_operators(staged)
    finally:
        torch.set_num_threads(count)
    for one, other in zip(before, after, strict=True):
        for name, value in one.items():
            assert_same_bits(name, value, other[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("features", "head"), OWN_PAIRS)
def test_a_gradient_that_is_not_finite_stays_with_its_coordinate(
    features: str, head: str, bad: float, capability: str
) -> None:
    staged = make_staged(40, features, head)
    clean, _ = by_operators(staged)
    staged.grads[33] = bad
    results, _ = by_operators(staged)
    assert results["params"][33].isnan()
    others = torch.arange(40) != 33
    for name, value in results.items():
        axis = 0 if name == "params" else 1
        index = others.nonzero().flatten()
        assert_same_bits(name, value.index_select(axis, index), clean[name].index_select(axis, index))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stays_with_its_coordinates(bad: float, capability: str) -> None:
    staged = make_staged(40, "log_sign_with_loss", "gates")
    clean, _ = by_operators(staged)
    staged.coordinate_inputs[0, 33:] = bad
    results, _ = by_operators(staged)
    assert results["params"][33:].isnan().all()
    assert_same_bits("params", results["params"][:33], clean["params"][:33])


def test_moments_that_are_zero_have_finite_gradients(capability: str) -> None:
    """The first step: all states are zero, and so are some gradients."""
    staged = make_staged(5, "moments", "tanh", torch.float64)
    staged.grads[:2] = 0
    staged.stage_state.zero_()
    assert_agree(staged, by_operators(staged))
    wide, gradients = by_operators(make_first_step(torch.float32, [0, 1e-30, 1e-22, 1e-12, 1e15]))
    for name, x in (wide | gradients).items():
        assert x.isfinite().all(), name


def make_first_step(dtype: torch.dtype, grads: list[float]) -> Staged:
    staged = make_staged(len(grads), "moments", "tanh", dtype)
    staged.grads.copy_(torch.tensor(grads))
    staged.stage_state.zero_()
    staged.cotangents[3].zero_()
    return staged


@pytest.mark.parametrize("beta", [0.0, 0.95, 0.9999])
def test_the_moments_are_bias_corrected_by_the_number_of_steps(beta: float, capability: str) -> None:
    """Against 1 - βᵗ; at the first step the mean is the gradient, and the root its size."""
    grads = torch.randn(7, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states, m, v = torch.zeros(4, 33, dtype=torch.float64), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        found, states = reference.moments(g, states, reference.Scalars(beta1=beta, beta2=beta))
        m, v = beta * m + (1 - beta) * g, beta * v + (1 - beta) * g * g
        root = (v / (1 - beta**t)).sqrt() + 1e-8
        torch.testing.assert_close(found, torch.stack([g / root, m / (1 - beta**t) / root], -1), rtol=1e-10, atol=0)
    first, _ = reference.moments(grads[0], torch.zeros(4, 33, dtype=torch.float64), reference.Scalars())
    torch.testing.assert_close(first, grads[0].sign()[:, None].expand(33, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("features", "head"), OWN_PAIRS)
def test_in_place_is_the_step(features: str, head: str, backend: str, dtype: torch.dtype) -> None:
    staged = make_staged(70, features, head, dtype)
    params, grads, data, stage_state, inputs, weights = raw_inputs(staged)
    options = staged.keywords() | {"coordinate_inputs": inputs, "backend": backend}
    state = LSTMState(data, 70)
    expected, new_state, new_stage_state = lstm_step_staged(
        params, grads, state, weights, stage_state=stage_state, **options
    )
    tracked = data * torch.ones((), requires_grad=True)
    lstm_step_staged_(params, grads, state, weights, stage_state=stage_state, **options)
    assert_same_bits("params", params, expected)
    assert_same_bits("state", data, new_state.data)
    assert_same_bits("stage state", stage_state, new_stage_state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tracked.sum().backward()
    own = lstm_step_staged(params, params, state, weights, stage_state=stage_state, **options)[0]
    lstm_step_staged_(params, params, state, weights, stage_state=stage_state, **options)
    assert_same_bits("params as gradients", params, own)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_tensors_that_cannot_be_overwritten_are_refused_and_unchanged(backend: str) -> None:
    staged = make_staged(64, "log_sign_with_loss", "gates")
    params, grads, data, stage_state, inputs, weights = raw_inputs(staged)
    memory = torch.cat([stage_state.flatten(), params])
    spread = stage_state.mT.contiguous().mT
    cases = [
        ({"stage_state": spread}, ValueError, "stage_state must be contiguous"),
        (
            {"stage_state": memory[64:].view(2, 2, 16 * 2)[:1].expand(2, 2, 32)},
            ValueError,
            "stage_state must be contig",
        ),
        (
            {"stage_state": memory[:128].view(2, 2, 32), "grads": memory[100:164]},
            RuntimeError,
            "stage_state must share",
        ),
        ({"coordinate_inputs": params.view(1, 64)}, RuntimeError, "coordinate_inputs must share no memory"),
    ]
    before = [x.clone() for x in (params, data, stage_state, memory)]
    for change, error, message in cases:
        call: dict[str, Any] = {"grads": grads, "stage_state": stage_state, "coordinate_inputs": inputs} | change
        with pytest.raises(error, match=message):
            lstm_step_staged_(
                params, call.pop("grads"), LSTMState(data, 64), weights, **staged.keywords(), **call, backend=backend
            )
    for x, kept in zip((params, data, stage_state, memory), before, strict=True):
        assert_same_bits("unchanged", x, kept)


@pytest.mark.parametrize(("features", "head"), [("moments", "gates"), ("log_sign", "tanh"), ("moments", "add")])
def test_a_pair_that_is_not_compiled_runs_by_the_reference_alone(features: str, head: str) -> None:
    staged = make_staged(6, features, head, torch.float64)
    with pytest.raises((RuntimeError, ValueError), match="are no stages that the kernels are"):
        torch.ops.metakern.lstm_step_staged(*raw_inputs(staged), *staged.options())
    assert_agree(staged, by_function(staged, "reference"))
    with pytest.raises(RuntimeError, match=f"are not compiled for features '{features}' with head '{head}'"):
        by_function(staged, "cpp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.zeros(1, 1, 32)}, r"stage_state must have shape \[1, 2, 32\], got \[1, 1, 32\]"),
        ({3: torch.zeros(2, 2, 32)}, r"stage_state must have shape \[1, 2, 32\], got \[2, 2, 32\]"),
        ({4: torch.zeros(1, 3)}, r"coordinate_inputs must have shape \[1, 6\], got \[1, 3\]"),
        ({4: torch.zeros(0, 6)}, r"coordinate_inputs must have shape \[1, 6\], got \[0, 6\]"),
        ({3: torch.zeros(1, 2, 32).double()}, "stage_state must be .*float32, got .*float64"),
        ({4: torch.zeros(1, 6).double()}, "coordinate_inputs must be .*float32, got .*float64"),
        ({9: 1.0}, "beta1 must be at least 0 and less than 1, got 1"),
        ({10: -0.1}, "beta2 must be at least 0 and less than 1, got -0.1"),
        ({10: float("nan")}, "beta2 must be at least 0 and less than 1, got nan"),
    ],
)
def test_arguments_of_the_stages_that_do_not_fit_are_refused(change: dict[int, Any], message: str) -> None:
    staged = make_staged(6, "log_sign_with_loss", "gates")
    arguments = [*raw_inputs(staged), *staged.options()]
    for index, value in change.items():
        arguments[index] = value
    for operator in (torch.ops.metakern.lstm_step_staged, torch.ops.metakern.lstm_step_staged_):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
            operator(*arguments)


def test_every_pair_with_kernels_is_tested() -> None:
    assert set(PAIRS) == COMPILED


def by_function(staged: Staged, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients by the public function and autograd."""
    names = ["params", "grads", "h", "c", "stage_state", "coordinate_inputs"]
    leaves = [getattr(staged, name).clone().requires_grad_() for name in names]
    weights = [w.clone().requires_grad_() for w in staged.weights]
    params, grads, h, c, states, inputs = leaves
    new_params, new_state, new_states = lstm_step_staged(
        *(params, grads, pack_state(h, c), weights),
        stage_state=pack_rows(states),
        coordinate_inputs=inputs,
        backend=backend,
        **staged.keywords(),
    )
    results = [new_params, *unpack_state(new_state), unpack_rows(new_states, params.numel())]
    gradients = torch.autograd.grad(results, [*leaves, *weights], staged.cotangents, materialize_grads=True)
    return (
        dict(zip(["params", "h", "c", "stage_state"], results, strict=True)),
        dict(zip([*names, *(f"weights[{i}]" for i in range(len(weights)))], gradients, strict=True)),
    )


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("features", "head"), PAIRS)
def test_the_public_function_and_autograd(features: str, head: str, backend: str) -> None:
    staged = make_staged(111, features, head, torch.float64)
    assert_agree(staged, by_function(staged, backend))


@pytest.mark.parametrize(("features", "head"), OWN_PAIRS)
def test_opcheck(features: str, head: str) -> None:
    staged = make_staged(40, features, head)
    options = staged.options()
    torch.library.opcheck(torch.ops.metakern.lstm_step_staged_.default, (*raw_inputs(staged), *options))
    inputs = [
        x.requires_grad_() if isinstance(x, Tensor) else [w.requires_grad_() for w in x] for x in raw_inputs(staged)
    ]
    torch.library.opcheck(torch.ops.metakern.lstm_step_staged.default, (*inputs, *options))


@pytest.mark.parametrize(("features", "head"), OWN_PAIRS)
def test_compiled_in_one_graph_and_under_vmap(features: str, head: str) -> None:
    staged = make_staged(40, features, head)

    def step(grads: Tensor) -> Tensor:
        state = pack_state(staged.h, staged.c)
        own = {"stage_state": pack_rows(staged.stage_state), "coordinate_inputs": staged.coordinate_inputs}
        return lstm_step_staged(staged.params, grads, state, staged.weights, **own, **staged.keywords())[0]

    eager = step(staged.grads)
    assert_same_bits("compiled", torch.compile(step, fullgraph=True)(staged.grads), eager)
    batch = torch.stack([staged.grads, -staged.grads])
    assert_same_bits("vmap", torch.func.vmap(step)(batch), torch.stack([eager, step(-staged.grads)]))


def test_a_second_derivative_is_refused() -> None:
    staged = make_staged(5, "moments", "tanh", torch.float64)
    grads = staged.grads.clone().requires_grad_()
    new, *_ = lstm_step_staged(
        *(staged.params, grads, pack_state(staged.h, staged.c), staged.weights),
        stage_state=pack_rows(staged.stage_state),
        **staged.keywords(),
    )
    (first,) = torch.autograd.grad(new.sum(), grads, create_graph=True)
    with pytest.raises(RuntimeError, match="provides no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    staged = make_staged(40, "moments", "tanh")
    expected, _ = by_function(staged, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, _ = by_function(staged, backend)
    for name, value in expected.items():
        assert_same_bits(name, results[name], value)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": "log"}, ValueError, "features must be one of none, log_sign, log_and_clip, moments, .*got 'log'"),
        ({"head": "gate"}, ValueError, "head must be one of add, gates, tanh, got 'gate'"),
        ({"stage_state": None}, ValueError, r"stage_state must have shape \[1, 2, 32\], got \[1, 0, 32\]"),
        ({"coordinate_inputs": torch.zeros(4, 4)}, ValueError, r"coordinate_inputs must have shape \[1, 6\], got"),
        ({"coordinate_inputs": None}, ValueError, r"coordinate_inputs must have shape \[1, 6\], got \[0, 6\]"),
        ({"coordinate_inputs": torch.zeros(1, 6).double()}, TypeError, "coordinate_inputs must be torch.float32, got"),
        ({"coordinate_inputs": [1.0] * 6}, TypeError, "coordinate_inputs must be a tensor, got list"),
        ({"weights": []}, ValueError, "weights must hold .*11.* got 0"),
        ({"params": torch.zeros(6, dtype=torch.int64)}, TypeError, r"params must be float32, .* got torch\.int64"),
        ({"features_scale": 0.0}, ValueError, "features_scale must be 1e-06 to 88.0, got 0.0"),
        ({"head_scale": "0.1"}, TypeError, "head_scale must be a number, got '0.1'"),
        ({"beta1": 1}, ValueError, "beta1 must be at least 0 and less than 1, got 1"),
        ({"beta2": None}, TypeError, "beta2 must be a number, got None"),
        ({"precision": "low"}, ValueError, "precision must be one of highest, high, medium, got 'low'"),
    ],
)
def test_the_public_function_names_what_does_not_fit(
    change: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    staged = make_staged(6, "log_sign_with_loss", "gates")
    call: dict[str, Any] = {"stage_state": pack_rows(staged.stage_state), "weights": staged.weights}
    call |= {"coordinate_inputs": staged.coordinate_inputs, **staged.keywords()} | change
    params = call.pop("params", staged.params)
    grads = params if params is not staged.params else staged.grads
    for function in (lstm_step_staged, lstm_step_staged_):
        with pytest.raises(error, match=message):
            function(params, grads, pack_state(staged.h, staged.c), **call, backend=backend)
