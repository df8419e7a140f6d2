"""csrc/lstm_step/cuda_kernels.cu itself, run on the CPU thread by thread, held to the float64 reference.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metakern.ops import LSTMState, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, assert_same_bits
from tests.cuda.device import Device, EmulationError
from tests.ops.lstm_step.emulator import Emulator
from tests.problems import Problem, evaluate_reference, make_problem, state_dtype, weight_names

#: Devices that schedule threads, and land asynchronous copies, in all the ways that the emulation knows.
SCHEDULES = [
    Device(order="forward"),
    Device(order="reverse", eager_copies=True),
    Device(order="shuffled", seed=1),
    Device(order="shuffled", seed=2, eager_copies=True),
]

#: Largest relative error of a product of two operands rounded to nearest, by precision.
PRODUCT_ERROR = {"high": 2**-10 + 2**-22, "medium": 2**-7 + 2**-16}

TILE = 32


def forward(
    emulator: Emulator,
    problem: Problem,
    *,
    device: Device | None = None,
    precision: str = "highest",
    state: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Named results."""
    packed = problem.state if state is None else problem.state.to(state)
    new_params, new_state = emulator.forward(
        problem.params,
        problem.grads,
        packed,
        problem.weights,
        problem.options,
        device=device or Device(),
        precision=precision,
    )
    assert_padding_is_zero("new state", new_state.data, len(problem.params))
    h, c = unpack_state(new_state)
    return {"new params": new_params, "new h": h, "new c": c}


def backward(
    emulator: Emulator, problem: Problem, *, device: Device | None = None, state: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Named gradients of all inputs but the params, whose gradient the kernel does not compute."""
    dtype = problem.h.dtype if state is None else state
    grad_params, grad_h, grad_c = problem.cotangents
    grad_grads, grad_state, grad_weights = emulator.backward(
        grad_params,
        pack_state(grad_h, grad_c).data.to(dtype),
        problem.grads,
        problem.state.data.to(dtype),
        problem.weights,
        problem.options,
        device=device or Device(),
    )
    n, layers = len(problem.grads), problem.h.shape[0]
    assert_padding_is_zero("gradient of state", grad_state, n)
    h, c = unpack_state(LSTMState(grad_state, n))
    names = ["grads", "h", "c", *weight_names(layers)]
    return {f"gradient of {name}": x for name, x in zip(names, [grad_grads, h, c, *grad_weights], strict=True)}


def assert_padding_is_zero(name: str, data: Tensor, n: int) -> None:
    lanes = data.movedim(-1, 1).flatten(0, 1)[n:]
    assert bool((lanes == 0).all()), f"{name} is not zero behind the last coordinate"


def assert_matches_reference(emulator: Emulator, problem: Problem, device: Device | None = None) -> None:
    """Hold results and gradients to the float64 reference, by the table in tests/conftest.py."""
    expected_results, expected_gradients = evaluate_reference(problem)
    for name, got in forward(emulator, problem, device=device).items():
        assert_close(name, got, expected_results[name], FORWARD_TOLERANCE[got.dtype])
    for name, got in backward(emulator, problem, device=device).items():
        assert_close(name, got, expected_gradients[name], GRADIENT_TOLERANCE[got.dtype])


def rounded(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem with state and its cotangents representable in ``dtype``."""
    p, h, c = problem.cotangents
    h, c, old_h, old_c = (x.to(dtype).to(x.dtype) for x in (h, c, problem.h, problem.c))
    return replace(problem, h=old_h, c=old_c, cotangents=(p, h, c))


# ------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("kilobytes", [163, 227])
@pytest.mark.parametrize(("hidden", "layers", "dtype"), [(64, 3, torch.float32), (64, 3, torch.float64), (40, 3, None)])
def test_weights_that_do_not_fit_shared_memory(
    hidden: int, layers: int, dtype: torch.dtype | None, kilobytes: int, emulator: Emulator
) -> None:
    problem = make_problem(33, hidden, layers, dtype or torch.float32)
    assert_matches_reference(emulator, problem, Device(shared_kilobytes=kilobytes))


def test_a_kernel_of_its_own_without_room_gives_way_to_the_general_one(emulator: Emulator) -> None:
    for hidden in (20, 32):
        assert_matches_reference(emulator, make_problem(40, hidden, 3), Device(shared_kilobytes=64))


@pytest.mark.parametrize("gain", [1e-3, 0.1, 6.0])
def test_small_and_saturated_preactivations(gain: float, emulator: Emulator) -> None:
    # From a zero state and small weights the results are small too: an absolute error would show.
    problem = make_problem(64, 20, 2, gain=gain)
    if gain < 1:
        problem = replace(problem, h=problem.h * gain, c=problem.c * 0)
    assert_matches_reference(emulator, problem)


def test_chunks_of_several_tiles(emulator: Emulator) -> None:
    # More tiles than chunks times the fewest tiles of one, with a last chunk that is not full.
    assert_matches_reference(emulator, make_problem(70_001, 2, 1), Device(multiprocessors=7))


# ----------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("hidden", [7, 20, 32])
def test_in_place_gives_the_same_bits(hidden: int, precision: str, emulator: Emulator) -> None:
    problem = make_problem(200, hidden, 3)
    for device in SCHEDULES:
        expected = forward(emulator, problem, precision=precision)
        params, state = problem.params.clone(), problem.state
        arguments = (params, problem.grads, state, problem.weights, problem.options)
        emulator.forward(*arguments, device=replace(device, multiprocessors=1), precision=precision, in_place=True)
        assert_same_bits("params", params, expected["new params"])
        for name, got in zip(("new h", "new c"), unpack_state(state), strict=True):
            assert_same_bits(name, got, expected[name])


# -------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("state", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "layers"), [(20, 2), (32, 2), (7, 3), (64, 1)])
def test_same_bits_in_every_schedule_and_for_every_number_of_multiprocessors(
    hidden: int, layers: int, state: torch.dtype | None, emulator: Emulator
) -> None:
    # A missing barrier shows here: one thread then reads before another has written, or after it has written anew.
    problem = make_problem(417, hidden, layers)
    expected = forward(emulator, problem, state=state) | backward(emulator, problem, state=state)
    devices = [replace(SCHEDULES[i], multiprocessors=count) for i, count in enumerate((132, 1, 3, 2))]
    for device in devices:
        got = forward(emulator, problem, device=device, state=state)
        for name, x in (got | backward(emulator, problem, device=device, state=state)).items():
            assert_same_bits(f"{name} on {device}", x, expected[name])


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("hidden", [20, 32])
def test_tensor_cores_give_the_same_bits_in_every_schedule(hidden: int, precision: str, emulator: Emulator) -> None:
    problem = make_problem(97, hidden, 2)
    expected = forward(emulator, problem, precision=precision)
    for device in SCHEDULES:
        got = forward(emulator, problem, precision=precision, device=replace(device, multiprocessors=1))
        for name, x in got.items():
            assert_same_bits(f"{name} on {device}", x, expected[name])


# -------------------------------------------------------------------------------- coarser products and storage


def error_bounds(problem: Problem, unit: float) -> dict[str, Tensor]:
    """How far results may be off when each product of a weight and an input is off by ``unit`` of itself.

    By the slopes: a sigmoid's is at most 1/4, that of tanh at most 1. So an error e of the pre-activations moves c' by
    at most (|c|/4 + 1/4 + 1) e and h' by at most e/4 more than c'.
    """
    double = problem.double()
    options = {key: value for key, value in problem.options.items() if key != "output_scale"}
    x = reference.preprocess_gradient(double.grads, options["preprocess"], options["preprocess_scale"])
    x_error = torch.zeros_like(x)
    bounds: dict[str, list[Tensor]] = {"new h": [], "new c": []}
    for layer in range(problem.h.shape[0]):
        weights = double.weights[4 * layer : 4 * layer + 4]
        h, c = double.h[layer], double.c[layer]
        size_ih, size_hh = weights[0].abs().T, weights[1].abs().T
        error = unit * ((x.abs() + x_error) @ size_ih + h.abs() @ size_hh) + x_error @ size_ih
        error = error.view(len(x), 4, -1).amax(1)
        bounds["new c"].append((c.abs() / 4 + 1.25) * error)
        bounds["new h"].append(bounds["new c"][-1] + error / 4)
        x, _ = reference.lstm_cell(x, h, c, weights)
        x_error = bounds["new h"][-1]
    head = abs(problem.options["output_scale"]) * (x_error @ double.weights[-2].abs().T).squeeze(-1)
    return {"new params": head} | {name: torch.stack(layers) for name, layers in bounds.items()}


@pytest.mark.parametrize("preprocess", ["log_sign", "none"])
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize(("hidden", "layers"), [(20, 1), (20, 2), (20, 3), (32, 2)])
def test_tensor_core_products_are_as_coarse_as_stated(
    hidden: int, layers: int, precision: str, preprocess: str, emulator: Emulator
) -> None:
    problem = make_problem(130, hidden, layers, preprocess=preprocess)
    expected, _ = evaluate_reference(problem)
    bounds = error_bounds(problem, PRODUCT_ERROR[precision])
    fine, coarse = forward(emulator, problem), forward(emulator, problem, precision=precision)
    for name, want in expected.items():
        error = (coarse[name].double() - want).abs()
        slack = FORWARD_TOLERANCE[torch.float32] * want.abs().max()
        assert bool((error <= bounds[name] + slack).all()), f"{name} is further off than {precision} products may be"
        fine_error = (fine[name].double() - want).abs().max()
        assert error.max() > 10 * fine_error, f"{name} is as exact as by float32 products: were they used instead?"


def rounded_operand(x: Tensor, precision: str) -> Tensor:
    """float64 to the nearest TF32 (ties away from zero) or bfloat16 (ties to even), in float64."""
    bits = {"high": 11, "medium": 8}[precision]
    mantissa, exponent = torch.frexp(x)
    scaled = torch.ldexp(mantissa, torch.tensor(bits))
    nearest = scaled.sign() * (scaled.abs() + 0.5).floor() if precision == "high" else scaled.round()
    return torch.ldexp(nearest, exponent - bits)


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize(("hidden", "layers"), [(20, 1), (32, 1), (20, 2), (32, 3)])
def test_tensor_core_products_are_exact_but_for_the_rounding_of_their_operands(
    hidden: int, layers: int, precision: str, emulator: Emulator
) -> None:
    problem = make_problem(130, hidden, layers)
    double, layer_h, layer_c = problem.double(), [], []
    x = reference.preprocess_gradient(double.grads, "log_sign", 10.0)
    for layer in range(layers):
        weight_ih, weight_hh, *biases = double.weights[4 * layer : 4 * layer + 4]
        operands = (rounded_operand(v, precision) for v in (x, double.h[layer], weight_ih, weight_hh))
        x, h, *weights = operands
        x, c = reference.lstm_cell(x, h, double.c[layer], [*weights, *biases])
        layer_h, layer_c = [*layer_h, x], [*layer_c, c]
    got = forward(emulator, problem, precision=precision)
    # An h' in float32 may round to the neighbour of what the same h' in float64 rounds to: all else of its coordinate
    # differs then, so that few of them may.
    for name, want in (("new h", torch.stack(layer_h)), ("new c", torch.stack(layer_c))):
        off = (got[name].double() - want).abs().amax((0, 2)) > FORWARD_TOLERANCE[torch.float32] * want.abs().max()
        assert int(off.sum()) <= (0 if layers == 1 else 6), f"{name} of {int(off.sum())} coordinates is off"


@pytest.mark.parametrize(("hidden", "dtype"), [(7, torch.float32), (64, torch.float32), (20, torch.float64)])
def test_sizes_without_tensor_core_products_are_computed_finer(
    hidden: int, dtype: torch.dtype, emulator: Emulator
) -> None:
    problem = make_problem(40, hidden, 2, dtype)
    for precision in ("high", "medium"):
        got, fine = forward(emulator, problem, precision=precision), forward(emulator, problem)
        for name, x in got.items():
            assert_same_bits(name, x, fine[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden", "layers"), [(20, 2), (32, 2), (7, 3)])
def test_state_in_bfloat16_is_rounded_once(hidden: int, layers: int, dtype: torch.dtype, emulator: Emulator) -> None:
    # The arithmetic is float32: what is stored is the reference's value rounded, everything else as exact as ever.
    problem = rounded(make_problem(77, hidden, layers, dtype), torch.bfloat16)
    results, gradients = evaluate_reference(problem)
    for name, got in forward(emulator, problem, state=torch.bfloat16).items():
        assert got.dtype == (dtype if name == "new params" else torch.bfloat16)
        assert_close(name, got, results[name], FORWARD_TOLERANCE[got.dtype])
    for name, got in backward(emulator, problem, state=torch.bfloat16).items():
        assert_close(name, got, gradients[name], GRADIENT_TOLERANCE[got.dtype])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_tensor_core_products_with_state_in_bfloat16(precision: str, emulator: Emulator) -> None:
    for hidden in (20, 32):
        problem = rounded(make_problem(77, hidden, 2), torch.bfloat16)
        expected, _ = evaluate_reference(problem)
        bounds = error_bounds(problem, PRODUCT_ERROR[precision])
        for name, got in forward(emulator, problem, precision=precision, state=torch.bfloat16).items():
            storage = FORWARD_TOLERANCE[got.dtype] * expected[name].abs().max()
            assert bool(((got.double() - expected[name]).abs() <= 1.01 * bounds[name] + storage).all()), name


# --------------------------------------------------------------------- what must stay with its coordinate or lane


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("preprocess", reference.PREPROCESS)
@pytest.mark.parametrize(("hidden", "precision"), [(20, "highest"), (20, "high"), (32, "medium"), (5, "highest")])
def test_a_gradient_that_is_not_finite_stays_with_its_coordinate(
    hidden: int, precision: str, preprocess: str, bad: float, emulator: Emulator
) -> None:
    clean = make_problem(67, hidden, 2, preprocess=preprocess)
    results, gradients = forward(emulator, clean, precision=precision), backward(emulator, clean)
    at = 40
    dirty = replace(clean, grads=clean.grads.index_fill(0, torch.tensor([at]), bad))
    others = torch.arange(67) != at
    for name, got in forward(emulator, dirty, precision=precision).items():
        axis = got.dim() - 1 if got.dim() == 1 else 1
        assert got.select(axis, at).isnan().all(), f"{name} of the coordinate with gradient {bad} is not NaN"
        kept, expected = (x.movedim(axis, 0)[others] for x in (got, results[name]))
        assert_same_bits(f"{name} of the other coordinates", kept, expected)
    dirty_gradients = backward(emulator, dirty)
    for name in ("gradient of grads", "gradient of h", "gradient of c"):
        axis = 0 if gradients[name].dim() == 1 else 1
        kept, expected = (x.movedim(axis, 0)[others] for x in (dirty_gradients[name], gradients[name]))
        assert_same_bits(f"{name} of the other coordinates", kept, expected)
    assert dirty_gradients["gradient of weight_ih_l0"].isnan().any(), "the shared weights must show it"


@pytest.mark.parametrize("state", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "hidden"), [(1, 20), (33, 20), (33, 32), (63, 5)])
def test_lanes_behind_the_last_coordinate_carry_no_meaning(
    n: int, hidden: int, state: torch.dtype | None, emulator: Emulator
) -> None:
    problem = make_problem(n, hidden, 2)
    dtype = state or state_dtype(torch.float32)
    tiles = (n + TILE - 1) // TILE
    unused = torch.arange(tiles * TILE).view(-1, 1, 1, 1, TILE) >= n
    p, h, c = problem.cotangents
    outcomes = []
    for fill in (0.0, math.nan):
        data, cotangent = (x.data.masked_fill(unused, fill).to(dtype) for x in (problem.state, pack_state(h, c)))
        arguments = (problem.params, problem.grads, LSTMState(data, n), problem.weights, problem.options)
        for precision in ("highest", "high", "medium"):
            new_params, new_state = emulator.forward(*arguments, precision=precision)
            assert_padding_is_zero("new state", new_state.data, n)
            outcomes.append([new_params, new_state.data])
        gradients = emulator.backward(p, cotangent, problem.grads, data, problem.weights, problem.options)
        assert_padding_is_zero("gradient of state", gradients[1], n)
        outcomes.append([*gradients[:2], *gradients[2]])
    for clean, dirty in zip(outcomes[:4], outcomes[4:], strict=True):
        for expected, got in zip(clean, dirty, strict=True):
            assert_same_bits("a result", got, expected)


# ------------------------------------------------------------------------------------------------------- errors


def test_an_error_of_any_call_names_the_call(emulator: Emulator) -> None:
    problem = make_problem(5)
    attribute = "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)"
    forward_calls = [
        "cudaGetDevice",
        "cudaDeviceGetAttribute(MultiProcessorCount)",
        "cudaDeviceGetAttribute(MaxSharedMemoryPerBlockOptin)",
        attribute,
        "launch of lstm_step's forward kernel",
    ]
    backward_calls = [
        *forward_calls[:3],
        *(attribute, "launch of lstm_step's backward kernel"),
        *(attribute, "launch of lstm_step's reduction of weight gradients"),
    ]
    no_kernel_image = 209
    for run, calls in ((forward, forward_calls), (backward, backward_calls)):
        for i, call in enumerate(calls):
            with pytest.raises(EmulationError) as raised:
                run(emulator, problem, device=Device(fail_call=i + 1, failure=no_kernel_image))
            assert (raised.value.error, raised.value.call) == (no_kernel_image, call)
        run(emulator, problem, device=Device(fail_call=len(calls) + 1, failure=no_kernel_image))


def test_a_device_without_enough_shared_memory_is_named(emulator: Emulator) -> None:
    problem = make_problem(5, 64, 3, torch.float64)
    for run, name in ((forward, "forward"), (backward, "backward")):
        with pytest.raises(EmulationError) as raised:
            run(emulator, problem, device=Device(shared_kilobytes=48))
        assert raised.value.call.startswith(f"lstm_step's {name} kernel, which needs more shared memory than a block")


def test_facts_of_a_device_are_asked_for_once(emulator: Emulator) -> None:
    # Of one of the first devices: the second call goes straight to the launch, so its second call of the runtime fails.
    problem = make_problem(5)
    device = Device(ordinal=0)
    forward(emulator, problem, device=device)
    with pytest.raises(EmulationError, match="launch of lstm_step's forward kernel"):
        forward(emulator, problem, device=replace(device, fail_call=2, failure=209))
