// Weight gradients: sums over a tile's coordinates of products of two arrays' rows, in a fixed order.
//
// The factor with more columns is transposed first, so that vectors run over the columns of the result: then a tile's
// products need no sums over lanes, and a tile stays in the first-level cache until its products are done.
#pragma once
#include <type_traits>

#include "../core/vec.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// Vectors of half the width, for the last columns. With AVX-512 a full one would waste up to a third of the work.
#if defined(__AVX512F__)
typedef float HalfFloatVec __attribute__((vector_size(vector_bytes / 2)));
typedef double HalfDoubleVec __attribute__((vector_size(vector_bytes / 2)));
template <>
struct lane_of<HalfFloatVec> {
  using type = float;
};
template <>
struct lane_of<HalfDoubleVec> {
  using type = double;
};
template <class V>
using half_t = std::conditional_t<sizeof(lane_t<V>) == 4, HalfFloatVec, HalfDoubleVec>;
#else
template <class V>
using half_t = V;
#endif

namespace {

// Columns of a result row in memory for `count` columns in use: whole vectors.
template <class V>
MK_INLINE constexpr int padded_columns(int count) {
  return (count + lanes<V> - 1) / lanes<V> * lanes<V>;
}

// Swaps the off-diagonal blocks of `Block` elements between a and b.
template <int Block, class V, int... I>
MK_INLINE void swap_blocks(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int n = lanes<V>;
  const V low = __builtin_shufflevector(a, b, (I / Block % 2 ? n + I - Block : I)...);
  b = __builtin_shufflevector(a, b, (I / Block % 2 ? n + I : I + Block)...);
  a = low;
}
template <int Block, class V>
MK_INLINE void transpose_in_place(V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes<V>; ++i)
    if (!(i & Block)) swap_blocks<Block>(v[i], v[i | Block], std::make_integer_sequence<int, lanes<V>>());
  if constexpr (Block * 2 < lanes<V>) transpose_in_place<Block * 2>(v);
}

// out [tile_lanes, stride] = the transposed rows row(0), ..., row(count - 1), each [tile_lanes]; columns from `count`
// on are zero.
template <class V, class Row>
MK_INLINE void transpose_rows(const Row& row, int count, int stride, lane_t<V>* out) {
  for (int first = 0; first < stride; first += lanes<V>)
    for (int lane = 0; lane < tile_lanes; lane += lanes<V>) {
      V v[lanes<V>];
#pragma GCC unroll 16
      for (int i = 0; i < lanes<V>; ++i) v[i] = first + i < count ? load<V>(row(first + i) + lane) : broadcast<V>(0);
      transpose_in_place<1>(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes<V>; ++i) store(out + (lane + i) * stride + first, v[i]);
    }
}

// sums[a][b] += sum over lanes of A[a][lane] * B[lane][b], for Rows rows of A [tile_lanes] and Full vectors of columns,
// and half a vector more with Half.
template <class V, int Rows, int Full, bool Half>
MK_INLINE void outer_product(const lane_t<V>* A, const lane_t<V>* B, int stride, lane_t<V>* sums) {
  using W = half_t<V>;
  constexpr int full = Full ? Full : 1;
  V acc[Rows][full];
  W half[Rows];
#pragma GCC unroll 8
  for (int a = 0; a < Rows; ++a) {
#pragma GCC unroll 4
    for (int b = 0; b < Full; ++b) acc[a][b] = load<V>(sums + a * stride + b * lanes<V>);
    if constexpr (Half) half[a] = load<W>(sums + a * stride + Full * lanes<V>);
  }
  for (int lane = 0; lane < tile_lanes; ++lane, B += stride) {
    V y[full];
    W y_half;
#pragma GCC unroll 4
    for (int b = 0; b < Full; ++b) y[b] = load<V>(B + b * lanes<V>);
    if constexpr (Half) y_half = load<W>(B + Full * lanes<V>);
#pragma GCC unroll 8
    for (int a = 0; a < Rows; ++a) {
      const lane_t<V> x = A[a * tile_lanes + lane];
#pragma GCC unroll 4
      for (int b = 0; b < Full; ++b) acc[a][b] += x * y[b];
      if constexpr (Half) half[a] += x * y_half;
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < Rows; ++a) {
#pragma GCC unroll 4
    for (int b = 0; b < Full; ++b) store(sums + a * stride + b * lanes<V>, acc[a][b]);
    if constexpr (Half) store(sums + a * stride + Full * lanes<V>, half[a]);
  }
}

template <class V, int Block, int Full, bool Half>
MK_INLINE int outer_product_rows(const lane_t<V>* A, int rows, const lane_t<V>* B, int stride, lane_t<V>* sums) {
  int a = 0;
  for (; a + Block <= rows; a += Block)
    outer_product<V, Block, Full, Half>(A + a * tile_lanes, B, stride, sums + a * stride);
  return a;
}

// As many rows at once as accumulators fit the registers.
template <class V, int Full, bool Half>
void outer_product_columns(const lane_t<V>* A, int rows, const lane_t<V>* B, int stride, lane_t<V>* sums) {
  constexpr int vectors = Full + Half, most = vector_bytes == 64 ? 8 : vectors > 2 ? 4 : vectors == 2 ? 6 : 8;
  int a = outer_product_rows<V, most, Full, Half>(A, rows, B, stride, sums);
  a += outer_product_rows<V, 4, Full, Half>(A + a * tile_lanes, rows - a, B, stride, sums + a * stride);
  outer_product_rows<V, 1, Full, Half>(A + a * tile_lanes, rows - a, B, stride, sums + a * stride);
}

// sums [rows, stride] += A [rows, tile_lanes] times B [tile_lanes, stride], for the first `columns` columns and some of
// the padding; stride is padded_columns(columns).
template <class V>
void add_outer_products(const lane_t<V>* A, int rows, const lane_t<V>* B, int columns, lane_t<V>* sums) {
  constexpr int halves = lanes<V> / lanes<half_t<V>>;
  const int stride = padded_columns<V>(columns);
  int left = (columns + lanes<half_t<V>> - 1) / lanes<half_t<V>>;  // in vectors of half_t
  for (int b = 0; left > 0;) {
    const lane_t<V>* from = B + b;
    lane_t<V>* to = sums + b;
    const int full = left / halves < 3 ? left / halves : left / halves == 4 ? 2 : 3;  // 4 = 2 + 2
    const bool half = halves == 2 && left % 2 && left / halves == full && full < 3;
    switch (full * 2 + half) {
      case 1: outer_product_columns<V, 0, true>(A, rows, from, stride, to); break;
      case 2: outer_product_columns<V, 1, false>(A, rows, from, stride, to); break;
      case 3: outer_product_columns<V, 1, true>(A, rows, from, stride, to); break;
      case 4: outer_product_columns<V, 2, false>(A, rows, from, stride, to); break;
      case 5: outer_product_columns<V, 2, true>(A, rows, from, stride, to); break;
      default: outer_product_columns<V, 3, false>(A, rows, from, stride, to); break;
    }
    left -= full * halves + half;
    b += full * lanes<V> + half * lanes<half_t<V>>;
  }
}

// Sum over the lanes of a row [tile_lanes].
template <class V>
MK_INLINE lane_t<V> row_sum(const lane_t<V>* row) {
  V sum = load<V>(row);
  for (int lane = lanes<V>; lane < tile_lanes; lane += lanes<V>) sum += load<V>(row + lane);
  return sum_lanes(sum);
}

// sums [count, lanes] += rows [count, tile_lanes], each folded to one vector.
template <class V>
void add_row_sums(const lane_t<V>* rows, int count, lane_t<V>* sums) {
  for (int row = 0; row < count; ++row, rows += tile_lanes, sums += lanes<V>) {
    V sum = load<V>(sums);
    for (int lane = 0; lane < tile_lanes; lane += lanes<V>) sum += load<V>(rows + lane);
    store(sums, sum);
  }
}

// The same of the products of every row with `factor` [tile_lanes].
template <class V>
void add_row_products(const lane_t<V>* factor, const lane_t<V>* rows, int count, lane_t<V>* sums) {
  for (int row = 0; row < count; ++row, rows += tile_lanes, sums += lanes<V>) {
    V sum = load<V>(sums);
    for (int lane = 0; lane < tile_lanes; lane += lanes<V>) sum += load<V>(factor + lane) * load<V>(rows + lane);
    store(sums, sum);
  }
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
