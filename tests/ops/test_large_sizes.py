"""Sizes beyond 32 bits: indices in the loss of the compiled kernels, and sizes that the operators refuse."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conformance.ops.raw_calls import arguments, operator

ROOT = Path(__file__).parents[2]

# Predictions of three outputs 2^30 elements apart, in memory that the system gives page by page as it is touched.
PROGRAM = """
#include "math/mlp.h"

#include <math.h>
#include <stdio.h>
#include <sys/mman.h>

using namespace metakern;

float* reserve(size_t elements) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, elements * sizeof(float), PROT_READ | PROT_WRITE, flags, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<float*>(memory);
}

int main() {
  const int64_t stride = int64_t(1) << 30;
  float *prediction = reserve(2 * stride + 1), *target = reserve(2 * stride + 1), *out = reserve(2 * stride + 1);
  if (prediction == nullptr || target == nullptr || out == nullptr) return 77;
  for (int o = 0; o < 3; ++o) {
    prediction[o * stride] = float(o + 1);
    target[o * stride] = 0.5f;
  }
  const LossSample<float> sample{prediction, target, stride, 3, 1.0f};
  const TaskLoss losses[] = {TaskLoss::mse, TaskLoss::cross_entropy, TaskLoss::binary_cross_entropy};
  for (const TaskLoss loss : losses) {
    target[0] = loss == TaskLoss::cross_entropy ? 2.0f : 0.5f;
    printf("%.6f", double(loss_value<float>(loss, sample)));
    loss_gradient<float>(loss, sample, out);
    for (int o = 0; o < 3; ++o) printf(" %.6f", double(out[o * stride]));
    loss_gradient_tangent<float>(loss, sample, prediction, out);
    for (int o = 0; o < 3; ++o) printf(" %.6f", double(out[o * stride]));
    printf("\\n");
  }
}
"""


def expected(loss: str) -> list[float]:
    """Loss, gradient, and its derivative in the direction of the predictions, by autograd."""
    prediction = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    target = torch.full((3,), 0.5, dtype=torch.float64)
    if loss == "mse":
        value = (prediction - target).square().sum()
    elif loss == "cross_entropy":
        value = torch.nn.functional.cross_entropy(prediction, torch.tensor(2))
    else:
        value = torch.nn.functional.binary_cross_entropy_with_logits(prediction, target, reduction="sum")
    (gradient,) = torch.autograd.grad(value, prediction, create_graph=True)
    (tangent,) = torch.autograd.grad((gradient * prediction.detach()).sum(), prediction)
    return [value.item(), *gradient.tolist(), *tangent.tolist()]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_loss_indexes_outputs_with_64_bits(tmp_path: Path) -> None:
    source, program = tmp_path / "loss.cpp", tmp_path / "loss"
    source.write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip("this system reserves no 24 GiB of addresses")
    assert result.returncode == 0, result.stderr
    lines = [[float(number) for number in line.split()] for line in result.stdout.splitlines()]
    for found, loss in zip(lines, ("mse", "cross_entropy", "binary_cross_entropy_with_logits"), strict=True):
        assert found == pytest.approx(expected(loss), abs=2e-6)


@pytest.mark.parametrize("name", ["mlp_inner_loop", "mlp_inner_loop_triton"])
def test_more_samples_than_the_kernels_count_are_refused(name: str) -> None:
    args = arguments(name, tasks=1)
    many = 2**20 + 1
    args[1], args[2], args[3] = (x[:, :1].expand(-1, many, *x.shape[2:]) for x in args[1:4])
    with pytest.raises(ValueError, match="support_x must have at most 1048576 samples, got 1048577"):
        operator(name)(*args)


def test_a_task_that_triton_counts_with_more_than_32_bits_is_refused() -> None:
    args = arguments("mlp_inner_loop_triton", tasks=1, loss=1)
    samples, units = 2**20, 600
    args[0] = [torch.zeros(1).expand(units, 2), torch.zeros(1).expand(units)]
    args[1], args[2], args[3] = torch.zeros(1, samples, 2), torch.zeros(1, samples, dtype=torch.int64), None
    args[4] = []
    with pytest.raises(ValueError, match=r"a task must take less than 2\^31 elements of scratch, got"):
        operator("mlp_inner_loop_triton")(*args)
