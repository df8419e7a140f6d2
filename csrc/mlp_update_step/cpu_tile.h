// Tiles of neighbouring coordinates of a block: where they lie, and what they read from the tables of rows and columns.
#pragma once
#include "../core/vec.h"
#include "cpu.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

constexpr int tile_size = 96;  // a multiple of the blocks of math/lane_product.h

template <class V>
constexpr int tile_vectors = tile_size / lanes<V>;

// Neighbouring coordinates of one row: those with the same entry of table X, if `inner` is 1.
struct Run {
  int lane, length;
  int64_t x;         // entry of X at `inner` index 0, within the piece
  int64_t position;  // of the first coordinate, in its row
  int64_t y;         // entry of Y of the first coordinate, within the span
};

// A tile: `count` coordinates from `start` in the segment. x and y are the first entries of its piece in the tables,
// x_local and y_local in the block's sums.
struct TilePlace {
  int64_t start;
  int count;
  int64_t x, x_local, y;
  int num_runs;
  Run runs[tile_size];

  MK_INLINE bool is_one_row() const { return num_runs == 1 && count == tile_size; }
};

// Rows of a piece, contiguous coordinates of a block, one run after another.
class RowWalk {
 public:
  RowWalk(int64_t row_length, int64_t rows_of_span, int64_t inner)
      : length_(row_length), rows_(rows_of_span), inner_(inner) {}

  void fill(TilePlace* tile) {
    tile->num_runs = 0;
    for (int lane = 0; lane < tile->count;) {
      const int64_t left = length_ - position_;
      const int length = int(left < tile->count - lane ? left : tile->count - lane);
      tile->runs[tile->num_runs++] = {lane, length, row_ * inner_, position_, row_of_span_ * length_ + position_};
      lane += length;
      position_ += length;
      if (position_ < length_) continue;
      position_ = 0;
      ++row_;
      if (++row_of_span_ == rows_) row_of_span_ = 0;
    }
  }

 private:
  int64_t length_, rows_, inner_;
  int64_t row_ = 0, row_of_span_ = 0, position_ = 0;
};

// f(tile) for all tiles of a block, in order.
template <class F>
void for_tiles(const FactoredShape& s, const MlpBlock& b, const F& f) {
  const int64_t row = (b.second[1] - b.second[0]) * s.inner, rows = b.middle[1] - b.middle[0], span = rows * row;
  const int64_t whole = s.middle * s.second * s.inner, firsts = b.first[1] - b.first[0];
  const bool contiguous = span == whole;
  const int64_t pieces = contiguous ? 1 : firsts, piece = contiguous ? firsts * span : span;
  const int64_t offset = b.middle[0] * s.second * s.inner + b.second[0] * s.inner;
  TilePlace tile;
  tile.y = b.outer * whole + offset;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t at = b.outer * s.first + b.first[0] + i;
    const int64_t start = at * whole + offset;
    tile.x = (at * s.middle + b.middle[0]) * s.inner;
    tile.x_local = i * rows * s.inner;
    RowWalk walk(row, rows, s.inner);
    for (int64_t done = 0; done < piece; done += tile_size) {
      tile.start = start + done;
      tile.count = int(piece - done < tile_size ? piece - done : tile_size);
      walk.fill(&tile);
      f(tile);
    }
  }
}

// Entries of one row of table X, repeated along the row from one index of `inner` on.
template <class S>
MK_INLINE void repeat_entries(const S* entries, int64_t inner, int64_t at, int count, S* out) {
  for (int done = 0; done < count;) {
    const int64_t left = inner - at;
    const int length = int(left < count - done ? left : count - done);
    for (int i = 0; i < length; ++i) out[done + i] = entries[at + i];
    done += length;
    at = 0;
  }
}

// The entries of table X for a tile's coordinates.
template <class S>
MK_INLINE void expand_x(const TilePlace& tile, const S* table, int64_t inner, S* out) {
  using V = vec_t<S>;
  table += tile.x;
  if (inner == 1 && tile.is_one_row()) {
    const V value = broadcast<V>(table[tile.runs[0].x]);
    for (int i = 0; i < tile_size; i += lanes<V>) store(out + i, value);
    return;
  }
  for (int r = 0; r < tile.num_runs; ++r) {
    const Run& run = tile.runs[r];
    S* to = out + run.lane;
    if (inner == 1)
      for (int i = 0; i < run.length; ++i) to[i] = table[run.x];
    else
      repeat_entries(table + run.x, inner, run.position % inner, run.length, to);
  }
}

template <class S>
MK_INLINE void expand_y(const TilePlace& tile, const S* table, S* out) {
  table += tile.y;
  if (tile.is_one_row()) {
    __builtin_memcpy(out, table + tile.runs[0].y, sizeof(S) * tile_size);
    return;
  }
  for (int r = 0; r < tile.num_runs; ++r) {
    const Run& run = tile.runs[r];
    for (int i = 0; i < run.length; ++i) out[run.lane + i] = table[run.y + i];
  }
}

// Adds a tile's numbers to the block's sums over rows, and over columns.
template <class S>
MK_INLINE void add_to_x(const TilePlace& tile, const S* values, int64_t inner, S* sums) {
  using V = vec_t<S>;
  sums += tile.x_local;
  if (inner == 1 && tile.is_one_row()) {
    V sum = load<V>(values);
    for (int i = lanes<V>; i < tile_size; i += lanes<V>) sum += load<V>(values + i);
    sums[tile.runs[0].x] += sum_lanes(sum);
    return;
  }
  for (int r = 0; r < tile.num_runs; ++r) {
    const Run& run = tile.runs[r];
    S* entries = sums + run.x;
    const S* from = values + run.lane;
    if (inner == 1) {
      S sum = 0;
      for (int i = 0; i < run.length; ++i) sum += from[i];
      entries[0] += sum;
      continue;
    }
    int64_t at = run.position % inner;
    for (int done = 0; done < run.length;) {
      const int64_t left = inner - at;
      const int length = int(left < run.length - done ? left : run.length - done);
      for (int i = 0; i < length; ++i) entries[at + i] += from[done + i];
      done += length;
      at = 0;
    }
  }
}

template <class S>
MK_INLINE void add_to_y(const TilePlace& tile, const S* values, S* sums) {
  for (int r = 0; r < tile.num_runs; ++r) {
    const Run& run = tile.runs[r];
    S* to = sums + run.y;
    const S* from = values + run.lane;
    for (int i = 0; i < run.length; ++i) to[i] += from[i];
  }
}

// Index of the segment's first coordinate in lists of tensors [T, *shape].
MK_INLINE int64_t segment_start(const MlpUpdateTensor& t, const MlpSegment& s) { return s.task * t.shape.numel(); }

template <class S>
constexpr DType own_dtype = sizeof(S) == sizeof(double) ? DType::float64 : DType::float32;

// Reads `count` numbers of a parameter-like tensor, padded with zeros to a tile.
template <class S>
MK_INLINE void read_tile(const void* data, DType dtype, int64_t start, int count, S* out) {
  if (dtype == own_dtype<S> && count == tile_size) {
    __builtin_memcpy(out, static_cast<const S*>(data) + start, sizeof(S) * tile_size);
    return;
  }
  for (int lane = 0; lane < tile_size; lane += tile_lanes) {
    const int left = count - lane < 0 ? 0 : count - lane;
    read_lanes(data, dtype, start + lane, left < tile_lanes ? left : tile_lanes, out + lane);
  }
}
template <class S>
MK_INLINE void write_tile(void* data, DType dtype, int64_t start, int count, const S* in) {
  if (dtype == own_dtype<S> && count == tile_size) {
    __builtin_memcpy(static_cast<S*>(data) + start, in, sizeof(S) * tile_size);
    return;
  }
  for (int lane = 0; lane < count; lane += tile_lanes)
    write_lanes(data, dtype, start + lane, count - lane < tile_lanes ? count - lane : tile_lanes, in + lane);
}

// The same for arrays of the arithmetic's dtype.
template <class S>
MK_INLINE void copy_tile(const S* from, int count, S* out) {
  if (count == tile_size) {
    __builtin_memcpy(out, from, sizeof(S) * tile_size);
    return;
  }
  for (int i = 0; i < count; ++i) out[i] = from[i];
  for (int i = count; i < tile_size; ++i) out[i] = S(0);
}
template <class S>
MK_INLINE void store_tile(S* to, int count, const S* from) {
  if (count == tile_size) {
    __builtin_memcpy(to, from, sizeof(S) * tile_size);
    return;
  }
  for (int i = 0; i < count; ++i) to[i] = from[i];
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
