// One tile's inputs and outputs of lstm_step's stages, and the stages' loops over its lanes.
#pragma once
#include "cpu_weights.h"
#include "stages.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

MK_INLINE int lanes_in_tile(const LstmStepProblem& p, int64_t tile) {
  const int64_t left = p.num_coordinates - tile * tile_lanes;
  return left < tile_lanes ? int(left) : tile_lanes;
}

template <class S>
constexpr DType dtype_of = sizeof(S) == 8 ? DType::float64 : DType::float32;

// Sets the lanes from `used_lanes` on of `count` rows to zero.
template <class S>
void clear_padding(S* rows, int64_t count, int used_lanes) {
  for (int64_t row = 0; row < count; ++row)
    for (int lane = used_lanes; lane < tile_lanes; ++lane) rows[row * tile_lanes + lane] = S(0);
}

// The rows of one tile, from or to arrays [K, N] of coordinate inputs and arrays of tiles of stage state. Zeros are
// read and written behind the last coordinate.
template <class S>
void read_inputs(const LstmStepProblem& p, const void* data, int rows, int64_t tile, int used, S* out) {
  for (int row = 0; row < rows; ++row)
    read_lanes(data, dtype_of<S>, row * p.num_coordinates + tile * tile_lanes, used, out + row * tile_lanes);
}
template <class S>
void write_inputs(const LstmStepProblem& p, void* data, int rows, int64_t tile, int used, const S* in) {
  for (int row = 0; row < rows; ++row)
    write_lanes(data, dtype_of<S>, row * p.num_coordinates + tile * tile_lanes, used, in + row * tile_lanes);
}
template <int Rows, class S>
void read_states(const void* data, int64_t tile, int used, S* out) {
  if constexpr (Rows > 0) {
    __builtin_memcpy(out, static_cast<const S*>(data) + tile * Rows * tile_lanes, sizeof(S) * Rows * tile_lanes);
    if (used < tile_lanes) clear_padding(out, Rows, used);
  }
}
template <int Rows, class S>
void write_states(void* data, int64_t tile, int used, S* in) {
  if constexpr (Rows > 0) {
    if (used < tile_lanes) clear_padding(in, Rows, used);
    __builtin_memcpy(static_cast<S*>(data) + tile * Rows * tile_lanes, in, sizeof(S) * Rows * tile_lanes);
  }
}

template <int Rows, class V>
MK_INLINE void load_rows(V (&out)[at_least_one(Rows)], const lane_t<V>* rows, int lane) {
  for (int row = 0; row < Rows; ++row) out[row] = load<V>(rows + row * tile_lanes + lane);
}
template <int Rows, class V>
MK_INLINE void store_rows(const V* values, lane_t<V>* rows, int lane) {
  for (int row = 0; row < Rows; ++row) store(rows + row * tile_lanes + lane, values[row]);
}
template <int Rows, class V>
MK_INLINE void add_rows(const V* values, lane_t<V>* rows, int lane) {
  for (int row = 0; row < Rows; ++row) {
    lane_t<V>* at = rows + row * tile_lanes + lane;
    store(at, load<V>(at) + values[row]);
  }
}

// The rows of one tile that the stages keep: those of the features, then those of the head.
template <class S, class Stages>
struct StateRows {
  alignas(64) S data[at_least_one(Stages::states) * tile_lanes];

  S* of_head() { return data + Stages::Features::states * tile_lanes; }
};

// The stages' inputs for one tile.
template <class S, class Stages>
struct TileInputs {
  alignas(64) S grads[tile_lanes], params[tile_lanes];
  StateRows<S, Stages> states;
  alignas(64) S coordinate_inputs[at_least_one(Stages::coordinate_inputs) * tile_lanes];

  // From the arguments of forward or backward; params may be null there.
  template <class Arguments>
  void read(const LstmStepProblem& p, const Arguments& args, int64_t tile, int used) {
    read_lanes(args.grads, p.dtype, tile * tile_lanes, used, grads);
    if (args.params != nullptr) read_lanes(args.params, p.dtype, tile * tile_lanes, used, params);
    read_states<Stages::states>(args.stage_state, tile, used, states.data);
    read_inputs(p, args.coordinate_inputs, Stages::coordinate_inputs, tile, used, coordinate_inputs);
  }
};

// Vectors of one stage's state rows and coordinate inputs.
template <class V, class Stage>
struct StageInputs {
  V states[at_least_one(Stage::states)];
  V coordinate_inputs[at_least_one(Stage::coordinate_inputs)];

  MK_INLINE StageInputs(const lane_t<V>* state_rows, const lane_t<V>* input_rows, int lane) {
    load_rows<Stage::states>(states, state_rows, lane);
    load_rows<Stage::coordinate_inputs>(coordinate_inputs, input_rows, lane);
  }
};
template <class V, class Stages, class S>
MK_INLINE StageInputs<V, typename Stages::Features> features_inputs(const TileInputs<S, Stages>& t, int lane) {
  return {t.states.data, t.coordinate_inputs, lane};
}
template <class V, class Stages, class S>
MK_INLINE StageInputs<V, typename Stages::Head> head_inputs(const TileInputs<S, Stages>& t, int lane) {
  using Features = typename Stages::Features;
  return {t.states.data + Features::states * tile_lanes, t.coordinate_inputs + Features::coordinate_inputs * tile_lanes,
          lane};
}

// Writes `count` rows of features and the features' new states.
template <class V, class S, class Stages>
void write_features(const Stages& stages, const TileInputs<S, Stages>& t, const S* weights, int count, S* features,
                    StateRows<S, Stages>& new_states) {
  using Features = typename Stages::Features;
  for (int lane = 0; lane < tile_lanes; lane += lanes<V>) {
    const auto in = features_inputs<V, Stages>(t, lane);
    V x[Features::max_inputs], out[at_least_one(Features::states)];
    stages.features.template forward<V>(load<V>(t.grads + lane), in.states, in.coordinate_inputs, weights, x, out);
    for (int k = 0; k < count; ++k) store(features + k * tile_lanes + lane, x[k]);
    store_rows<Features::states>(out, new_states.data, lane);
  }
}

// The head's outputs of the top cell's h [H].
template <class Head, class V>
MK_INLINE void head_outputs(const PackedWeights<lane_t<V>>& packed, const lane_t<V>* h, int H, int lane,
                            V (&out)[Head::outputs]) {
  for (int r = 0; r < Head::outputs; ++r) {
    out[r] = broadcast<V>(packed.head_bias()[r]);
    for (int j = 0; j < H; ++j) out[r] += load<V>(h + j * tile_lanes + lane) * packed.head()[r * H + j];
  }
}

// Updates the tile's params, and writes the head's new states.
template <class V, class S, class Stages>
void apply_head(const Stages& stages, TileInputs<S, Stages>& t, const PackedWeights<S>& packed, const S* h, int H,
                StateRows<S, Stages>& new_states) {
  using Head = typename Stages::Head;
  for (int lane = 0; lane < tile_lanes; lane += lanes<V>) {
    const auto in = head_inputs<V, Stages>(t, lane);
    V o[Head::outputs], out[at_least_one(Head::states)];
    head_outputs<Head>(packed, h, H, lane, o);
    store(t.params + lane,
          stages.head.template forward<V>(o, load<V>(t.params + lane), load<V>(t.grads + lane), in.states,
                                          in.coordinate_inputs, packed.head_weights(), out));
    store_rows<Head::states>(out, new_states.of_head(), lane);
  }
}

// ---------------------------------------------------------------------------------------------------- backward

// Gradients of one tile: incoming ones, and those of the stages' inputs.
template <class S, class Stages>
struct TileGradients {
  static constexpr bool additive = Stages::Head::additive;
  alignas(64) S new_params[tile_lanes], params[tile_lanes], grads[tile_lanes];
  StateRows<S, Stages> new_states, states;
  alignas(64) S coordinate_inputs[at_least_one(Stages::coordinate_inputs) * tile_lanes];

  void read(const LstmStepProblem& p, const LstmStepBackward& args, int64_t tile, int used) {
    read_lanes(args.grad_new_params, p.dtype, tile * tile_lanes, used, new_params);
    read_states<Stages::states>(args.grad_new_stage_state, tile, used, new_states.data);
  }
  void write(const LstmStepProblem& p, const LstmStepBackward& args, int64_t tile, int used) {
    write_lanes(args.grad_grads, p.dtype, tile * tile_lanes, used, grads);
    if (args.grad_params != nullptr)
      write_lanes(args.grad_params, p.dtype, tile * tile_lanes, used, additive ? new_params : params);
    write_states<Stages::states>(args.grad_stage_state, tile, used, states.data);
    write_inputs(p, args.grad_coordinate_inputs, Stages::coordinate_inputs, tile, used, coordinate_inputs);
  }
};

// Writes the gradients of the outputs and the head's part of `gradients`, and adds those of the head's own weights to
// `grad_own`; h is the new h of the top cell.
template <class V, class S, class Stages>
void head_backward(const Stages& stages, const TileInputs<S, Stages>& t, const PackedWeights<S>& packed, const S* h,
                   int H, TileGradients<S, Stages>& gradients, S* grad_out, S* grad_own) {
  using Features = typename Stages::Features;
  using Head = typename Stages::Head;
  for (int lane = 0; lane < tile_lanes; lane += lanes<V>) {
    const auto in = head_inputs<V, Stages>(t, lane);
    V o[Head::outputs] = {}, grad_new_states[at_least_one(Head::states)], param = {};
    if constexpr (Head::reads_outputs) head_outputs<Head>(packed, h, H, lane, o);
    if constexpr (!Head::additive) param = load<V>(t.params + lane);
    load_rows<Head::states>(grad_new_states, gradients.new_states.of_head(), lane);
    HeadGradient<V, Head> out;
    stages.head.template backward<V>(o, param, load<V>(t.grads + lane), in.states, in.coordinate_inputs,
                                     packed.head_weights(), load<V>(gradients.new_params + lane), grad_new_states,
                                     &out);
    store_rows<Head::outputs>(out.outputs, grad_out, lane);
    add_rows<Head::weights>(out.weights, grad_own, lane);
    store_rows<Head::states>(out.states, gradients.states.of_head(), lane);
    store_rows<Head::coordinate_inputs>(out.coordinate_inputs,
                                        gradients.coordinate_inputs + Features::coordinate_inputs * tile_lanes, lane);
    if constexpr (!Head::additive) {
      store(gradients.params + lane, out.param);
      store(gradients.grads + lane, out.grad);
    }
  }
}

// The same for the features, from the gradients of their `count` rows.
template <class V, class S, class Stages>
void features_backward(const Stages& stages, const TileInputs<S, Stages>& t, const S* weights, int count,
                       const S* grad_x, TileGradients<S, Stages>& gradients, S* grad_own) {
  using Features = typename Stages::Features;
  for (int lane = 0; lane < tile_lanes; lane += lanes<V>) {
    const auto in = features_inputs<V, Stages>(t, lane);
    V rows[Features::max_inputs], grad_new_states[at_least_one(Features::states)];
    for (int k = 0; k < Features::max_inputs; ++k)
      rows[k] = k < count ? load<V>(grad_x + k * tile_lanes + lane) : broadcast<V>(0);
    load_rows<Features::states>(grad_new_states, gradients.new_states.data, lane);
    FeaturesGradient<V, Features> out;
    stages.features.template backward<V>(load<V>(t.grads + lane), in.states, in.coordinate_inputs, weights, rows,
                                         grad_new_states, &out);
    if constexpr (!Stages::Head::additive) out.grad += load<V>(gradients.grads + lane);
    store(gradients.grads + lane, out.grad);
    add_rows<Features::weights>(out.weights, grad_own, lane);
    store_rows<Features::states>(out.states, gradients.states.data, lane);
    store_rows<Features::coordinate_inputs>(out.coordinate_inputs, gradients.coordinate_inputs, lane);
  }
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
