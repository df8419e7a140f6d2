"""Calls of mlp_inner_loop and mlp_meta_loss that together run each of their CUDA kernels, for compute-sanitizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.mlp_problems import Case as MlpProblem


@dataclass(frozen=True)
class MlpCase:
    """Sizes, dtype and options of one call of mlp_inner_loop and mlp_meta_loss, both ways, with learned rates."""

    widths: tuple[int, ...] = (3, 20, 5)
    dtype: torch.dtype = torch.float32
    activation: str | tuple[str, ...] = "tanh"
    loss: str = "mse"
    steps: int = 3
    per_parameter: bool = False
    checkpoint_every: int = 2
    clip_norm: float | None = None

    def run(self, backend: str, device: str) -> None:
        """Raise unless adapted parameters, losses and meta-gradients are numbers."""
        problem = MlpProblem(list(self.widths), 3, loss=self.loss, device=device)
        lr = [torch.full(p.shape if self.per_parameter else (), 0.01, device=device) for p in problem.params]
        options = {"steps": self.steps, "activation": self.activation, "checkpoint_every": self.checkpoint_every}
        options["clip_norm"] = self.clip_norm
        for call in (problem.meta, problem.adapt):
            for index, x in enumerate(call(backend, self.dtype, lr, **options)):
                if bool(x.cpu().isnan().any()):
                    raise ArithmeticError(f"{call.__name__}: result {index} holds NaN")


#: The last case's steps do not fit any device's shared memory.
MLP_CASES = [
    *(MlpCase(activation=activation) for activation in ("relu", "tanh", "sigmoid", "gelu")),
    *(MlpCase(loss=loss) for loss in ("cross_entropy", "binary_cross_entropy_with_logits")),
    *(MlpCase(dtype=dtype, per_parameter=True) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
    MlpCase((1, 40, 40, 1), per_parameter=True),
    MlpCase((3, 20, 7, 5), activation=("leaky_relu:0.1", "gelu"), clip_norm=0.1),
    MlpCase((20, 40, 10), torch.float64, "gelu", steps=20, checkpoint_every=20),
]

#: Triton's kernels take minutes to compile.
CASES = {"cuda": MLP_CASES, "triton": [], "reference": MLP_CASES[:1]}
