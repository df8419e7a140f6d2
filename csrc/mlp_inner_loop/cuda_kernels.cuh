// mlp_inner_loop's kernels: whole inner loops of a task in one block's shared memory, and the sums over tasks.
#pragma once
#include "cuda.h"
#include "cuda_task.cuh"

namespace metakern {
inline namespace MK_CAPABILITY {

// Writes zeros after the last task, so that results are deterministic.
template <class S>
__device__ __forceinline__ void clear_padding(const MlpArguments& a, void* data, int64_t elements) {
  if (data == nullptr) return;
  const int64_t end = a.p.padded_tasks() * elements, step = int64_t(gridDim.x) * blockDim.x;
  int64_t i = a.p.num_tasks * elements + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < end; i += step) static_cast<S*>(data)[i] = S(0);
}

template <class S>
__global__ void __launch_bounds__(max_mlp_threads, 1) mlp_kernel(const __grid_constant__ MlpArguments a) {
  if (a.call.mode == MlpMode::adapt)
    clear_padding<S>(a, a.call.trajectory, a.p.num_params() * a.p.num_checkpoints());
  else
    clear_padding<S>(a, a.call.task_grads, a.call.flat);
  for (int64_t task = blockIdx.x; task < a.p.num_tasks; task += gridDim.x) {
    MlpTask<S>(a, task).run();
    __syncthreads();  // before the next task's parameters
  }
}

// A block takes 32 neighbouring elements of a tensor. Each of its warps adds every 32nd task, then warp 0 adds the
// warps' sums, pair by pair.
constexpr int reduce_columns = warp_lanes;
constexpr int reduce_rows = 32;

struct MlpReduceArguments {
  MlpCudaReduction r;
  int64_t first_block[MlpCudaReduction::capacity];  // of every part
};

template <class S>
__global__ void __launch_bounds__(reduce_columns* reduce_rows, 1)
    mlp_reduce_kernel(const __grid_constant__ MlpReduceArguments a) {
  S* sums = shared_elements<S>();  // [rows][columns]
  int part = a.r.num_parts - 1;
  while (a.first_block[part] > int64_t(blockIdx.x)) --part;
  const MlpCudaReduction::Part& to = a.r.parts[part];
  const int column = int(threadIdx.x) % reduce_columns, row = int(threadIdx.x) / reduce_columns;
  const int64_t at = (int64_t(blockIdx.x) - a.first_block[part]) * reduce_columns + column;
  const S* grads = static_cast<const S*>(a.r.task_grads) + to.first + at;
  S sum = 0;
  if (at < to.elements) {
    for (int64_t task = row; task < a.r.num_tasks; task += reduce_rows) {
      const S weight = a.r.weights == nullptr ? S(1) : read_lane<S>(a.r.weights, a.r.dtype, task);
      const S term = weight * grads[task * a.r.flat];
      if (to.shared)
        sum += term;
      else
        write_lane(to.out, a.r.dtype, task * to.elements + at, term);
    }
  }
  if (!to.shared) return;
  sums[row * reduce_columns + column] = sum;
  for (int rows = reduce_rows / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (row < rows) sums[row * reduce_columns + column] += sums[(row + rows) * reduce_columns + column];
  }
  if (row == 0 && at < to.elements) write_lane(to.out, a.r.dtype, at, sums[column]);
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
