"""The CPU kernels of hrnn_step against the reference: every gradient on its own scale, tails, extremes, isolation.

Axis legend: M tensors, T tasks, n coordinates of a segment, H = 10 hidden units, R = 21 rows of the state.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import assert_close, assert_same_bits
from tests.ops.hrnn_step.problems import (
    HIDDEN,
    INPUT_DECAY,
    MEANS,
    RATE,
    SCALE_DECAY,
    SQUARES,
    Problem,
    gradients,
    make_problem,
    results,
)

#: Around the 8 and 16 lanes of a vector, the 32 of a tile and the 512 of a piece, and an empty tensor.
SIZES = (0, 1, 9, 33, 511, 512, 513, 1100)


@pytest.mark.sanitize
@pytest.mark.parametrize("attention", [False, True], ids=["plain", "attention"])
def test_every_gradient_is_the_references(capability: str, attention: bool) -> None:
    problem = make_problem(SIZES, tasks=2, attention=attention)
    found, expected = gradients(problem, "cpp"), gradients(problem, "reference")
    for name, x in found.items():
        # A segment of one coordinate has no gradient through its direction, whose norm is 1, but rounding errors.
        assert_close(f"gradient of {name}", x, expected[name], 1e-12)
    for (name, x), y in zip(results(problem.run()).items(), results(problem.run("reference")).values(), strict=True):
        assert_close(name, x, y, 1e-13)


@pytest.mark.sanitize
def test_a_fresh_state_and_zero_or_sparse_gradients(capability: str) -> None:
    problem = make_problem((40, 7, 3), tasks=2)
    for state in problem.states:
        state[:, MEANS], state[:, SQUARES], state[:, SCALE_DECAY:] = 0, 0, 0
    problem.grads[0][:, 1:] = 0
    problem.grads[1].zero_()
    for (name, x), y in zip(results(problem.run()).items(), results(problem.run("reference")).values(), strict=True):
        assert x.isfinite().all(), name
        assert_close(name, x, y, 1e-13)
    found, expected = gradients(problem, "cpp"), gradients(problem, "reference")
    for name, x in found.items():
        assert x.isfinite().all(), name
        assert_close(f"gradient of {name}", x, expected[name], 1e-11)


def features_of(grads: Tensor, squares: Tensor) -> Tensor:
    """x of segments of one coordinate whose moving means become ``grads`` and squares ``squares``, [T, 12]."""
    problem = make_problem((1,), tasks=len(grads), dtype=grads.dtype)
    state = problem.states[0]
    state[:, INPUT_DECAY], state[:, SCALE_DECAY], state[:, RATE] = 0, 1, -3
    state[:, SQUARES] = squares[:, None, None]
    problem.grads[0], problem.mean_rate[:] = grads[:, None], -5
    return problem.run().means[0, :, HIDDEN : HIDDEN + 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_features_keep_their_relative_accuracy(capability: str, dtype: torch.dtype) -> None:
    # asinh by log(x + sqrt(1 + x^2)) fails for small and for large negative x.
    sizes = torch.logspace(-30, 17, 471, dtype=torch.float64)
    grads = torch.cat([sizes, -sizes]).to(dtype)
    x = features_of(grads, torch.ones_like(grads)).double()
    expected = grads.double().asinh()
    tolerance = 4 * torch.finfo(dtype).eps
    for k in range(4):
        assert ((x[:, k] - expected).abs() <= tolerance * expected.abs()).all()
    assert_close("log rate", x[:, 11], torch.full_like(expected, 2), tolerance)
    squares = torch.logspace(-12, 30, 421, dtype=torch.float64).to(dtype)
    x = features_of(torch.full_like(squares, 0.5), squares).double()
    assert (x[:, 7:11].abs() <= 40 * torch.finfo(dtype).eps).all()  # four equal logarithms minus their mean


@pytest.mark.sanitize
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stays_in_its_segment(capability: str, value: float) -> None:
    problem, bad = (make_problem((70, 5, 600), tasks=3, dtype=torch.float32) for _ in range(2))
    bad.grads[2][1, 40] = value
    good, spoiled = results(problem.run()), results(bad.run())
    assert spoiled["params[2]"][1].isnan().all()
    assert spoiled["states[2]"][1, :, 40].isnan().any()
    spoiled["states[2]"][1, :, 40] = good["states[2]"][1, :, 40]  # no other coordinate's state
    for name, x in spoiled.items():
        if name == "means":
            x[2, 1] = good[name][2, 1]
        elif name == "params[2]":
            x[1] = good[name][1]
        assert_same_bits(name, x, good[name])


def test_gradients_of_a_spoiled_segment_reach_no_other(capability: str) -> None:
    problem, bad = (make_problem((70, 5), tasks=3, dtype=torch.float32) for _ in range(2))
    bad.grads[0][1, 40] = math.nan
    good, spoiled = gradients(problem, "cpp"), gradients(bad, "cpp")
    for name in ("grads[1]", "states[1]", "params[0]", "params[1]"):
        assert_same_bits(name, spoiled[name], good[name])
    for name in ("grads[0]", "states[0]"):
        assert_same_bits(name, spoiled[name][[0, 2]], good[name][[0, 2]])
        assert spoiled[name][1].isnan().any()


def test_a_learning_rate_beyond_the_range_is_infinite_and_a_huge_one_is_clipped(capability: str) -> None:
    problem = make_problem((20,))
    problem.weights[4][3] = 1000.0
    assert not problem.run().params[0].isfinite().any()
    problem.weights[4][3] = -1.0
    problem.states[0][:, RATE] = 50
    assert_close("params", problem.run().params[0], problem.run("reference").params[0], 1e-12)
    problem.states[0][:, RATE, 3] = math.inf
    assert problem.run().states[0][0, RATE].isnan().tolist() == [i == 3 for i in range(20)]


@pytest.mark.parametrize("attention", [False, True], ids=["plain", "attention"])
def test_a_segment_has_the_same_bits_alone(capability: str, attention: bool) -> None:
    problem = make_problem((700, 3, 1000), tasks=3, attention=attention, dtype=torch.float32)
    together = results(problem.run())
    for i in range(3):
        alone = results(problem.tensors([i]).run())
        for name in ("params", "states", "attended")[: 2 + attention]:
            assert_same_bits(name, alone[f"{name}[0]"], together[f"{name}[{i}]"])
        assert_same_bits("means", alone["means"][0], together["means"][i])


@pytest.mark.sanitize
def test_many_tiny_and_one_large_tensor_share_the_work(capability: str, threads: None) -> None:
    problem = make_problem((1, 2, 20_000, 3), tasks=30, dtype=torch.float32).tensors([0, 1, 3])
    large = make_problem((20_000,), dtype=torch.float32)
    for call in (problem, large):
        outcomes = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes.append(results(call.run()) | {f"gradient of {n}": x for n, x in gradients(call, "cpp").items()})
        for other in outcomes[1:]:
            for name, x in other.items():
                assert_same_bits(name, x, outcomes[0][name])


def test_a_call_without_tensors_gives_means_of_none_and_zero_gradients() -> None:
    problem = make_problem((), tasks=3)
    assert problem.run().means.shape == (0, 3, HIDDEN + 13)
    found = gradients(problem, "cpp")
    assert not any(x.any() for x in found.values())
    assert list(found) == [*(f"weights[{i}]" for i in range(5)), "biases", "mean_rate"]


def kept_bytes(problem: Problem) -> int:
    """Bytes that the graph of a call keeps, each tensor's once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for state in problem.states:
        state.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step = problem.run()
    assert step.params[0].requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("attention", [False, True], ids=["plain", "attention"])
def test_backward_keeps_92_bytes_a_coordinate(attention: bool) -> None:
    number = 100_000
    kept = kept_bytes(make_problem((number,), dtype=torch.float32, attention=attention)) / number
    assert kept == pytest.approx(96 if attention else 92, abs=0.1)
