// Clipping a task's gradient g to a norm of c: the sums over its elements, and the resulting factors.
#pragma once
#include "cpu_layout.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Sums of products per lane, in double, which holds every square of a float: no finite norm overflows.
template <class V>
class LaneSums {
 public:
  MK_INLINE void add(V a, V b) {
    Wide wide_a[parts], wide_b[parts];
    widen(a, wide_a);
    widen(b, wide_b);
    for (int i = 0; i < parts; ++i) sums_[i] += wide_a[i] * wide_b[i];
  }
  double operator[](int lane) const { return sums_[lane / lanes<Wide>][lane % lanes<Wide>]; }

 private:
  using S = lane_t<V>;
  using Wide = DoubleVec;
  static constexpr int parts = lanes<V> / lanes<Wide>;

  static MK_INLINE void widen(V v, Wide (&out)[parts]) {
    typedef S Part __attribute__((vector_size(vector_bytes / parts)));
    Part pieces[parts];
    __builtin_memcpy(pieces, &v, sizeof(V));
    for (int i = 0; i < parts; ++i) out[i] = __builtin_convertvector(pieces[i], Wide);
  }

  Wide sums_[parts]{};
};

// min(1, c / |g|) of every task, and 1 / |g| where it is clipped, else 0. NaN where the norm is NaN.
template <class V>
struct Clipping {
  V coefficient, inverse;
};

// `squares` of every task in its lanes.
template <class Layout>
Clipping<typename Layout::V> clipping(const LaneSums<typename Layout::V>& squares, double norm) {
  using V = typename Layout::V;
  using S = lane_t<V>;
  Clipping<V> out{broadcast<V>(1), broadcast<V>(0)};
  for (int lane = 0; lane < lanes<V>; ++lane) {
    const double square = Layout::task_total(squares, lane);
    if (square <= norm * norm) continue;  // false for NaN
    const double length = __builtin_sqrt(square);
    out.coefficient[lane] = S(norm / length);
    out.inverse[lane] = S(1 / length);
  }
  return out;
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
