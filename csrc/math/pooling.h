// Windows of 2 by 2 pixels, next to each other: their maxima, and the way from a window to its pixels and back.
//
// A row of windows lies over two rows of pixels. `which` is the place of a pixel in its window, in the order of memory:
// 0 and 1 in the row above, 2 and 3 in the row below. All functions read and write whole vectors: buffers are longer
// by `pooling_slack` elements, and what is written behind a row's end is undefined.
#pragma once
#include <stdint.h>

#include <utility>

#include "../core/portable.h"
#include "../core/vec.h"

namespace metakern {
inline namespace MK_CAPABILITY {

template <class V>
constexpr int pooling_slack = 2 * lanes<V>;

// The pixels of a row as those of the left and of the right columns of the windows.
template <class V, int... I>
MK_INLINE void split_pairs(V a, V b, V& left, V& right, std::integer_sequence<int, I...>) {
  left = __builtin_shufflevector(a, b, (2 * I)...);
  right = __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// The inverse.
template <class V, int... I>
MK_INLINE void join_pairs(V left, V right, V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int n = lanes<V>;
  a = __builtin_shufflevector(left, right, (I / 2 + I % 2 * n)...);
  b = __builtin_shufflevector(left, right, (n / 2 + I / 2 + I % 2 * n)...);
}

// The four pixels of as many windows as there are lanes.
template <class V>
MK_INLINE void load_windows(const lane_t<V>* above, const lane_t<V>* below, V (&pixels)[4]) {
  constexpr int n = lanes<V>;
  constexpr std::make_integer_sequence<int, n> each{};
  split_pairs(load<V>(above), load<V>(above + n), pixels[0], pixels[1], each);
  split_pairs(load<V>(below), load<V>(below + n), pixels[2], pixels[3], each);
}

// The maxima of a row of windows. As in PyTorch, the first of equal pixels wins, and the last NaN.
template <class S>
MK_INLINE void pool_row(const S* above, const S* below, int64_t windows, S* best, int_t<S>* which) {
  using V = vec_t<S>;
  using I = int_t<V>;
  for (int64_t j = 0; j < windows; j += lanes<V>) {
    V pixels[4];
    load_windows(above + 2 * j, below + 2 * j, pixels);
    V found = pixels[0];
    I place{};
#pragma GCC unroll 3
    for (int k = 1; k < 4; ++k) {
      const I wins = (pixels[k] > found) | (pixels[k] != pixels[k]);
      found = wins ? pixels[k] : found;
      place = wins ? I{} + k : place;
    }
    store(best + j, found);
    __builtin_memcpy(which + j, &place, sizeof(I));
  }
}

// The pixels of one row, 0 or 1, of the windows: each window's value where its pixel won, zero elsewhere.
template <class S>
MK_INLINE void spread_row(const S* values, const int_t<S>* which, int64_t windows, int row, S* pixels) {
  using V = vec_t<S>;
  using I = int_t<V>;
  constexpr int n = lanes<V>;
  for (int64_t j = 0; j < windows; j += n) {
    I place;
    __builtin_memcpy(&place, which + j, sizeof(I));
    const V value = load<V>(values + j);
    V a, b;
    join_pairs(place == 2 * row ? value : V{}, place == 2 * row + 1 ? value : V{}, a, b,
               std::make_integer_sequence<int, n>());
    store(pixels + 2 * j, a);
    store(pixels + 2 * j + n, b);
  }
}

// Of each window the pixel that won.
template <class S>
MK_INLINE void pick_row(const S* above, const S* below, const int_t<S>* which, int64_t windows, S* values) {
  using V = vec_t<S>;
  using I = int_t<V>;
  for (int64_t j = 0; j < windows; j += lanes<V>) {
    V pixels[4];
    load_windows(above + 2 * j, below + 2 * j, pixels);
    I place;
    __builtin_memcpy(&place, which + j, sizeof(I));
    const V left = place == 0 ? pixels[0] : pixels[2], right = place == 1 ? pixels[1] : pixels[3];
    store(values + j, (place & 1) != 0 ? right : left);
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
