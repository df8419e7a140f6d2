// lstm_step on the CPU: coordinates in SIMD lanes, weights broadcast, gates in registers; the state of a tile is read
// once and written once. Compiled once per instruction set; problem.h has the axis legend.
#include "../core/vec.h"
#include "../math/tile_outer_products.h"
#include "cpu.h"
#include "cpu_cell.h"
#include "cpu_stages.h"
#include "cpu_weights.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Calls of NextTile::prefetch by the layers of one tile.
MK_INLINE int forward_steps(const LstmStepProblem& p) {
  return p.num_layers * ((p.hidden_size + group_units - 1) / group_units);
}

template <class S, class Stages>
void forward_tiles(const LstmStepProblem& p, const Stages& stages, const LstmStepForward& args, int64_t first_tile,
                   int64_t last_tile) {
  using V = vec_t<S>;
  const int H = p.hidden_size;
  const PackedWeights<S> packed(p, static_cast<S*>(const_cast<void*>(args.packed)));
  alignas(64) S features[Stages::Features::max_inputs * tile_lanes], old_h[max_hidden * tile_lanes];
  TileInputs<S, Stages> inputs;
  StateRows<S, Stages> new_states;
  const int64_t state_bytes = int64_t(sizeof(S)) * p.tile_state();
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int used = lanes_in_tile(p, tile);
    inputs.read(p, args, tile, used);
    write_features<V>(stages, inputs, packed.features_weights(), p.stages.inputs, features, new_states);
    const S* state = static_cast<const S*>(args.state) + tile * p.tile_state();
    S* new_state = static_cast<S*>(args.new_state) + tile * p.tile_state();
    const S* x = features;
    S* gates = static_cast<S*>(args.gates);
    if (gates != nullptr) gates += tile * p.tile_gates();
    NextTile next(forward_steps(p));
    if (tile + 1 < last_tile) {
      next.add(state + p.tile_state(), state_bytes);
      if (new_state != state) next.add(new_state + p.tile_state(), state_bytes);
      if (gates != nullptr) next.add(gates + p.tile_gates(), int64_t(sizeof(S)) * p.tile_gates());
    }
    for (int layer = 0; layer < p.num_layers; ++layer) {
      const int64_t h_at = int64_t(layer) * 2 * H * tile_lanes, c_at = h_at + H * tile_lanes;
      LayerGates<S> kept{};
      if (gates != nullptr) kept = LayerGates<S>::of_layer(gates, layer, H);
      const S* h = state + h_at;
      if (args.new_state == args.state)
        h = static_cast<const S*>(__builtin_memcpy(old_h, h, sizeof(S) * H * tile_lanes));
      forward_layer<V>({x, h, state + c_at, new_state + h_at, new_state + c_at, kept}, packed.forward(layer),
                       p.inputs(layer), H, used, &next);  // clear_padding writes the rest
      x = new_state + h_at;
    }
    if (used < tile_lanes) {
      clear_padding(new_state, int64_t(p.num_layers) * 2 * H, used);
      if (gates != nullptr) clear_padding(gates, p.tile_gates() / tile_lanes, used);
    }
    apply_head<V>(stages, inputs, packed, x, H, new_states);
    write_lanes(args.new_params, p.dtype, tile * tile_lanes, used, inputs.params);
    write_states<Stages::states>(args.new_stage_state, tile, used, new_states.data);
  }
}

template <class S>
void forward(const LstmStepProblem& p, const LstmStepForward& args, int64_t first_tile, int64_t last_tile) {
  with_stages<S>(p, [&](const auto& stages) { forward_tiles<S>(p, stages, args, first_tile, last_tile); });
}

// ---------------------------------------------------------------------------------------------------- backward

// Working memory of one thread: the activations of a tile, a layer's gradients, and the sums of the weight gradients
// over a block of tiles. Small enough for the second-level cache.
template <class S>
struct Scratch {
  S* gates;          // [L, 5, H, tile_lanes]  LayerGates, unless forward kept them
  S* grad_gates;     // [4, H, tile_lanes]     gradients of a layer's pre-activations
  S* hidden;         // [L, H, tile_lanes]     h' of every layer
  S* new_c;          // [H, tile_lanes]
  S* features;       // [feature_rows, tile_lanes]
  S* grad_out;       // [R, tile_lanes]
  S* grad_x;         // [max(H, feature_rows), tile_lanes]
  S* last_state;     // [L, 2, H, tile_lanes]; last tile, zero after the last coordinate
  S* transposed;     // [tile_lanes, columns of a layer]: a layer's x and h
  S* sums;           // gradients of weight_ih and weight_hh: per layer [4H, columns]
  S* bias_sums;      // [L, 4H, lanes]
  S* head_sums;      // [R, H + 1, lanes]: weights and bias of every output
  S* own_sums;       // [own_weights, tile_lanes]: gradients of the stages' own weights
  int64_t num_sums;  // elements from `sums` on

  // Columns in memory of a layer's weight gradients: its inputs, then its h.
  static int columns(const LstmStepProblem& p, int layer) {
    return padded_columns<vec_t<S>>(p.inputs(layer) + p.hidden_size);
  }
  // Lays the arrays out one after the other from `memory`; returns their elements.
  int64_t lay_out(const LstmStepProblem& p, S* memory) {
    S* at = memory;
    const auto take = [&](int64_t count) {
      S* const from = at;
      at += count;
      return from;
    };
    const int64_t H = p.hidden_size, rows = int64_t(p.num_layers) * H;
    constexpr int width = lanes<vec_t<S>>;
    gates = take(p.tile_gates());
    grad_gates = take(4 * H * tile_lanes);
    hidden = take(rows * tile_lanes);
    new_c = take(H * tile_lanes);
    features = take(int64_t(p.feature_rows()) * tile_lanes);
    grad_out = take(int64_t(p.stages.outputs) * tile_lanes);
    grad_x = take((H < p.feature_rows() ? p.feature_rows() : H) * tile_lanes);
    last_state = take(p.tile_state());
    int most = 0;
    for (int l = 0; l < p.num_layers; ++l) most = columns(p, l) > most ? columns(p, l) : most;
    transposed = take(int64_t(most) * tile_lanes);
    sums = at;
    for (int l = 0; l < p.num_layers; ++l) take(4 * H * columns(p, l));
    bias_sums = take(4 * rows * width);
    head_sums = take(p.stages.outputs * (H + 1) * width);
    own_sums = take(int64_t(p.stages.own_weights()) * tile_lanes);
    num_sums = at - sums;
    return at - memory;
  }
  S* sums_of(const LstmStepProblem& p, int layer) const {
    S* at = sums;
    for (int l = 0; l < layer; ++l) at += int64_t(4) * p.hidden_size * columns(p, l);
    return at;
  }
};

// out[k] = sum over the 4H gate rows of w[row][k] * rows[row], for K inputs k at once.
template <class V, int K>
MK_INLINE void transposed_product(const lane_t<V>*& w, const lane_t<V>* rows, int count, lane_t<V>* out) {
  V acc[K][pair];
  for (int k = 0; k < K; ++k)
    for (int u = 0; u < pair; ++u) acc[k][u] = broadcast<V>(0);
  for (int row = 0; row < count; ++row, w += K) {
    V d[pair];
    for (int u = 0; u < pair; ++u) d[u] = load<V>(rows + int64_t(row) * tile_lanes + u * lanes<V>);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
      for (int u = 0; u < pair; ++u) acc[k][u] += d[u] * w[k];
  }
  for (int k = 0; k < K; ++k)
    for (int u = 0; u < pair; ++u) store(out + k * tile_lanes + u * lanes<V>, acc[k][u]);
}

template <class V>
void transposed_products(const lane_t<V>* w, const lane_t<V>* rows, int count, lane_t<V>* out, int outputs) {
  for (int k = 0; k < outputs;) {
    const int width = input_block(outputs - k);
    lane_t<V>* to = out + k * tile_lanes;
    switch (width) {
      case 1: transposed_product<V, 1>(w, rows, count, to); break;
      case 2: transposed_product<V, 2>(w, rows, count, to); break;
      case 3: transposed_product<V, 3>(w, rows, count, to); break;
      case 4: transposed_product<V, 4>(w, rows, count, to); break;
      case 5: transposed_product<V, 5>(w, rows, count, to); break;
      case 6: transposed_product<V, 6>(w, rows, count, to); break;
#if defined(__AVX512F__)
      case 7: transposed_product<V, 7>(w, rows, count, to); break;
      case 8: transposed_product<V, 8>(w, rows, count, to); break;
      case 9: transposed_product<V, 9>(w, rows, count, to); break;
      case 10: transposed_product<V, 10>(w, rows, count, to); break;
      case 11: transposed_product<V, 11>(w, rows, count, to); break;
      case 12: transposed_product<V, 12>(w, rows, count, to); break;
#endif
    }
    k += width;
  }
}

// Recomputes one tile's gates and hidden states into the scratch memory.
template <class S>
void recompute_tile(const LstmStepProblem& p, const PackedWeights<S>& packed, const S* state, const Scratch<S>& scratch,
                    NextTile* next) {
  using V = vec_t<S>;
  const int H = p.hidden_size;
  const int64_t rows = int64_t(H) * tile_lanes;
  const S* x = scratch.features;
  for (int layer = 0; layer < p.num_layers; ++layer) {
    S* hidden = scratch.hidden + layer * rows;
    const S* h = state + layer * 2 * rows;
    forward_layer<V>({x, h, h + rows, hidden, scratch.new_c, LayerGates<S>::of_layer(scratch.gates, layer, H)},
                     packed.forward(layer), p.inputs(layer), H, tile_lanes, next);
    x = hidden;
  }
}

// Hidden states of one tile from the gates that forward kept, to the same bits.
template <class S>
void restore_hidden(const LstmStepProblem& p, S* gates, const Scratch<S>& scratch, int used) {
  using V = vec_t<S>;
  const int H = p.hidden_size;
  S* out = scratch.hidden;
  for (int layer = 0; layer < p.num_layers; ++layer) {
    const auto kept = LayerGates<S>::of_layer(gates, layer, H);
    for (int j = 0; j < H; ++j, out += tile_lanes)
      for (int lane = 0; lane < tile_lanes; lane += lanes<V>) store(out + lane, kept.template hidden<V>(j, lane));
  }
  if (used < tile_lanes) clear_padding(scratch.hidden, int64_t(p.num_layers) * H, used);
}

// Adds one layer's part of the weight gradients of a tile to the sums.
template <class S>
void add_weight_gradients(const LstmStepProblem& p, const S* state, const Scratch<S>& scratch, int layer) {
  using V = vec_t<S>;
  const int H = p.hidden_size, inputs = p.inputs(layer);
  const int64_t rows = int64_t(H) * tile_lanes;
  const S* grads = scratch.grad_gates;
  const S* x = layer == 0 ? scratch.features : scratch.hidden + (layer - 1) * rows;
  const S* h = state + layer * 2 * rows;
  const auto row = [&](int k) { return k < inputs ? x + k * tile_lanes : h + (k - inputs) * tile_lanes; };
  transpose_rows<V>(row, inputs + H, Scratch<S>::columns(p, layer), scratch.transposed);
  add_outer_products<V>(grads, 4 * H, scratch.transposed, inputs + H, scratch.sums_of(p, layer));
  add_row_sums<V>(grads, 4 * H, scratch.bias_sums + int64_t(layer) * 4 * H * lanes<V>);
}

// The same for the head.
template <class S>
void add_head_gradients(const LstmStepProblem& p, const Scratch<S>& scratch) {
  using V = vec_t<S>;
  const int H = p.hidden_size;
  const S* top = scratch.hidden + int64_t(p.num_layers - 1) * H * tile_lanes;
  for (int r = 0; r < p.stages.outputs; ++r) {
    const S* grad_out = scratch.grad_out + r * tile_lanes;
    S* sums = scratch.head_sums + r * (H + 1) * lanes<V>;
    add_row_products<V>(grad_out, top, H, sums);
    add_row_sums<V>(grad_out, 1, sums + H * lanes<V>);
  }
}

// Adds the sums of a block of tiles to `partial`, laid out as cpu_weights.h says; the first block of a group
// overwrites it.
template <bool First, class S>
void add_block(const LstmStepProblem& p, const Scratch<S>& scratch, double* partial) {
  const auto add = [](double& to, S value)
                       __attribute__((always_inline)) { to = First ? double(value) : to + double(value); };
  using V = vec_t<S>;
  const int H = p.hidden_size;
  const auto add_lanes = [&](const S* sums, int count, double* out) {
    for (int i = 0; i < count; ++i) add(out[i], sum_lanes(load<V>(sums + i * lanes<V>)));
  };
  for (int layer = 0; layer < p.num_layers; ++layer) {
    const FlatLayer at(p, layer);
    const int inputs = p.inputs(layer), columns = Scratch<S>::columns(p, layer);
    const S* sums = scratch.sums_of(p, layer);
    for (int row = 0; row < 4 * H; ++row, sums += columns) {
      for (int k = 0; k < inputs; ++k) add(partial[at.weight_ih + int64_t(row) * inputs + k], sums[k]);
      for (int k = 0; k < H; ++k) add(partial[at.weight_hh + int64_t(row) * H + k], sums[inputs + k]);
    }
    add_lanes(scratch.bias_sums + int64_t(layer) * 4 * H * lanes<V>, 4 * H, partial + at.bias);
  }
  const int outputs = p.stages.outputs;
  double* head = partial + p.flat_weights() - p.flat_head();
  for (int r = 0; r < outputs; ++r) {
    const S* sums = scratch.head_sums + r * (H + 1) * lanes<V>;
    add_lanes(sums, H, head + r * H);
    add_lanes(sums + H * lanes<V>, 1, head + outputs * H + r);
  }
  for (int i = 0; i < p.stages.own_weights(); ++i)
    add(head[outputs * (H + 1) + i], row_sum<V>(scratch.own_sums + i * tile_lanes));
}

// Gradients of one tile: writes grad_state, and adds the weight gradients to the sums.
template <int Outputs, class S>
void backward_tile(const LstmStepProblem& p, const PackedWeights<S>& packed, const S* state, S* tile_gates,
                   const S* grad_new_state, S* grad_state, const Scratch<S>& scratch, int used, NextTile* next) {
  using V = vec_t<S>;
  const int H = p.hidden_size;
  const int64_t rows = int64_t(H) * tile_lanes;
  const S* grad_out = scratch.grad_out;
  S* grads = scratch.grad_gates;
  for (int layer = p.num_layers - 1; layer >= 0; --layer) {
    const bool top = layer == p.num_layers - 1;
    const auto kept = LayerGates<S>::of_layer(tile_gates, layer, H);
    const S* c = state + (layer * 2 + 1) * rows;
    for (int j = 0; j < H; ++j) {
      next->prefetch();
      for (int lane = 0; lane < tile_lanes; lane += lanes<V>) {
        const int64_t at = int64_t(j) * tile_lanes + lane;
        V grad_h = load<V>(grad_new_state + layer * 2 * rows + at);
        V grad_c = load<V>(grad_new_state + (layer * 2 + 1) * rows + at);
        grad_h += top ? load<V>(grad_out + lane) * packed.head()[j] : load<V>(scratch.grad_x + at);
        for (int r = 1; r < Outputs; ++r)
          if (top) grad_h += load<V>(grad_out + r * tile_lanes + lane) * packed.head()[r * H + j];
        const auto u = kept.template activations<V>(j, lane);
        const auto d = lstm_unit_backward<V>(u.gates, u.tanh_c, load<V>(c + at), grad_h, grad_c);
        store(grads + at, d.preactivation.i);
        store(grads + rows + at, d.preactivation.f);
        store(grads + 2 * rows + at, d.preactivation.g);
        store(grads + 3 * rows + at, d.preactivation.o);
        store(grad_state + (layer * 2 + 1) * rows + at, d.c);
      }
    }
    if (used < tile_lanes) {  // drop the incoming gradients of lanes after the last coordinate
      clear_padding(grads, 4 * H, used);
      clear_padding(grad_state + (layer * 2 + 1) * rows, H, used);
    }
    for (int lane = 0; lane < tile_lanes; lane += pair * lanes<V>) {
      transposed_products<V>(packed.transposed_h(layer), grads + lane, 4 * H, grad_state + layer * 2 * rows + lane, H);
      transposed_products<V>(packed.transposed_x(layer), grads + lane, 4 * H, scratch.grad_x + lane, p.inputs(layer));
    }
    add_weight_gradients(p, state, scratch, layer);
  }
}

// Calls of NextTile::prefetch by backward for one tile.
MK_INLINE int backward_steps(const LstmStepProblem& p, bool gates_kept) {
  return p.num_layers * p.hidden_size + (gates_kept ? 0 : forward_steps(p));
}

template <class S, class Stages>
void backward_block(const LstmStepProblem& p, const Stages& stages, const LstmStepBackward& args,
                    const Scratch<S>& scratch, int64_t first_tile, int tiles, bool first, double* partial) {
  using V = vec_t<S>;
  const PackedWeights<S> packed(p, static_cast<S*>(const_cast<void*>(args.packed)));
  TileInputs<S, Stages> inputs;
  StateRows<S, Stages> dropped;
  TileGradients<S, Stages> gradients;
  const int64_t state_bytes = int64_t(sizeof(S)) * p.tile_state();
  for (int64_t i = 0; i < scratch.num_sums; ++i) scratch.sums[i] = S(0);
  for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
    const int64_t at = tile * p.tile_state();
    const int used = lanes_in_tile(p, tile);
    inputs.read(p, args, tile, used);
    gradients.read(p, args, tile, used);
    write_features<V>(stages, inputs, packed.features_weights(), p.stages.inputs, scratch.features, dropped);
    const S* state = static_cast<const S*>(args.state) + at;
    const S* grad_new_state = static_cast<const S*>(args.grad_new_state) + at;
    S* grad_state = static_cast<S*>(args.grad_state) + at;
    const bool last = tile + 1 == first_tile + tiles;
    S* gates = static_cast<S*>(const_cast<void*>(args.gates));
    if (gates != nullptr) gates += tile * p.tile_gates();
    NextTile next(backward_steps(p, gates != nullptr));
    if (!last) {
      next.add(state + p.tile_state(), state_bytes);
      next.add(grad_new_state + p.tile_state(), state_bytes);
      next.add(grad_state + p.tile_state(), state_bytes);
      if (gates != nullptr) next.add(gates + p.tile_gates(), int64_t(sizeof(S)) * p.tile_gates());
    }
    if (used < tile_lanes) {  // values after the last coordinate, NaN included, must not reach the weights
      __builtin_memcpy(scratch.last_state, state, sizeof(S) * p.tile_state());
      clear_padding(scratch.last_state, int64_t(p.num_layers) * 2 * p.hidden_size, used);
      state = scratch.last_state;
    }
    if (gates == nullptr)
      recompute_tile(p, packed, state, scratch, &next);
    else
      restore_hidden(p, gates, scratch, used);
    const S* top = scratch.hidden + int64_t(p.num_layers - 1) * p.hidden_size * tile_lanes;
    head_backward<V>(stages, inputs, packed, top, p.hidden_size, gradients, scratch.grad_out,
                     scratch.own_sums + Stages::Features::weights * tile_lanes);
    backward_tile<Stages::Head::outputs>(p, packed, state, gates == nullptr ? scratch.gates : gates, grad_new_state,
                                         grad_state, scratch, used, &next);
    features_backward<V>(stages, inputs, packed.features_weights(), p.stages.inputs, scratch.grad_x, gradients,
                         scratch.own_sums);
    add_head_gradients(p, scratch);
    gradients.write(p, args, tile, used);
  }
  first ? add_block<true>(p, scratch, partial) : add_block<false>(p, scratch, partial);
}

template <class S, class Stages>
void backward_groups(const LstmStepProblem& p, const Stages& stages, const LstmStepBackward& args, void* memory,
                     int64_t first_group, int64_t last_group) {
  Scratch<S> scratch;
  scratch.lay_out(p, static_cast<S*>(memory));
  const int64_t tiles = p.num_tiles(), blocks = num_blocks(p), groups = num_groups(p);
  for (int64_t group = first_group; group < last_group; ++group) {
    double* partial = args.partials + group * p.flat_weights();
    const int64_t first_block = blocks * group / groups;
    for (int64_t block = first_block; block < blocks * (group + 1) / groups; ++block) {
      const int64_t first = block * block_tiles;
      const int count = int(tiles - first < block_tiles ? tiles - first : block_tiles);
      backward_block<S>(p, stages, args, scratch, first, count, block == first_block, partial);
    }
  }
}

template <class S>
void backward(const LstmStepProblem& p, const LstmStepBackward& args, void* memory, int64_t first_group,
              int64_t last_group) {
  with_stages<S>(p, [&](const auto& stages) { backward_groups<S>(p, stages, args, memory, first_group, last_group); });
}

template <class S>
int64_t scratch_bytes(const LstmStepProblem& p) {
  return Scratch<S>().lay_out(p, nullptr) * int64_t(sizeof(S));
}

template <class S>
constexpr LstmStepKernels kernels{packed_bytes<S>, pack_weights<S>,          forward<S>, scratch_bytes<S>, backward<S>,
                                  sum_partials,    write_weight_gradients<S>};

}  // namespace
}  // namespace MK_CAPABILITY

template <>
const LstmStepKernels& lstm_step_kernels<CpuCapability::MK_CAPABILITY>(bool is_double) {
  return is_double ? kernels<double> : kernels<float>;
}

}  // namespace metakern
