// Forward of hrnn_step: a pass over the pieces, sums of each segment, and the update of the params, which needs the
// root of the segment's mean square of delta.
#pragma once
#include "cpu_cell.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Results of one tile.
template <class V>
struct TileResults {
  V rest[rest_rows][W<V>];  // the new state without h
  V steps[2][W<V>];
  V squares[2][W<V>];
};

template <class V>
MK_INLINE void write_results(const HrnnStepProblem& p, const CallWeights<lane_t<V>>& w, const TileInputs<V>& in,
                             const CellRows<V>& cell, const ScaleMeans<V>* scales, int columns, TileResults<V>& out) {
  for (int n = 0; n < columns; ++n) {
    const auto new_row = [&](int state_row) -> V& { return out.rest[state_row - hrnn_hidden][n]; };
#pragma GCC unroll 4
    for (int k = 0; k < num_scales; ++k) {
      new_row(row_mean + k) = scales[n].mean[k];
      new_row(row_square + k) = scales[n].square[k];
    }
    const V rate = in.row(row_rate)[n], step = step_log_rate(rate, cell.readouts[rate_readout][n]);
    new_row(row_rate) = new_log_rate(rate, step, w.momentum);
    new_row(row_scale_decay) = sigmoid(cell.readouts[scale_decay_readout][n]);
    new_row(row_input_decay) = sigmoid(cell.readouts[input_decay_readout][n]);
    const V delta = cell.readouts[direction_readout][n];
    out.steps[0][n] = learning_rate(step + w.offset) * delta;
    out.squares[0][n] = delta * delta;
    if (p.attention) {
      const V attention = cell.readouts[attention_readout][n];
      out.steps[1][n] = learning_rate(step) * attention;
      out.squares[1][n] = attention * attention;
    }
  }
}

template <class V>
void forward_piece(const HrnnStepProblem& p, const HrnnStepArguments& args, const CallWeights<lane_t<V>>& w,
                   const Piece& piece) {
  using S = lane_t<V>;
  const SegmentInputs<S> segment(args, piece);
  const int64_t n = piece.tensor.coordinates;
  RowSums<V, forward_sums> sums;
  TileInputs<V> in;
  CellRows<V> cell;
  TileResults<V> out;
  ScaleMeans<V> scales[W<V>];
  for (int tile = 0; tile < piece.tiles; ++tile) {
    const int used = piece.used(tile), columns = columns_of<V>(used);
    S* state = static_cast<S*>(piece.tensor.new_state) + piece.row(hrnn_rows, tile);
    prefetch_next(state, n, hrnn_rows);
    read_inputs<V>(p, piece, tile, used, in, cell);
    write_features<V>(in, segment.mean_rate, columns, scales, cell);
    run_cell<V>(w, segment.biases, columns, cell);
    run_readouts<V>(w, p.attention, columns, cell);
    write_results<V>(p, w, in, cell, scales, columns, out);
    write_tile<V>(state, n, hrnn_hidden, used, cell.new_h);
    write_tile<V>(state + hrnn_hidden * n, n, rest_rows, used, out.rest);
    write_tile<V>(static_cast<S*>(piece.tensor.steps) + piece.row(p.directions(), tile), n, p.directions(), used,
                  out.steps);
    V(*new_rate)[W<V>] = out.rest + row_rate - hrnn_hidden;
    clear_padding<V>(cell.new_h, hrnn_hidden, used);
    clear_padding<V>(cell.x, hrnn_features, used);
    clear_padding<V>(new_rate, 1, used);
    clear_padding<V>(out.squares, p.directions(), used);
    sums.add(0, hrnn_hidden, cell.new_h);
    sums.add(hrnn_hidden, hrnn_features, cell.x);
    sums.add(hrnn_means - 1, 1, new_rate);
    sums.add(hrnn_means, p.directions(), out.squares);
  }
  sums.write(args.sums + piece.index * forward_sums);
}

template <class S>
void forward(const HrnnStepProblem& p, const HrnnStepArguments& args, int64_t first_tile, int64_t last_tile) {
  for_each_piece(p, args, first_tile, last_tile, [&](const Piece& piece) {
    forward_piece<vec_t<S>>(p, args, CallWeights<S>(args.weights_of(piece.task)), piece);
  });
}

// f(segment, its tensor, its first piece) for a range of segments.
template <class F>
void for_each_segment(const HrnnStepProblem& p, const HrnnStepArguments& args, int64_t first, int64_t last,
                      const F& f) {
  for (int64_t segment = first; segment < last; ++segment) {
    const HrnnTensor& tensor = args.tensors[segment / p.num_tasks];
    f(segment, tensor, tensor.first_piece + segment % p.num_tasks * tensor.pieces);
  }
}

// The means of a segment without coordinates are zero.
inline double divisor(const HrnnTensor& tensor) { return tensor.coordinates > 0 ? double(tensor.coordinates) : 1; }

template <class S>
void finish_forward(const HrnnStepProblem& p, const HrnnStepArguments& args, int64_t first, int64_t last) {
  for_each_segment(p, args, first, last, [&](int64_t segment, const HrnnTensor& tensor, int64_t piece) {
    const double zeros[forward_sums] = {};
    double* rows = args.sums + piece * forward_sums;
    add_tree(rows, tensor.pieces, forward_sums);
    const double* sums = tensor.pieces > 0 ? rows : zeros;
    S* means = static_cast<S*>(args.means) + segment * hrnn_means;
    S* rms = static_cast<S*>(args.rms) + segment * p.directions();
    for (int i = 0; i < hrnn_means; ++i) means[i] = S(sums[i] / divisor(tensor));
    for (int i = 0; i < p.directions(); ++i)
      rms[i] = S(__builtin_sqrt(sums[hrnn_means + i] / divisor(tensor) + rms_epsilon));
  });
}

template <class V>
void apply_piece(const HrnnStepProblem& p, const HrnnStepArguments& args, const Piece& piece) {
  using S = lane_t<V>;
  const HrnnTensor& tensor = piece.tensor;
  const S* rms = static_cast<const S*>(args.rms) + piece.segment * p.directions();
  V params[W<V>], steps[2][W<V>], moved[W<V>];
  for (int tile = 0; tile < piece.tiles; ++tile) {
    const int used = piece.used(tile);
    const int64_t first = piece.param(tile);
    read_params<V>(tensor.params, p.dtype, first, used, params);
    read_tile<V>(static_cast<const S*>(tensor.steps) + piece.row(p.directions(), tile), tensor.coordinates,
                 p.directions(), used, steps);
    for (int i = 0; i < p.directions(); ++i) {
      for (int n = 0; n < W<V>; ++n) moved[n] = params[n] - steps[i][n] / rms[i];
      write_params<V>(i == 0 ? tensor.new_params : tensor.attended, p.dtype, first, used, moved);
    }
  }
}

template <class S>
void apply(const HrnnStepProblem& p, const HrnnStepArguments& args, int64_t first_tile, int64_t last_tile) {
  for_each_piece(p, args, first_tile, last_tile, [&](const Piece& piece) { apply_piece<vec_t<S>>(p, args, piece); });
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
