"""lstm_step with other features and another head: every combination of stages against the float64 reference.

Axis legend: N coordinates, T tasks, H hidden units, L layers, E rows of the stages' own state, K task inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from metakern.ops import pack_state, unpack_state
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.staged import lstm_step_staged
from metakern.ops.lstm_step.state import LSTMState
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, assert_same_bits
from tests.problems import make_problem, state_dtype

FEATURES, HEADS = list(reference.FEATURES), list(reference.HEADS)

#: The pairs that the kernels are compiled for (csrc/lstm_step/stages.h): the plain ones, and one new stage either side.
PAIRS = [*((name, "add") for name in FEATURES), *((name, "gates") for name in reference.PREPROCESS)]

SCALES = (10.0, 0.1)


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
    task_inputs: Tensor
    weights: list[Tensor]
    cotangents: list[Tensor]  # of new params [N], new h, new c [L, N, H], new stage state [E, N]

    def stages(self) -> tuple[reference.FeaturesStage, reference.HeadStage]:
        return reference.FEATURES[self.features], reference.HEADS[self.head]

    def options(self) -> tuple[int, int, float, float, int]:
        return FEATURES.index(self.features), HEADS.index(self.head), *SCALES, 0


def make_staged(
    n: int,
    features: str,
    head: str,
    dtype: torch.dtype = torch.float32,
    *,
    tasks: int = 1,
    hidden: int = 20,
    layers: int = 2,
) -> Staged:
    """Random inputs; the state of the moments is one that gradients have led to, so v is positive."""
    plain = make_problem(n, hidden, layers, dtype, preprocess="none" if features == "moments" else features)
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
        states[1] = states[1].square() + 0.01
    steps = torch.arange(1, tasks + 1, dtype=torch.float64)[:, None]
    decays = torch.tensor([[0.9, 0.95]], dtype=torch.float64)
    task_inputs = torch.cat([decays.expand(tasks, 2), 1 / (1 - decays**steps)], 1).to(work)[:, : first.task_inputs]
    return Staged(
        *(features, head, plain.params, plain.grads, plain.h, plain.c, states, task_inputs.contiguous(), weights),
        [*plain.cotangents, uniform(*states.shape)],
    )


def by_reference(staged: Staged) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Named results and gradients in float64."""
    names = ["params", "grads", "h", "c", "stage_state", "task_inputs"]
    leaves = [getattr(staged, name).double().requires_grad_() for name in names]
    weights = [w.double().requires_grad_() for w in staged.weights]
    params, grads, h, c, states, tasks = leaves
    repeated = tasks.repeat_interleave(params.numel() // max(len(tasks), 1), 0).T
    results = reference.staged_step(params, grads, h, c, states, repeated, weights, *staged.stages(), *SCALES)
    gradients = torch.autograd.grad(
        results, [*leaves, *weights], [x.double() for x in staged.cotangents], materialize_grads=True
    )
    return (
        dict(zip(["params", "h", "c", "stage_state"], results, strict=True)),
        dict(zip([*names, *(f"weights[{i}]" for i in range(len(weights)))], gradients, strict=True)),
    )


def by_operators(staged: Staged, tail: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same by the compiled operators; ``tail`` stands behind the last coordinate of the states."""
    n = staged.params.numel()
    state, grad_state = pack_state(staged.h, staged.c).data, pack_state(*staged.cotangents[1:3]).data
    for data in (state, grad_state):
        data[-1:, ..., (n - 1) % 32 + 1 :] = tail
    inputs = (staged.params, staged.grads, state, staged.stage_state, staged.task_inputs, staged.weights)
    operators = torch.ops.metakern
    params, new_state, stage_state = operators.lstm_step_staged(*inputs, *staged.options())
    h, c = unpack_state(LSTMState(new_state, n))
    *gradients, grad_weights = operators.lstm_step_staged_backward(
        *(staged.cotangents[0], grad_state, staged.cotangents[3], *inputs, *staged.options())
    )
    grad_params, grad_grads, grad_state, grad_stage_state, grad_tasks = gradients
    grad_h, grad_c = unpack_state(LSTMState(grad_state, n))
    tasks = len(staged.task_inputs)
    grad_tasks = grad_tasks.view(staged.task_inputs.shape[1], tasks, n // tasks).sum(-1).T
    named = dict(zip(("params", "grads", "h", "c"), (grad_params, grad_grads, grad_h, grad_c), strict=True))
    named |= {"stage_state": grad_stage_state, "task_inputs": grad_tasks}
    named |= {f"weights[{i}]": w for i, w in enumerate(grad_weights)}
    return {"params": params, "h": h, "c": c, "stage_state": stage_state}, named


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
    staged = make_staged(3 * 37, features, head, dtype, tasks=3)  # tasks of 37: tiles hold coordinates of two tasks
    assert_agree(staged, by_operators(staged))


@pytest.mark.parametrize(("features", "head"), [("moments", "add"), ("log_sign", "gates")])
@pytest.mark.parametrize(("n", "hidden", "layers"), [(1, 1, 1), (31, 1, 3), (33, 7, 3), (64, 64, 1), (1000, 5, 2)])
def test_sizes(features: str, head: str, n: int, hidden: int, layers: int, capability: str) -> None:
    staged = make_staged(n, features, head, torch.float64, hidden=hidden, layers=layers)
    assert_agree(staged, by_operators(staged))


@pytest.mark.parametrize(("features", "head"), [("moments", "add"), ("log_sign", "gates")])
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
    state, options = pack_state(staged.h, staged.c).data, (reference.PREPROCESS.index(preprocess), *SCALES, 0)
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


@pytest.mark.parametrize(("features", "head"), [("moments", "add"), ("log_sign", "gates")])
def test_what_stands_behind_the_last_coordinate_reaches_nothing(features: str, head: str, capability: str) -> None:
    staged = make_staged(45, features, head)
    for got, expected in zip(by_operators(staged, tail=float("nan")), by_operators(staged), strict=True):
        for name, value in expected.items():
            assert_same_bits(name, got[name], value)


@pytest.mark.parametrize("threads", [2])
def test_same_bits_for_any_number_of_threads(threads: int) -> None:
    staged = make_staged(20_000, "moments", "add", tasks=4)
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
@pytest.mark.parametrize(("features", "head"), [("moments", "add"), ("log_sign", "gates")])
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


def test_moments_that_are_zero_have_finite_gradients(capability: str) -> None:
    staged = make_staged(5, "moments", "add", torch.float64)
    staged.grads[:2] = 0
    staged.stage_state[:, :2] = 0
    assert_agree(staged, by_operators(staged))


def test_a_pair_that_is_not_compiled_is_refused() -> None:
    staged = replace(make_staged(4, "moments", "gates"))
    state = pack_state(staged.h, staged.c).data
    with pytest.raises((RuntimeError, ValueError), match="features 3 and head 1 are no stages that the kernels are"):
        torch.ops.metakern.lstm_step_staged(
            *(staged.params, staged.grads, state, staged.stage_state, staged.task_inputs, staged.weights),
            *staged.options(),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage_state": torch.zeros(1, 6)}, r"stage_state must have shape \[2, 6\], got \[1, 6\]"),
        ({"task_inputs": torch.zeros(1, 3)}, r"task_inputs must have shape \[tasks, 4\], got \[1, 3\]"),
        ({"task_inputs": torch.zeros(4, 4)}, "got 4 rows for 6 coordinates"),
        ({"task_inputs": torch.zeros(0, 4)}, "got 0 rows for 6 coordinates"),
        ({"stage_state": torch.zeros(2, 6).double()}, "stage_state must be .*float32, got .*float64"),
    ],
)
def test_tensors_of_the_stages_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    staged = replace(make_staged(6, "moments", "add"), **change)
    state = pack_state(staged.h, staged.c).data
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        torch.ops.metakern.lstm_step_staged(
            *(staged.params, staged.grads, state, staged.stage_state, staged.task_inputs, staged.weights),
            *staged.options(),
        )


def test_every_name_has_a_stage_of_the_sizes_that_the_kernels_know() -> None:
    for features, head in itertools.product(FEATURES, HEADS):
        first, last = reference.FEATURES[features], reference.HEADS[head]
        assert first.inputs in (1, 2), features
        assert last.outputs in (1, 2), head


def by_function(staged: Staged, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients by the public function and autograd."""
    names = ["params", "grads", "h", "c", "stage_state", "task_inputs"]
    leaves = [getattr(staged, name).clone().requires_grad_() for name in names]
    weights = [w.clone().requires_grad_() for w in staged.weights]
    params, grads, h, c, states, tasks = leaves
    new_params, new_state, new_states = lstm_step_staged(
        *(params, grads, pack_state(h, c), weights),
        features=staged.features,
        head=staged.head,
        stage_state=states,
        task_inputs=tasks,
        backend=backend,
    )
    results = [new_params, *unpack_state(new_state), new_states]
    gradients = torch.autograd.grad(results, [*leaves, *weights], staged.cotangents, materialize_grads=True)
    return (
        dict(zip(["params", "h", "c", "stage_state"], results, strict=True)),
        dict(zip([*names, *(f"weights[{i}]" for i in range(len(weights)))], gradients, strict=True)),
    )


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("features", "head"), PAIRS)
def test_the_public_function_and_autograd(features: str, head: str, backend: str) -> None:
    staged = make_staged(3 * 37, features, head, torch.float64, tasks=3)
    assert_agree(staged, by_function(staged, backend))


@pytest.mark.parametrize(("features", "head"), [("moments", "add"), ("log_sign", "gates")])
def test_opcheck(features: str, head: str) -> None:
    staged = make_staged(40, features, head, tasks=2)
    state = pack_state(staged.h, staged.c).data
    inputs = (staged.params, staged.grads, state, staged.stage_state, staged.task_inputs, staged.weights)
    inputs = tuple(x.requires_grad_() if isinstance(x, Tensor) else [w.requires_grad_() for w in x] for x in inputs)
    torch.library.opcheck(torch.ops.metakern.lstm_step_staged.default, (*inputs, *staged.options()))


def test_compiled_in_one_graph_and_under_vmap() -> None:
    staged = make_staged(40, "moments", "add", tasks=2)

    def step(grads: Tensor) -> Tensor:
        state = pack_state(staged.h, staged.c)
        return lstm_step_staged(
            *(staged.params, grads, state, staged.weights),
            features="moments",
            head="add",
            stage_state=staged.stage_state,
            task_inputs=staged.task_inputs,
        )[0]

    eager = step(staged.grads)
    assert_same_bits("compiled", torch.compile(step, fullgraph=True)(staged.grads), eager)
    batch = torch.stack([staged.grads, -staged.grads])
    assert_same_bits("vmap", torch.func.vmap(step)(batch), torch.stack([eager, step(-staged.grads)]))


def test_a_second_derivative_is_refused() -> None:
    staged = make_staged(5, "moments", "add", torch.float64)
    grads = staged.grads.clone().requires_grad_()
    new, *_ = lstm_step_staged(
        *(staged.params, grads, pack_state(staged.h, staged.c), staged.weights),
        features="moments",
        head="add",
        stage_state=staged.stage_state,
        task_inputs=staged.task_inputs,
    )
    (first,) = torch.autograd.grad(new.sum(), grads, create_graph=True)
    with pytest.raises(RuntimeError, match="provides no second derivative"):
        first.sum().backward()


def test_a_pair_without_kernels_runs_by_the_reference_alone() -> None:
    staged = make_staged(6, "moments", "gates", torch.float64)
    assert_agree(staged, by_function(staged, "reference"))
    with pytest.raises(RuntimeError, match="the kernels are not compiled for features 'moments' with head 'gates'"):
        by_function(staged, "cpp")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    staged = make_staged(40, "log_sign", "gates")
    expected, _ = by_function(staged, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, _ = by_function(staged, backend)
    for name, value in expected.items():
        assert_same_bits(name, results[name], value)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_params_of_integers_are_refused(backend: str) -> None:
    staged = make_staged(6, "log_sign", "add")
    params, state = torch.zeros(6, dtype=torch.int64), pack_state(staged.h, staged.c)
    with pytest.raises(TypeError, match=r"params must be float32, bfloat16, float16 or float64, got torch\.int64"):
        lstm_step_staged(params, params, state, staged.weights, features="log_sign", head="add", backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": "log"}, ValueError, "features must be one of none, log_sign, log_and_clip, moments, got 'log'"),
        ({"head": "gate"}, ValueError, "head must be one of add, gates, got 'gate'"),
        ({"stage_state": None}, ValueError, r"stage_state must have shape \[2, 6\], got \[0, 6\]"),
        ({"task_inputs": torch.zeros(4, 4)}, ValueError, "got 4 rows for 6 coordinates"),
        (
            {"task_inputs": torch.zeros(1, 4).double()},
            TypeError,
            "task_inputs must be torch.float32, got torch.float64",
        ),
        ({"weights": []}, ValueError, "weights must hold 10 tensors, got 0"),
    ],
)
def test_the_public_function_names_what_does_not_fit(change: dict, error: type[Exception], message: str) -> None:
    staged = make_staged(6, "moments", "add")
    call = {"features": "moments", "head": "add", "stage_state": staged.stage_state, "task_inputs": staged.task_inputs}
    call |= {"weights": staged.weights} | change
    with pytest.raises(error, match=message):
        lstm_step_staged(staged.params, staged.grads, pack_state(staged.h, staged.c), **call)
