// x^-1/2 of a vector of positive numbers by the processor's estimate and one step of Newton's method, for float with
// AVX2 and AVX-512; else by a root and a division. Relative error below 3e-7; NaN propagates; infinity counts as the
// largest number.
#pragma once
#include "../core/vec.h"

namespace metakern {
inline namespace MK_CAPABILITY {

template <class V>
MK_INLINE V estimated_inverse_root(V x) {
  return lane_t<V>(1) / square_root(x);
}

#if defined(__AVX2__)
template <>
MK_INLINE FloatVec estimated_inverse_root<FloatVec>(FloatVec x) {
  x = at_most(x, 3.4028235e38f);
#if defined(__AVX512F__)
  const FloatVec y = FloatVec(_mm512_rsqrt14_ps(__m512(x)));
#else
  const FloatVec y = FloatVec(_mm256_rsqrt_ps(__m256(x)));
#endif
  return y + y * 0.5f * (1.0f - x * y * y);
}
#endif

}  // namespace MK_CAPABILITY
}  // namespace metakern
