// Backward of hrnn_step. It recomputes each tile from the old state.
//
// With rho the root of the segment's mean square of delta and e = exp(l_step + o), a param's step is e delta / rho, and
//   gradient of delta_i = -G_i e_i / rho + delta_i D / (n rho^3),   D = sum over the segment of G_j e_j delta_j
// for the gradient G of the new params: D / (n rho^3) is the segment's factor, which needs a pass of its own.
#pragma once
#include "../math/outer_products.h"
#include "cpu_forward.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// ------------------------------------------------------------------------------------------------- the factors

template <class V>
void dots_piece(const HrnnStepProblem& p, const HrnnStepArguments& args, const Piece& piece) {
  using S = lane_t<V>;
  const HrnnTensor& tensor = piece.tensor;
  RowSums<V, dot_sums> sums;
  V grads[W<V>], steps[2][W<V>];
  for (int tile = 0; tile < piece.tiles; ++tile) {
    const int used = piece.used(tile);
    read_tile<V>(static_cast<const S*>(tensor.saved_steps) + piece.row(p.directions(), tile), tensor.coordinates,
                 p.directions(), used, steps);
    for (int i = 0; i < p.directions(); ++i) {
      read_params<V>(i == 0 ? tensor.grad_new_params : tensor.grad_attended, p.dtype, piece.param(tile), used, grads);
      for (int n = 0; n < W<V>; ++n) steps[i][n] *= grads[n];
    }
    sums.add(0, p.directions(), steps);
  }
  sums.write(args.sums + piece.index * dot_sums);
}

template <class S>
void dots(const HrnnStepProblem& p, const HrnnStepArguments& args, int64_t first_tile, int64_t last_tile) {
  for_each_piece(p, args, first_tile, last_tile, [&](const Piece& piece) { dots_piece<vec_t<S>>(p, args, piece); });
}

template <class S>
void finish_dots(const HrnnStepProblem& p, const HrnnStepArguments& args, int64_t first, int64_t last) {
  for_each_segment(p, args, first, last, [&](int64_t segment, const HrnnTensor& tensor, int64_t piece) {
    if (tensor.pieces == 0) return;
    double* rows = args.sums + piece * dot_sums;
    add_tree(rows, tensor.pieces, dot_sums);
    for (int i = 0; i < p.directions(); ++i) {
      const double rms = double(static_cast<const S*>(args.saved_rms)[segment * p.directions() + i]);
      args.factors[segment * 2 + i] = rows[i] / (divisor(tensor) * rms * rms * rms);
    }
  });
}

// ------------------------------------------------------------------------------------------- gradients of a tile

// What the segment of a piece brings, beside the forward's.
template <class S>
struct SegmentGradients {
  S inverse_rms[2], factor[2];
  S means[hrnn_means];  // each coordinate's share

  SegmentGradients(const HrnnStepProblem& p, const HrnnStepArguments& args, const Piece& piece) {
    for (int i = 0; i < p.directions(); ++i) {
      inverse_rms[i] = S(1) / static_cast<const S*>(args.saved_rms)[piece.segment * p.directions() + i];
      factor[i] = S(args.factors[piece.segment * 2 + i]);
    }
    const S* grad_means = static_cast<const S*>(args.grad_means) + piece.segment * hrnn_means;
    for (int i = 0; i < hrnn_means; ++i) means[i] = grad_means[i] / S(piece.tensor.coordinates);
  }
};

// Incoming gradients of one tile, and those of its inputs.
template <class V>
struct TileGradients {
  V params[2][W<V>];  // of the new params and the attended points
  V new_h[hrnn_hidden][W<V>];
  V new_rest[rest_rows][W<V>];

  V g[W<V>];
  V inputs[hrnn_inputs][W<V>];  // of x and h
  V rest[rest_rows][W<V>];
  V last_feature[W<V>];

  MK_INLINE void read(const HrnnStepProblem& p, const Piece& piece, int tile, int used) {
    const HrnnTensor& tensor = piece.tensor;
    const int64_t n = tensor.coordinates;
    const lane_t<V>* state = static_cast<const lane_t<V>*>(tensor.grad_new_state) + piece.row(hrnn_rows, tile);
    prefetch_next(state, n, hrnn_rows);
    prefetch_next(static_cast<const lane_t<V>*>(tensor.grad_state) + piece.row(hrnn_rows, tile), n, hrnn_rows);
    read_tile<V>(state, n, hrnn_hidden, used, new_h);
    read_tile<V>(state + hrnn_hidden * n, n, rest_rows, used, new_rest);
    read_params<V>(tensor.grad_new_params, p.dtype, piece.param(tile), used, params[0]);
    if (p.attention) read_params<V>(tensor.grad_attended, p.dtype, piece.param(tile), used, params[1]);
  }
  MK_INLINE void write(const HrnnStepProblem& p, const Piece& piece, int tile, int used) const {
    const int64_t n = piece.tensor.coordinates;
    lane_t<V>* state = static_cast<lane_t<V>*>(piece.tensor.grad_state) + piece.row(hrnn_rows, tile);
    write_tile<V>(state, n, hrnn_hidden, used, inputs + hrnn_features);
    write_tile<V>(state + hrnn_hidden * n, n, rest_rows, used, rest);
    write_params<V>(piece.tensor.grad_grads, p.dtype, piece.param(tile), used, g);
  }
};

constexpr int in_rest(int state_row) { return state_row - hrnn_hidden; }

// Overwrites the readouts with their gradients and those of o and m; writes the rate's gradient but for its feature.
template <class V>
MK_INLINE void readouts_backward(const HrnnStepProblem& p, const CallWeights<lane_t<V>>& w,
                                 const SegmentGradients<lane_t<V>>& segment, const TileInputs<V>& in, int columns,
                                 CellRows<V>& cell, TileGradients<V>& grads) {
  using S = lane_t<V>;
  for (int n = 0; n < columns; ++n) {
    const auto readout = [&](int row) -> V& { return cell.readouts[row][n]; };
    const V delta = readout(direction_readout), rate = in.row(row_rate)[n];
    const V step = step_log_rate(rate, readout(rate_readout));
    const V through_step = grads.params[0][n] * learning_rate(step + w.offset) * segment.inverse_rms[0];
    const V grad_offset = -through_step * delta;
    const V grad_rate = grads.new_rest[in_rest(row_rate)][n] + segment.means[hrnn_means - 1];
    V grad_step = grad_offset + grad_rate * (S(1) - w.momentum);
    V grad_attention = broadcast<V>(0);
    if (p.attention) {
      const V attention = readout(attention_readout);
      const V through = grads.params[1][n] * learning_rate(step) * segment.inverse_rms[1];
      grad_step -= through * attention;
      grad_attention = attention * segment.factor[1] - through;
    }
    grads.rest[in_rest(row_rate)][n] = grad_step + grad_rate * w.momentum;
    readout(direction_readout) = delta * segment.factor[0] - through_step;
    readout(rate_readout) = grad_step;
    readout(scale_decay_readout) =
        decay_backward(sigmoid(readout(scale_decay_readout)), grads.new_rest[in_rest(row_scale_decay)][n]);
    readout(input_decay_readout) =
        decay_backward(sigmoid(readout(input_decay_readout)), grads.new_rest[in_rest(row_input_decay)][n]);
    readout(attention_readout) = grad_attention;
    readout(max_readouts) = grad_offset;
    readout(max_readouts + 1) = grad_rate * (rate - step) * (w.momentum * (S(1) - w.momentum));
  }
}

// Overwrites the gates with the gradients of their pre-activations; writes the gradients of x and h.
template <class V>
MK_INLINE void cell_backward(bool attention, const CallWeights<lane_t<V>>& w,
                             const SegmentGradients<lane_t<V>>& segment, int used, CellRows<V>& cell,
                             TileGradients<V>& grads) {
  constexpr int H = hrnn_hidden, I = hrnn_inputs;
  const int columns = columns_of<V>(used);
  V grad_h[H][W<V>];  // in turn: of h'; of h, through u * h
  V *to_h = grad_h[0], *to_inputs = grads.inputs[0];
  const auto to_h_row = [&](int j, int n, V sum) { to_h[j * W<V> + n] = sum; };
  if (attention)
    fixed_product<V, H>(columns, to_h_row, FixedTerm<V, 1, H, max_readouts, W<V>>{w.readouts, cell.readouts[0]});
  else
    fixed_product<V, H>(columns, to_h_row, FixedTerm<V, 1, H, num_readouts, W<V>>{w.readouts, cell.readouts[0]});
  for (int j = 0; j < H; ++j)
    for (int n = 0; n < columns; ++n) {
      const V grad = grad_h[j][n] + grads.new_h[j][n] + segment.means[j];
      const GruUnit<V> unit{cell.gates[H + j][n], cell.gates[2 * H + j][n]};
      const auto d = gru_output_backward(unit, cell.h[j][n], grad);
      cell.gates[H + j][n] = d.pre_u;
      cell.gates[2 * H + j][n] = d.pre_c;
      grad_h[j][n] = d.h;
    }
  clear_padding<V>(cell.gates + H, 2 * H, used);
  const FixedTerm<V, 1, I, H, W<V>> of_candidate{w.candidate, cell.gates[2 * H]};
  fixed_product<V, I>(columns, [&](int k, int n, V sum) { to_inputs[k * W<V> + n] = sum; }, of_candidate);
  for (int j = 0; j < H; ++j)
    for (int n = 0; n < columns; ++n) {
      V& grad_reset_h = grads.inputs[hrnn_features + j][n];
      const auto d = gru_reset_backward(cell.gates[j][n], cell.h[j][n], grad_reset_h);
      cell.gates[j][n] = d.pre_r;
      grad_reset_h = grad_h[j][n] + d.h;
    }
  clear_padding<V>(cell.gates, H, used);
  const FixedTerm<V, 1, I, 2 * H, W<V>> of_gates{w.gates, cell.gates[0]};
  fixed_product<V, I>(columns, [&](int k, int n, V sum) { to_inputs[k * W<V> + n] += sum; }, of_gates);
}

template <class V>
MK_INLINE void inputs_backward(const CallWeights<lane_t<V>>& w, const SegmentGradients<lane_t<V>>& segment,
                               const TileInputs<V>& in, const ScaleMeans<V>* scales, const CellRows<V>& cell,
                               int columns, TileGradients<V>& grads) {
  for (int n = 0; n < columns; ++n) {
    V x[num_scale_features], y[num_scales], grad_mean[num_scales], grad_square[num_scales];
#pragma GCC unroll 11
    for (int k = 0; k < num_scale_features; ++k) x[k] = grads.inputs[k][n] + segment.means[hrnn_hidden + k];
#pragma GCC unroll 4
    for (int k = 0; k < num_scales; ++k) {
      y[k] = cell.x[k][n];
      x[k] += cell.readouts[direction_readout][n] * w.scales[k];
      grad_mean[k] = grads.new_rest[in_rest(row_mean) + k][n];
      grad_square[k] = grads.new_rest[in_rest(row_square) + k][n];
    }
    const auto d = scale_features_backward<V>(scales[n], in.g[n], in.scale_state(n), y, x, grad_mean, grad_square);
    grads.g[n] = d.g;
#pragma GCC unroll 4
    for (int k = 0; k < num_scales; ++k) {
      grads.rest[in_rest(row_mean) + k][n] = d.state.mean[k];
      grads.rest[in_rest(row_square) + k][n] = d.state.square[k];
    }
    grads.rest[in_rest(row_scale_decay)][n] = d.state.scale_decay;
    grads.rest[in_rest(row_input_decay)][n] = d.state.input_decay;
    const V last = grads.inputs[num_scale_features][n] + segment.means[hrnn_hidden + num_scale_features];
    grads.rest[in_rest(row_rate)][n] += last;
    grads.last_feature[n] = last;
  }
}

// ------------------------------------------------------------------------------------------------ sums and groups

// Adds the products of `tiles` tiles to a group's weight gradients.
template <class V>
void add_weight_gradients(const CellRows<V>* cells, int tiles, double* partial) {
  using S = lane_t<V>;
  constexpr int H = hrnn_hidden;
  const auto rows = [&](const V(*first)[W<V>]) {
    return Rows<S>{reinterpret_cast<const S*>(first), CellRows<V>::stride};
  };
  const CellRows<V>& cell = cells[0];
  outer_products<V>(rows(cell.gates), hrnn_gates, rows(cell.x), hrnn_features, tiles, partial + flat_x);
  outer_products<V>(rows(cell.gates), 2 * H, rows(cell.h), H, tiles, partial + flat_gates_h);
  outer_products<V>(rows(cell.gates + 2 * H), H, rows(cell.reset_h), H, tiles, partial + flat_candidate_h);
  outer_products<V>(rows(cell.readouts), max_readouts, rows(cell.new_h), H, tiles, partial + flat_readouts);
  outer_products<V>(rows(cell.readouts), 1, rows(cell.x), num_scales, tiles, partial + flat_scales);
}

// Working memory of one thread.
template <class V>
struct BackwardScratch {
  CellRows<V> cells[piece_tiles];
  TileInputs<V> in;
  TileGradients<V> grads;
  ScaleMeans<V> scales[W<V>];
  int filled;  // tiles in `cells`
};

template <class V>
MK_INLINE void backward_tile(const HrnnStepProblem& p, const CallWeights<lane_t<V>>& w,
                             const SegmentInputs<lane_t<V>>& inputs, const SegmentGradients<lane_t<V>>& segment,
                             const Piece& piece, int tile, BackwardScratch<V>& scratch, CellRows<V>& cell) {
  const int used = piece.used(tile), columns = columns_of<V>(used);
  TileInputs<V>& in = scratch.in;
  TileGradients<V>& grads = scratch.grads;
  read_inputs<V>(p, piece, tile, used, in, cell);
  grads.read(p, piece, tile, used);
  write_features<V>(in, inputs.mean_rate, columns, scratch.scales, cell);
  run_cell<V>(w, inputs.biases, columns, cell);
  run_readouts<V>(w, p.attention, columns, cell);
  readouts_backward<V>(p, w, segment, in, columns, cell, grads);
  clear_padding<V>(cell.readouts, max_readouts + 2, used);
  cell_backward<V>(p.attention, w, segment, used, cell, grads);
  inputs_backward<V>(w, segment, in, scratch.scales, cell, columns, grads);
  grads.write(p, piece, tile, used);
  clear_padding<V>(&grads.last_feature, 1, used);
  // Backward's other factors are zero there, but zero times NaN is NaN.
  clear_padding<V>(cell.x, hrnn_features, used);
  clear_padding<V>(cell.h, hrnn_hidden, used);
  clear_padding<V>(cell.reset_h, hrnn_hidden, used);
  clear_padding<V>(cell.new_h, hrnn_hidden, used);
}

template <class V>
void backward_piece(const HrnnStepProblem& p, const HrnnStepArguments& args, const CallWeights<lane_t<V>>& w,
                    const Piece& piece, BackwardScratch<V>& scratch, double* partial) {
  using S = lane_t<V>;
  const SegmentInputs<S> inputs(args, piece);
  const SegmentGradients<S> segment(p, args, piece);
  RowSums<V, backward_sums> sums;
  for (int tile = 0; tile < piece.tiles; ++tile) {
    CellRows<V>& cell = scratch.cells[scratch.filled];
    backward_tile<V>(p, w, inputs, segment, piece, tile, scratch, cell);
    sums.add(0, hrnn_gates, cell.gates);
    sums.add(row_grad_feature, 1, &scratch.grads.last_feature);
    sums.add(row_grad_readouts, max_readouts + 2, cell.readouts);
    if (++scratch.filled == piece_tiles) {
      add_weight_gradients<V>(scratch.cells, piece_tiles, partial);
      scratch.filled = 0;
    }
  }
  double* out = args.sums + piece.index * backward_sums;
  sums.write(out);
  for (int i = row_grad_readouts; i < backward_sums; ++i) partial[flat_scalars + i - row_grad_readouts] += out[i];
}

template <class S>
void backward(const HrnnStepProblem& p, const HrnnStepArguments& args, void* memory, int64_t first_group,
              int64_t last_group) {
  using V = vec_t<S>;
  auto& scratch = *static_cast<BackwardScratch<V>*>(memory);
  const CallWeights<S> w(args.weights);
  const int64_t tiles = args.num_tiles(p), blocks = (tiles + piece_tiles - 1) / piece_tiles;
  const int64_t groups = args.num_groups(p);
  for (int64_t group = first_group; group < last_group; ++group) {
    double* partial = args.partials + group * flat_weights;
    for (int i = 0; i < flat_weights; ++i) partial[i] = 0;
    scratch.filled = 0;
    const int64_t last = blocks * (group + 1) / groups * piece_tiles;
    for_each_piece(p, args, blocks * group / groups * piece_tiles, last < tiles ? last : tiles,
                   [&](const Piece& piece) { backward_piece<V>(p, args, w, piece, scratch, partial); });
    if (scratch.filled > 0) add_weight_gradients<V>(scratch.cells, scratch.filled, partial);
  }
}

template <class S>
constexpr int64_t scratch_bytes = sizeof(BackwardScratch<vec_t<S>>);

template <class S>
void finish_backward(const HrnnStepProblem& p, const HrnnStepArguments& args, int64_t first, int64_t last) {
  for_each_segment(p, args, first, last, [&](int64_t segment, const HrnnTensor& tensor, int64_t piece) {
    const double zeros[backward_sums] = {};
    double* rows = args.sums + piece * backward_sums;
    add_tree(rows, tensor.pieces, backward_sums);
    const double* sums = tensor.pieces > 0 ? rows : zeros;
    S* grad_biases = static_cast<S*>(args.grad_biases) + segment * hrnn_gates;
    for (int i = 0; i < hrnn_gates; ++i) grad_biases[i] = S(sums[i]);
    args.grad_rates[segment] = sums[row_grad_feature];
  });
}

// Copies a group's sums, or zeros where there are no coordinates, into the weights' shapes.
template <class S>
void write_weight_gradients(const HrnnStepProblem& p, const double* flat, void* const* grad_weights) {
  constexpr int H = hrnn_hidden, X = hrnn_features;
  const auto out = [&](int weight) { return static_cast<S*>(grad_weights[weight]); };
  for (int row = 0; row < hrnn_gates; ++row) {
    S* to = row < 2 * H ? out(0) + row * hrnn_inputs : out(1) + (row - 2 * H) * hrnn_inputs;
    const double* of_h = row < 2 * H ? flat + flat_gates_h + row * H : flat + flat_candidate_h + (row - 2 * H) * H;
    for (int k = 0; k < X; ++k) to[k] = S(flat[flat_x + row * X + k]);
    for (int k = 0; k < H; ++k) to[X + k] = S(of_h[k]);
  }
  for (int i = 0; i < p.readouts() * H; ++i) out(2)[i] = S(flat[flat_readouts + i]);
  for (int k = 0; k < num_scales; ++k) out(3)[k] = S(flat[flat_scales + k]);
  const double* scalars = flat + flat_scalars;
  out(4)[scalar_rate_bias] = S(scalars[rate_readout]);
  out(4)[scalar_scale_bias] = S(scalars[scale_decay_readout]);
  out(4)[scalar_input_bias] = S(scalars[input_decay_readout]);
  out(4)[scalar_offset] = S(scalars[max_readouts]);
  out(4)[scalar_momentum] = S(scalars[max_readouts + 1]);
}

template <class S>
void reduce(const HrnnStepProblem& p, const HrnnStepArguments& args) {
  for (int64_t task = 0; task < p.num_tasks; ++task) {
    double sum = 0;
    for (int64_t m = 0; m < p.num_tensors; ++m) sum += args.grad_rates[m * p.num_tasks + task];
    static_cast<S*>(args.grad_mean_rate)[task] = S(-sum);
  }
  const double zeros[flat_weights] = {};
  add_tree(args.partials, args.num_groups(p), flat_weights);
  write_weight_gradients<S>(p, args.num_groups(p) > 0 ? args.partials : zeros, args.grad_weights);
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
