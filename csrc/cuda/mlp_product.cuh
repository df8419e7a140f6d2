// Products of small matrices in shared memory, by all threads of a block.
#pragma once
#include "storage.cuh"

namespace metakern {
inline namespace MK_CAPABILITY {

constexpr int max_product_shift = 3;

template <class S>
__device__ __forceinline__ S* shared_elements() {
  return reinterpret_cast<S*>(dynamic_shared());
}

// Element (i, j) is number start + i * row + j * column of the shared memory.
struct SharedMatrix {
  int start, row, column;
  __device__ __forceinline__ SharedMatrix transposed() const { return {start, column, row}; }
};

// One term of a sum of products: a [M, inner] times b [inner, N].
struct ProductTerm {
  SharedMatrix a, b;
  int inner;
};

// acc += the share of one of `lanes` lanes in a tile of 2 rows and 2 columns.
template <class S>
__device__ __forceinline__ void add_term(const ProductTerm& t, const int (&m)[2], const int (&n)[2], int lane,
                                         int lanes, S (&acc)[2][2]) {
  const S* memory = shared_elements<S>();
  const S* a = memory + t.a.start + lane * t.a.column;
  const S* b = memory + t.b.start + lane * t.b.row;
  const int a0 = m[0] * t.a.row, a1 = m[1] * t.a.row, b0 = n[0] * t.b.column, b1 = n[1] * t.b.column;
  const int a_step = lanes * t.a.column, b_step = lanes * t.b.row;
#pragma unroll 4
  for (int k = lane; k < t.inner; k += lanes, a += a_step, b += b_step) {
    const S x[2] = {a[a0], a[a1]}, y[2] = {b[b0], b[b1]};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) acc[i][j] += x[i] * y[j];
  }
}

// sink(m, n, sum over both terms of (a b)(m, n)) for every element [M, N]; a term with an inner size of 0 is none.
//
// Where there are fewer tiles than threads, up to 2^max_product_shift neighbouring lanes share the inner size of a tile
// and then its elements. A tile's rows and columns are far apart: so neighbouring threads read neighbouring ones. The
// order of every sum is a function of the sizes and of the threads of the block. All threads of the block must call it.
template <class S, class Sink>
__device__ __forceinline__ void product(int M, int N, const ProductTerm& first, const ProductTerm& second,
                                        const Sink& sink) {
  const int tiles_m = (M + 1) / 2, tiles_n = (N + 1) / 2, tiles = tiles_m * tiles_n;
  int shift = 0;
  while (shift < max_product_shift && (tiles << (shift + 1)) <= int(blockDim.x) && (4 << shift) <= first.inner) ++shift;
  const int lanes = 1 << shift, lane = int(threadIdx.x) & (lanes - 1), warp_lane = int(threadIdx.x) % warp_lanes;
  for (int item = int(threadIdx.x); item - warp_lane < tiles << shift; item += int(blockDim.x)) {
    const int at = item >> shift, tile_m = at / tiles_n, tile_n = at - tile_m * tiles_n;
    const bool used = at < tiles;
    const int m[2] = {tile_m, tile_m + tiles_m < M ? tile_m + tiles_m : tile_m};
    const int n[2] = {tile_n, tile_n + tiles_n < N ? tile_n + tiles_n : tile_n};
    S acc[2][2] = {};
    if (used) {
      add_term(first, m, n, lane, lanes, acc);
      add_term(second, m, n, lane, lanes, acc);
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i / 2][i % 2] += from_lane_xor(acc[i / 2][i % 2], mask);
    if (!used) continue;
    for (int i = lane; i < 4; i += lanes) {
      const int row = i / 2, column = i % 2;
      if ((row && m[1] == m[0]) || (column && n[1] == n[0])) continue;
      const S upper = column ? acc[0][1] : acc[0][0], lower = column ? acc[1][1] : acc[1][0];
      sink(row ? m[1] : m[0], column ? n[1] : n[0], row ? lower : upper);
    }
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
