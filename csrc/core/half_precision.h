// Conversion of bfloat16 and float16 on their bits, rounding to nearest even: GCC has _Float16 only from 12 on x86 and
// from 13 elsewhere, and so the device needs no header of its own.
#pragma once
#include "portable.h"

namespace metakern {
inline namespace MK_CAPABILITY {

MK_INLINE float from_bfloat16(uint16_t bits) { return bit_copy<float>(uint32_t(bits) << 16); }
MK_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x);
  if (x != x) return uint16_t((bits >> 16) | 0x40);  // keep NaN a NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

MK_INLINE float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = uint32_t(half & 0x7fff) << 13;
  const uint32_t exponent = rest & 0x0f800000;
  uint32_t bits = rest + 0x38000000;  // from the bias of 15 to that of 127
  if (exponent == 0x0f800000) {       // infinity and NaN
    bits += 0x38000000;
  } else if (exponent == 0) {  // zero and denormal numbers: let a subtraction normalise them
    bits = bit_copy<uint32_t>(bit_copy<float>(bits + 0x00800000) - bit_copy<float>(uint32_t(0x38800000)));
  }
  return bit_copy<float>(bits | sign);
}
MK_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x), size = bits & 0x7fffffff;
  uint32_t half;
  if (size >= 0x47800000) {  // 65536 and more, infinity, NaN
    half = size > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (size < 0x38800000) {  // below 2^-14: adding 0.5 rounds at the place of the last denormal bit
    half = bit_copy<uint32_t>(bit_copy<float>(size) + 0.5f) - 0x3f000000;
  } else {
    half = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  }
  return uint16_t(half | ((bits >> 16) & 0x8000));
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
