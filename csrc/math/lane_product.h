// Products of small matrices of SIMD vectors; the left matrix may instead hold numbers that are the same in all lanes.
#pragma once
#include "../core/vec.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Element (i, j) is data[i * row + j * column].
template <class Element>
struct LaneMatrix {
  const Element* data;
  int64_t row;
  int64_t column;

  MK_INLINE LaneMatrix transposed() const { return {data, column, row}; }
};

// One term of a sum of products: a [M, K], of vectors or numbers, times b [K, N].
template <class V, class Number>
struct LaneTerm {
  LaneMatrix<Number> a;
  LaneMatrix<V> b;
  int inner;
};

// A block's accumulators stay in registers: with AVX-512 24 of 32, otherwise 12 of 16.
constexpr int block_rows = 4;
constexpr int block_columns = vector_bytes == 64 ? 6 : 3;
// Narrow blocks have more rows, as the additions to one accumulator depend on each other.
constexpr int rows_of(int columns) {
  return columns * 2 * block_rows <= block_rows * block_columns ? 2 * block_rows : block_rows;
}

// Keeps the compiler from loading a vector anew for each product with it. With AVX2, whose blocks are narrow, loads
// are then the bottleneck.
template <class Number>
MK_INLINE void in_register([[maybe_unused]] Number& x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(Number) == vector_bytes) __asm__("" : "+x"(x));
#endif
}

template <class V, class Number, int M, int N>
MK_INLINE void add_term(V (&acc)[M][N], const LaneTerm<V, Number>& term, int m, int n) {
  const Number* a = term.a.data + m * term.a.row;
  const V* b = term.b.data + n * term.b.column;
  const int64_t a_row = term.a.row, b_column = term.b.column;
  for (int k = 0; k < term.inner; ++k, a += term.a.column, b += term.b.row) {
    V y[N];
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) y[j] = b[j * b_column];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      Number x = a[i * a_row];
      in_register(x);
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) acc[i][j] += x * y[j];
    }
  }
}

// sink(m, n, sum over the terms of (a b)(m, n)) for every element of the block.
template <class V, int M, int N, class Number, int Terms, class Sink>
MK_INLINE void product_block(const LaneTerm<V, Number> (&terms)[Terms], int m, int n, const Sink& sink) {
  V acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) acc[i][j] = broadcast<V>(0);
#pragma GCC unroll 2
  for (int t = 0; t < Terms; ++t) add_term(acc, terms[t], m, n);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) sink(m + i, n + j, acc[i][j]);
}

template <class V, int N, class Number, int Terms, class Sink>
void product_columns(const LaneTerm<V, Number> (&terms)[Terms], int rows, int n, const Sink& sink) {
  int m = 0;
  for (; m + rows_of(N) <= rows; m += rows_of(N)) product_block<V, rows_of(N), N>(terms, m, n, sink);
  for (; m + 2 <= rows; m += 2) product_block<V, 2, N>(terms, m, n, sink);
  for (; m < rows; ++m) product_block<V, 1, N>(terms, m, n, sink);
}

// The whole product; columns are split into blocks of nearly equal width, so that no narrow block remains.
template <class V, class Number, int Terms, class Sink>
void product(const LaneTerm<V, Number> (&terms)[Terms], int rows, int columns, const Sink& sink) {
  const int blocks = (columns + block_columns - 1) / block_columns;
  for (int block = 0, n = 0; block < blocks; ++block) {
    const int width = (columns - n + blocks - block - 1) / (blocks - block);
    switch (width) {
      case 1: product_columns<V, 1>(terms, rows, n, sink); break;
      case 2: product_columns<V, 2>(terms, rows, n, sink); break;
      case 3: product_columns<V, 3>(terms, rows, n, sink); break;
#if defined(__AVX512F__)
      case 4: product_columns<V, 4>(terms, rows, n, sink); break;
      case 5: product_columns<V, 5>(terms, rows, n, sink); break;
      default: product_columns<V, 6>(terms, rows, n, sink); break;
#else
      default: break;
#endif
    }
    n += width;
  }
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
