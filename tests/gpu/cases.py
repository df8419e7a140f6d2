"""A small call of every kernel, forward, in place and backward, for compute-sanitizer.

compute-sanitizer --tool memcheck python -m tests.gpu.cases [cuda] [triton]
python -m tests.gpu.cases --dry     by the reference on the CPU

Every operator of the conformance suite takes part: by ``CASES`` in tests/ops/<folder>/gpu_cases.py, which map a
backend to cases with a method ``run``, or else by examples of its row. Inputs are made on the CPU, so that few other
kernels run. Exits with status 1 if a result is NaN or a call raises; the tests check the values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tests.conformance.ops.implementations import with_gradients
from tests.conformance.ops.operators import Operator
from tests.conformance.ops.rows import with_modules
from tests.gpu.common import BACKENDS

F32 = torch.float32

#: Examples of a row: of float32, and of the other dtypes. Triton's kernels, which take seconds to compile, run one.
EXAMPLES, OTHERS = ("small", "viewed", "spread"), ("viewed",)


class Case(Protocol):
    """One call."""

    def run(self, backend: str, device: str) -> None:
        """Raise if a result is NaN."""


@dataclass(frozen=True)
class RowCase:
    """An example of a row of the conformance suite, forward and backward."""

    op: Operator
    example: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op.name}, {self.example}, {self.dtype}"

    def run(self, backend: str, device: str) -> None:
        """Raise if a result or a gradient is NaN."""
        example = self.op.make(self.dtype, **getattr(self.op, self.example)).to(device)
        results, gradients = with_gradients(self.op, example, lambda leaves: self.op.call(leaves, backend))
        for name, x in (results | {f"gradient of {name}": x for name, x in gradients.items()}).items():
            if bool(x.cpu().isnan().any()):
                raise ArithmeticError(f"{name} holds NaN")


def row_cases(op: Operator, backend: str) -> Iterator[RowCase]:
    """The cases of an operator without a module of its own."""
    if backend == "cuda":
        for dtype in op.dtypes:
            if op.serves(backend, dtype):
                yield from (RowCase(op, example, dtype) for example in (EXAMPLES if dtype == F32 else OTHERS))
    elif op.serves(backend, F32):
        yield RowCase(op, "small" if backend == "reference" else "viewed", F32)


def cases(backend: str) -> list[Case]:
    """All cases by a backend, or by the reference."""
    found: list[Case] = []
    for op, module in with_modules("gpu_cases"):
        found += row_cases(op, backend) if module is None else module.CASES[backend]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases of each backend, even if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backends", nargs="*", help=f"{' and '.join(BACKENDS)}, by default both")
    parser.add_argument("--dry", action="store_true", help="by the reference on the CPU")
    options = parser.parse_args(arguments)
    device = "cpu" if options.dry else "cuda"
    failed = total = 0
    for backend in ["reference"] if options.dry else options.backends or BACKENDS:
        for case in cases(backend):
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
