// lstm_step on the GPU: selection and launch of kernels. The kernels are in cuda_forward.cuh, cuda_forward_mma.cuh and
// cuda_backward.cuh.
#define MK_CAPABILITY cuda  // the host's copies of the arithmetic must not merge with those of the CPU's kernels
#include <math.h>

#include "../core/launch.h"
#include "cuda.h"
#include "cuda_backward.cuh"
#include "cuda_forward.cuh"
#include "cuda_forward_mma.cuh"

namespace metakern {
namespace {

template <class S>
PreprocessScale<S> preprocess_scale(const LstmStepProblem& p) {
  const double scale = p.preprocess_scale;
  return {S(exp(scale)), S(exp(-scale)), S(1 / scale)};
}

int at_most_int(int64_t n, int bound) { return n < bound ? int(n) : bound; }

// With fewer warps per block, reading the weights through the cache is faster.
constexpr int few_warps = 2;

// False where the device has too little shared memory for this kernel.
template <class Units>
bool launch_forward(const LstmStepProblem& p, const CudaLstmStepForward& args, const DeviceFacts& facts,
                    cudaStream_t stream, CudaResult* result) {
  using S = typename Units::Scalar;
  static std::atomic<bool> prepared[cached_devices];
  ForwardArguments<S> a{p, args, preprocess_scale<S>(p), true};
  const int warp_bytes = WarpMemory<Units>::bytes(p.hidden_size);
  int packed_bytes = Units::packed_bytes(p.hidden_size, p.num_layers);
  if (packed_bytes + few_warps * warp_bytes > facts.shared_bytes) {
    if (Units::fixed_hidden > 0) return false;
    a.pack_weights = false;
    packed_bytes = 0;
  }
  const int warps = at_most_int((facts.shared_bytes - packed_bytes) / warp_bytes, Units::max_warps);
  if (warps < 1) return false;
  // Full blocks even for few tiles: idle warps help to pack the weights.
  const LaunchShape shape{at_most_int(p.num_tiles(), facts.multiprocessors), warps * warp_lanes,
                          packed_bytes + warps * warp_bytes};
  *result = launch(forward_kernel<Units>, prepared, facts, shape, a, stream, "launch of lstm_step's forward kernel");
  return true;
}

template <class Store>
bool launch_forward_float(const LstmStepProblem& p, const CudaLstmStepForward& args, const DeviceFacts& facts,
                          cudaStream_t stream, CudaResult* result) {
  using Launch =
      bool (*)(const LstmStepProblem&, const CudaLstmStepForward&, const DeviceFacts&, cudaStream_t, CudaResult*);
  Launch tensor_cores = nullptr;
  if (p.precision == Precision::high && p.hidden_size == 20) tensor_cores = launch_forward<MmaUnits<Tf32, Store, 20>>;
  if (p.precision == Precision::high && p.hidden_size == 32) tensor_cores = launch_forward<MmaUnits<Tf32, Store, 32>>;
  if (p.precision == Precision::medium && p.hidden_size == 20) tensor_cores = launch_forward<MmaUnits<Bf16, Store, 20>>;
  if (p.precision == Precision::medium && p.hidden_size == 32) tensor_cores = launch_forward<MmaUnits<Bf16, Store, 32>>;
  if (tensor_cores != nullptr && tensor_cores(p, args, facts, stream, result)) return true;
  if (p.hidden_size == 20 && launch_forward<FmaUnits<float, Store, 20>>(p, args, facts, stream, result)) return true;
  if (p.hidden_size == 32 && launch_forward<FmaUnits<float, Store, 32>>(p, args, facts, stream, result)) return true;
  return launch_forward<FmaUnits<float, Store, 0>>(p, args, facts, stream, result);
}

// False where the device has too little shared memory for this kernel.
template <class S, class Store, int FixedH>
bool launch_backward(const LstmStepProblem& p, const CudaLstmStepBackward& args, const DeviceFacts& facts,
                     cudaStream_t stream, CudaResult* result) {
  static std::atomic<bool> prepared[cached_devices];
  BackwardArguments<S> a{p, args, preprocess_scale<S>(p), chunk_tiles(p), num_chunks(p), true};
  const int warp_bytes = TileMemory<S>::bytes(p.hidden_size, p.num_layers);
  const int ones_bytes = TileMemory<S>::stride * int(sizeof(S));
  int block_bytes = ones_bytes + Sizes<FixedH>{p.hidden_size}.packed_elements(p.num_layers) * int(sizeof(S));
  if (block_bytes + few_warps * warp_bytes > facts.shared_bytes) {
    if (FixedH > 0) return false;
    a.pack_weights = false;
    block_bytes = ones_bytes;
  }
  const int warps = at_most_int((facts.shared_bytes - block_bytes) / warp_bytes, max_backward_warps);
  if (warps < 1) return false;
  const LaunchShape shape{at_most_int(a.chunks, facts.multiprocessors), warps * warp_lanes,
                          block_bytes + warps * warp_bytes};
  *result = launch(backward_kernel<S, Store, FixedH>, prepared, facts, shape, a, stream,
                   "launch of lstm_step's backward kernel");
  return true;
}

template <class Store>
bool launch_backward_float(const LstmStepProblem& p, const CudaLstmStepBackward& args, const DeviceFacts& facts,
                           cudaStream_t stream, CudaResult* result) {
  if (p.hidden_size == 20 && launch_backward<float, Store, 20>(p, args, facts, stream, result)) return true;
  if (p.hidden_size == 32 && launch_backward<float, Store, 32>(p, args, facts, stream, result)) return true;
  return launch_backward<float, Store, 0>(p, args, facts, stream, result);
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
  const bool launched =
      p.dtype == DType::float64          ? launch_forward<FmaUnits<double, double, 0>>(p, args, facts, stream, &result)
      : p.state_dtype == DType::bfloat16 ? launch_forward_float<BFloat16>(p, args, facts, stream, &result)
                                         : launch_forward_float<float>(p, args, facts, stream, &result);
  if (!launched)
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
    const bool launched =
        p.dtype == DType::float64          ? launch_backward<double, double, 0>(p, args, facts, stream, &result)
        : p.state_dtype == DType::bfloat16 ? launch_backward_float<BFloat16>(p, args, facts, stream, &result)
                                           : launch_backward_float<float>(p, args, facts, stream, &result);
    if (!launched)
      return {cudaErrorInvalidConfiguration,
              "lstm_step's backward kernel, which needs more shared memory than a block of this device has,"};
    if (!result.ok()) return result;
  }
  return p.dtype == DType::float64 ? launch_reduce<double>(p, args, facts, stream)
                                   : launch_reduce<float>(p, args, facts, stream);
}

}  // namespace metakern
