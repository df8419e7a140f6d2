// Transposition of matrices between memory with rows side by side and packed memory with one vector per column.
#pragma once
#include <stdint.h>

#include <utility>

#include "../core/portable.h"
#include "../core/vec.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// One step of the transposition, for two rows that are `step` apart: of every 2 * step lanes, the upper half of the
// first row changes places with the lower half of the second.
template <int step, class V, int... I>
MK_INLINE void exchange_lanes(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int n = lanes<V>;
  const V low = __builtin_shufflevector(a, b, ((I & step) ? n + I - step : I)...);
  const V high = __builtin_shufflevector(a, b, ((I & step) ? n + I : I + step)...);
  a = low;
  b = high;
}

template <int step, class V>
MK_INLINE void transpose_steps(V* rows) {
  constexpr int n = lanes<V>;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    if ((i & step) == 0) exchange_lanes<step>(rows[i], rows[i + step], std::make_integer_sequence<int, n>());
  if constexpr (step > 1) transpose_steps<step / 2>(rows);
}

// rows[i][j] becomes rows[j][i], of as many vectors as there are lanes.
template <class V>
MK_INLINE void transpose_lanes(V* rows) {
  transpose_steps<lanes<V> / 2>(rows);
}

// The first `count` lanes, at most all of them, from and to memory; others are loaded as zeros and not stored.
template <class V>
MK_INLINE V load_first(const lane_t<V>* p, int64_t count) {
  if (count >= lanes<V>) return load<V>(p);
  V v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
template <class V>
MK_INLINE void store_first(lane_t<V>* p, V v, int64_t count) {
  if (count >= lanes<V>) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
#if defined(__AVX512F__)
MK_INLINE uint32_t first_lanes(int64_t count) { return count >= 16 ? 0xffffu : (1u << count) - 1; }
template <>
MK_INLINE FloatVec load_first<FloatVec>(const float* p, int64_t count) {
  return FloatVec(_mm512_maskz_loadu_ps(__mmask16(first_lanes(count)), p));
}
template <>
MK_INLINE void store_first<FloatVec>(float* p, FloatVec v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16(first_lanes(count)), __m512(v));
}
template <>
MK_INLINE DoubleVec load_first<DoubleVec>(const double* p, int64_t count) {
  return DoubleVec(_mm512_maskz_loadu_pd(__mmask8(first_lanes(count)), p));
}
template <>
MK_INLINE void store_first<DoubleVec>(double* p, DoubleVec v, int64_t count) {
  _mm512_mask_storeu_pd(p, __mmask8(first_lanes(count)), __m512d(v));
}
#elif defined(__AVX2__)
MK_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count < 8 ? count : 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
MK_INLINE FloatVec load_first<FloatVec>(const float* p, int64_t count) {
  return FloatVec(_mm256_maskload_ps(p, first_lanes(count)));
}
template <>
MK_INLINE void store_first<FloatVec>(float* p, FloatVec v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), __m256(v));
}
#endif

// packed[column * pitch + row] = in[row * row_pitch + column], for `rows` of at most one vector; zeros up to the
// vector.
template <class S>
MK_INLINE void pack_columns(const S* in, int64_t row_pitch, int64_t rows, int64_t columns, S* packed, int64_t pitch) {
  using V = vec_t<S>;
  constexpr int n = lanes<V>;
  V tile[n];
  for (int64_t column = 0; column < columns; column += n) {
    const int64_t count = columns - column < n ? columns - column : n;
    if (rows == n && count == n) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) tile[i] = load<V>(in + i * row_pitch + column);
    } else {
      for (int i = 0; i < n; ++i) tile[i] = i < rows ? load_first<V>(in + i * row_pitch + column, count) : V{};
    }
    transpose_lanes(tile);
    if (count == n) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(packed + (column + i) * pitch, tile[i]);
    } else {
      for (int i = 0; i < count; ++i) store(packed + (column + i) * pitch, tile[i]);
    }
  }
}

// The inverse, with `added` on every column: out[row * row_pitch + column] = packed[column * pitch + row] + added[row].
template <class S>
MK_INLINE void unpack_columns(const S* packed, int64_t pitch, vec_t<S> added, int64_t rows, int64_t columns, S* out,
                              int64_t row_pitch) {
  using V = vec_t<S>;
  constexpr int n = lanes<V>;
  V tile[n];
  for (int64_t column = 0; column < columns; column += n) {
    const int64_t count = columns - column < n ? columns - column : n;
    if (count == n) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) tile[i] = load<V>(packed + (column + i) * pitch) + added;
    } else {
      for (int i = 0; i < n; ++i) tile[i] = i < count ? load<V>(packed + (column + i) * pitch) + added : V{};
    }
    transpose_lanes(tile);
    if (rows == n && count == n) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(out + i * row_pitch + column, tile[i]);
    } else {
      for (int i = 0; i < n; ++i)
        if (i < rows) store_first(out + i * row_pitch + column, tile[i], count);
    }
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
