// A block as rows of neighbouring coordinates, and the state of a tile of a row.
#pragma once
#include "cpu_segment.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// One row: table Y is contiguous along it, and the `inner` entries of table X repeat. x and y are its first entries in
// the segment's tables, x_local and y_local in the block's sums.
struct RowPlace {
  int64_t start, x, y, x_local, y_local;
};

// f(row) for all rows of a block, in order.
template <class F>
MK_INLINE void for_rows(const FactoredShape& s, const MlpBlock& b, const F& f) {
  const int64_t middles = b.middle[1] - b.middle[0], length = row_length(s, b), offset = b.second[0] * s.inner;
  for (int64_t first = b.first[0]; first < b.first[1]; ++first)
    for (int64_t m = 0; m < middles; ++m) {
      const int64_t middle = b.middle[0] + m;
      const int64_t x = ((b.outer * s.first + first) * s.middle + middle) * s.inner;
      const int64_t y = (b.outer * s.middle + middle) * s.second * s.inner + offset;
      const int64_t x_local = ((first - b.first[0]) * middles + m) * s.inner;
      f(RowPlace{x * s.second + offset, x, y, x_local, m * length});
    }
}

// f(position, count) for the tiles of a row.
template <class F>
MK_INLINE void for_row_tiles(int64_t length, const F& f) {
  for (int64_t at = 0; at < length; at += tile_size) f(at, int(length - at < tile_size ? length - at : tile_size));
}

// Repeats a row's entries of X, one after another in `from`, for a vector from any of them.
template <class S>
MK_INLINE void repeat_row(const S* from, int64_t inner, S* out) {
  using V = vec_t<S>;
  if (inner == 1) return store(out, broadcast<V>(*from));
  for (int64_t i = 0; i < inner; ++i) out[i] = from[i];
  for (int64_t i = 0; i < lanes<V>; ++i) out[inner + i] = out[i];
}

// First entries, within a repeated row, of the vectors from a position on.
template <class V>
MK_INLINE void row_phases(int64_t inner, int64_t position, int vectors, int* phases) {
  int phase = inner == 1 ? 0 : int(position % inner);
  const int step = inner == 1 ? 0 : lanes<V> % int(inner);
  for (int j = 0; j < vectors; ++j) {
    phases[j] = phase;
    phase += step;
    if (phase >= inner) phase -= int(inner);
  }
}

// `count` numbers from `start`, followed by zeros up to whole vectors: the array itself, or a copy in `buffer`.
template <class S>
MK_INLINE const S* view(const void* data, DType dtype, int64_t start, int count, S* buffer) {
  using V = vec_t<S>;
  if (dtype != own_dtype<S>) {
    read_tile(data, dtype, start, count, buffer);
    return buffer;
  }
  const S* from = static_cast<const S*>(data) + start;
  if (count % lanes<V> == 0) return from;
  const int whole = count / lanes<V> * lanes<V>;
  for (int i = 0; i < whole; i += lanes<V>) store(buffer + i, load<V>(from + i));
  for (int i = whole; i < whole + lanes<V>; ++i) buffer[i] = i < count ? from[i] : S(0);
  return buffer;
}

// Where to write `count` numbers in whole vectors: the array itself, or `buffer`, which put() copies.
template <class S>
MK_INLINE S* target(void* data, DType dtype, int64_t start, int count, S* buffer) {
  return dtype == own_dtype<S> && count % lanes<vec_t<S>> == 0 ? static_cast<S*>(data) + start : buffer;
}
template <class S>
MK_INLINE void put(void* data, DType dtype, int64_t start, int count, const S* from, const S* buffer) {
  if (from == buffer) write_tile(data, dtype, start, count, buffer);
}

template <class S>
struct TileBuffers {
  alignas(64) S g[tile_size], p[tile_size], m[3][tile_size], v[tile_size], full[3][tile_size];
};

// The old state of a tile from coordinate `start` of the segment.
template <class S>
struct TileState {
  const S *g, *p, *m[3], *v, *full[3];  // full: with one axis

  MK_INLINE TileState(const Segment<S>& s, int64_t start, int count, TileBuffers<S>* buffers) {
    constexpr DType own = own_dtype<S>;
    g = view(s.tensor.grads, s.problem.dtype, s.start + start, count, buffers->g);
    p = view(s.tensor.params, s.problem.dtype, s.start + start, count, buffers->p);
    v = view(s.tensor.v, own, s.start + start, count, buffers->v);
    for (int k = 0; k < 3; ++k) {
      const int64_t at = 3 * s.start + k * s.n + start;
      m[k] = view(s.tensor.m, own, at, count, buffers->m[k]);
      full[k] = s.shape.is_factored ? nullptr : view(s.tensor.r, own, at, count, buffers->full[k]);
    }
  }
};

// The new state of a tile, written in whole vectors.
template <class S>
struct NewTileState {
  const Segment<S>& s;
  int64_t start;
  int count;
  TileBuffers<S>& buffers;
  S *p, *m[3], *v, *full[3];

  MK_INLINE NewTileState(const Segment<S>& segment, int64_t first, int n, TileBuffers<S>* kept)
      : s(segment), start(first), count(n), buffers(*kept) {
    constexpr DType own = own_dtype<S>;
    p = target(s.tensor.new_params, s.problem.dtype, s.start + start, count, buffers.p);
    v = target(s.tensor.new_v, own, s.start + start, count, buffers.v);
    for (int k = 0; k < 3; ++k) {
      m[k] = target(s.tensor.new_m, own, moment(k), count, buffers.m[k]);
      full[k] = s.shape.is_factored ? nullptr : target(s.tensor.new_r, own, moment(k), count, buffers.full[k]);
    }
  }
  MK_INLINE int64_t moment(int k) const { return 3 * s.start + k * s.n + start; }

  MK_INLINE void finish() const {
    constexpr DType own = own_dtype<S>;
    put(s.tensor.new_params, s.problem.dtype, s.start + start, count, p, buffers.p);
    put(s.tensor.new_v, own, s.start + start, count, v, buffers.v);
    for (int k = 0; k < 3; ++k) {
      put(s.tensor.new_m, own, moment(k), count, m[k], buffers.m[k]);
      if (!s.shape.is_factored) put(s.tensor.new_r, own, moment(k), count, full[k], buffers.full[k]);
    }
  }
};

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
