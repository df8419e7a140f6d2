"""Calls of inner_update that together run each of its GPU kernels, for compute-sanitizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.update_problems import make_update


@dataclass(frozen=True)
class UpdateCase:
    """The layout of α, dtype and options of one call of inner_update, on the sizes that the other tests have."""

    rates: str = "number"
    dtype: torch.dtype = torch.float32
    clip_norm: float | None = None
    resting: bool = False

    def run(self, backend: str, device: str) -> None:
        """Raise if an active task gets NaN."""
        resting = (1,) if self.resting else None
        problem = make_update(3, self.rates, self.dtype, clip_norm=self.clip_norm, resting=resting).to(device)
        updated = problem.expected() if backend == "reference" else problem.run(backend)
        for index, x in enumerate(updated):
            if bool(x.cpu().isnan().any()):
                raise ArithmeticError(f"tensor {index} holds NaN")


UPDATE_CASES = [
    UpdateCase("per parameter and step", clip_norm=2.0, resting=True),
    *(UpdateCase(dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    *(UpdateCase("per parameter", dtype, 2.0) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
    UpdateCase("per tensor", resting=True),
]

CASES = {"cuda": UPDATE_CASES, "triton": UPDATE_CASES[:1], "reference": UPDATE_CASES[:1]}
