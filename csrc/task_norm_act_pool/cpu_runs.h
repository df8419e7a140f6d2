// Loops over a run of contiguous elements, by vectors; the last may be a part of one.
#pragma once
#include "../math/transpose.h"
#include "cpu.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

template <class S>
struct bytes_of;
template <>
struct bytes_of<float> {
  typedef uint8_t type __attribute__((vector_size(vector_bytes / 4)));
};
template <>
struct bytes_of<double> {
  typedef uint8_t type __attribute__((vector_size(vector_bytes / 8)));
};

// A whole vector.
template <class S>
struct Whole {
  using V = vec_t<S>;
  using I = int_t<V>;
  using Bytes = typename bytes_of<S>::type;

  MK_INLINE V load_values(const S* p) const { return load<V>(p); }
  MK_INLINE void store_values(S* p, V v) const { store(p, v); }
  MK_INLINE V keep(V v) const { return v; }
  MK_INLINE I load_bytes(const uint8_t* p) const {
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof(Bytes));
    return __builtin_convertvector(bytes, I);
  }
  MK_INLINE void store_bytes(uint8_t* p, I v) const {
    const Bytes bytes = __builtin_convertvector(v, Bytes);
    __builtin_memcpy(p, &bytes, sizeof(Bytes));
  }
};

// Its first lanes; the others are loaded as zeros, kept as zeros, and not stored.
template <class S>
struct Part {
  using V = vec_t<S>;
  using I = int_t<V>;
  int64_t count;

  MK_INLINE V load_values(const S* p) const { return load_first<V>(p, count); }
  MK_INLINE void store_values(S* p, V v) const { store_first(p, v, count); }
  MK_INLINE V keep(V v) const {
    I lane;
    for (int i = 0; i < lanes<V>; ++i) lane[i] = i;
    return lane < I{} + int_t<S>(count) ? v : V{};
  }
  MK_INLINE I load_bytes(const uint8_t* p) const {
    I v{};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
  }
  MK_INLINE void store_bytes(uint8_t* p, I v) const {
    for (int64_t i = 0; i < count; ++i) p[i] = uint8_t(v[i]);
  }
};

// Calls f(first element, vector, which of `unroll` accumulators) for the vectors of n elements.
template <class S, int unroll = 1, class F>
MK_INLINE void each_vector(int64_t n, const F& f) {
  constexpr int width = lanes<vec_t<S>>;
  int64_t i = 0;
  for (; i + unroll * width <= n; i += unroll * width)
#pragma GCC unroll 8
    for (int k = 0; k < unroll; ++k) f(i + k * width, Whole<S>{}, k);
  if constexpr (unroll > 1)
    for (; i + width <= n; i += width) f(i, Whole<S>{}, 0);
  if (i < n) f(i, Part<S>{n - i}, 0);
}

// A sum of vectors in several accumulators, as one alone would wait for its own result.
template <class S>
struct Sum {
  static constexpr int count = 4;
  vec_t<S> parts[count] = {};

  MK_INLINE void add(vec_t<S> v, int k) { parts[k] += v; }
  MK_INLINE double total() const { return double(sum_lanes((parts[0] + parts[1]) + (parts[2] + parts[3]))); }
};

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
