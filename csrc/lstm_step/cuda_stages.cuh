// lstm_step's stages in the CUDA kernels: a thread runs the features and the head of one coordinate of its warp's tile.
//
// The stages' state and inputs are read and written where they are needed; they take no registers while the cells run.
// Lanes after the last coordinate compute with zeros: stages must map those to finite features, and to zero gradients
// of weights and outputs where the incoming gradients are zero.
#pragma once
#include <type_traits>

#include "../math/activations.cuh"
#include "cuda_weights.cuh"
#include "stages.h"

namespace metakern {
inline namespace MK_CAPABILITY {

template <class Stage>
struct StageScalar;
template <template <class> class Stage, class S>
struct StageScalar<Stage<S>> {
  using type = S;
};
// The scalar of the stages' arithmetic.
template <class Stages>
using stage_scalar = typename StageScalar<typename Stages::Features>::type;

// The stages of lstm_step itself.
template <class S>
using PlainStages = Stages<GradientFeatures<S>, AddHead<S>>;
template <class Stages>
constexpr bool is_plain = std::is_same_v<Stages, PlainStages<stage_scalar<Stages>>>;

// This thread's coordinate of a tile, in arrays of the stages; it may lie after the last one.
struct StageLane {
  int64_t tile, coordinates;
  int lane;

  __device__ __forceinline__ StageLane(const LstmStepProblem& p, int64_t t)
      : tile(t), coordinates(p.num_coordinates), lane(threadIdx.x % warp_lanes) {}
  __device__ __forceinline__ int64_t coordinate() const { return tile * tile_lanes + lane; }
  __device__ __forceinline__ bool real() const { return coordinate() < coordinates; }

  // `Rows` rows from row `first` of an array [tiles, States, tile_lanes].
  template <int Rows, int States, class S>
  __device__ __forceinline__ void read_states(const void* from, int first, S* out) const {
#pragma unroll
    for (int row = 0; row < Rows; ++row)
      out[row] = real() ? static_cast<const S*>(from)[(tile * States + first + row) * tile_lanes + lane] : S(0);
  }
  template <int Rows, int States, class S>
  __device__ __forceinline__ void write_states(const S* in, int first, void* to) const {
#pragma unroll
    for (int row = 0; row < Rows; ++row)
      static_cast<S*>(to)[(tile * States + first + row) * tile_lanes + lane] = real() ? in[row] : S(0);
  }
  // The same of an array [rows, N].
  template <int Rows, class S>
  __device__ __forceinline__ void read_inputs(const void* from, int first, S* out) const {
#pragma unroll
    for (int row = 0; row < Rows; ++row)
      out[row] = real() ? static_cast<const S*>(from)[(first + row) * coordinates + coordinate()] : S(0);
  }
  template <int Rows, class S>
  __device__ __forceinline__ void write_inputs(const S* in, int first, void* to) const {
    if (!real()) return;
#pragma unroll
    for (int row = 0; row < Rows; ++row) static_cast<S*>(to)[(first + row) * coordinates + coordinate()] = in[row];
  }
};

// One stage of a pair: the first of its rows of state and inputs, and the index of its own weights.
template <class Stages, bool IsHead>
struct StagePart {
  using Features = typename Stages::Features;
  using Head = typename Stages::Head;
  static constexpr int first_state = IsHead ? Features::states : 0;
  static constexpr int first_input = IsHead ? Features::coordinate_inputs : 0;
  static constexpr int own_weights = IsHead ? Head::weights : Features::weights;
  static constexpr int states = IsHead ? Head::states : Features::states;
  static constexpr int inputs = IsHead ? Head::coordinate_inputs : Features::coordinate_inputs;
  using S = stage_scalar<Stages>;

  S state[at_least_one(states)], input[at_least_one(inputs)];
  const S* weights;

  template <class Weights>
  __device__ __forceinline__ StagePart(const StageLane& at, const CudaStages& from, const Weights& all)
      : weights(own_weights == 0 ? nullptr : all.tensor(4 * all.layers + 2 + (IsHead && Features::weights > 0))) {
    at.template read_states<states, Stages::states>(from.state, first_state, state);
    at.template read_inputs<inputs>(from.inputs, first_input, input);
  }
  static __device__ __forceinline__ void write_states(const StageLane& at, const S* in, void* to) {
    at.template write_states<states, Stages::states>(in, first_state, to);
  }
  static __device__ __forceinline__ void write_inputs(const StageLane& at, const S* in, void* to) {
    at.template write_inputs<inputs>(in, first_input, to);
  }
};
template <class Stages>
using FeaturesPart = StagePart<Stages, false>;
template <class Stages>
using HeadPart = StagePart<Stages, true>;

}  // namespace MK_CAPABILITY
}  // namespace metakern
