// The activations of float vectors with AVX2 and FMA: fewer instructions than the portable ones, of the same accuracy.
#pragma once
#include "../core/vec.h"
#include "activations.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
namespace metakern {
inline namespace MK_CAPABILITY {

// 2^y = 2^whole * 2^rest with |rest| <= 1/2, for y = factor * x, |y| < 126.
struct PowerOfTwo {
  __m256 shifted, rest;

  MK_INLINE PowerOfTwo(__m256 x, float factor) {
    const __m256 k = _mm256_set1_ps(factor), magic = _mm256_set1_ps(constants<float>::round_magic);
    shifted = _mm256_fmadd_ps(x, k, magic);
    rest = _mm256_fmsub_ps(x, k, _mm256_sub_ps(shifted, magic));
  }

  // p * 2^whole, by adding to p's exponent: the bits of `shifted` end in those of `whole`.
  MK_INLINE __m256 scale(__m256i p) const {
    return _mm256_castsi256_ps(_mm256_add_epi32(p, _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
  }
};

MK_INLINE __m256 horner(__m256, __m256 p) { return p; }
template <class... Rest>
MK_INLINE __m256 horner(__m256 x, __m256 p, float next, Rest... rest) {
  return horner(x, _mm256_fmadd_ps(p, x, _mm256_set1_ps(next)), rest...);
}

constexpr float log2_e = 1.4426950408889634f;

// 1 + e^-x; 2^rest by a minimax fit, relative error below 9.2e-8.
template <>
MK_INLINE FloatVec sigmoid_denominator<FloatVec>(FloatVec x) {
  constexpr float bound = constants<float>::exp_bound;
  const PowerOfTwo power(__m256(at_least(at_most(x, bound), -bound)), -log2_e);
  const __m256 p = horner(power.rest, _mm256_set1_ps(1.3264727e-3f), 9.6715127e-3f, 5.5507337e-2f, 2.4022242e-1f,
                          6.9314698e-1f, 1.0f);
  return FloatVec(_mm256_add_ps(power.scale(_mm256_castps_si256(p)), _mm256_set1_ps(1)));
}

// e^2x - 1 without cancellation: (2^rest - 1) / rest by a fit of the same kind, relative error 1.1e-8.
template <>
MK_INLINE FloatVec tanh_numerator<FloatVec>(FloatVec x) {
  constexpr float bound = constants<float>::tanh_bound / 2;
  const PowerOfTwo power(__m256(at_least(at_most(x, bound), -bound)), 2 * log2_e);
  const __m256 p = horner(power.rest, _mm256_set1_ps(1.5403512e-4f), 1.3390735e-3f, 9.6182375e-3f, 5.5503574e-2f,
                          2.4022650e-1f, 6.9314719e-1f);
  const __m256 scale = power.scale(_mm256_castps_si256(_mm256_set1_ps(1)));
  return FloatVec(_mm256_fmadd_ps(scale, _mm256_mul_ps(p, power.rest), _mm256_sub_ps(scale, _mm256_set1_ps(1))));
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
#endif
