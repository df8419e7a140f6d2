"""mlp_inner_loop by Triton kernels, held to the reference and to the compiled operators.

Axis legend: T tasks, S support and Q query samples of a task, K inner steps.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")

import metakern
from metakern.ops import mlp_inner_loop, mlp_meta_loss
from metakern.ops.core.triton_launch import is_interpreted
from metakern.ops.mlp_inner_loop import triton as triton_mlp
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import mlp, regression
from tests.mlp_problems import F64, Case, assert_equal
from tests.triton.memory_model import Watch

pytestmark = pytest.mark.usefixtures("interpreter_like_a_gpu", "quick_interpreter")

F32 = torch.float32


def make_case(device: torch.device, widths: list[int], tasks: int = 2, *sizes: int, **options: Any) -> Case:
    """A case on a device, 4 support and 3 query samples where ``sizes`` says no other."""
    case = Case(widths, tasks, *(sizes or (4, 3)), **options)
    case.params = [p.to(device) for p in case.params]
    case.support, case.query = ((x.to(device), y.to(device)) for x, y in (case.support, case.query))
    return case


def assert_matches_reference(case: Case, adapt: bool = True, **options: Any) -> None:
    """Losses, adapted parameters and every gradient, in float64."""
    assert_equal(case.meta("triton", **options), case.meta("reference", **options), 1e-10)
    for name in ("query_mask", "step_weights"):
        options.pop(name, None)
    if adapt:
        assert_equal(case.adapt("triton", **options), case.adapt("reference", **options), 1e-10)


# ------------------------------------------------------------------------------------ against the reference


# ------------------------------------------------------------------------------------ bits and isolation


def test_bits_depend_on_no_graph_checkpoints_programs_or_other_tasks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(device, [3, 2], 3)
    options = {"steps": 3, "step_weights": [0.1] * 3}
    expected = case.meta("triton", F32, **options)
    for every in (1, 2):
        got = case.meta("triton", F32, checkpoint_every=every, **options)
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(f"result {index} with checkpoint_every={every}", a, b)
    params, (support, query) = [p.float() for p in case.params], case.data(F32)
    sets = [[(x[tasks], y[tasks]) for x, y in (support, query)] for tasks in (slice(3), slice(2, 3))]
    with torch.no_grad():
        plain, last = (mlp_meta_loss(params, *s, lr=0.1, backend="triton", **options) for s in sets)
    assert_same_bits("losses without a graph", plain, expected[0])
    assert_same_bits("loss of the last task alone", last, plain[2:])
    monkeypatch.setattr(triton_mlp, "_most_programs", lambda _: 1)
    for index, (a, b) in enumerate(zip(case.meta("triton", F32, **options), expected, strict=True)):
        assert_same_bits(f"result {index} of one program", a, b)


@pytest.mark.skipif(not is_interpreted(), reason="the interpreter is what is watched")
@pytest.mark.parametrize("call", ["meta", "losses", "adapt", "one rate"])
def test_barriers_order_every_access_and_none_is_out_of_bounds(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([2, 3, 2], 1) if call == "one rate" else Case([3, 18, 17, 2], 3, 17, 2, own=True)
    if call == "meta":
        case.params[1] = case.params[1][0]
    shapes = [(2, *p.shape[-2 + i % 2 :]) if i % 3 else (2,) for i, p in enumerate(case.params)]
    rates = [torch.full(shape, 0.1, dtype=F64) for shape in (shapes[:1] if call == "one rate" else shapes)]
    options: dict[str, Any] = {"steps": 2, "activation": "gelu", "checkpoint_every": 1}
    options |= {"lr": 0.1} if call == "adapt" else {"lr": rates, "per_step": True}
    if call != "one rate":
        options["support_mask"] = torch.arange(17).remainder(3).ne(0).expand(3, 17)
    watch = Watch(monkeypatch, triton_mlp)
    if call == "losses":
        with torch.no_grad():
            mlp_meta_loss(case.params, case.support, case.query, **options, step_weights=[0.5, 0.5], backend="triton")
    else:
        getattr(case, "adapt" if call == "adapt" else "meta")("triton", **options)
    assert watch.accesses > 500
    assert watch.phases > 30


@pytest.mark.skipif(not is_interpreted(), reason="the interpreter is what is watched")
def test_a_missing_barrier_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch, triton_mlp)
    monkeypatch.setattr(Watch, "_new_phase", lambda _: None)
    with pytest.raises(Exception, match="the same phase has"):
        Case([3, 5, 2], 1).adapt("triton", steps=1)
    assert watch.accesses


@pytest.mark.parametrize("label", [-1, 3, -100, 2**40])
def test_a_label_without_an_output_spoils_its_task_alone(
    label: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(device, [2, 4, 3], loss="cross_entropy")
    options: dict[str, Any] = {"lr": 0.1, "steps": 1, "loss": "cross_entropy", "backend": "triton"}
    # As where a CUDA graph is captured, and nothing can be asked.
    module = sys.modules["metakern.ops.mlp_inner_loop"]  # metakern.ops has the function by this name
    monkeypatch.setattr(module, "_check_labels", lambda *_: None)
    with torch.no_grad():
        expected = mlp_meta_loss(case.params, case.support, case.query, **options)
        for labels in (case.support[1], case.query[1]):
            kept = labels[1, 2].clone()
            labels[1, 2] = label
            losses = mlp_meta_loss(case.params, case.support, case.query, **options)
            assert_same_bits("the other task", losses[:1], expected[:1])
            assert losses[1].isnan()
            labels[1, 2] = kept
        case.query[1][1, 2] = label
        mask = torch.ones(2, 3, dtype=torch.bool, device=device)
        mask[1, 2] = False
        assert mlp_meta_loss(case.params, case.support, case.query, query_mask=mask, **options).isfinite().all()


def test_a_label_without_an_output_raises(device: torch.device) -> None:
    case = make_case(device, [2, 4, 3], loss="cross_entropy")
    case.query[1][1, 2] = 3
    with pytest.raises(ValueError, match="query_y must be 0 to 2, as the model has 3 outputs, got 3"):
        mlp_meta_loss(case.params, case.support, case.query, lr=0.1, steps=1, loss="cross_entropy", backend="triton")


def test_a_model_of_too_many_layers_is_named(device: torch.device) -> None:
    layers = [layer for _ in range(9) for layer in (torch.nn.Linear(1, 1), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers[:-1]).to(device)
    x = torch.ones(2, 3, 1, device=device)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: the model has more than 8 layers"):
        metakern.adapt(model, x, x, backend="triton")


@pytest.mark.parametrize("tasks", [31, 600])
def test_sums_over_many_tasks(tasks: int, device: torch.device) -> None:
    case = make_case(device, [2, 3, 2], tasks, 1, 1)
    for index in (0, 3):
        case.params[index] = case.params[index].expand(tasks, *case.params[index].shape)
    lr = [torch.ones(3, dtype=F64, device=device)]
    elements = sum((3 * 2, 3, 2 * 3, 2, 3))
    values = case.draw(-(-tasks // 16) * 16, elements).to(device)
    weights = case.draw(tasks).to(device)
    arguments = (weights, values.view(-1), case.params, *case.support, lr, 3, True, 0)
    grads, rates = torch.ops.metakern.mlp_meta_loss_triton_backward(*arguments)
    weighted = (values[:tasks] * weights[:, None]).split([6, 3, 6, 2, 3], dim=1)
    for index, (got, rows) in enumerate(zip([*grads, *rates], weighted, strict=True)):
        expected = rows if index in (0, 3) else rows.sum(0)
        assert_close(f"gradient {index}", got.flatten(1 if index in (0, 3) else 0), expected, 1e-13)


# ------------------------------------------------------------------------------------ torch


NAMES = ("mlp_inner_loop", "mlp_inner_loop_backward", "mlp_meta_loss", "mlp_meta_loss_backward")


def arguments(name: str, device: torch.device) -> tuple[Any, ...]:
    """Arguments of the operator ``name``, with every kind of optional tensor."""
    case = make_case(device, [2, 4, 1])
    rates = [torch.full((2,), 0.1, dtype=F64, device=device) for _ in case.params]
    masks = [torch.ones(y.shape[:2], dtype=torch.bool, device=device) for _, y in (case.support, case.query)]
    flags, options = torch.ones(2, dtype=torch.bool), (0.1, 2, True, -1, 1, 0, 1)
    private = torch.zeros(16 * 2 * 17, dtype=F64, device=device)
    grads = [p.expand(2, *p.shape) for p in case.params]
    support, query = (*case.support, masks[0]), (*case.query, masks[1])
    if name == "mlp_inner_loop":
        return case.params, *support, rates, *options, True, flags
    if name == "mlp_inner_loop_backward":
        return grads, private, case.params, *support, rates, *options, flags
    if name == "mlp_meta_loss":
        weights = torch.tensor([0.0, 1.0], dtype=F64)
        return case.params, *support, *query, rates, *options, flags, weights, True
    values = torch.zeros(16 * (17 + 8), dtype=F64, device=device)
    return torch.ones(2, dtype=F64, device=device), values, case.params, *case.support, rates, 2, True, 0


def test_adapt_and_meta_loss_take_the_kernels(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp(3, 4, 2).to(device)
    episode = regression(2, 4, 3, 3, 2)
    sets = [tuple(x.to(device) for x in part) for part in (episode.support, episode.query)]
    results = []
    for backend in ("triton", "reference"):
        losses = metakern.meta_loss(model, *sets, steps=1, lr=0.1, loss=F.mse_loss, backend=backend, explain=True)
        with torch.no_grad():
            adapted = metakern.adapt(model, *sets[0], steps=1, lr=0.1, loss=F.mse_loss, backend=backend)
        gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
        results.append([losses, *adapted.parameters.values(), *gradients])
    assert_equal(*results, 1e-10)
    assert "fused inner loop" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.ones(3, 5, 7, dtype=F64)},
        {"x": torch.ones(3, 0, 2, dtype=F64)},
        {"x": torch.ones(3, 5, 2)},
        {"x": torch.ones(5, 2, dtype=F64)},
        {"y": torch.ones(3, 4, 1, dtype=F64)},
        {"y": torch.ones(3, 5, 1)},
        {"y": torch.ones(3, 5), "loss": "cross_entropy"},
        {"y": torch.ones(3, 4, dtype=torch.long), "loss": "cross_entropy"},
        {"support_mask": torch.ones(3, 4) > 0},
        {"support_mask": torch.ones(3, 5)},
        {"lr": [torch.ones((), dtype=F64)] * 3},
        {"lr": [torch.ones(3, dtype=F64)] * 4},
        {"lr": [torch.ones((), dtype=F64)] * 4, "per_step": True},
        {"lr": [torch.ones(())] * 4},
        {"lr": float("nan")},
        {"params": [torch.ones(4, 2, dtype=F64), torch.ones(3, dtype=F64)]},
        {"params": [torch.ones(2, dtype=F64), torch.ones(3, dtype=F64)]},
        {"params": [torch.ones(2, 4, 2, dtype=F64), torch.ones(4, dtype=F64)]},
        {"params": [torch.ones(1, 2, dtype=F64), torch.ones(1)]},
        {"params": [torch.ones(0, 2, dtype=F64), torch.ones(0, dtype=F64)]},
        {"params": [x for n in (4, 3) for x in (torch.ones(n, 2, dtype=F64), torch.ones(n, dtype=F64))]},
    ],
)
def test_bad_input_raises_what_the_compiled_operator_raises(change: dict[str, Any], device: torch.device) -> None:
    case = Case([2, 4, 1], 3)
    values: dict[str, Any] = {"params": case.params, "x": case.support[0], "y": case.support[1], "lr": 0.1, "steps": 2}
    values |= change
    raised = []
    for backend, place in (("cpp", torch.device("cpu")), ("triton", device)):
        moved = torch.utils._pytree.tree_map_only(Tensor, lambda x, place=place: x.to(place), values)
        args = [moved.pop(name) for name in ("params", "x", "y")]
        with pytest.raises((ValueError, TypeError)) as error:
            mlp_inner_loop(*args, **moved, backend=backend)
        raised.append((error.type, str(error.value).partition("\n")[0]))
    assert raised[1] == raised[0]


def test_private_results_of_another_problem(device: torch.device) -> None:
    for name, index, message in (
        ("mlp_inner_loop_triton_backward", 1, "trajectory must be the one of this problem, got 8 elements"),
        ("mlp_meta_loss_triton_backward", 1, "task_grads must be the one of this problem, got 8 elements"),
    ):
        args = list(arguments(name.replace("_triton", ""), device))
        args[index] = torch.zeros(8, dtype=F64, device=device)
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.metakern, name)(*args)
