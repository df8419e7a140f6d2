// The network and the update of a block whose rows are long, or of a tensor with one axis.
//
// The norms are part of the first layer's weights. What a coordinate's features r, c and their roots add to that layer
// is the same for all coordinates of a row or of a column: it is added to the biases, once a row and once a block.
#pragma once
#include "../math/inverse_root.h"
#include "cpu_network.h"
#include "cpu_rows.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Inputs that differ between neighbouring coordinates: g, p, m (3), v, m root (3), root, g of_g (3), m of_m (3), and
// with one axis V (3) and its root (3).
constexpr int inputs_of_tables = 6;
constexpr int own_inputs = tensor_features - 2 * inputs_of_tables, full_inputs = own_inputs + inputs_of_tables;
constexpr int input_m_factor = 13, input_full = 16, input_full_root = 19;

// The first layer's weights of a segment, times the features' norms.
template <class S>
struct FirstLayer {
  S* own;          // [W, own_inputs or full_inputs]
  S *of_x, *of_y;  // [6, W], of a table's entries and their roots

  MK_INLINE FirstLayer(int width, S* scratch)
      : own(scratch), of_x(own + full_inputs * width), of_y(of_x + inputs_of_tables * width) {}

  void fill(const Segment<S>& s, LaneMatrix<S> weight, int width) const {
    const S* norms = s.norms();
    const int x = s.shape.rows_are_x ? feature_r : feature_c, y = s.shape.rows_are_x ? feature_c : feature_r;
    const int inputs = s.shape.is_factored ? own_inputs : full_inputs;
    for (int unit = 0; unit < width; ++unit) {
      const S* from = weight.data + unit * weight.row;
      S* to = own + unit * inputs;
      const auto scaled = [&](int feature) { return from[feature] * norms[feature]; };
      for (int i = 0; i < feature_r; ++i) to[i] = scaled(i);
      for (int k = 0; k < 3; ++k) {
        to[input_m_factor + k] = scaled(feature_m_factor + k);
        if (!s.shape.is_factored) {
          to[input_full + k] = scaled(feature_r + k) + scaled(feature_c + k);
          to[input_full_root + k] = scaled(feature_r_root + k) + scaled(feature_c_root + k);
          continue;
        }
        of_x[k * width + unit] = scaled(x + k);
        of_x[(3 + k) * width + unit] = scaled(x + feature_r_root - feature_r + k);
        of_y[k * width + unit] = scaled(y + k);
        of_y[(3 + k) * width + unit] = scaled(y + feature_r_root - feature_r + k);
      }
    }
  }
};

// Adds a row's and a column's part to the first layer's sums.
template <class V>
struct AddTables {
  using S = lane_t<V>;
  V* out;
  const S *rows, *columns;
  int64_t row_stride, column_stride;
  const int* phases;

  MK_INLINE void operator()(int m, int n, V value) const {
    value += load<V>(columns + m * column_stride + n * lanes<V>) + load<V>(rows + m * row_stride + phases[n]);
    out[m * tile_vectors<V> + n] = at_least(value, S(0));
  }
};

template <class S, bool IsFactored>
class RowUpdate {
 public:
  using V = vec_t<S>;
  static constexpr int C = tile_vectors<V>, inputs = IsFactored ? own_inputs : full_inputs;

  RowUpdate(const Segment<S>& s, const MlpBlock& b, S* scratch)
      : s_(s),
        b_(b),
        network_(s.call, s.place.task),
        width_(s.problem.width),
        rate_(static_cast<const S*>(s.problem.rates)[s.number()]),
        keep_(static_cast<const S*>(s.problem.keep)[s.number()]),
        x_(s.table_x()),
        y_(s.table_y()),
        row_stride_(padded(s.shape.inner)),
        column_stride_(padded(b.y_size(s.shape))),
        first_(width_, scratch),
        row_factors_(first_.of_y + inputs_of_tables * width_),
        row_biases_(row_factors_ + 3 * row_stride_),
        column_biases_(row_biases_ + width_ * row_stride_) {}

  void run() {
    first_.fill(s_, network_.weight(0), width_);
    if constexpr (IsFactored) set_columns();
    for_rows(s_.shape, b_, [&](const RowPlace& row) {
      if constexpr (IsFactored) set_row(row);
      for_row_tiles(row_length(s_.shape, b_), [&](int64_t position, int count) { step(row, position, count); });
    });
  }

 private:
  // The part of table Y in the first layer, [W, span].
  void set_columns() {
    const FactoredShape& shape = s_.shape;
    const int64_t first =
        (b_.outer * shape.middle + b_.middle[0]) * shape.second * shape.inner + b_.second[0] * shape.inner;
    const S *now = y_.now + first, *root = y_.root + first;
    const int64_t n = y_.entries, span = b_.y_size(shape);
    for (int unit = 0; unit < width_; ++unit) {
      const S* w = first_.of_y + unit;
      S weights[inputs_of_tables];
      for (int i = 0; i < inputs_of_tables; ++i) weights[i] = w[i * width_];
      S* to = column_biases_ + unit * column_stride_;
      for (int64_t i = 0; i < span; ++i)
        to[i] = weights[0] * now[i] + weights[1] * now[n + i] + weights[2] * now[2 * n + i] + weights[3] * root[i] +
                weights[4] * root[n + i] + weights[5] * root[2 * n + i];
    }
  }

  // R or C of a row's entries of table X, and their part in the first layer with its bias, [W, inner].
  void set_row(const RowPlace& row) {
    const int64_t n = x_.entries, inner = s_.shape.inner;
    for (int k = 0; k < 3; ++k) repeat_row(x_.factor + k * n + row.x, inner, row_factors_ + k * row_stride_);
    S sums[largest_width];
    for (int64_t i = 0; i < inner; ++i) {
      const S* bias = network_.bias(0);
      const S *now = x_.now + row.x + i, *root = x_.root + row.x + i, *w = first_.of_x;
      for (int unit = 0; unit < width_; ++unit)
        sums[unit] = bias[unit] + w[unit] * now[0] + w[width_ + unit] * now[n] + w[2 * width_ + unit] * now[2 * n] +
                     w[3 * width_ + unit] * root[0] + w[4 * width_ + unit] * root[n] +
                     w[5 * width_ + unit] * root[2 * n];
      for (int unit = 0; unit < width_; ++unit) row_biases_[unit * row_stride_ + i] = sums[unit];
    }
    for (int unit = 0; unit < width_; ++unit) {
      S* bias = row_biases_ + unit * row_stride_;
      repeat_row(bias, inner, bias);
    }
  }

  void step(const RowPlace& row, int64_t position, int count) {
    const TileState<S> state(s_, row.start + position, count, &old_);
    const NewTileState<S> now(s_, row.start + position, count, &new_);
    const int vectors = (count + lanes<V> - 1) / lanes<V>;
    int phases[C];
    if constexpr (IsFactored) row_phases<V>(s_.shape.inner, position, vectors, phases);
    features_of_gradient(state, now, vectors);
    for (int k = 0; k < 3; ++k) features_of_moment(state, now, k, row.y + position, phases, vectors);
    V out[network_outputs * C];
    const LaneTerm<V, S> terms[1] = {{{first_.own, inputs, 1}, tile_rows(features_), inputs}};
    if constexpr (IsFactored)
      product(terms, width_, vectors,
              AddTables<V>{hidden_, row_biases_, column_biases_ + row.y_local + position, row_stride_, column_stride_,
                           phases});
    else
      product(terms, width_, vectors, AddBias<V>{hidden_, network_.bias(0), true});
    network_.after_first(hidden_, out, vectors);
    for (int j = 0; j < vectors; ++j) {
      const V p = load<V>(state.p + j * lanes<V>);
      store(now.p + j * lanes<V>, p * keep_ - out[j] * rate_ * exponential<V>(out[C + j] * network_.exp_mult));
    }
    now.finish();
  }

  MK_INLINE void features_of_gradient(const TileState<S>& state, const NewTileState<S>& now, int vectors) {
    const S keep = s_.decays.keep[decay_v], add = s_.decays.add[decay_v];
    for (int j = 0; j < vectors; ++j) {
      const int lane = j * lanes<V>;
      const V g = load<V>(state.g + lane), v = keep * load<V>(state.v + lane) + add * (g * g);
      store(now.v + lane, v);
      features_[feature_g * C + j] = g;
      features_[feature_p * C + j] = load<V>(state.p + lane);
      features_[feature_v * C + j] = v;
      features_[feature_root * C + j] = estimated_inverse_root<V>(v + S(1e-6));
    }
  }

  MK_INLINE void features_of_moment(const TileState<S>& state, const NewTileState<S>& now, int k, int64_t y,
                                    const int* phases, int vectors) {
    const S keep = s_.decays.keep[decay_m + k], add = s_.decays.add[decay_m + k];
    for (int j = 0; j < vectors; ++j) {
      const int lane = j * lanes<V>;
      const V g = load<V>(state.g + lane), m = keep * load<V>(state.m[k] + lane) + add * g;
      store(now.m[k] + lane, m);
      V of_g, of_m;
      if constexpr (IsFactored) {
        of_g = of_m =
            load<V>(row_factors_ + k * row_stride_ + phases[j]) * load<V>(y_.factor + k * y_.entries + y + lane);
      } else {
        const V full = new_full_factor<V>(g, load<V>(state.full[k] + lane), k, s_.decays);
        store(now.full[k] + lane, full);
        of_g = estimated_inverse_root<V>(at_least<V>(full + S(1e-9), S(1e-9)));
        of_m = estimated_inverse_root<V>(full + S(1e-6));
        features_[(input_full + k) * C + j] = full;
        features_[(input_full_root + k) * C + j] = estimated_inverse_root<V>(full + S(1e-8));
      }
      features_[(feature_m + k) * C + j] = m;
      features_[(feature_m_root + k) * C + j] = m * features_[feature_root * C + j];
      features_[(feature_g_factor + k) * C + j] = g * of_g;
      features_[(input_m_factor + k) * C + j] = m * of_m;
    }
  }

  const Segment<S>& s_;
  const MlpBlock& b_;
  const Network<S> network_;
  const int width_;
  const S rate_, keep_;
  const Table<S> x_, y_;
  const int64_t row_stride_, column_stride_;
  const FirstLayer<S> first_;
  S *row_factors_, *row_biases_, *column_biases_;
  TileBuffers<S> old_, new_;
  V features_[full_inputs * C], hidden_[most_hidden_layers * largest_width * C];
};

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
