"""csrc/mlp_inner_loop/cuda_kernels.cu itself, run on the CPU thread by thread, held to the reference.

Axis legend: T tasks, S support and Q query samples of a task, K inner steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops.mlp_inner_loop import cuda_shared_bytes, make_problem
from tests.conftest import GRADIENT_TOLERANCE, assert_same_bits
from tests.cuda.device import DEVICE, Device, EmulationError
from tests.mlp_problems import F64, Case, assert_equal
from tests.ops.mlp_inner_loop.emulator import (
    ADAPT,
    ALL_STEPS,
    META_LOSS,
    NO_WAY_BACK,
    ONE_STEP,
    WITHOUT_ADJOINT,
    Arguments,
    MlpEmulator,
)

F32 = torch.float32


def arguments(case: Case, dtype: torch.dtype, lr: Any, steps: int, masks: Any = (None, None), **options: Any) -> Any:
    """The operators' arguments, from those of the public function."""
    values = {"per_step": False, "adapted": None, "activation": "relu", "first_order": False} | options
    every = values.pop("checkpoint_every", None) or steps
    problem = make_problem(case.params, lr, steps, loss=case.loss, checkpoint_every=every, **values)
    rates = [r.detach().to(dtype) for r in lr] if isinstance(lr, list) else []
    sets = [(*samples, mask) for samples, mask in zip(case.data(dtype), masks, strict=True)]
    return Arguments(problem, [p.detach().to(dtype) for p in case.params], rates, *sets)


def meta(
    mlp: MlpEmulator, case: Case, dtype: torch.dtype = F64, lr: Any = 0.1, device: Device = DEVICE, **options: Any
) -> list[Tensor]:
    """Results of Case.meta, by the emulated operators."""
    steps = options.pop("steps")
    step_weights = options.pop("step_weights", None) or [0.0] * (steps - 1) + [1.0]
    masks = options.pop("support_mask", None), options.pop("query_mask", None)
    a = arguments(case, dtype, lr, steps, masks, **options)
    losses, task_grads = mlp.mlp_meta_loss(a, step_weights, device=device)
    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=dtype)
    grads, rates = mlp.mlp_meta_loss_backward(weights, task_grads, a, device)
    return [losses, *grads, *rates]


def adapt(
    mlp: MlpEmulator, case: Case, dtype: torch.dtype = F64, lr: Any = 0.1, device: Device = DEVICE, **options: Any
) -> list[Tensor]:
    """Results of Case.adapt, by the emulated operators."""
    a = arguments(case, dtype, lr, options.pop("steps"), **options)
    a = Arguments(a.problem, a.params, a.lr, a.support)
    results, trajectory = mlp.mlp_inner_loop(a, device=device)
    weights = [torch.linspace(-1, 1, r.numel(), dtype=dtype).view(r.shape) for r in results]
    grads, rates = mlp.mlp_inner_loop_backward(weights, trajectory, a, device)
    return [*results, *grads, *rates]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(f"result {index}", a, b)


# ------------------------------------------------------------------------------------------- against the reference


# ------------------------------------------------------------------------------------------------- sizes and bits


def small(case: Case, mlp: MlpEmulator, placement: int, steps: int, every: int, activation: str) -> Device:
    """A device whose shared memory holds no more of a task than that."""
    a = arguments(case, F32, 0.1, steps, activation=activation, checkpoint_every=every)
    device = Device(shared_kilobytes=mlp.shared_bytes(a, placement) // 1024 + 1)
    assert mlp.plan(a, META_LOSS, True, DEVICE).placement == ALL_STEPS
    assert mlp.plan(a, META_LOSS, True, device).placement == placement
    return device


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_steps_that_do_not_fit_give_the_same_bits_as_those_that_do(activation: str, mlp: MlpEmulator) -> None:
    case = Case([17, 20, 4], 5)
    options = {"steps": 5, "step_weights": [0.1] * 5, "activation": activation}
    expected, adapted = meta(mlp, case, F32, **options), adapt(mlp, case, F32, steps=5, activation=activation)
    for placement, every in ((ONE_STEP, 5), (ONE_STEP, 2), (ONE_STEP, 1), (WITHOUT_ADJOINT, 5), (WITHOUT_ADJOINT, 2)):
        device = small(case, mlp, placement, 5, every, activation)
        assert_same(meta(mlp, case, F32, device=device, checkpoint_every=every, **options), expected)
        assert_same(meta(mlp, case, F32, checkpoint_every=every, **options), expected)
        got = adapt(mlp, case, F32, device=device, checkpoint_every=every, steps=5, activation=activation)
        assert_same(got, adapted)


def test_losses_have_the_same_bits_without_gradients(mlp: MlpEmulator) -> None:
    case, weights = Case([3, 20, 4], 3), [0.5, 0.0, 0.25, 0.25]
    a = arguments(case, F32, 0.1, 4)
    with_grads, without = (mlp.mlp_meta_loss(a, weights, flag) for flag in (True, False))
    assert_same_bits("losses", without[0], with_grads[0])
    assert without[1].numel() == 0
    results = [mlp.mlp_inner_loop(Arguments(a.problem, a.params, [], a.support), keep)[0] for keep in (True, False)]
    assert_same(*results)


def test_same_bits_in_every_schedule_and_for_every_number_of_multiprocessors(mlp: MlpEmulator) -> None:
    case = Case([3, 20, 4], 37)  # a block takes several tasks; the sum takes more than its 32 rows
    lr = [torch.full((), 0.1) for _ in case.params]
    options = {"lr": lr, "steps": 2, "activation": "gelu"}
    expected = meta(mlp, case, F32, **options)
    assert_equal(expected, case.meta("reference", **options), GRADIENT_TOLERANCE[F32])
    tight = Device(multiprocessors=1, shared_kilobytes=24)
    assert mlp.plan(arguments(case, F32, 0.1, 2), META_LOSS, True, tight).blocks < 37
    for device in (tight, Device(order="reverse"), Device(multiprocessors=2, order="shuffled", seed=1)):
        assert_same(meta(mlp, case, F32, device=device, **options), expected)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.parametrize("placement", [ALL_STEPS, WITHOUT_ADJOINT])
def test_same_bits_in_every_schedule_of_every_path(placement: int, order: str, mlp: MlpEmulator) -> None:
    case = Case([17, 20, 4], 2, 6, 5, "cross_entropy")
    device = DEVICE if placement == ALL_STEPS else small(case, mlp, placement, 4, 2, "relu")
    masks = [torch.rand(2, n, generator=case.generator) < 0.6 for n in (6, 5)]
    shared = {"steps": 4, "checkpoint_every": 2, "first_order": (False, True, False, False)}
    weights = {"step_weights": [0.1, 0.0, 0.4, 0.5], "support_mask": masks[0], "query_mask": masks[1]}
    for lr in (0.1, [torch.full((), 0.1)], [0.1 + 0.05 * case.draw(*p.shape) for p in case.params]):
        scheduled = replace(device, order=order, seed=2)
        got = [meta(mlp, case, F32, lr, on, **shared, **weights) for on in (device, scheduled)]
        assert_same(*got)
        assert_same(*(adapt(mlp, case, F32, lr, on, **shared) for on in (device, scheduled)))


def test_what_lies_behind_the_last_task_is_zero(mlp: MlpEmulator) -> None:
    case = Case([2, 4, 1], 3)
    a = arguments(case, F32, 0.1, 2, checkpoint_every=1)
    trajectory = mlp.mlp_inner_loop(Arguments(a.problem, a.params, [], a.support))[1].view(16, -1)
    task_grads = mlp.mlp_meta_loss(a, [0.0, 1.0])[1].view(16, -1)
    for private in (trajectory, task_grads):
        assert bool((private[:3] != 0).any(1).all())
        assert bool((private[3:] == 0).all())


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_a_label_without_an_output_makes_its_task_nan(label: int, mlp: MlpEmulator) -> None:
    case = Case([2, 4, 3], 3, loss="cross_entropy")
    before = meta(mlp, case, steps=1)[0]
    for labels in (case.query[1], case.support[1]):
        kept = int(labels[1, 2])
        labels[1, 2] = label
        after = meta(mlp, case, steps=1)[0]
        assert_same_bits("others", after[[0, 2]], before[[0, 2]])
        assert after[1].isnan()
        labels[1, 2] = kept


def test_a_failed_call_is_named(mlp: MlpEmulator) -> None:
    a = arguments(Case([2, 4, 1], 3), F32, 0.1, 1)
    task_grads = mlp.mlp_meta_loss(a, [1.0])[1]
    calls = {
        1: "cudaGetDevice",
        2: "cudaDeviceGetAttribute(MultiProcessorCount)",
        4: "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)",
        5: "launch of mlp_inner_loop's kernel",
    }
    for call, name in calls.items():
        with pytest.raises(EmulationError) as caught:
            mlp.mlp_meta_loss(a, [1.0], device=Device(fail_call=call, failure=209))
        assert (caught.value.error, caught.value.call) == (209, name)
    with pytest.raises(EmulationError, match="launch of mlp_inner_loop's sum over tasks"):
        mlp.mlp_meta_loss_backward(torch.ones(3), task_grads, a, Device(fail_call=1, failure=209))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32, F64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("widths", "samples", "queries"), [([1, 40, 40, 1], 5, 10), ([64, 9, 5], 40, 3), ([3, 2], 2, 9)]
)
def test_python_knows_the_rule_of_what_fits(
    widths: list[int], samples: int, queries: int, activation: str, dtype: torch.dtype, mlp: MlpEmulator
) -> None:
    for loss in ("mse", "cross_entropy"):
        case = Case(widths, 2, samples, queries, loss)
        both = arguments(case, dtype, 0.1, 3, activation=activation)
        for a, q in ((both, queries), (Arguments(both.problem, both.params, [], both.support), 0)):
            assert cuda_shared_bytes(widths, samples, q, activation, loss, dtype) == mlp.shared_bytes(
                a, WITHOUT_ADJOINT
            )


def test_results_are_those_that_a_trace_expects(mlp: MlpEmulator) -> None:
    case = Case([2, 4, 1], 3)
    for dtype in (torch.bfloat16, F32, F64):
        lr = [torch.full((), 0.1) for _ in case.params]
        a = arguments(case, dtype, lr, 3, checkpoint_every=2)
        params, rates, sets = (
            [x if x is None else x.to("meta") for x in xs] for xs in (a.params, a.lr, a.support + a.query)
        )
        flags, weights = torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=a.arithmetic)
        operators = torch.ops.metakern
        adapted = operators.mlp_inner_loop(params, *sets[:3], rates, *a.problem.scalars, True, flags)
        losses = operators.mlp_meta_loss(params, *sets, rates, *a.problem.scalars, flags, weights, True)
        got = [*mlp.mlp_inner_loop(Arguments(a.problem, a.params, a.lr, a.support)), *mlp.mlp_meta_loss(a, [1.0] * 3)]
        for x, want in zip([*got[0], *got[1:]], [*adapted[0], adapted[1], *losses], strict=True):
            assert (x.shape, x.dtype) == (want.shape, want.dtype)


def test_without_a_way_back_one_step_is_held(mlp: MlpEmulator) -> None:
    a = arguments(Case([1, 40, 40, 1], 3, 5, 10), F32, 0.1, 5)
    training, evaluation = (mlp.plan(a, META_LOSS, flag) for flag in (True, False))
    adaptation = mlp.plan(a, ADAPT, False)
    assert training.placement == ALL_STEPS
    assert training.scratch_bytes == evaluation.scratch_bytes == adaptation.scratch_bytes == 0
    assert evaluation.shared_bytes == mlp.shared_bytes(a, NO_WAY_BACK) < training.shared_bytes / 3
