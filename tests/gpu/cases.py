"""A small call of every kernel, forward, in place and backward, for compute-sanitizer.

compute-sanitizer --tool memcheck python -m tests.gpu.cases [cuda] [triton]
python -m tests.gpu.cases --dry     by the reference on the CPU

Inputs are made on the CPU, so that few other kernels run. Exits with status 1 if a result is NaN or a call raises;
the tests check the values.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from metakern.ops import LSTMState, lstm_step_
from tests.gpu.common import BACKENDS, with_bfloat16_state
from tests.mlp_problems import Case as MlpProblem
from tests.problems import evaluate, make_problem
from tests.update_problems import make_update

PRECISIONS = ("highest", "high", "medium")


@dataclass(frozen=True)
class Case:
    """Sizes, dtypes and options of one call; N ends within a tile."""

    n: int = 70
    hidden: int = 20
    layers: int = 2
    dtype: torch.dtype = torch.float32
    bfloat16_state: bool = False
    precision: str = "highest"
    preprocess: str = "log_sign"

    def run(self, backend: str, device: str) -> None:
        """Raise if forward, backward or the step in place gives NaN."""
        problem = make_problem(self.n, self.hidden, self.layers, self.dtype, preprocess=self.preprocess)
        problem = with_bfloat16_state(problem) if self.bfloat16_state else problem
        p, h, c = problem.cotangents
        problem = replace(
            problem,
            params=problem.params.to(device),
            grads=problem.grads.to(device),
            h=problem.h.to(device),
            c=problem.c.to(device),
            weights=[w.to(device) for w in problem.weights],
            cotangents=(p.to(device), h.to(device), c.to(device)),
            options=problem.options | {"precision": self.precision},
        )
        results, gradients = evaluate(problem, backend)
        params, state = problem.params.clone(), LSTMState(problem.state.data.clone(), self.n)
        lstm_step_(params, problem.grads, state, problem.weights, backend=backend, **problem.options)
        for name, x in {**results, **gradients, "params in place": params, "state in place": state.data}.items():
            if bool(x.cpu().isnan().any()):  # an infinite slope in float16 is sound
                raise ArithmeticError(f"{name} holds NaN")


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


#: Sizes with specialised kernels in every precision and storage; sizes for the general kernel; every dtype; several
#: blocks and chunks.
CUDA_CASES = [
    *(
        Case(hidden=hidden, precision=precision, bfloat16_state=coarse)
        for hidden, precision, coarse in itertools.product((20, 32), PRECISIONS, (False, True))
    ),
    *(Case(hidden=hidden, layers=layers) for hidden, layers in ((1, 1), (7, 3), (64, 2), (64, 3), (20, 3), (32, 1))),
    *(Case(hidden=hidden, dtype=torch.float64, layers=layers) for hidden, layers in ((20, 2), (7, 3), (64, 3))),
    *(Case(dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(hidden=5, preprocess=name) for name in ("none", "log_and_clip")),
    Case(hidden=7, bfloat16_state=True),
    Case(n=1),
    Case(n=4500),
    Case(n=4500, hidden=3, layers=1),
]

#: Fewer cases, as each takes seconds to compile.
TRITON_CASES = [
    Case(),
    Case(n=1000, precision="medium", bfloat16_state=True),
    Case(hidden=5, dtype=torch.float64, preprocess="none"),
]

UPDATE_CASES = [
    UpdateCase("per parameter and step", clip_norm=2.0, resting=True),
    *(UpdateCase(dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    *(UpdateCase("per parameter", dtype, 2.0) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
    UpdateCase("per tensor", resting=True),
]

#: The last case's steps do not fit any device's shared memory.
MLP_CASES = [
    *(MlpCase(activation=activation) for activation in ("relu", "tanh", "sigmoid", "gelu")),
    *(MlpCase(loss=loss) for loss in ("cross_entropy", "binary_cross_entropy_with_logits")),
    *(MlpCase(dtype=dtype, per_parameter=True) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
    MlpCase((1, 40, 40, 1), per_parameter=True),
    MlpCase((3, 20, 7, 5), activation=("leaky_relu:0.1", "gelu"), clip_norm=0.1),
    MlpCase((20, 40, 10), torch.float64, "gelu", steps=20, checkpoint_every=20),
]

CASES: dict[str, list[Case | UpdateCase | MlpCase]] = {
    "cuda": [*CUDA_CASES, *UPDATE_CASES, *MLP_CASES],
    "triton": [*TRITON_CASES, UPDATE_CASES[0]],
    "reference": [*CUDA_CASES[:3], *TRITON_CASES, UPDATE_CASES[0], MLP_CASES[0]],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases of each backend, even if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backends", nargs="*", help=f"{' and '.join(BACKENDS)}, by default both")
    parser.add_argument("--dry", action="store_true", help="by the reference on the CPU")
    options = parser.parse_args(arguments)
    device = "cpu" if options.dry else "cuda"
    failed = total = 0
    for backend in ["reference"] if options.dry else options.backends or BACKENDS:
        for case in CASES[backend]:
            print(f"{backend}: {case}", flush=True)
            total += 1
            try:
                case.run(backend, device)
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # the next case runs all the same
                print(f"FAILED: {backend}: {case}: {type(error).__name__}: {error}", flush=True)
                failed += 1
    print(f"{total - failed} of {total} cases ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
