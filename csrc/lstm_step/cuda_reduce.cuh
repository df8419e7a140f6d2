// The layout of the partial weight gradients of lstm_step's backward, and the kernel that sums them.
#pragma once
#include "../core/storage.cuh"
#include "cuda.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// Partial sums of a layer's weight gradients, [4H][columns]: a column for each input, each hidden unit and the bias.
// The head's weight [R, H], its bias [R] and the stages' own weights come last.
struct PartialLayer {
  int columns;
  int64_t offset;
  MK_INLINE PartialLayer(const LstmStepProblem& p, int layer)
      : columns(p.inputs(layer) + p.hidden_size + 1), offset(0) {
    for (int l = 0; l < layer; ++l) offset += int64_t(4) * p.hidden_size * (p.inputs(l) + p.hidden_size + 1);
  }
};

// Sums the chunks' partial sums in a fixed order, and writes every weight's gradient.
constexpr int reduce_outputs = 32, reduce_groups = 8;

template <class S>
struct ReduceArguments {
  LstmStepProblem problem;
  const double* partials;  // [chunks][flat_weights]
  int64_t chunks;
  void* grad_weights[max_weights];
};

template <class S>
__device__ __forceinline__ void write_weight_gradient(const ReduceArguments<S>& a, int64_t i, S value) {
  const LstmStepProblem& p = a.problem;
  const int H = p.hidden_size, L = p.num_layers;
  const auto out = [&](int tensor) { return static_cast<S*>(a.grad_weights[tensor]); };
  const StageSizes& stages = p.stages;
  const int64_t head = p.flat_weights() - p.flat_head(), bias = head + stages.outputs * H;
  const int64_t of_features = bias + stages.outputs, of_head = of_features + stages.features_weights;
  if (i >= of_head) {
    out(4 * L + 2 + (stages.features_weights > 0))[i - of_head] = value;
  } else if (i >= of_features) {
    out(4 * L + 2)[i - of_features] = value;
  } else if (i >= bias) {
    out(4 * L + 1)[i - bias] = value;
  } else if (i >= head) {
    out(4 * L)[i - head] = value;
  } else {
    int l = L - 1;
    while (i < PartialLayer(p, l).offset) --l;
    const PartialLayer layer(p, l);
    const int inputs = p.inputs(l);
    const int64_t row = (i - layer.offset) % (4 * H), column = (i - layer.offset) / (4 * H);
    if (column < inputs) {
      out(4 * l)[row * inputs + column] = value;
    } else if (column < inputs + H) {
      out(4 * l + 1)[row * H + column - inputs] = value;
    } else {
      out(4 * l + 2)[row] = value;
      out(4 * l + 3)[row] = value;
    }
  }
}

template <class S>
__global__ void __launch_bounds__(reduce_outputs* reduce_groups)
    reduce_kernel(const __grid_constant__ ReduceArguments<S> a) {
  double* sums = reinterpret_cast<double*>(dynamic_shared());  // [reduce_groups][reduce_outputs]
  const int output = threadIdx.x % reduce_outputs, group = threadIdx.x / reduce_outputs;
  const int64_t flat = a.problem.flat_weights(), i = int64_t(blockIdx.x) * reduce_outputs + output;
  double sum = 0;
  if (i < flat) {
#pragma unroll 8
    for (int64_t chunk = group; chunk < a.chunks; chunk += reduce_groups) sum += a.partials[chunk * flat + i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0 || i >= flat) return;
  for (int g = 1; g < reduce_groups; ++g) sum += sums[g * reduce_outputs + output];
  write_weight_gradient<S>(a, i, S(sum));
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
