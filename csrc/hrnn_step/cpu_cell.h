// The new hidden state and the readouts of one tile: features, the biased GRU, products with the readouts.
#pragma once
#include "../math/activations_avx2.h"
#include "../math/activations_avx512.h"
#include "../math/fixed_product.h"
#include "../math/gru_cell.h"
#include "cpu_tiles.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

constexpr int rest_rows = hrnn_rows - hrnn_hidden;  // rows of the state after h

// The weights, and what belongs to a call.
template <class S>
struct CallWeights {
  const S *gates, *candidate, *readouts, *scales;
  S readout_biases[max_readouts];
  S offset, momentum;

  explicit CallWeights(const HrnnWeights& w)
      : gates(static_cast<const S*>(w.data[0])),
        candidate(static_cast<const S*>(w.data[1])),
        readouts(static_cast<const S*>(w.data[2])),
        scales(static_cast<const S*>(w.data[3])) {
    const S* scalars = static_cast<const S*>(w.data[4]);
    for (S& bias : readout_biases) bias = S(0);
    readout_biases[rate_readout] = scalars[scalar_rate_bias];
    readout_biases[scale_decay_readout] = scalars[scalar_scale_bias];
    readout_biases[input_decay_readout] = scalars[scalar_input_bias];
    offset = scalars[scalar_offset];
    momentum = sigmoid(scalars[scalar_momentum]);
  }
};

// What the segment of a piece brings.
template <class S>
struct SegmentInputs {
  const S* biases;  // [3H]
  S mean_rate;

  SegmentInputs(const HrnnStepArguments& args, const Piece& piece)
      : biases(static_cast<const S*>(args.biases) + piece.segment * hrnn_gates),
        mean_rate(static_cast<const S*>(args.mean_rate)[piece.task]) {}
};

// Rows of one tile's cell; backward keeps those of several tiles, for the sums of products that are weight gradients.
template <class V>
struct CellRows {
  V x[hrnn_features][W<V>];
  V h[hrnn_hidden][W<V>];
  V reset_h[hrnn_hidden][W<V>];  // r * h
  V gates[hrnn_gates][W<V>];     // r, u, c; in backward then the gradients of their pre-activations
  V new_h[hrnn_hidden][W<V>];
  V readouts[max_readouts + 2][W<V>];  // in backward then their gradients, and those of o and m

  static constexpr int64_t stride = sizeof(CellRows) / sizeof(lane_t<V>);
};

// One tile's other inputs.
template <class V>
struct TileInputs {
  V g[W<V>];
  V rest[rest_rows][W<V>];  // the state without h

  MK_INLINE const V (&row(int state_row) const)[W<V>] { return rest[state_row - hrnn_hidden]; }

  MK_INLINE ScaleState<V> scale_state(int n) const {
    ScaleState<V> out;
#pragma GCC unroll 4
    for (int k = 0; k < num_scales; ++k) {
      out.mean[k] = row(row_mean + k)[n];
      out.square[k] = row(row_square + k)[n];
    }
    out.scale_decay = row(row_scale_decay)[n];
    out.input_decay = row(row_input_decay)[n];
    return out;
  }
};

template <class V>
MK_INLINE void read_inputs(const HrnnStepProblem& p, const Piece& piece, int tile, int used, TileInputs<V>& in,
                           CellRows<V>& cell) {
  const int64_t n = piece.tensor.coordinates;
  const lane_t<V>* state = static_cast<const lane_t<V>*>(piece.tensor.state) + piece.row(hrnn_rows, tile);
  read_params<V>(piece.tensor.grads, p.dtype, piece.param(tile), used, in.g);
  read_tile<V>(state, n, hrnn_hidden, used, cell.h);
  read_tile<V>(state + hrnn_hidden * n, n, rest_rows, used, in.rest);
  prefetch_next(state, n, hrnn_rows);
}

// Writes the features; scales[n]: the new means and squares.
template <class V>
MK_INLINE void write_features(const TileInputs<V>& in, lane_t<V> mean_rate, int columns, ScaleMeans<V>* scales,
                              CellRows<V>& cell) {
  for (int n = 0; n < columns; ++n) {
    const ScaleMeans<V> now(in.g[n], in.scale_state(n));
    V x[num_scale_features];
    now.features(x);
#pragma GCC unroll 11
    for (int k = 0; k < num_scale_features; ++k) cell.x[k][n] = x[k];
    cell.x[num_scale_features][n] = in.row(row_rate)[n] - mean_rate;
    scales[n] = now;
  }
}

// out[m][n] = bias[m] + sum over the inputs [x; h] of w[m][k] input[k][n].
template <int Rows, class V>
MK_INLINE void cell_product(const lane_t<V>* w, const V (*x)[W<V>], const V (*h)[W<V>], int columns,
                            const lane_t<V>* bias, V* out) {
  const FixedTerm<V, hrnn_inputs, 1, hrnn_features, W<V>> of_x{w, x[0]};
  const FixedTerm<V, hrnn_inputs, 1, hrnn_hidden, W<V>> of_h{w + hrnn_features, h[0]};
  fixed_product<V, Rows>(columns, [&](int m, int n, V sum) { out[m * W<V> + n] = sum + bias[m]; }, of_x, of_h);
}

// Writes the activations of the gates, r * h and h'.
template <class V>
MK_INLINE void run_cell(const CallWeights<lane_t<V>>& w, const lane_t<V>* biases, int columns, CellRows<V>& cell) {
  constexpr int H = hrnn_hidden;
  cell_product<2 * H>(w.gates, cell.x, cell.h, columns, biases, cell.gates[0]);
  for (int j = 0; j < H; ++j)
    for (int n = 0; n < columns; ++n) {
      const V r = sigmoid(cell.gates[j][n]);
      cell.gates[j][n] = r;
      cell.reset_h[j][n] = r * cell.h[j][n];
    }
  cell_product<H>(w.candidate, cell.x, cell.reset_h, columns, biases + 2 * H, cell.gates[2 * H]);
  for (int j = 0; j < H; ++j)
    for (int n = 0; n < columns; ++n) {
      const auto unit = GruUnit<V>::of(cell.gates[H + j][n], cell.gates[2 * H + j][n]);
      cell.gates[H + j][n] = unit.update;
      cell.gates[2 * H + j][n] = unit.candidate;
      cell.new_h[j][n] = unit.new_h(cell.h[j][n]);
    }
}

template <class V>
MK_INLINE void run_readouts(const CallWeights<lane_t<V>>& w, bool attention, int columns, CellRows<V>& cell) {
  const FixedTerm<V, hrnn_hidden, 1, hrnn_hidden, W<V>> term{w.readouts, cell.new_h[0]};
  const lane_t<V>* biases = w.readout_biases;
  V* out = cell.readouts[0];
  const auto sink = [&](int m, int n, V sum) { out[m * W<V> + n] = sum + biases[m]; };
  if (attention)
    fixed_product<V, max_readouts>(columns, sink, term);
  else
    fixed_product<V, num_readouts>(columns, sink, term);
  for (int n = 0; n < columns; ++n)
#pragma GCC unroll 4
    for (int k = 0; k < num_scales; ++k) cell.readouts[direction_readout][n] += cell.x[k][n] * w.scales[k];
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
