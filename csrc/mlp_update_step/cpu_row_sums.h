// The sums over a block whose rows are long, or of a tensor with one axis: squares of g for the factors, and squares of
// the features for their norms.
#pragma once
#include "cpu_rows.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Adds g^2 to the block's sums over rows and columns.
template <class S>
void squares_of_rows(const Segment<S>& s, const MlpBlock& b, S* x, S* y, S* scratch) {
  using V = vec_t<S>;
  const int64_t inner = s.shape.inner, length = row_length(s.shape, b);
  // Vectors that start at the same entry of X, the next so many coordinates later, share a sum; several for speed.
  const int64_t wrap = inner * lanes<V> * (inner < 4 ? 4 : 1);
  TileBuffers<S> buffers;
  for_rows(s.shape, b, [&](const RowPlace& row) {
    S *sums = x + row.x_local, *columns = y + row.y_local;
    for (int64_t i = 0; i < wrap; i += lanes<V>) store(scratch + i, broadcast<V>(0));
    int64_t at = 0;
    for_row_tiles(length, [&](int64_t position, int count) {
      const S* g = view(s.tensor.grads, s.problem.dtype, s.start + row.start + position, count, buffers.g);
      S* to = columns + position;
      int lane = 0;
      for (; lane < count; lane += lanes<V>) {
        const V value = load<V>(g + lane), square = value * value;
        store(scratch + at, load<V>(scratch + at) + square);
        if (lane + lanes<V> <= count)
          store(to + lane, load<V>(to + lane) + square);
        else
          for (int i = lane; i < count; ++i) to[i] += square[i - lane];
        at += lanes<V>;
        if (at == wrap) at = 0;
      }
    });
    for (int64_t first = 0; first < wrap; first += inner)
      for (int64_t i = 0; i < inner; ++i) sums[i] += scratch[first + i];
  });
}

// Sums of squares of the features, in lanes; they go to double after so many tiles.
template <class S>
struct FeatureSums {
  using V = vec_t<S>;
  static constexpr int most_tiles = 16;
  V sums[tensor_features];
  double* out;
  int tiles = 0;

  explicit FeatureSums(double* to) : out(to) { clear(); }

  void clear() {
    for (V& sum : sums) sum = broadcast<V>(0);
    tiles = 0;
  }
  void flush() {
    for (int f = 0; f < tensor_features; ++f) out[f] += double(sum_lanes(sums[f]));
    clear();
  }
  MK_INLINE void count_tile() {
    if (++tiles == most_tiles) flush();
  }
};

// What the sums of a tile share: 1 / (v + 1e-6), and R^2 C^2. Lanes after the last coordinate hold zeros.
template <class S>
struct SharedSquares {
  alignas(64) S root[tile_size], factors[3][tile_size];
};

template <class V>
MK_INLINE void clear_lanes(V* x, int from) {
  for (int i = from; i < lanes<V>; ++i) (*x)[i] = 0;
}

// Adds the squares of g, p, v and its root.
template <class S>
MK_INLINE void add_gradient_squares(const TileState<S>& state, const Decays<S>& decays, int count, FeatureSums<S>* to,
                                    S* roots) {
  using V = vec_t<S>;
  const S keep = decays.keep[decay_v], add = decays.add[decay_v];
  V of_g = to->sums[feature_g], of_p = to->sums[feature_p], of_v = to->sums[feature_v],
    of_root = to->sums[feature_root];
  for (int lane = 0; lane < count; lane += lanes<V>) {
    const V g = load<V>(state.g + lane), p = load<V>(state.p + lane), square = g * g;
    const V v = keep * load<V>(state.v + lane) + add * square;
    V root = S(1) / (v + S(1e-6));
    if (count - lane < lanes<V>) clear_lanes(&root, count - lane);
    store(roots + lane, root);
    of_g += square;
    of_p += p * p;
    of_v += v * v;
    of_root += root;
  }
  to->sums[feature_g] = of_g;
  to->sums[feature_p] = of_p;
  to->sums[feature_v] = of_v;
  to->sums[feature_root] = of_root;
}

// Adds the squares of m, m root, g of_g and m of_m for one decay.
template <class S>
MK_INLINE void add_moment_squares(const TileState<S>& state, const Decays<S>& decays, int k, int count, const S* roots,
                                  const S* squares_of_g, const S* squares_of_m, FeatureSums<S>* to) {
  using V = vec_t<S>;
  const S keep = decays.keep[decay_m + k], add = decays.add[decay_m + k];
  V of_m = to->sums[feature_m + k], of_root = to->sums[feature_m_root + k];
  V of_g_factor = to->sums[feature_g_factor + k], of_m_factor = to->sums[feature_m_factor + k];
  for (int lane = 0; lane < count; lane += lanes<V>) {
    const V g = load<V>(state.g + lane), m = keep * load<V>(state.m[k] + lane) + add * g, square = m * m;
    of_m += square;
    of_root += square * load<V>(roots + lane);
    of_g_factor += g * g * load<V>(squares_of_g + lane);
    of_m_factor += square * load<V>(squares_of_m + lane);
  }
  to->sums[feature_m + k] = of_m;
  to->sums[feature_m_root + k] = of_root;
  to->sums[feature_g_factor + k] = of_g_factor;
  to->sums[feature_m_factor + k] = of_m_factor;
}

// Sums of a factored segment's block over the features that are no table's.
template <class S>
void factored_squares(const Segment<S>& s, const MlpBlock& b, S* scratch, double* out) {
  using V = vec_t<S>;
  const FactoredShape& shape = s.shape;
  const Table<S> of_x = s.table_x(), of_y = s.table_y();
  const int64_t length = row_length(shape, b), span = b.y_size(shape), inner = shape.inner;
  const int64_t row_stride = padded(inner), stride = padded(span);
  S *rows = scratch, *columns = rows + 3 * row_stride;  // R^2 of a row or C^2, or the reverse
  const int64_t first_y = (b.outer * shape.middle + b.middle[0]) * shape.second * inner + b.second[0] * inner;
  for (int k = 0; k < 3; ++k) {
    const S* factor = of_y.factor + k * of_y.entries + first_y;
    S* to = columns + k * stride;
    for (int64_t i = 0; i < span; ++i) to[i] = factor[i] * factor[i];
    for (int64_t i = span; i < span + lanes<V>; ++i) to[i] = S(0);
  }
  TileBuffers<S> buffers;
  SharedSquares<S> shared;
  FeatureSums<S> sums(out);
  for_rows(shape, b, [&](const RowPlace& row) {
    for (int k = 0; k < 3; ++k) {
      S* to = rows + k * row_stride;
      repeat_row(of_x.factor + k * of_x.entries + row.x, inner, to);
      for (int64_t i = 0; i < (inner == 1 ? 0 : inner) + lanes<V>; ++i) to[i] *= to[i];
    }
    for_row_tiles(length, [&](int64_t position, int count) {
      const TileState<S> state(s, row.start + position, count, &buffers);
      int phases[tile_vectors<V>];
      row_phases<V>(inner, position, (count + lanes<V> - 1) / lanes<V>, phases);
      add_gradient_squares(state, s.decays, count, &sums, shared.root);
      for (int k = 0; k < 3; ++k) {
        const S *from = columns + k * stride + row.y_local + position, *of_row = rows + k * row_stride;
        for (int lane = 0, j = 0; lane < count; lane += lanes<V>, ++j)
          store(shared.factors[k] + lane, load<V>(from + lane) * load<V>(of_row + phases[j]));
        add_moment_squares(state, s.decays, k, count, shared.root, shared.factors[k], shared.factors[k], &sums);
      }
      sums.count_tile();
    });
  });
  sums.flush();
}

// Sums of a block of a tensor with one axis, over all features.
template <class S>
void full_squares(const Segment<S>& s, const MlpBlock& b, double* out) {
  using V = vec_t<S>;
  TileBuffers<S> buffers;
  SharedSquares<S> shared;
  alignas(64) S of_m[tile_size];
  FeatureSums<S> sums(out);
  for_rows(s.shape, b, [&](const RowPlace& row) {
    for_row_tiles(row_length(s.shape, b), [&](int64_t position, int count) {
      const TileState<S> state(s, row.start + position, count, &buffers);
      add_gradient_squares(state, s.decays, count, &sums, shared.root);
      for (int k = 0; k < 3; ++k) {
        V of_full = sums.sums[feature_r + k], of_root = sums.sums[feature_r_root + k];
        for (int lane = 0; lane < count; lane += lanes<V>) {
          const V full = new_full_factor<V>(load<V>(state.g + lane), load<V>(state.full[k] + lane), k, s.decays);
          V root = S(1) / (full + S(1e-8));
          if (count - lane < lanes<V>) clear_lanes(&root, count - lane);
          of_full += full * full;
          of_root += root;
          store(shared.factors[k] + lane, S(1) / at_least(full + S(1e-9), S(1e-9)));
          store(of_m + lane, S(1) / (full + S(1e-6)));
        }
        sums.sums[feature_r + k] = sums.sums[feature_c + k] = of_full;
        sums.sums[feature_r_root + k] = sums.sums[feature_c_root + k] = of_root;
        add_moment_squares(state, s.decays, k, count, shared.root, shared.factors[k], of_m, &sums);
      }
      sums.count_tile();
    });
  });
  sums.flush();
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
