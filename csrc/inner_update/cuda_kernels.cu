// inner_update on the GPU: how the list is split into launches. The kernels are in cuda_kernels.cuh.
#define MK_CAPABILITY cuda  // the host's copies of the arithmetic must not merge with those of the CPU's kernels
#include <math.h>

#include "../core/launch.h"
#include "cuda.h"
#include "cuda_kernels.cuh"

namespace metakern {
namespace {

constexpr int64_t max_segments = 64;     // of a task: a warp of the update adds two sums a lane
constexpr int64_t resident_blocks = 8;   // of a multiprocessor
constexpr int64_t max_blocks = 1 << 20;  // the kernels stride over the rest

int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// How the sums of a task's squares are laid out: a function of the problem alone.
struct NormLayout {
  int segments = 1;
  int launches = 0;  // 0: no clipping

  explicit NormLayout(const InnerUpdateProblem& p) {
    if (!(p.clip_norm > 0) || p.num_tasks == 0) return;
    int64_t units = 0, parts = 0;
    for (int64_t i = 0; i < p.num_tensors; ++i) {
      units += units_of(p.task_size(p.tensors[i]));
      parts += p.tensors[i].numel > 0;
    }
    const int64_t wanted = (units + update_warps - 1) / update_warps;
    segments = wanted < 1 ? 1 : int(smaller(wanted, max_segments));
    launches = int((parts + NormArguments::capacity - 1) / NormArguments::capacity);
  }
  int sums() const { return segments * launches; }
};

CudaResult launch_norms(const InnerUpdateProblem& p, const NormLayout& layout, double* sums, cudaStream_t stream) {
  NormArguments a{};
  a.segments = layout.segments;
  a.num_sums = layout.sums();
  a.num_tasks = p.num_tasks;
  a.sums = sums;
  a.active = p.active;
  const LaunchShape shape{smaller(p.num_tasks * layout.segments, max_blocks), update_threads,
                          update_warps * int(sizeof(double))};
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    const InnerUpdateTensor& t = p.tensors[i];
    if (t.numel > 0) {
      a.parts[a.num_parts++] = {t.grads, a.num_units, p.task_size(t), t.dtype};
      a.num_units += units_of(p.task_size(t));
    }
    if (a.num_parts == 0 || (a.num_parts < NormArguments::capacity && i + 1 < p.num_tensors)) continue;
    const CudaResult result = launch(norm_kernel, shape, a, stream, "launch of inner_update's norm kernel");
    if (!result.ok()) return result;
    a.num_parts = 0;
    a.num_units = 0;
    a.first_sum += layout.segments;
  }
  return {};
}

UpdatePart update_part(const InnerUpdateProblem& p, const InnerUpdateTensor& t, int64_t first_unit) {
  const int64_t task_size = p.task_size(t);
  const bool repeats = t.rates != nullptr && t.rate_period != 1;
  // One of the two sizes divides the other.
  const int64_t row = repeats ? smaller(task_size, t.rate_period) : task_size;
  const int64_t period = repeats ? t.rate_period : 1;
  return {t.params, t.grads, t.updated, t.rates, first_unit, row, task_size, period, t.dtype, t.rate_dtype};
}

CudaResult launch_updates(const InnerUpdateProblem& p, const NormLayout& layout, const double* sums,
                          const DeviceFacts& facts, cudaStream_t stream) {
  UpdateArguments a{};
  a.num_sums = layout.sums();
  a.rate = p.rate;
  a.clip_norm = p.clip_norm;
  a.sums = sums;
  a.active = p.active;
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    const InnerUpdateTensor& t = p.tensors[i];
    if (t.numel > 0) {
      const UpdatePart part = update_part(p, t, a.num_units);
      a.parts[a.num_parts++] = part;
      a.num_units += t.numel / part.row * units_of(part.row);
    }
    if (a.num_parts == 0 || (a.num_parts < UpdateArguments::capacity && i + 1 < p.num_tensors)) continue;
    const int64_t blocks = (a.num_units + update_warps - 1) / update_warps;
    const LaunchShape shape{smaller(blocks, facts.multiprocessors * resident_blocks), update_threads, 0};
    const CudaResult result = launch(update_kernel, shape, a, stream, "launch of inner_update's kernel");
    if (!result.ok()) return result;
    a.num_parts = 0;
    a.num_units = 0;
  }
  return {};
}

}  // namespace

int64_t cuda_inner_update_workspace_bytes(const InnerUpdateProblem& p) {
  return p.num_tasks * NormLayout(p).sums() * int64_t(sizeof(double));
}

CudaResult cuda_inner_update(const InnerUpdateProblem& p, void* workspace, cudaStream_t stream) {
  DeviceFacts facts;
  CudaResult result = device_facts(&facts);
  if (!result.ok()) return result;
  const NormLayout layout(p);
  double* sums = static_cast<double*>(workspace);
  if (layout.launches > 0) result = launch_norms(p, layout, sums, stream);
  return result.ok() ? launch_updates(p, layout, sums, facts, stream) : result;
}

}  // namespace metakern
