"""mlp_inner_loop on a GPU: against the float64 reference, bits, sizes, autograd, torch.compile, graphs, streams.

Without a GPU test_cuda.py runs the same kernels. Axis legend: T tasks, S support and Q query samples of a task, K inner
steps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from bench.gpu_device import CudaDevice
from metakern.ops import mlp_inner_loop, mlp_meta_loss
from metakern.ops.mlp_inner_loop.reference import LOSSES
from tests.conftest import GRADIENT_TOLERANCE, assert_same_bits
from tests.gpu.common import assert_all_same_bits, captured, needs_cuda
from tests.mlp_problems import F64, Case, assert_equal

pytestmark = needs_cuda

DEVICE, BACKEND = "cuda", "cuda"
F32 = torch.float32


def on_device(*args: Any, **options: Any) -> Case:
    return Case(*args, device=DEVICE, **options)


# ------------------------------------------------------------------------------------------- against the reference


# ------------------------------------------------------------------------------------------------- sizes and bits


def test_two_runs_give_the_same_bits_and_leave_the_arguments_alone() -> None:
    case = on_device([3, 40, 40, 4], 1000, 10, 10)  # more tasks than are served at once
    lr = [torch.full((), 0.05, device=DEVICE) for _ in case.params]
    first = case.meta(BACKEND, F32, lr=lr, steps=5) + case.adapt(BACKEND, F32, lr=lr, steps=5)
    second = case.meta(BACKEND, F32, lr=lr, steps=5) + case.adapt(BACKEND, F32, lr=lr, steps=5)
    assert_all_same_bits(second, first, "the second run")
    again = on_device([3, 40, 40, 4], 1000, 10, 10)
    assert_all_same_bits([*case.params, *case.support], [*again.params, *again.support], "arguments")


def test_steps_that_do_not_fit_shared_memory_give_the_same_bits_as_few_that_do() -> None:
    case = on_device([20, 100, 10], 300, 20, 20)
    options = {"steps": 40, "lr": 0.01}  # 41 times 3110 parameters take half a megabyte
    expected = case.meta(BACKEND, F32, checkpoint_every=2, **options)
    assert_all_same_bits(case.meta(BACKEND, F32, **options), expected, "without checkpoints")
    assert_equal(expected, case.meta("reference", **options), 10 * GRADIENT_TOLERANCE[F32])


def test_losses_have_the_same_bits_without_a_graph() -> None:
    case = on_device([3, 20, 4], 19)
    expected = case.meta(BACKEND, steps=7, step_weights=[0.1] * 7)[0]
    with torch.no_grad():
        options = {"lr": 0.1, "steps": 7, "step_weights": [0.1] * 7, "backend": BACKEND}
        assert_same_bits("losses", mlp_meta_loss(case.params, case.support, case.query, **options), expected)


def test_more_than_two_to_the_31_gradients() -> None:
    # A product of two 32-bit sizes would wrap: all tasks are the same one.
    case, tasks = on_device([1, 64, 64, 1], 1, 2, 2), 500_000
    needed, free = 12 * 2**30, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, {free >> 30} GiB are free")
    params = [p.to(F32).requires_grad_() for p in case.params]
    assert sum(p.numel() for p in params) * tasks > 2**31

    def run(count: int) -> list[Tensor]:
        sets = [tuple(t.expand(count, *t.shape[1:]).contiguous() for t in s) for s in case.data(F32)]
        losses = mlp_meta_loss(params, *sets, lr=0.1, steps=1, backend=BACKEND)
        return [losses, *torch.autograd.grad(losses.mean(), params)]

    one, many = run(1), run(tasks)
    assert bool((many[0] == one[0]).all()), "equal tasks have different losses"
    assert_equal(many[1:], one[1:], 1e-4)


# ------------------------------------------------------------------------------------------- the package around it


def test_meta_loss_and_adapt_take_the_kernels_and_without_room_the_generic_path(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", logger="metakern")
    for hidden, fused in ((40, True), (600, False)):
        model = nn.Sequential(
            nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2)
        )
        model.to(DEVICE)
        x, y = torch.randn(2, 4, 5, 3, device=DEVICE), torch.randn(2, 4, 5, 2, device=DEVICE)
        options = {"steps": 2, "lr": 0.01, "loss": F.mse_loss}
        results = []
        for backend in (None, "reference"):
            caplog.clear()
            losses = metakern.meta_loss(model, (x[0], y[0]), (x[1], y[1]), backend=backend, **options)
            results.append([losses, *torch.autograd.grad(losses.mean(), list(model.parameters()))])
            assert ("fused inner loop, Sequential" in caplog.text) == (fused and backend is None)
        assert_equal(*results, 1e-4)
        adapted = metakern.adapt(model, x[0], y[0], **options)
        assert {p.device.type for p in adapted.parameters.values()} == {DEVICE}


def test_labels_without_an_output() -> None:
    case = on_device([2, 4, 3], 3, loss="cross_entropy")
    case.query[1][1, 2] = 3
    options = {"lr": 0.1, "steps": 1, "loss": "cross_entropy", "backend": BACKEND}
    with pytest.raises(ValueError, match="query_y must be 0 to 2, as the model has 3 outputs, got 3"):
        mlp_meta_loss(case.params, case.support, case.query, **options)


@pytest.mark.parametrize("call", ["meta", "adapt"])
def test_compiled_in_one_graph_equals_eager(call: str) -> None:
    case = on_device([2, 6, 3], 5)
    lr = [torch.full((3,), 0.1, dtype=F64, device=DEVICE) for _ in case.params]
    expected = getattr(case, call)(BACKEND, lr=lr, steps=3, per_step=True)
    options = {"steps": 3, "per_step": True, "backend": BACKEND}

    def function(params: list[Tensor], rates: list[Tensor]) -> Any:
        if call == "meta":
            return mlp_meta_loss(params, case.support, case.query, lr=rates, **options)
        return mlp_inner_loop(params, *case.support, lr=rates, **options)

    params, rates = [p.requires_grad_() for p in case.params], [r.requires_grad_() for r in lr]
    got = torch.compile(function, fullgraph=True)(params, rates)
    if call == "meta":
        results, weights = [got], [torch.linspace(0.5, 1.5, 5, dtype=F64, device=DEVICE)]
    else:
        results = list(got)
        weights = [torch.linspace(-1, 1, r.numel(), dtype=F64, device=DEVICE).view(r.shape) for r in results]
    gradients = torch.autograd.grad(results, [*params, *rates], weights)
    assert_all_same_bits([*results, *gradients], expected, "the compiled function")


# ------------------------------------------------------------------------------------------- launches, graphs, streams


class Kept:
    """One problem's tensors, kept in place: what a CUDA graph reads again and again."""

    def __init__(self, seed: int, loss: str = "mse") -> None:
        case = on_device([3, 20, 4], 19, loss=loss, seed=seed)
        self.loss, self.params = loss, [p.to(F32).requires_grad_() for p in case.params]
        self.support, self.query = case.data(F32)

    def copy_(self, other: Kept) -> None:
        with torch.no_grad():
            for xs, ys in ((self.params, other.params), (self.support, other.support), (self.query, other.query)):
                for x, y in zip(xs, ys, strict=True):
                    x.copy_(y)

    def run(self) -> list[Tensor]:
        options = {"lr": 0.1, "steps": 3, "loss": self.loss, "backend": BACKEND}
        losses = mlp_meta_loss(self.params, self.support, self.query, **options)
        adapted = mlp_inner_loop(self.params, *self.support, **options)
        gradients = torch.autograd.grad(losses.sum() + sum(a.square().sum() for a in adapted), self.params)
        return [losses.detach(), *(a.detach() for a in adapted), *gradients]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_replayed_graph_equals_the_call_on_changed_inputs(loss: str) -> None:
    kept = Kept(0, loss)
    graph, results = captured(kept.run)
    for seed in (1, 2, 1):
        kept.copy_(Kept(seed, loss))
        graph.replay()
        torch.cuda.synchronize()
        assert_all_same_bits(results, Kept(seed, loss).run(), "a replayed graph")
    if loss == "cross_entropy":  # which no host can check
        kept.query[1][2, 0] = -1
        graph.replay()
        torch.cuda.synchronize()
        assert results[0].isnan().nonzero().tolist() == [[2]]


def test_the_current_stream_is_the_one_that_is_used() -> None:
    # On that stream the inputs arrive late: a launch on another one would read the old numbers.
    kept, new = Kept(1), Kept(2)
    expected = [x.clone() for x in new.run()]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        kept.copy_(new)
        results = kept.run()
    torch.cuda.synchronize()
    assert_all_same_bits(results, expected, "another stream")


def test_one_launch_each_way() -> None:
    case = on_device([1, 40, 40, 1], 32, 5, 10)
    params, (support, query) = [p.to(F32) for p in case.params], case.data(F32)
    flags, weights = torch.ones(5, dtype=torch.bool), torch.tensor([0.0, 0, 0, 0, 1])
    scalars = (0.01, 5, False, -1, 0, 0, 5)
    operators, ones = torch.ops.metakern, torch.ones(32, device=DEVICE)
    forward = operators.mlp_meta_loss(params, *support, None, *query, None, [], *scalars, flags, weights, True)
    device = CudaDevice()
    arguments = (params, *support, None, *query, None, [], *scalars, flags, weights, True)
    assert device.launches(lambda: operators.mlp_meta_loss(*arguments)) == 1
    backward = (ones, forward[1], params, *support, [], 5, False, 0)
    assert device.launches(lambda: operators.mlp_meta_loss_backward(*backward)) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_a_device_that_is_not_the_current_one() -> None:
    first, second = (Case([3, 20, 4], 19, device=f"cuda:{index}").meta(BACKEND, F32, steps=3) for index in (0, 1))
    assert torch.cuda.current_device() == 0
    assert {x.device for x in second} == {torch.device("cuda:1")}
    assert_all_same_bits([x.to("cuda:0") for x in second], first, "the second device")


# ----------------------------------------------------------------------------------------------------- bad input


def test_a_direct_call_with_arguments_that_do_not_fit_raises() -> None:
    case = on_device([2, 4, 1], 3)
    params, (support, query) = [p.to(F32) for p in case.params], case.data(F32)
    flags, weights = torch.ones(2, dtype=torch.bool), torch.tensor([0.0, 1.0])

    def call(**change: Any) -> None:
        values = {"x": support[0], "lr": [], "steps": 2, "flags": flags, "weights": weights} | change
        scalars = (0.1, values["steps"], False, -1, 0, 0, 1)
        sets = (values["x"], support[1], None, *query, None)
        torch.ops.metakern.mlp_meta_loss(
            params, *sets, values["lr"], *scalars, values["flags"], values["weights"], True
        )

    call()
    many = torch.ones(257)
    bad: dict[str, tuple[type[Exception], dict[str, Any]]] = {
        "support_x must be on the device of params": (RuntimeError, {"x": support[0].cpu()}),
        "support_x must be torch.float32, got torch.float64": (TypeError, {"x": support[0].double()}),
        r"lr\[0\] must be on the device of params": (RuntimeError, {"lr": [torch.tensor(0.1)]}),
        "second_order must be on the CPU": (RuntimeError, {"flags": flags.to(DEVICE)}),
        "step_weights must be on the CPU": (RuntimeError, {"weights": weights.to(DEVICE)}),
        "the CUDA kernels take at most 256 steps, got 257": (
            ValueError,
            {"steps": 257, "flags": many > 0, "weights": many},
        ),
    }
    for message, (error, change) in bad.items():
        with pytest.raises(error, match=message):
            call(**change)
