// Weight gradients: sums over coordinates of products of two arrays' rows, in a fixed order.
#pragma once
#include "../core/vec.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// A [tiles, rows, Lanes] array with its stride between tiles.
template <class S>
struct Rows {
  const S* data;
  int64_t tile_stride;
};

// out[a][b] += sum over all lanes of A[a] * B[b], for RA x RB rows at once.
template <class V, int RA, int RB, int Lanes>
MK_INLINE void outer_product(Rows<lane_t<V>> A, Rows<lane_t<V>> B, int tiles, double* out, int64_t out_stride) {
  V acc[RA][RB];
  for (int a = 0; a < RA; ++a)
    for (int b = 0; b < RB; ++b) acc[a][b] = broadcast<V>(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const lane_t<V>* pa = A.data + tile * A.tile_stride;
    const lane_t<V>* pb = B.data + tile * B.tile_stride;
    for (int lane = 0; lane < Lanes; lane += lanes<V>) {
      V xb[RB];
#pragma GCC unroll 4
      for (int b = 0; b < RB; ++b) xb[b] = load<V>(pb + b * Lanes + lane);
#pragma GCC unroll 4
      for (int a = 0; a < RA; ++a) {
        const V xa = load<V>(pa + a * Lanes + lane);
#pragma GCC unroll 4
        for (int b = 0; b < RB; ++b) acc[a][b] += xa * xb[b];
      }
    }
  }
  constexpr int count = RA * RB, padded = (count + lanes<V> - 1) / lanes<V> * lanes<V>;
  if constexpr (count == padded || vector_bytes == 32) {
    V all[padded];
    for (int i = 0; i < padded; ++i) all[i] = i < count ? acc[i / RB][i % RB] : broadcast<V>(0);
    lane_t<V> sums[padded];
    for (int i = 0; i < padded; i += lanes<V>) store(sums + i, sum_lanes_of_each<V>(all + i));
    for (int a = 0; a < RA; ++a)
      for (int b = 0; b < RB; ++b) out[a * out_stride + b] += double(sums[a * RB + b]);
  } else {
    for (int a = 0; a < RA; ++a)
      for (int b = 0; b < RB; ++b) out[a * out_stride + b] += double(sum_lanes(acc[a][b]));
  }
}

template <class V, int RA, int Lanes>
MK_INLINE void outer_product_row(Rows<lane_t<V>> A, Rows<lane_t<V>> B, int b_rows, int tiles, double* out) {
  constexpr int RB = vector_bytes == 64 ? 4 : vector_bytes == 32 ? 3 : 2;
  // Bounds that a compiler sees through, for numbers of rows that it knows.
  const int blocks = b_rows / RB * RB, pairs = vector_bytes == 32 ? blocks + (b_rows - blocks) / 2 * 2 : blocks;
  for (int b = 0; b < blocks; b += RB)
    outer_product<V, RA, RB, Lanes>(A, {B.data + b * Lanes, B.tile_stride}, tiles, out + b, b_rows);
  for (int b = blocks; b < pairs; b += 2)
    outer_product<V, RA, 2, Lanes>(A, {B.data + b * Lanes, B.tile_stride}, tiles, out + b, b_rows);
  for (int b = pairs; b < b_rows; ++b)
    outer_product<V, RA, 1, Lanes>(A, {B.data + b * Lanes, B.tile_stride}, tiles, out + b, b_rows);
}

template <class V, int Lanes = tile_lanes>
void outer_products(Rows<lane_t<V>> A, int a_rows, Rows<lane_t<V>> B, int b_rows, int tiles, double* out) {
  const int blocks = a_rows / 4 * 4;
  for (int a = 0; a < blocks; a += 4)
    outer_product_row<V, 4, Lanes>({A.data + a * Lanes, A.tile_stride}, B, b_rows, tiles, out + int64_t(a) * b_rows);
  for (int a = blocks; a < a_rows; ++a)
    outer_product_row<V, 1, Lanes>({A.data + a * Lanes, A.tile_stride}, B, b_rows, tiles, out + int64_t(a) * b_rows);
}

template <class V, int Lanes = tile_lanes>
void row_sums(Rows<lane_t<V>> A, int a_rows, int tiles, double* out) {
  for (int a = 0; a < a_rows; ++a) {
    V acc = broadcast<V>(0);
    for (int tile = 0; tile < tiles; ++tile)
      for (int lane = 0; lane < Lanes; lane += lanes<V>)
        acc += load<V>(A.data + tile * A.tile_stride + a * Lanes + lane);
    out[a] += double(sum_lanes(acc));
  }
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
