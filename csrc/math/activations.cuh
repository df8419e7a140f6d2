// Sigmoid and tanh in float by the device's own exponential and reciprocal; specialisations of activations.h.
//
// exp2_approx is off by at most 2^-22 of its result and reciprocal_approx by 2^-23, so sigmoid and tanh are within
// 3e-7 of 1, and tanh within 7e-7 of its own value too: below 0.35, where e^2x - 1 would cancel, it is a polynomial.
// double keeps the portable functions.
#pragma once
#include "../core/intrinsics.cuh"
#include "lstm_cell.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// 1 + e^-x. Infinite below -88: its reciprocal is 0.
template <>
MK_INLINE float sigmoid_denominator<float>(float x) {
  return 1.0f + exp2_approx(x * -1.44269504f);
}

struct Fraction {
  float numerator, denominator;
};

// tanh(x). The numerator stays finite, to avoid 0 times infinity.
MK_INLINE Fraction tanh_fraction(float x) {
  const float z = x * x;
  float p = -4.91484964e-2f;  // tanh(x) / x as 1 + z p(z), weighted least squares, relative error 4.1e-8 up to 0.35
  p = p * z + 1.32998253e-1f;
  p = p * z - 3.33326632e-1f;
  const float e = exp2_approx(min_or_nan(x, 15.0f) * 2.88539008f);  // tanh(15) is 1
  const bool small = z < 0.1225f;
  return {small ? x + x * z * p : e - 1.0f, small ? 1.0f : e + 1.0f};
}

template <>
MK_INLINE float sigmoid<float>(float x) {
  return reciprocal_approx(sigmoid_denominator(x));
}

template <>
MK_INLINE float tanh<float>(float x) {
  const Fraction t = tanh_fraction(x);
  return t.numerator * reciprocal_approx(t.denominator);
}

// sigmoid(x) * tanh(y) with one reciprocal. Where the denominators' product overflows, below 1e-37, it is 0.
template <>
MK_INLINE float sigmoid_tanh<float>(float x, float y) {
  const Fraction t = tanh_fraction(y);
  return t.numerator * reciprocal_approx(sigmoid_denominator(x) * t.denominator);
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
