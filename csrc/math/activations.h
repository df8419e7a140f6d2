// Exponential, logarithm, sigmoid and tanh of one value or one SIMD vector of values.
//
// No libm call and no fast-math: the same source serves the scalar device code and the vector loops, NaN propagates,
// and the error is a few units in the last place (tested).
#pragma once
#include "../core/portable.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// (e^r - 1 - r) / r^2 for |r| <= ln(2)/2. Float: weighted least-squares fit at Chebyshev nodes, relative error of e^r
// below 4e-9. Double: the Taylor series up to r^13, truncation below 1e-17.
template <class V>
MK_INLINE V expm1_tail(V r, float) {
  V p = broadcast<V>(1.3814466e-3f);
  p = p * r + 8.3687805e-3f;
  p = p * r + 4.1668394e-2f;
  p = p * r + 1.6666520e-1f;
  return p * r + 4.9999993e-1f;
}
template <class V>
MK_INLINE V expm1_tail(V r, double) {
  V p = broadcast<V>(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  return p * r + 0.5;
}

// e^x = scale * (1 + tail) with scale a power of two and |tail| < 0.42.
template <class V>
struct ExpParts {
  V scale;
  V tail;

  MK_INLINE V plus_one() const { return scale * tail + (scale + lane_t<V>(1)); }   // e^x + 1
  MK_INLINE V minus_one() const { return scale * tail + (scale - lane_t<V>(1)); }  // e^x - 1, without cancellation
};

// e^y for y = factor * x clamped to +-bound; bound is at most exp_bound, so that scale is a normal number.
template <class V>
MK_INLINE ExpParts<V> exp_parts(V x, lane_t<V> factor, lane_t<V> bound) {
  using S = lane_t<V>;
  using C = constants<S>;
  const S x_bound = bound / (factor < 0 ? -factor : factor);
  x = at_least(at_most(x, x_bound), -x_bound);
  const V shifted = x * (factor * S(1.4426950408889634)) + C::round_magic;
  const V n = shifted - C::round_magic;
  const V r = x * factor - n * S(0.6931471805599453);
  // The bits of `shifted` are those of the constant plus n.
  const int_t<V> exponent = bit_copy<int_t<V>>(shifted) - (bit_copy<int_t<S>>(C::round_magic) - C::exponent_bias);
  return {bit_copy<V>(exponent << C::mantissa_bits), r + (r * r) * expm1_tail(r, S{})};
}

// 1 + e^-x
template <class V>
MK_INLINE V sigmoid_denominator(V x) {
  return exp_parts(x, -1, constants<lane_t<V>>::exp_bound).plus_one();
}

// e^2x - 1, bounded far beyond where tanh is 1, so that products with it do not overflow.
template <class V>
MK_INLINE V tanh_numerator(V x) {
  return exp_parts(x, 2, constants<lane_t<V>>::tanh_bound).minus_one();
}

template <class V>
MK_INLINE V sigmoid(V x) {
  return broadcast<V>(1) / sigmoid_denominator(x);
}

// (e^2x - 1) / (e^2x + 1); small x keep their relative accuracy.
template <class V>
MK_INLINE V tanh(V x) {
  const V numerator = tanh_numerator(x);
  return numerator / (numerator + lane_t<V>(2));
}

// sigmoid(x) * tanh(y) with one division. Below 1e-25 (double: 1e-270) the denominator may overflow: the result is 0.
template <class V>
MK_INLINE V sigmoid_tanh(V x, V y) {
  const V numerator = tanh_numerator(y);
  return numerator / (sigmoid_denominator(x) * (numerator + lane_t<V>(2)));
}

// x above 0, e^x - 1 below; and its derivative.
template <class V>
MK_INLINE V elu(V x) {
  return x > broadcast<V>(0) ? x : tanh_numerator(x * lane_t<V>(0.5));
}
template <class V>
MK_INLINE V elu_slope(V x) {
  return x > broadcast<V>(0) ? broadcast<V>(1) : tanh_numerator(x * lane_t<V>(0.5)) + lane_t<V>(1);
}

// 2 * atanh(s) / s as a polynomial in z = s^2, for |s| <= 0.172.
template <class V>
MK_INLINE V log_series(V z, float) {
  V p = broadcast<V>(2.0f / 9);
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  return p * z + 2.0f;
}
template <class V>
MK_INLINE V log_series(V z, double) {
  V p = broadcast<V>(2.0 / 21);
  p = p * z + 2.0 / 19;
  p = p * z + 2.0 / 17;
  p = p * z + 2.0 / 15;
  p = p * z + 2.0 / 13;
  p = p * z + 2.0 / 11;
  p = p * z + 2.0 / 9;
  p = p * z + 2.0 / 7;
  p = p * z + 2.0 / 5;
  p = p * z + 2.0 / 3;
  return p * z + 2.0;
}

// x = 2^exponent * mantissa for a positive finite x, denormal numbers included; the mantissa lies in
// [sqrt(1/2), sqrt(2)).
template <class V>
struct LogParts {
  V exponent, mantissa;
};
template <class V>
MK_INLINE LogParts<V> log_parts(V x) {
  using S = lane_t<V>;
  using C = constants<S>;
  using I = int_t<V>;
  const auto denormal = x < broadcast<V>(C::smallest_normal);
  const V normal = denormal ? x * C::denormal_scale : x;
  const V shift = denormal ? broadcast<V>(C::denormal_shift) : broadcast<V>(0);
  // Take sqrt(1/2) off the exponent field, so that the mantissa that is left lies in [sqrt(1/2), sqrt(2)).
  const S root_half = S(0.7071067811865476);
  const I root_half_bits = bit_copy<I>(broadcast<V>(root_half));
  const I offset = bit_copy<I>(normal) - root_half_bits;
  const I exponent = offset >> C::mantissa_bits;
  const V m = bit_copy<V>((offset & ((int_t<S>(1) << C::mantissa_bits) - 1)) + root_half_bits);
  // int -> float through the magic constant: exact, and the same few instructions for every lane type
  return {bit_copy<V>(exponent + bit_copy<I>(broadcast<V>(C::round_magic))) - C::round_magic - shift, m};
}

// Natural logarithm of a positive finite x, denormal numbers included.
template <class V>
MK_INLINE V log(V x) {
  using S = lane_t<V>;
  const LogParts<V> p = log_parts(x);
  const V s = (p.mantissa - S(1)) / (p.mantissa + S(1));
  return p.exponent * S(0.6931471805599453) + s * log_series(s * s, S{});
}

// log(1 + x) for a finite x >= 0; small x keep their relative accuracy.
template <class V>
MK_INLINE V log_one_plus(V x) {
  using S = lane_t<V>;
  const V sum = x + S(1);
  const LogParts<V> p = log_parts(sum);
  // The rounding error of the sum counts only where the mantissa is the sum itself.
  const V error = sum < broadcast<V>(S(1.4142135623730951)) ? x - (sum - S(1)) : broadcast<V>(0);
  const V s = (p.mantissa - S(1) + error) / (p.mantissa + S(1) + error);
  return p.exponent * S(0.6931471805599453) + s * log_series(s * s, S{});
}

// Inverse hyperbolic sine of a finite x, as an odd function: log(x + sqrt(1 + x^2)) itself cancels for large negative
// x.
template <class V>
MK_INLINE V asinh(V x) {
  using S = lane_t<V>;
  const V zero = broadcast<V>(0), size = x < zero ? -x : x;
  const V t = at_most(size, constants<S>::asinh_bound);  // its square is finite
  const V y = log_one_plus(size + size * (t / (S(1) + square_root(S(1) + t * t))));
  return x < zero ? -y : y;
}

// e^x, with x clamped to +-exp_bound.
template <class V>
MK_INLINE V exponential(V x) {
  const auto e = exp_parts(x, lane_t<V>(1), constants<lane_t<V>>::exp_bound);
  return e.scale * e.tail + e.scale;
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
