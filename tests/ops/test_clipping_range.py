"""Clipping by norms far from 1: against a plain loop in float64, in every backend and transform.

The squares of such gradients overflow or underflow their dtype: 60,000 squared is infinite in float16, and 1e-30
squared is zero in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.ops import inner_update
from tests.conftest import BACKENDS, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close

#: dtype, size of the gradients, the norm that they are clipped to.
RANGES = [
    pytest.param(torch.float16, 6e4, 2.0, id="float16, large"),
    pytest.param(torch.float16, 6e4, 1e-3, id="float16, large, to a small norm"),
    pytest.param(torch.float16, 1e-4, 1e-5, id="float16, small"),
    pytest.param(torch.bfloat16, 1e30, 2.0, id="bfloat16, large"),
    pytest.param(torch.float32, 1e30, 2.0, id="float32, large"),
    pytest.param(torch.float32, 1e-30, 1e-32, id="float32, small"),
    pytest.param(torch.float64, 1e100, 2.0, id="float64, large"),
]


def draw(dtype: torch.dtype, size: float) -> tuple[list[Tensor], list[Tensor]]:
    """Params that do not hide the update, and gradients of two tasks, the second a third of the first."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.rand(2, *shape, generator=generator, dtype=torch.float64) + 0.1 for shape in ((3,), (2, 4), ())]
    scale = torch.tensor([1.0, 1 / 3], dtype=torch.float64)
    grads = [(g / 1.1 * size * scale.view(-1, *[1] * (g.dim() - 1))).to(dtype) for g in grads]
    return [torch.zeros_like(g) for g in grads], grads


def plain(params: list[Tensor], grads: list[Tensor], clip_norm: float) -> list[Tensor]:
    """The update with a rate of 0.5 in float64, one task after another."""
    new = [p.double().clone() for p in params]
    for task in range(2):
        parts = [g[task].double() for g in grads]
        norm = torch.cat([part.flatten() for part in parts]).norm()
        for p, part in zip(new, parts, strict=True):
            p[task] = p[task] - 0.5 * part * min(1.0, clip_norm / float(norm))
    return new


def tolerance(dtype: torch.dtype, backend: str) -> float:
    """The reference rounds the clipped gradient of 16 bits, and then the step."""
    half = dtype in (torch.float16, torch.bfloat16)
    return FORWARD_TOLERANCE[dtype] * (3 if half and backend == "reference" else 1)


def assert_update(got: list[Tensor], dtype: torch.dtype, size: float, clip_norm: float, backend: str) -> None:
    params, grads = draw(dtype, size)
    for index, (new, want) in enumerate(zip(got, plain(params, grads, clip_norm), strict=True)):
        assert new.dtype == dtype
        scale = float(want.abs().max())
        assert scale > 0
        # The smallest number of float16 is 6e-8: below, what counts is its distance.
        slack = tolerance(dtype, backend) + (6e-8 / scale if dtype == torch.float16 else 0)
        assert_close(f"tensor {index}", new, want, slack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "size", "clip_norm"), RANGES)
def test_the_step_has_the_norm(
    dtype: torch.dtype, size: float, clip_norm: float, backend: str, request: pytest.FixtureRequest
) -> None:
    if backend == "triton":
        request.getfixturevalue("interpreter_like_a_gpu")
    params, grads = draw(dtype, size)
    got = inner_update(params, grads, 0.5, clip_norm=clip_norm, backend=backend)
    assert_update(got, dtype, size, clip_norm, backend)


@pytest.mark.parametrize(("dtype", "size", "clip_norm"), RANGES)
def test_compiled(dtype: torch.dtype, size: float, clip_norm: float) -> None:
    params, grads = draw(dtype, size)
    torch.compiler.reset()  # every range is a graph of its own
    for backend in ("cpp", "reference"):

        def step(params: list[Tensor], grads: list[Tensor], backend: str = backend) -> list[Tensor]:
            return inner_update(params, grads, 0.5, clip_norm=clip_norm, backend=backend)

        got = torch.compile(step, backend="aot_eager", fullgraph=True)(params, grads)
        assert_update(got, dtype, size, clip_norm, "reference")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("dtype", "size", "clip_norm"), RANGES)
def test_transformed(dtype: torch.dtype, size: float, clip_norm: float, backend: str) -> None:
    params, grads = draw(dtype, size)

    def one(p: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        new = inner_update([x[None] for x in p], [x[None] for x in g], 0.5, clip_norm=clip_norm, backend=backend)
        return [x[0] for x in new]

    assert_update(torch.func.vmap(one)(params, grads), dtype, size, clip_norm, "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transformed", [False, True], ids=["autograd", "torch.func"])
@pytest.mark.parametrize(
    ("dtype", "size", "clip_norm"),
    [(torch.float32, 1e20, 2.0), (torch.float32, 1e-20, 1e-22), (torch.float64, 1e60, 1.0)],
)
def test_derivatives(dtype: torch.dtype, size: float, clip_norm: float, transformed: bool, backend: str) -> None:
    _, grads = draw(dtype, size)
    weights = [torch.linspace(-1, 2, g.numel(), dtype=torch.float64).view(g.shape) for g in grads]

    def total(*leaves: Tensor, backend: str = backend) -> Tensor:
        new = inner_update([torch.zeros_like(x) for x in leaves], leaves, 0.5, clip_norm=clip_norm, backend=backend)
        return sum((x * w.to(x.dtype)).sum() for x, w in zip(new, weights, strict=True))

    def slopes(leaves: list[Tensor], backend: str) -> Any:
        if transformed:
            return torch.func.grad(lambda xs: total(*xs, backend=backend))(tuple(leaves))
        leaves = [x.clone().requires_grad_() for x in leaves]
        return torch.autograd.grad(total(*leaves, backend=backend), leaves)

    def slopes_of_a_loop() -> Any:
        leaves = [g.double().requires_grad_() for g in grads]
        loss = 0
        for task in range(2):
            norm = torch.cat([x[task].flatten() for x in leaves]).norm()
            pairs = zip(leaves, weights, strict=True)
            loss = loss - 0.5 * clip_norm / norm * sum((x[task] * w[task]).sum() for x, w in pairs)
        return torch.autograd.grad(loss, leaves)

    for index, (a, b) in enumerate(zip(slopes(grads, backend), slopes_of_a_loop(), strict=True)):
        assert_close(f"gradient {index}", a, b, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_adapt_of_a_float16_model_takes_the_step(backend: str) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float16)
    nn.init.zeros_(model.weight)
    x = torch.full((2, 1, 1), 200.0, dtype=torch.float16)
    y = torch.full((2, 1, 1), -150.0, dtype=torch.float16)  # the gradient is 2 * 200 * 150 = 60,000
    adapted = metakern.adapt(model, x, y, loss=nn.functional.mse_loss, lr=0.5, clip_norm=1.0, backend=backend)
    (weight,) = adapted.parameters.values()
    assert_close("weight", weight, torch.full((2, 1, 1), -0.5), FORWARD_TOLERANCE[torch.float16])
