// Basics for arithmetic headers that compile both for one coordinate (float, double; host or device) and for a SIMD
// vector of coordinates (GCC/Clang vector extensions).
//
// Everything lives in an inline namespace named after the instruction set that it is compiled for: the same
// header is compiled several times into one library, and the linker must never merge those copies.
#pragma once
#include <stdint.h>

#ifndef MK_CAPABILITY
#define MK_CAPABILITY baseline
#endif

#if defined(__CUDACC__)
#define MK_INLINE __host__ __device__ __forceinline__
#else
#define MK_INLINE inline __attribute__((always_inline))
#endif

namespace metakern {
inline namespace MK_CAPABILITY {

// Element type of a value: V itself for scalars, the lane type for vectors (specialised beside the vector types).
template <class V>
struct lane_of {
  using type = V;
};
template <class V>
using lane_t = typename lane_of<V>::type;

template <class V>
MK_INLINE V broadcast(lane_t<V> x) {
  return V{} + x;
}
template <>
MK_INLINE float broadcast<float>(float x) {
  return x;
}
template <>
MK_INLINE double broadcast<double>(double x) {
  return x;
}

template <class To, class From>
MK_INLINE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_copy needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Both return x if it is NaN, as the comparison is false.
template <class V>
MK_INLINE V at_most(V x, lane_t<V> bound) {
  const V b = broadcast<V>(bound);
  return b < x ? b : x;
}
template <class V>
MK_INLINE V at_least(V x, lane_t<V> bound) {
  const V b = broadcast<V>(bound);
  return b > x ? b : x;
}

MK_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}
MK_INLINE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}
template <class V>
MK_INLINE V square_root(V x) {
  for (int i = 0; i < int(sizeof(V) / sizeof(lane_t<V>)); ++i) x[i] = square_root(lane_t<V>(x[i]));
  return x;
}

// Per-lane-type constants; `int_of<V>` is the integer type with V's shape.
template <class S>
struct constants;
template <>
struct constants<float> {
  using bits = int32_t;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  static constexpr int mantissa_bits = 23;
  static constexpr bits exponent_bias = 127;
  static constexpr float exp_bound = 87.0f;
  static constexpr float tanh_bound = 30.0f;  // tanh(15) is 1
  static constexpr float asinh_bound = 1e9f;  // 1 + x^2 is x^2 long before
  static constexpr float smallest_normal = 1.17549435e-38f;
  static constexpr float denormal_scale = 33554432.0f;  // 2^25
  static constexpr float denormal_shift = 25.0f;
};
template <>
struct constants<double> {
  using bits = int64_t;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa_bits = 52;
  static constexpr bits exponent_bias = 1023;
  static constexpr double exp_bound = 708.0;
  static constexpr double tanh_bound = 80.0;  // tanh(40) is 1
  static constexpr double asinh_bound = 1e150;
  static constexpr double smallest_normal = 2.2250738585072014e-308;
  static constexpr double denormal_scale = 18014398509481984.0;  // 2^54
  static constexpr double denormal_shift = 54.0;
};

template <class V>
struct int_of {
  using type = typename constants<V>::bits;
};
template <class V>
using int_t = typename int_of<V>::type;

}  // namespace MK_CAPABILITY
}  // namespace metakern
