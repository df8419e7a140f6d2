// mlp_update_step on the CPU. Compiled once per instruction set; problem.h has the axis legend.
//
// Three passes over a segment: g alone (sums of its squares, for the factors), all of the state (sums of squares of
// the features, for their norms), and all of it again (the network and the update). Within a block they read the cache.
#include "cpu_factors.h"
#include "cpu_network.h"
#include "cpu_row_sums.h"
#include "cpu_row_update.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// First-layer biases of every task: the time features are the same for all of its coordinates.
template <class S>
void biases(const MlpUpdateProblem& p, const double* time, void* out_) {
  S* out = static_cast<S*>(out_);
  for (int64_t task = 0; task < p.num_tasks; ++task) {
    const S* weight = p.own<S>(p.weights[0], task, int64_t(p.width) * mlp_inputs);
    const S* bias = p.own<S>(p.weights[1], task, p.width);
    for (int unit = 0; unit < p.width; ++unit) {
      double sum = double(bias[unit]);
      for (int j = 0; j < time_features; ++j)
        sum += double(weight[unit * mlp_inputs + tensor_features + j]) * time[task * time_features + j];
      out[task * p.width + unit] = S(sum);
    }
  }
}

// Scratch memory of the passes over blocks that go by rows, whose arrays cpu_row_sums.h and cpu_row_update.h lay out.
template <class S>
int64_t scratch_bytes(const MlpUpdateProblem& p, int64_t longest_column) {
  const int64_t rows = padded(longest_pattern), columns = padded(longest_column);
  const int64_t squares = 16 * rows, feature_squares = 3 * (rows + columns);
  const int64_t update = p.width * (full_inputs + 2 * inputs_of_tables + rows + columns) + 3 * rows;
  const int64_t most = squares > feature_squares ? squares : feature_squares;
  return (most > update ? most : update) * int64_t(sizeof(S));
}

template <class S>
void squares(const MlpUpdateCall& call, int64_t index, void* scratch) {
  using V = vec_t<S>;
  const MlpBlock& b = call.blocks[index];
  const Segment<S> s(call, b.segment);
  if (!s.shape.is_factored) return;
  S *x = s.block_sums_x(b), *y = s.block_sums_y(b, forward_sums);
  for (int64_t i = 0; i < b.x_size(s.shape); ++i) x[i] = S(0);
  for (int64_t i = 0; i < b.y_size(s.shape); ++i) y[i] = S(0);
  if (goes_by_rows(s.shape)) return squares_of_rows(s, b, x, y, static_cast<S*>(scratch));
  alignas(64) S g[tile_size];
  for_tiles(s.shape, b, [&](const TilePlace& tile) {
    read_tile(s.tensor.grads, s.problem.dtype, s.start + tile.start, tile.count, g);
    for (int i = 0; i < tile_size; i += lanes<V>) store(g + i, load<V>(g + i) * load<V>(g + i));
    add_to_x(tile, g, s.shape.inner, x);
    add_to_y(tile, g, y);
  });
}

// Moving means of an axis's means, and (r + 1e-8)^-1/2; adds up the squares of both over the entries.
template <class S>
void average(const Segment<S>& s, const Table<S>& t, const double* sums, int64_t count, double* totals) {
  for (int k = 0; k < 3; ++k) {
    const S keep = s.decays.keep[decay_factors + k], add = s.decays.add[decay_factors + k];
    const S* old = t.old + k * t.entries;
    S *now = t.now + k * t.entries, *root = t.root + k * t.entries;
    double squares = 0, root_squares = 0;
    for (int64_t i = 0; i < t.entries; ++i) {
      now[i] = keep * old[i] + add * S(sums[i] / double(count) + 1e-30);
      root[i] = inverse_root(S(now[i] + S(1e-8)));
      squares += double(now[i]) * double(now[i]);
      root_squares += double(root[i]) * double(root[i]);
    }
    totals[k] = squares;
    totals[3 + k] = root_squares;
  }
}

template <class S>
void factors(const MlpUpdateCall& call, int64_t index) {
  const Segment<S> s(call, index);
  if (!s.shape.is_factored) return;
  const double* sums = add_blocks(s, forward_sums);
  const Table<S> rows = s.rows(), columns = s.columns();
  const bool is_x = s.shape.rows_are_x;
  const int64_t x_size = s.shape.x_size();
  double totals[12];
  average(s, rows, is_x ? sums : sums + x_size, is_x ? s.shape.x_count() : s.shape.y_count(), totals);
  average(s, columns, is_x ? sums + x_size : sums, is_x ? s.shape.y_count() : s.shape.x_count(), totals + 6);
  row_factors(s, rows);
  column_factors(columns);
  double* out = call.segment_sums + index * tensor_features;
  for (int k = 0; k < 3; ++k) {
    out[feature_r + k] = totals[k] / double(rows.entries);
    out[feature_r_root + k] = totals[3 + k] / double(rows.entries);
    out[feature_c + k] = totals[6 + k] / double(columns.entries);
    out[feature_c_root + k] = totals[9 + k] / double(columns.entries);
  }
}

// Whether a feature's squares are summed over coordinates, not over the entries of its table.
constexpr bool is_own(bool is_factored, int feature) {
  return !is_factored || feature < feature_r || feature >= feature_m_factor;
}

// Adds the squares of a vector of coordinates. Lanes after the last coordinate are not counted.
template <bool IsPartial, class S>
MK_INLINE void add_squares(const TileInputs<S>& inputs, const Decays<S>& decays, int lane, int count,
                           vec_t<S> (&sums)[tensor_features]) {
  using V = vec_t<S>;
  V x[tensor_features], factors[3], used = broadcast<V>(1);
  for (int k = 0; k < 3; ++k)
    factors[k] = load<V>(inputs.row_factor[k] + lane) * load<V>(inputs.column_factor[k] + lane);
  own_features(load<V>(inputs.g + lane), load<V>(inputs.p + lane), inputs.moments(lane, decays), factors, factors, x);
  if constexpr (IsPartial) clear_lanes(&used, count - lane);
#pragma GCC unroll 28
  for (int f = 0; f < tensor_features; ++f)
    if (is_own(true, f)) sums[f] += IsPartial ? x[f] * x[f] * used : x[f] * x[f];
}

// Sums of squares over a block with short rows of the features that are no table's.
template <class S>
void squares_of_tiles(const Segment<S>& s, const MlpBlock& b, double* out) {
  using V = vec_t<S>;
  TileInputs<S> inputs;
  for_tiles(s.shape, b, [&](const TilePlace& tile) {
    inputs.read(s, tile);
    inputs.read_factors(s, tile);
    V sums[tensor_features];
#pragma GCC unroll 28
    for (int f = 0; f < tensor_features; ++f) sums[f] = broadcast<V>(0);
    int lane = 0;
    for (; lane + lanes<V> <= tile.count; lane += lanes<V>)
      add_squares<false>(inputs, s.decays, lane, tile.count, sums);
    if (lane < tile.count) add_squares<true>(inputs, s.decays, lane, tile.count, sums);
    for (int f = 0; f < tensor_features; ++f)
      if (is_own(true, f)) out[f] += double(sum_lanes(sums[f]));
  });
}

template <class S>
void feature_squares(const MlpUpdateCall& call, int64_t index, void* scratch) {
  const MlpBlock& b = call.blocks[index];
  const Segment<S> s(call, b.segment);
  double* out = call.block_sums + index * block_numbers;
  for (int f = 0; f < tensor_features; ++f) out[f] = 0;
  if (!s.shape.is_factored) return full_squares(s, b, out);
  if (goes_by_rows(s.shape)) return factored_squares(s, b, static_cast<S*>(scratch), out);
  squares_of_tiles(s, b, out);
}

template <class S>
void norms(const MlpUpdateCall& call, int64_t index) {
  const Segment<S> s(call, index);
  const double* of_tables = call.segment_sums + index * tensor_features;
  for (int f = 0; f < tensor_features; ++f) {
    const double mean = is_own(s.shape.is_factored, f) ? sum_of_blocks(s, f) / double(s.n) : of_tables[f];
    s.norms()[f] = S(1 / square_root(1e-5 + mean));
  }
}

// The network and the update of a block with short rows.
template <class S>
void update_tiles(const Segment<S>& s, const MlpBlock& b) {
  using V = vec_t<S>;
  const Network<S> network(s.call, s.place.task);
  const S rate = static_cast<const S*>(s.problem.rates)[s.number()];
  const S keep = static_cast<const S*>(s.problem.keep)[s.number()];
  const S* norms = s.norms();
  TileInputs<S> inputs;
  constexpr int C = tile_vectors<V>;
  V x[tensor_features * C], hidden[most_hidden_layers * largest_width * C], out[network_outputs * C];
  S* new_m = offset<S>(s.tensor.new_m, 3 * s.start);
  for_tiles(s.shape, b, [&](const TilePlace& tile) {
    inputs.read(s, tile);
    inputs.read_factors(s, tile);
    inputs.read_tables(s, tile);
    const int vectors = (tile.count + lanes<V> - 1) / lanes<V>;
    for (int j = 0; j < vectors; ++j) {
      const int lane = j * lanes<V>;
      const NewMoments<V> now = inputs.moments(lane, s.decays);
      const Factors<V> f = inputs.template factors<true>(lane, s.decays);
      V features[tensor_features];
      own_features(load<V>(inputs.g + lane), load<V>(inputs.p + lane), now, f.of_g, f.of_m, features);
      table_features(f, features);
#pragma GCC unroll 28
      for (int i = 0; i < tensor_features; ++i) x[i * C + j] = features[i] * norms[i];
      for (int k = 0; k < 3; ++k) store(inputs.m[k] + lane, now.m[k]);
      store(inputs.v + lane, now.v);
    }
    network.forward(x, hidden, out, vectors);
    for (int j = 0; j < vectors; ++j) {
      S* p = inputs.p + j * lanes<V>;
      store(p, load<V>(p) * keep - out[j] * rate * exponential<V>(out[C + j] * network.exp_mult));
    }
    write_tile(s.tensor.new_params, s.problem.dtype, s.start + tile.start, tile.count, inputs.p);
    for (int k = 0; k < 3; ++k) store_tile(new_m + k * s.n + tile.start, tile.count, inputs.m[k]);
    store_tile(offset<S>(s.tensor.new_v, s.start + tile.start), tile.count, inputs.v);
  });
}

template <class S>
void update(const MlpUpdateCall& call, int64_t index, void* scratch) {
  const MlpBlock& b = call.blocks[index];
  const Segment<S> s(call, b.segment);
  if (!goes_by_rows(s.shape)) return update_tiles(s, b);
  S* memory = static_cast<S*>(scratch);
  s.shape.is_factored ? RowUpdate<S, true>(s, b, memory).run() : RowUpdate<S, false>(s, b, memory).run();
}

template <class S>
constexpr MlpUpdateKernels kernels{biases<S>,          scratch_bytes<S>, squares<S>, factors<S>,
                                   feature_squares<S>, norms<S>,         update<S>};

}  // namespace
}  // namespace MK_CAPABILITY

template <>
const MlpUpdateKernels& mlp_update_kernels<CpuCapability::MK_CAPABILITY>(bool is_double) {
  return is_double ? kernels<double> : kernels<float>;
}

}  // namespace metakern
