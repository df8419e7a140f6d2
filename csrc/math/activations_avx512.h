// The activations of float vectors with AVX-512's instructions for powers of two: these need no clamping, unlike
// exponents built by integer arithmetic, and handle infinities and NaN correctly.
#pragma once
#include "../core/vec.h"
#include "activations.h"

#if defined(__AVX512F__)
namespace metakern {
inline namespace MK_CAPABILITY {

// 2^y = 2^whole * 2^rest with |rest| <= 1/2; an infinite y leaves rest 0.
struct PowerOfTwo {
  __m512 whole, rest;

  MK_INLINE explicit PowerOfTwo(__m512 y)
      : whole(_mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT)),
        rest(_mm512_reduce_ps(y, _MM_FROUND_TO_NEAREST_INT)) {}

  MK_INLINE __m512 scale(__m512 x) const { return _mm512_scalef_ps(x, whole); }
};

MK_INLINE __m512 horner(__m512, __m512 p) { return p; }
template <class... Rest>
MK_INLINE __m512 horner(__m512 x, __m512 p, float next, Rest... rest) {
  return horner(x, _mm512_fmadd_ps(p, x, _mm512_set1_ps(next)), rest...);
}

constexpr float log2_e = 1.4426950408889634f;

// 1 + e^-x; 2^rest by a minimax fit, relative error below 9.2e-8. May be infinite.
template <>
MK_INLINE FloatVec sigmoid_denominator<FloatVec>(FloatVec x) {
  const PowerOfTwo power(__m512(x) * _mm512_set1_ps(-log2_e));
  const __m512 p = horner(power.rest, _mm512_set1_ps(1.3264727e-3f), 9.6715127e-3f, 5.5507337e-2f, 2.4022242e-1f,
                          6.9314698e-1f, 1.0f);
  return FloatVec(power.scale(p) + _mm512_set1_ps(1));
}

// e^2x - 1 without cancellation: (2^rest - 1) / rest by a fit of the same kind, relative error 1.1e-8.
template <>
MK_INLINE FloatVec tanh_numerator<FloatVec>(FloatVec x) {
  const FloatVec bounded = at_most(x, constants<float>::tanh_bound / 2);
  const PowerOfTwo power(__m512(bounded) * _mm512_set1_ps(2 * log2_e));
  const __m512 p = horner(power.rest, _mm512_set1_ps(1.5403512e-4f), 1.3390735e-3f, 9.6182375e-3f, 5.5503574e-2f,
                          2.4022650e-1f, 6.9314719e-1f);
  const __m512 scale = power.scale(_mm512_set1_ps(1));
  return FloatVec(_mm512_fmadd_ps(scale, p * power.rest, scale - _mm512_set1_ps(1)));
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
#endif
