"""Contenders for one step of a per-parameter MLP optimizer: metakern and plain PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metakern.ops import mlp_update_step
from metakern.ops.mlp_update_step import Moments, factor_shapes, reference

#: Maps the arguments of reference.mlp_update_step to the new params and moments, as one list.
Step = Callable[..., list[Tensor]]

EXP_MULT = 1e-3


@dataclass(frozen=True)
class Case:
    """Tensors of one task, and the network; ``compiled`` says whether torch.compile is measured too."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    width: int = 32
    layers: int = 2
    backward: bool = False
    compiled: bool = True

    @property
    def title(self) -> str:
        """The case in words."""
        widths = "-".join(str(self.width) for _ in range(self.layers))
        what = "forward + backward" if self.backward else "forward"
        return f"{what}, 39-{widths}-2, {self.name}"

    @property
    def coordinates(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def _joined(new: tuple[list[Tensor], Moments]) -> list[Tensor]:
    return [*new[0], *(x for xs in new[1] for x in xs)]


def eager(*arguments: Any) -> list[Tensor]:
    """The definition in plain PyTorch."""
    step: Callable[..., Any] = reference.mlp_update_step
    return _joined(step(*arguments, EXP_MULT))


def fused(*arguments: Any) -> list[Tensor]:
    """metakern.ops.mlp_update_step by its C++ kernels."""
    return _joined(mlp_update_step(*arguments, exp_mult=EXP_MULT, backend="cpp"))


def compiled() -> Step:
    """The definition by torch.compile."""
    step: Step = torch.compile(eager, fullgraph=True, dynamic=False)
    return step


def make_arguments(case: Case, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Random arguments, as after some steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    factors = [factor_shapes(shape) for shape in case.shapes]
    params, grads = ([normal(1, *shape) for shape in case.shapes] for _ in range(2))
    moments = Moments(
        [normal(1, 3, *shape) for shape in case.shapes],
        [normal(1, *shape).square() for shape in case.shapes],
        [normal(1, 3, *rows).square() for rows, _ in factors],
        [normal(1, 3, *columns).square() for _, columns in factors],
    )
    sizes = [39, *[case.width] * case.layers, 2]
    weights = []
    for layer, outputs in enumerate(sizes[1:]):
        weights += [normal(outputs, sizes[layer]) / sizes[layer] ** 0.5, 0.1 * normal(outputs)]
    decays = torch.tensor([0.9, 0.99, 0.999, 0.999, 0.9, 0.99, 0.999], dtype=dtype)
    ones = torch.ones(len(case.shapes), 1, dtype=dtype)
    return params, grads, moments, weights, decays, 1e-2 * ones, ones, torch.tensor([100])


def leaves(arguments: Sequence[Any]) -> list[Tensor]:
    """Every tensor that has a gradient."""
    params, grads, moments, weights, *numbers, _ = arguments
    return [*params, *grads, *(x for xs in moments for x in xs if x.numel()), *weights, *numbers]


def make_call(case: Case, step: Step, seed: int, dtype: torch.dtype = torch.float32) -> Callable[[], Sequence[Tensor]]:
    """A step, or a step with its gradients, on random arguments."""
    arguments = make_arguments(case, seed, dtype)
    if not case.backward:

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return [x for x in step(*arguments) if x.numel()]

        return forward
    inputs = [x.requires_grad_() for x in leaves(arguments)]
    cotangents: list[Tensor] = []

    def forward_backward() -> Sequence[Tensor]:
        results = [x for x in step(*arguments) if x.numel()]
        if not cotangents:
            generator = torch.Generator().manual_seed(seed + 1)
            cotangents.extend(torch.randn(x.shape, generator=generator, dtype=dtype) for x in results)
        return torch.autograd.grad(results, inputs, cotangents)

    return forward_backward
