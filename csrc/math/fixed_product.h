// Products of a small matrix of numbers, the same in all lanes, and rows of SIMD vectors, with sizes known at compile
// time. For sizes known at run time, see lane_product.h.
#pragma once
#include "../core/vec.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// One term of a sum of products, w b: element (m, k) of w is w[m * Row + k * Column], row k of b has Width vectors.
template <class V, int Row, int Column, int Inner, int Width>
struct FixedTerm {
  const lane_t<V>* w;
  const V* b;

  template <int M, int N>
  MK_INLINE void add(V (&acc)[M][N], int m, int n) const {
    const lane_t<V>* a = w + m * Row;
    const V* y = b + n;
#pragma GCC unroll 2
    for (int k = 0; k < Inner; ++k, a += Column, y += Width) {
      V x[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) x[j] = y[j];
#pragma GCC unroll 10
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) acc[i][j] += x[j] * a[i * Row];
    }
  }
};

// A block's accumulators stay in registers, of which AVX-512 has 32; its products broadcast the number themselves.
constexpr int fixed_block_rows = vector_bytes == 64 ? 10 : 5;

template <class V, int First, int Rows, int N, class Sink, class... Terms>
MK_INLINE void fixed_product_rows(int n, const Sink& sink, const Terms&... terms) {
  if constexpr (First < Rows) {
    constexpr int blocks = (Rows - First + fixed_block_rows - 1) / fixed_block_rows;
    constexpr int M = (Rows - First + blocks - 1) / blocks;  // blocks of nearly one height
    V acc[M][N];
#pragma GCC unroll 10
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) acc[i][j] = broadcast<V>(0);
    (terms.add(acc, First, n), ...);
#pragma GCC unroll 10
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) sink(First + i, n + j, acc[i][j]);
    fixed_product_rows<V, First + M, Rows, N>(n, sink, terms...);
  }
}

// sink(m, n, sum over the terms of (w b)(m, n)) for Rows rows and the first `columns` vectors of each.
template <class V, int Rows, class Sink, class... Terms>
MK_INLINE void fixed_product(int columns, const Sink& sink, const Terms&... terms) {
  int n = 0;
  for (; n + 2 <= columns; n += 2) fixed_product_rows<V, 0, Rows, 2>(n, sink, terms...);
  if (n < columns) fixed_product_rows<V, 0, Rows, 1>(n, sink, terms...);
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
