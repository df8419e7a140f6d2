// SIMD vectors of coordinates for this translation unit's instruction set, and their loads and stores from and to
// memory of any parameter dtype.
#pragma once
#include <stdint.h>

#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "dtypes.h"
#include "half_precision.h"

namespace metakern {
inline namespace MK_CAPABILITY {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

typedef float FloatVec __attribute__((vector_size(vector_bytes)));
typedef double DoubleVec __attribute__((vector_size(vector_bytes)));
typedef int32_t Int32Vec __attribute__((vector_size(vector_bytes)));
typedef int64_t Int64Vec __attribute__((vector_size(vector_bytes)));

template <>
struct lane_of<FloatVec> {
  using type = float;
};
template <>
struct lane_of<DoubleVec> {
  using type = double;
};
template <>
struct int_of<FloatVec> {
  using type = Int32Vec;
};
template <>
struct int_of<DoubleVec> {
  using type = Int64Vec;
};

template <class S>
struct vec_of;
template <>
struct vec_of<float> {
  using type = FloatVec;
};
template <>
struct vec_of<double> {
  using type = DoubleVec;
};
template <class S>
using vec_t = typename vec_of<S>::type;

// The processor's minimum and maximum return their second operand if either is NaN, so a NaN x is returned, as
// required. The compiler does not generate them, as it may not assume which NaN is wanted.
#if defined(__AVX512F__)
template <>
MK_INLINE FloatVec at_most<FloatVec>(FloatVec x, float bound) {
  return FloatVec(_mm512_min_ps(_mm512_set1_ps(bound), __m512(x)));
}
template <>
MK_INLINE FloatVec at_least<FloatVec>(FloatVec x, float bound) {
  return FloatVec(_mm512_max_ps(_mm512_set1_ps(bound), __m512(x)));
}
#elif defined(__AVX2__)
template <>
MK_INLINE FloatVec at_most<FloatVec>(FloatVec x, float bound) {
  return FloatVec(_mm256_min_ps(_mm256_set1_ps(bound), __m256(x)));
}
template <>
MK_INLINE FloatVec at_least<FloatVec>(FloatVec x, float bound) {
  return FloatVec(_mm256_max_ps(_mm256_set1_ps(bound), __m256(x)));
}
#endif

// The compiler keeps the portable form's lanes apart, as a root of a negative number must set errno.
#if defined(__AVX512F__)
template <>
MK_INLINE FloatVec square_root<FloatVec>(FloatVec x) {
  return FloatVec(_mm512_sqrt_ps(__m512(x)));
}
template <>
MK_INLINE DoubleVec square_root<DoubleVec>(DoubleVec x) {
  return DoubleVec(_mm512_sqrt_pd(__m512d(x)));
}
#elif defined(__AVX2__)
template <>
MK_INLINE FloatVec square_root<FloatVec>(FloatVec x) {
  return FloatVec(_mm256_sqrt_ps(__m256(x)));
}
template <>
MK_INLINE DoubleVec square_root<DoubleVec>(DoubleVec x) {
  return DoubleVec(_mm256_sqrt_pd(__m256d(x)));
}
#elif defined(__SSE2__)
template <>
MK_INLINE FloatVec square_root<FloatVec>(FloatVec x) {
  return FloatVec(_mm_sqrt_ps(__m128(x)));
}
template <>
MK_INLINE DoubleVec square_root<DoubleVec>(DoubleVec x) {
  return DoubleVec(_mm_sqrt_pd(__m128d(x)));
}
#endif

template <class V>
constexpr int lanes = int(sizeof(V) / sizeof(lane_t<V>));

template <class V>
MK_INLINE V load(const lane_t<V>* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
MK_INLINE void store(lane_t<V>* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Sum of the lanes, in a fixed order: first over the quarters (16 bytes each), then within one.
template <class V>
MK_INLINE lane_t<V> sum_lanes(V v) {
  using S = lane_t<V>;
  typedef S Quarter __attribute__((vector_size(16)));
  constexpr int width = 16 / sizeof(S), count = vector_bytes / 16;
  Quarter parts[count];
  __builtin_memcpy(parts, &v, sizeof(V));
  Quarter sum = parts[0];
#pragma GCC unroll 4
  for (int i = 1; i < count; ++i) sum += parts[i];
  S total = sum[0];
#pragma GCC unroll 4
  for (int i = 1; i < width; ++i) total += sum[i];
  return total;
}

// Pairwise sums of neighbouring lanes: of `a` in the lower half, of `b` in the upper.
template <class V, int... I>
MK_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// out[i] = sum of the lanes of v[i], for as many vectors as there are lanes: a pairwise tree, in a fixed order.
template <class V>
MK_INLINE V sum_lanes_of_each(const V* v) {
  V sums[lanes<V>];
  for (int i = 0; i < lanes<V>; ++i) sums[i] = v[i];
#pragma GCC unroll 4
  for (int count = lanes<V> / 2; count > 0; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      sums[i] = add_neighbours(sums[2 * i], sums[2 * i + 1], std::make_integer_sequence<int, lanes<V>>());
  return sums[0];
}

// Loads `count` elements from index `first` of a parameter-like array into `out[tile_lanes]`, padded with zeros.
template <class S>
inline void read_lanes(const void* data, DType dtype, int64_t first, int count, S* out) {
  switch (dtype) {
    case DType::float64:
      for (int i = 0; i < count; ++i) out[i] = S(static_cast<const double*>(data)[first + i]);
      break;
    case DType::float32:
      for (int i = 0; i < count; ++i) out[i] = S(static_cast<const float*>(data)[first + i]);
      break;
    case DType::bfloat16:
      for (int i = 0; i < count; ++i) out[i] = S(from_bfloat16(static_cast<const uint16_t*>(data)[first + i]));
      break;
    case DType::float16:
      for (int i = 0; i < count; ++i) out[i] = S(from_float16(static_cast<const uint16_t*>(data)[first + i]));
      break;
  }
  for (int i = count; i < tile_lanes; ++i) out[i] = S(0);
}

template <class S>
inline void write_lanes(void* data, DType dtype, int64_t first, int count, const S* in) {
  switch (dtype) {
    case DType::float64:
      for (int i = 0; i < count; ++i) static_cast<double*>(data)[first + i] = double(in[i]);
      break;
    case DType::float32:
      for (int i = 0; i < count; ++i) static_cast<float*>(data)[first + i] = float(in[i]);
      break;
    case DType::bfloat16:
      for (int i = 0; i < count; ++i) static_cast<uint16_t*>(data)[first + i] = to_bfloat16(float(in[i]));
      break;
    case DType::float16:
      for (int i = 0; i < count; ++i) static_cast<uint16_t*>(data)[first + i] = to_float16(float(in[i]));
      break;
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
