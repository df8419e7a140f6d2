// mlp_inner_loop on the GPU: the resources of a call, and its launches. The kernels are in cuda_kernels.cuh.
#define MK_CAPABILITY cuda  // the host's copies of the arithmetic must not merge with those of the CPU's kernels
#include "../core/launch.h"
#include "cuda.h"
#include "cuda_kernels.cuh"

namespace metakern {
namespace {

constexpr int64_t resident_threads = 2048;  // of a multiprocessor

int64_t element_bytes(const MlpInnerLoopProblem& p) { return p.is_double ? sizeof(double) : sizeof(float); }

template <class S>
CudaResult launch_mlp(const MlpArguments& a, const MlpCudaPlan& plan, const DeviceFacts& facts, cudaStream_t stream) {
  static std::atomic<bool> prepared[cached_devices];
  const LaunchShape shape{plan.blocks, plan.threads, int(plan.shared_bytes)};
  return launch(mlp_kernel<S>, prepared, facts, shape, a, stream, "launch of mlp_inner_loop's kernel");
}

template <class S>
CudaResult launch_reduce(const MlpReduceArguments& a, int64_t blocks, cudaStream_t stream) {
  constexpr int threads = reduce_columns * reduce_rows;
  const LaunchShape shape{blocks, threads, threads * int(sizeof(S))};
  return launch(mlp_reduce_kernel<S>, shape, a, stream, "launch of mlp_inner_loop's sum over tasks");
}

}  // namespace

CudaResult cuda_mlp_plan(const MlpInnerLoopProblem& p, MlpMode mode, bool with_grads, MlpCudaPlan* plan) {
  DeviceFacts facts;
  const CudaResult result = device_facts(&facts);
  if (!result.ok()) return result;
  // The first that fits, or the last.
  MlpPlacement& placement = plan->placement;
  placement = with_grads ? MlpPlacement::all_steps : MlpPlacement::no_way_back;
  MlpLayout layout = mlp_layout(p, placement);
  while (layout.elements * element_bytes(p) > facts.shared_bytes &&
         placement < MlpPlacement::one_step_without_adjoint) {
    placement = MlpPlacement(int(placement) + 1);
    layout = mlp_layout(p, placement);
  }
  plan->threads = threads_of(p);
  plan->shared_limit = facts.shared_bytes;
  plan->shared_bytes = layout.elements * element_bytes(p);
  const int64_t by_memory = facts.shared_bytes / plan->shared_bytes, by_threads = resident_threads / plan->threads;
  const int64_t at_once = by_memory < 1 ? 1 : by_memory < by_threads ? by_memory : by_threads;
  const int64_t blocks = facts.multiprocessors * at_once;
  plan->blocks = p.num_tasks < blocks ? p.num_tasks : blocks;
  const MlpScratch scratch(p, layout, mode, placement);
  plan->scratch_bytes = plan->blocks * scratch.elements() * element_bytes(p);
  return {};
}

CudaResult cuda_mlp_inner_loop(const MlpInnerLoopProblem& p, const MlpCudaCall& call, const MlpCudaPlan& plan,
                               cudaStream_t stream) {
  DeviceFacts facts;
  const CudaResult result = device_facts(&facts);
  if (!result.ok()) return result;
  const MlpArguments a{p, call, mlp_layout(p, plan.placement), plan.placement, has_one_rate(p)};
  return p.is_double ? launch_mlp<double>(a, plan, facts, stream) : launch_mlp<float>(a, plan, facts, stream);
}

CudaResult cuda_mlp_reduce(const MlpCudaReduction& r, cudaStream_t stream) {
  MlpReduceArguments a{r, {}};
  int64_t blocks = 0;
  for (int i = 0; i < r.num_parts; ++i) {
    a.first_block[i] = blocks;
    blocks += (r.parts[i].elements + reduce_columns - 1) / reduce_columns;
  }
  return r.dtype == DType::float64 ? launch_reduce<double>(a, blocks, stream) : launch_reduce<float>(a, blocks, stream);
}

}  // namespace metakern
