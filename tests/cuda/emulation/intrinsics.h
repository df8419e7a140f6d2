// What csrc/core/intrinsics.cuh wraps, on the CPU. Approximations are as bad as the real ones may be: each result is
// moved to the edge of its documented error, up or down by a bit of the argument.
#pragma once
#include <cmath>
#include <cstring>

#include "cuda_runtime.h"

namespace metakern {
inline namespace MK_CAPABILITY {

inline char* dynamic_shared() { return emulation::shared_memory(); }

inline float at_the_edge(double exact, float argument, double error) {
  const bool up = bit_copy<uint32_t>(argument) & 1;
  return float(exact * (up ? 1 + error : 1 - error));
}
inline float exp2_approx(float x) {
  const double y = std::exp2(double(x));
  return y < 0x1p-126 ? 0.0f : at_the_edge(y, x, 0x1p-22 - 0x1p-24);  // the conversion adds the rest
}
inline float reciprocal_approx(float x) {
  const double y = 1 / double(x);
  return std::fabs(y) < 0x1p-126 ? std::copysign(0.0f, x) : at_the_edge(y, x, 0x1p-24);
}
inline float min_or_nan(float x, float y) { return x != x || y != y ? x + y : y < x ? y : x; }

inline void copy_async_16(void* shared, const void* global) { emulation::copy_16(shared, global); }
inline void copy_async_commit() { emulation::commit_copies(); }
template <int Pending>
inline void copy_async_wait() {
  emulation::wait_for_copies(Pending);
}

inline void prefetch_l2(const void* p) { static_cast<void>(*static_cast<const volatile char*>(p)); }  // faults if wild

template <class Words>
inline void store_global(void* p, const Words& x) {
  emulation::require_alignment(p, sizeof(x));
  std::memcpy(p, &x, sizeof(x));
}

template <class S>
inline S from_lane_xor(S x, int mask) {
  unsigned char value[64] = {};
  std::memcpy(value, &x, sizeof(x));
  emulation::warp_barrier(MK_SITE, value);
  S y;
  std::memcpy(&y, emulation::lane_value(emulation::lane() ^ mask), sizeof(y));
  return y;
}

// Neither may be fused on a processor that could: a volatile product is rounded.
template <class S>
inline S rounded_product(S x, S y) {
  volatile S product = x * y;
  return product;
}

inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x);
  if (x != x) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t pack_bfloat16(float x, float y) { return bfloat16_bits(x) | bfloat16_bits(y) << 16; }
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

// One lane's operands of a warp-wide product.
struct Fragments {
  uint32_t a[4], b[2];
};
static_assert(sizeof(Fragments) <= 64, "lane_value() holds 64 bytes");

// d += a b; a(fragments, lane's register) -> value. K elements of k in steps of one register's.
template <class ValueA, class ValueB>
inline void multiply_fragments(float (&d)[4], int depth, ValueA a, ValueB b) {
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    double sum = d[i];
    for (int k = 0; k < depth; ++k) sum += double(a(row, k)) * double(b(k, column));
    d[i] = float(sum);
  }
}
inline const Fragments& fragments_of(int lane) { return *static_cast<const Fragments*>(emulation::lane_value(lane)); }
inline void share_fragments(const void* site, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  unsigned char value[64] = {};
  std::memcpy(value, a, sizeof(a));
  std::memcpy(value + sizeof(a), b, sizeof(b));
  emulation::warp_barrier(site, value);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  share_fragments(MK_SITE, a, b);
  const auto value = [](uint32_t bits) { return bit_copy<float>(bits & 0xffffe000); };  // the rest is ignored
  multiply_fragments(
      d, 8, [&](int row, int k) { return value(fragments_of(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]); },
      [&](int k, int column) { return value(fragments_of(column * 4 + k % 4).b[k / 4]); });
}
inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  share_fragments(MK_SITE, a, b);
  const auto half = [](uint32_t bits, int k) { return bit_copy<float>(k % 2 ? bits & 0xffff0000u : bits << 16); };
  multiply_fragments(
      d, 16, [&](int row, int k) { return half(fragments_of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k); },
      [&](int k, int column) { return half(fragments_of(column * 4 + k % 8 / 2).b[k / 8], k); });
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
