// Products of small matrices in shared memory, by all threads of a block.
#pragma once
#include "../core/storage.cuh"

namespace metakern {
inline namespace MK_CAPABILITY {

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

// A thread's share of a product: elements (tile_m + i * tiles_m, tile_n + j * tiles_n), as number i * tile_columns + j.
constexpr int tile_rows = 4;
constexpr int tile_columns = 2;
constexpr int tile_size = tile_rows * tile_columns;

// acc += every `lanes`-th summand of a tile's elements, from number `lane` on; m and n are its rows and columns.
template <class S>
__device__ __forceinline__ void add_term(const ProductTerm& t, const int (&m)[tile_rows], const int (&n)[tile_columns],
                                         int lane, int lanes, S (&acc)[tile_size]) {
  const S* a = shared_elements<S>() + t.a.start + lane * t.a.column;
  const S* b = shared_elements<S>() + t.b.start + lane * t.b.row;
  int a_at[tile_rows], b_at[tile_columns];
#pragma unroll
  for (int i = 0; i < tile_rows; ++i) a_at[i] = m[i] * t.a.row;
#pragma unroll
  for (int j = 0; j < tile_columns; ++j) b_at[j] = n[j] * t.b.column;
  const int a_step = lanes * t.a.column, b_step = lanes * t.b.row;
#pragma unroll 2
  for (int k = lane; k < t.inner; k += lanes, a += a_step, b += b_step) {
    S y[tile_columns];
#pragma unroll
    for (int j = 0; j < tile_columns; ++j) y[j] = b[b_at[j]];
#pragma unroll
    for (int i = 0; i < tile_rows; ++i) {
      const S x = a[a_at[i]];
#pragma unroll
      for (int j = 0; j < tile_columns; ++j) acc[i * tile_columns + j] += x * y[j];
    }
  }
}

// One step of reduce-scatter of a tile's sums between two lanes: the lane keeps one half of the first 2 * half sums and
// adds its partner's values of them; the partner gets the other half.
template <int half, class S>
__device__ __forceinline__ void share_sums(int lane, int mask, S (&acc)[tile_size]) {
  const bool upper = lane & mask;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const S kept = upper ? acc[i + half] : acc[i], given = upper ? acc[i] : acc[i + half];
    acc[i] = kept + from_lane_xor(given, mask);
  }
}

// sink(m, n, sum over both terms of (a b)(m, n)) for every element [M, N]; a term with an inner size of 0 is none.
//
// Where there are fewer tiles than threads, up to 8 neighbouring lanes share the summands of a tile and then its
// elements. A tile's rows and columns are far apart: so neighbouring threads read neighbouring ones. The order of every
// sum is a function of the sizes and of the threads of the block. All threads of the block must call it.
template <class S, class Sink>
__device__ __forceinline__ void product(int M, int N, const ProductTerm& first, const ProductTerm& second,
                                        const Sink& sink) {
  const int tiles_m = (M + tile_rows - 1) / tile_rows, tiles_n = (N + tile_columns - 1) / tile_columns;
  const int tiles = tiles_m * tiles_n;
  int shift = 0;
  while ((1 << shift) < tile_size && tiles << (shift + 1) <= int(blockDim.x)) ++shift;
  const int lanes = 1 << shift, lane = int(threadIdx.x) & (lanes - 1), warp_lane = int(threadIdx.x) % warp_lanes;
  for (int item = int(threadIdx.x); item - warp_lane < tiles << shift; item += int(blockDim.x)) {
    const int at = item >> shift, tile_m = at / tiles_n, tile_n = at - tile_m * tiles_n;
    int m[tile_rows], n[tile_columns];
#pragma unroll
    for (int i = 0; i < tile_rows; ++i) m[i] = tile_m + i * tiles_m < M ? tile_m + i * tiles_m : M - 1;
#pragma unroll
    for (int j = 0; j < tile_columns; ++j) n[j] = tile_n + j * tiles_n < N ? tile_n + j * tiles_n : N - 1;
    S acc[tile_size] = {};
    if (at < tiles) {
      add_term(first, m, n, lane, lanes, acc);
      add_term(second, m, n, lane, lanes, acc);
    }
    static_assert(tile_size == 8, "three steps share out a tile");
    if (shift > 0) share_sums<4>(lane, lanes >> 1, acc);
    if (shift > 1) share_sums<2>(lane, lanes >> 2, acc);
    if (shift > 2) share_sums<1>(lane, lanes >> 3, acc);
    if (at >= tiles) continue;
    const int end = (lane + 1) * (tile_size >> shift);
    for (int i = lane * (tile_size >> shift); i < end; ++i) {
      const int row = tile_m + i / tile_columns * tiles_m, column = tile_n + i % tile_columns * tiles_n;
      if (row < M && column < N) sink(row, column, acc[0]);
#pragma unroll
      for (int j = 1; j < tile_size; ++j) acc[j - 1] = acc[j];
    }
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
