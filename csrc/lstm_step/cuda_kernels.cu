// lstm_step on the GPU: selection and launch of kernels. The kernels are in cuda_forward.cuh, cuda_forward_mma.cuh,
// cuda_backward.cuh and cuda_reduce.cuh.
#define MK_CAPABILITY cuda  // the host's copies of the arithmetic must not merge with those of the CPU's kernels
#include "../core/launch.h"
#include "cuda.h"
#include "cuda_backward.cuh"
#include "cuda_forward.cuh"
#include "cuda_forward_mma.cuh"

namespace metakern {
namespace {

int at_most_int(int64_t n, int bound) { return n < bound ? int(n) : bound; }

// With fewer warps per block, reading the weights through the cache is faster.
constexpr int few_warps = 2;

// One call of a launcher, with its stages.
template <class Pointers_, class Stages_>
struct Call {
  using Pointers = Pointers_;
  using Stages = Stages_;
  const LstmStepProblem& problem;
  const Pointers& pointers;
  const Stages& stages;
  const DeviceFacts& facts;
  cudaStream_t stream;
  CudaResult* result;

  template <class Arguments>
  bool launch(void (*kernel)(Arguments), std::atomic<bool> (&prepared)[cached_devices], const LaunchShape& shape,
              const Arguments& arguments, const char* name) const {
    *result = metakern::launch(kernel, prepared, facts, shape, arguments, stream, name);
    return true;
  }
};

// False where the device has too little shared memory for this kernel.
template <class Units, class Call>
bool launch_forward(const Call& call) {
  const LstmStepProblem& p = call.problem;
  static std::atomic<bool> prepared[cached_devices];
  ForwardArguments<typename Units::Stages> a{p, call.pointers, call.stages, true};
  const int warp_bytes = WarpMemory<Units>::bytes(p.hidden_size), shared_bytes = call.facts.shared_bytes;
  int packed_bytes = Units::packed_bytes(p.hidden_size, p.num_layers);
  if (packed_bytes + few_warps * warp_bytes > shared_bytes) {
    if (Units::fixed_hidden > 0) return false;
    a.pack_weights = false;
    packed_bytes = 0;
  }
  const int warps = at_most_int((shared_bytes - packed_bytes) / warp_bytes, Units::max_warps);
  if (warps < 1) return false;
  // Full blocks even for few tiles: idle warps help to pack the weights.
  const LaunchShape shape{at_most_int(p.num_tiles(), call.facts.multiprocessors), warps * warp_lanes,
                          packed_bytes + warps * warp_bytes};
  return call.launch(forward_kernel<Units>, prepared, shape, a, "launch of lstm_step's forward kernel");
}

template <class Kind, class Store, class Call>
bool launch_tensor_cores(const Call& call) {
  if (call.problem.hidden_size == 20) return launch_forward<MmaUnits<Kind, Store, 20>>(call);
  if (call.problem.hidden_size == 32) return launch_forward<MmaUnits<Kind, Store, 32>>(call);
  return false;
}

// False where the device has too little shared memory for this kernel.
template <class Store, int FixedH, class Call>
bool launch_backward(const Call& call) {
  using Stages = typename Call::Stages;
  using S = stage_scalar<Stages>;
  using Memory = TileMemory<Stages>;
  const LstmStepProblem& p = call.problem;
  static std::atomic<bool> prepared[cached_devices];
  BackwardArguments<Stages> a{p, call.pointers, call.stages, chunk_tiles(p), num_chunks(p), true};
  const int warp_bytes = Memory::bytes(p.hidden_size, p.num_layers), shared_bytes = call.facts.shared_bytes;
  const int ones_bytes = Memory::stride * int(sizeof(S));
  int block_bytes = ones_bytes + Sizes<Stages, FixedH>{p.hidden_size}.packed_elements(p.num_layers) * int(sizeof(S));
  if (block_bytes + few_warps * warp_bytes > shared_bytes) {
    if (FixedH > 0) return false;
    a.pack_weights = false;
    block_bytes = ones_bytes;
  }
  const int warps = at_most_int((shared_bytes - block_bytes) / warp_bytes, max_backward_warps);
  if (warps < 1) return false;
  const LaunchShape shape{at_most_int(a.chunks, call.facts.multiprocessors), warps * warp_lanes,
                          block_bytes + warps * warp_bytes};
  return call.launch(backward_kernel<Stages, Store, FixedH>, prepared, shape, a,
                     "launch of lstm_step's backward kernel");
}

// The kernels of one pair of stages, by the sizes that they are compiled for. The plain stages have kernels for 20 and
// 32 hidden units, others for 20, which their authors use, and all pairs a general one.
struct Forward {
  template <class Store, int FixedH, class Call>
  static bool fma(const Call& call) {
    return launch_forward<FmaUnits<typename Call::Stages, Store, FixedH>>(call);
  }
  template <class Store, class Call>
  static bool tensor_cores(const Call& call) {
    if (call.problem.precision == Precision::high) return launch_tensor_cores<Tf32, Store>(call);
    if (call.problem.precision == Precision::medium) return launch_tensor_cores<Bf16, Store>(call);
    return false;
  }
};
struct Backward {
  template <class Store, int FixedH, class Call>
  static bool fma(const Call& call) {
    return launch_backward<Store, FixedH>(call);
  }
  template <class Store, class Call>
  static bool tensor_cores(const Call&) {
    return false;
  }
};

template <class Pass, class Store, class Call>
bool launch_float(const Call& call) {
  constexpr bool plain = is_plain<typename Call::Stages>;
  const int H = call.problem.hidden_size;
  if constexpr (plain)
    if (Pass::template tensor_cores<Store>(call)) return true;
  if (H == 20 && Pass::template fma<Store, 20>(call)) return true;
  if constexpr (plain)
    if (H == 32 && Pass::template fma<Store, 32>(call)) return true;
  return Pass::template fma<Store, 0>(call);
}

// Launches a pass for the stages that the problem names. False where the device has too little shared memory for it.
template <class Pass, class Pointers>
bool launch_pass(const LstmStepProblem& p, const Pointers& pointers, const DeviceFacts& facts, cudaStream_t stream,
                 CudaResult* result) {
  bool launched = false;
  const auto run = [&](const auto& stages) {
    using Stages = std::decay_t<decltype(stages)>;
    const Call<Pointers, Stages> call{p, pointers, stages, facts, stream, result};
    if constexpr (std::is_same_v<stage_scalar<Stages>, double>)
      launched = Pass::template fma<double, 0>(call);
    else if (p.state_dtype == DType::float32)
      launched = launch_float<Pass, float>(call);
    else if constexpr (is_plain<Stages>)
      launched = launch_float<Pass, BFloat16>(call);
  };
  if (p.dtype == DType::float64)
    with_stages<double>(p, run);
  else
    with_stages<float>(p, run);
  return launched;
}

template <class S>
CudaResult launch_reduce(const LstmStepProblem& p, const CudaLstmStepBackward& args, const DeviceFacts& facts,
                         cudaStream_t stream) {
  static std::atomic<bool> prepared[cached_devices];
  ReduceArguments<S> a{p, static_cast<const double*>(args.workspace), num_chunks(p), {}};
  for (int i = 0; i < p.num_weights(); ++i) a.grad_weights[i] = args.grad_weights[i];
  constexpr int threads = reduce_outputs * reduce_groups;
  const LaunchShape shape{(p.flat_weights() + reduce_outputs - 1) / reduce_outputs, threads,
                          threads * int(sizeof(double))};
  return launch(reduce_kernel<S>, prepared, facts, shape, a, stream,
                "launch of lstm_step's reduction of weight gradients");
}

}  // namespace

CudaResult cuda_lstm_step_forward(const LstmStepProblem& p, const CudaLstmStepForward& args, cudaStream_t stream) {
  DeviceFacts facts;
  CudaResult result = device_facts(&facts);
  if (!result.ok() || p.num_coordinates == 0) return result;
  if (!launch_pass<Forward>(p, args, facts, stream, &result))
    return {cudaErrorInvalidConfiguration,
            "lstm_step's forward kernel, which needs more shared memory than a block of this device has,"};
  return result;
}

int64_t cuda_lstm_step_workspace_bytes(const LstmStepProblem& p) {
  return (num_chunks(p) * p.flat_weights() + 2) * int64_t(sizeof(double));
}

CudaResult cuda_lstm_step_backward(const LstmStepProblem& p, const CudaLstmStepBackward& args, cudaStream_t stream) {
  DeviceFacts facts;
  CudaResult result = device_facts(&facts);
  if (!result.ok()) return result;
  if (p.num_coordinates > 0) {
    if (!launch_pass<Backward>(p, args, facts, stream, &result))
      return {cudaErrorInvalidConfiguration,
              "lstm_step's backward kernel, which needs more shared memory than a block of this device has,"};
    if (!result.ok()) return result;
  }
  return p.dtype == DType::float64 ? launch_reduce<double>(p, args, facts, stream)
                                   : launch_reduce<float>(p, args, facts, stream);
}

}  // namespace metakern
