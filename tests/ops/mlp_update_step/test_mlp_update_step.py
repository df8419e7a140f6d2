"""mlp_update_step against arithmetic by hand, permuted axes, and what its documentation promises."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops import mlp_update_step
from metakern.ops.mlp_update_step import TIME_SCALES, Moments, factor_shapes, factored_axes
from tests.conformance.ops.mlp_update_step import make_call
from tests.conftest import assert_close

F32, F64 = torch.float32, torch.float64
BACKENDS = ("cpp", "reference")


@pytest.fixture(params=BACKENDS)
def by(request: pytest.FixtureRequest) -> str:
    """Every backend that serves the operator."""
    return str(request.param)


# ----------------------------------------------------------------------------------------------- by hand


def network(feature: int, output: int) -> list[Tensor]:
    """One hidden layer whose output ``output`` is relu(input) - relu(-input) of one feature; the other is 0."""
    weights = [torch.zeros(4, 39, dtype=F64), torch.zeros(4, dtype=F64)]
    weights += [torch.zeros(2, 4, dtype=F64), torch.zeros(2, dtype=F64)]
    weights[0][0, feature], weights[0][1, feature] = 1.0, -1.0
    weights[2][output, 0], weights[2][output, 1] = 1.0, -1.0
    return weights


def test_one_coordinate_by_hand(by: str) -> None:
    # g = 2, θ = 1/2, no moments, all decays 1/2: m = 1, v = 2, V = 2.
    decays = torch.full((7,), 0.5, dtype=F64)
    moments = Moments(*(torch.zeros(1, *shape, dtype=F64) for shape in ((3, 1), (1,), (3, 1), (3, 0))))
    moments = Moments(*([x] for x in moments))
    params, grads = [torch.full((1, 1), 0.5, dtype=F64)], [torch.full((1, 1), 2.0, dtype=F64)]
    rates, keep, steps = torch.full((1, 1), 0.25, dtype=F64), torch.full((1, 1), 0.875, dtype=F64), torch.tensor([3])
    raw = {0: 2.0, 1: 0.5, 2: 1.0, 5: 2.0, 6: 1 / math.sqrt(2 + 1e-6), 9: 1 / math.sqrt(2 + 1e-6)}
    raw |= {10: 2 / math.sqrt(2 + 1e-9), 13: 2.0, 16: 2.0, 19: 1 / math.sqrt(2 + 1e-8), 25: 1 / math.sqrt(2 + 1e-6)}
    features = {i: x / math.sqrt(1e-5 + x * x) for i, x in raw.items()}
    features |= {28 + i: math.tanh(3 / scale - 1) for i, scale in enumerate(TIME_SCALES)}
    for feature, x in features.items():
        new, state = mlp_update_step(
            params, grads, moments, network(feature, 0), decays, rates, keep, steps, exp_mult=0.5, backend=by
        )
        want = 0.875 * 0.5 - 0.25 * x
        assert float(new[0]) == pytest.approx(want, rel=1e-12), f"feature {feature}"
    assert [float(x) for x in state.m[0].flatten()] == [1.0, 1.0, 1.0]
    assert float(state.v[0]) == 2.0
    assert [float(x) for x in state.r[0].flatten()] == pytest.approx([2.0] * 3)
    magnitude = network(1, 1)
    magnitude[3][0] = 1.0  # direction 1, magnitude that of θ
    new, _ = mlp_update_step(params, grads, moments, magnitude, decays, rates, keep, steps, exp_mult=0.5, backend=by)
    assert float(new[0]) == pytest.approx(0.4375 - 0.25 * math.exp(0.5 * features[1]), rel=1e-12)


def test_a_matrix_by_hand(by: str) -> None:
    """Adafactor's features of a 2 x 3 matrix, in plain Python; its last axis is the largest."""
    g = [[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]]
    beta = [0.5, 0.75, 0.0]
    old_r, old_c = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], [[0.2, 0.4, 0.6], [0.1, 0.1, 0.1], [1.0, 2.0, 3.0]]
    moments = Moments(
        [torch.zeros(1, 3, 2, 3, dtype=F64)],
        [torch.zeros(1, 2, 3, dtype=F64)],
        [torch.tensor(old_r, dtype=F64).unsqueeze(0)],
        [torch.tensor(old_c, dtype=F64).unsqueeze(0)],
    )
    decays = torch.tensor([0.0, 0.0, 0.0, 0.0, *beta], dtype=F64)
    one = torch.ones(1, 1, dtype=F64)
    params = [torch.zeros(1, 2, 3, dtype=F64)]
    for k in range(3):
        r = [beta[k] * old_r[k][i] + (1 - beta[k]) * sum(x * x for x in g[i]) / 3 for i in range(2)]
        c = [beta[k] * old_c[k][j] + (1 - beta[k]) * (g[0][j] ** 2 + g[1][j] ** 2) / 2 for j in range(3)]
        mean = sum(r) / 2
        factor = [[g[i][j] / math.sqrt(r[i] / (mean + 1e-9)) / math.sqrt(c[j]) for j in range(3)] for i in range(2)]
        tables = {13: [[x] * 3 for x in r], 16: [c] * 2, 10: factor, 25: factor}  # with decay 0, m is g
        tables[19] = [[1 / math.sqrt(x + 1e-8)] * 3 for x in r]
        tables[22] = [[1 / math.sqrt(x + 1e-8) for x in c]] * 2
        for feature, x in tables.items():
            norm = math.sqrt(1e-5 + sum(y * y for row in x for y in row) / 6)
            new, state = mlp_update_step(
                params,
                [torch.tensor([g], dtype=F64)],
                moments,
                network(feature + k, 0),
                decays,
                one,
                one,
                torch.tensor([0]),
                backend=by,
            )
            want = -torch.tensor(x, dtype=F64) / norm
            assert_close(f"feature {feature} of decay {k}", new[0][0], want, 1e-12)
        assert_close("r", state.r[0][0, k], torch.tensor(r, dtype=F64), 1e-12)
        assert_close("c", state.c[0][0, k], torch.tensor(c, dtype=F64), 1e-12)


# ------------------------------------------------------------------------------------------- which axes


def test_of_equal_axes_the_later_one_counts_as_the_larger() -> None:
    assert factored_axes((3, 3)) == (1, 0)
    assert factored_axes((3, 2, 3)) == (2, 0)
    assert factored_axes((4, 3, 3, 3)) == (0, 3)
    assert factored_axes((7,)) is None
    assert factor_shapes((64, 32, 3, 3)) == ((32, 3, 3), (64, 3, 3))
    assert factor_shapes((7,)) == ((7,), (0,))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (5, 4, 3, 2), (23, 19, 2, 3)], ids=str)
def test_permuted_axes_give_permuted_results(by: str, shape: tuple[int, ...]) -> None:
    """Sizes that differ: which axis is the largest does not depend on where it is, as with convolution weights."""
    (p,), (g,), moments, *rest = make_call([shape], F64)
    expected, state = mlp_update_step([p], [g], moments, *rest, backend=by)
    axes = factored_axes(shape)
    assert axes is not None
    for order in itertools.permutations(range(len(shape))):
        moved = [0, *(1 + axis for axis in order)]
        parts = [0, 1, *(2 + axis for axis in order)]

        def without(gone: int, order: tuple[int, ...] = order) -> list[int]:
            """The axes of a factor in the new order: those of the tensor but one."""
            left = [axis for axis in range(len(shape)) if axis != gone]
            return [0, 1, *(2 + left.index(axis) for axis in order if axis != gone)]

        rows, columns = without(axes.largest), without(axes.second)
        permuted = Moments(
            [moments.m[0].permute(parts)],
            [moments.v[0].permute(moved)],
            [moments.r[0].permute(rows)],
            [moments.c[0].permute(columns)],
        )
        got, new = mlp_update_step([p.permute(moved)], [g.permute(moved)], permuted, *rest, backend=by)
        assert_close(f"params {order}", got[0], expected[0].permute(moved), 1e-12)
        assert_close(f"r {order}", new.r[0], state.r[0].permute(rows), 1e-12)
        assert_close(f"c {order}", new.c[0], state.c[0].permute(columns), 1e-12)


# ------------------------------------------------------------------------------------------- what is promised


def test_tensors_and_tasks_do_not_depend_on_each_other() -> None:
    shapes = [(5, 4), (7,), (3, 2, 2)]
    params, grads, moments, weights, decays, rates, keep, steps = make_call(shapes, F32, tasks=3)
    together, state = mlp_update_step(params, grads, moments, weights, decays, rates, keep, steps, backend="cpp")
    for i, task in itertools.product(range(3), range(3)):
        one = slice(task, task + 1)
        own = Moments(*([xs[i][one]] for xs in moments))
        numbers = (rates[i : i + 1, one], keep[i : i + 1, one], steps[one])
        alone, new = mlp_update_step([params[i][one]], [grads[i][one]], own, weights, decays, *numbers, backend="cpp")
        assert torch.equal(alone[0], together[i][one])
        assert all(torch.equal(x[0], y[i][one]) for x, y in zip(new, state, strict=True))


def test_backward_keeps_24_bytes_a_coordinate() -> None:
    arguments = make_call([(200, 300)], F32, tasks=1)
    leaves = [*arguments[0], *arguments[1], *arguments[2].m, *arguments[3]]
    for x in leaves:
        x.requires_grad_()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mlp_update_step(*arguments, backend="cpp")
    factors = 2 * 3 * (200 + 300) * 4  # old and new
    weights = sum(w.numel() * 4 for w in arguments[3])
    assert sum(kept.values()) <= 24 * 200 * 300 + factors + weights + 28 * 4 + 200


def test_a_decay_of_one_keeps_the_moments(by: str) -> None:
    arguments = list(make_call([(4, 3), (5,)], F64))
    arguments[4] = torch.ones(7, dtype=F64)
    _, new = mlp_update_step(*arguments, backend=by)
    for name, got, want in zip(Moments._fields, new, arguments[2], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), name


# ------------------------------------------------------------------------------------------- bad arguments

NAMES = ("params", "grads", "moments", "weights", "decays", "rates", "keep", "steps")


def changed(**by_name: Any) -> list[Any]:
    """Arguments of a call, some of them replaced."""
    arguments = make_call([(4, 3), (5,)], F32)
    return [by_name.get(name, x) for name, x in zip(NAMES, arguments, strict=True)]


def one_tensor(*shape: int) -> list[Any]:
    """Arguments of a call with one tensor of this shape, without its task axis."""
    arguments = make_call([(4, 3)], F32)
    params = [torch.zeros(2, *shape)]
    return [params, params, *arguments[2:]]


def layers(width: int, number: int) -> list[Any]:
    return changed(weights=make_call([(1,)], F32, width=width, layers=number)[3])


FAULTS = {
    "rank 0": (lambda: one_tensor(), {}, ValueError, r"params\[0\] must have .* 1 to 4 axes behind it, got \[2\]"),
    "rank 5": (lambda: one_tensor(1, 2, 1, 2, 1), {}, ValueError, r"params\[0\] .* 1 to 4 axes .*2, 1, 2, 1, 2, 1\]"),
    "narrow": (lambda: layers(3, 1), {}, ValueError, r"weights\[0\] must .* W of 4 to 64, got \[3, 39\]"),
    "wide": (lambda: layers(65, 1), {}, ValueError, r"weights\[0\] must .* W of 4 to 64, got \[65, 39\]"),
    "deep": (lambda: layers(4, 5), {}, ValueError, r"weights must hold 4, 6, 8 or 10 tensors, two a layer, got 12"),
    "odd": (lambda: changed(weights=layers(4, 2)[3][:5]), {}, ValueError, r"two a layer, got 5"),
    "decays": (lambda: changed(decays=torch.zeros(6)), {}, ValueError, r"decays must have shape \[7\], got \[6\]"),
    "steps": (lambda: changed(steps=torch.zeros(2)), {}, TypeError, r"steps must be torch.int64, got torch.float32"),
    "rates": (lambda: changed(rates=torch.zeros(2)), {}, ValueError, r"rates must have shape \[2, 2\], got \[2\]"),
    "few grads": (lambda: changed(grads=[torch.zeros(2, 4, 3)]), {}, ValueError, r"grads must hold .* 2, got 1"),
    "tuple": (lambda: changed(moments=([], [], [], [])), {}, TypeError, r"moments must be Moments, got tuple"),
    "exp_mult": (lambda: changed(), {"exp_mult": math.inf}, ValueError, r"exp_mult must be finite, got inf"),
    "mixed": (
        lambda: changed(decays=torch.zeros(7, dtype=F64)),
        {},
        TypeError,
        r"rates must be torch.float64, got torch.float32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_argument_is_named(by: str, fault: str) -> None:
    make, options, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        mlp_update_step(*make(), backend=by, **options)


def test_rows_and_columns_of_the_wrong_shape_are_named(by: str) -> None:
    arguments = changed()
    moments = arguments[2]
    swapped = moments._replace(r=moments.c, c=moments.r)
    with pytest.raises(ValueError, match=r"r\[0\] must have shape \[2, 3, 3\], got \[2, 3, 4\]"):
        mlp_update_step(*changed(moments=swapped), backend=by)
