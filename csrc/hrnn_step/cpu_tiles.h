// Tiles of coordinates in the order of tensors, tasks and coordinates; loads, stores and sums of a tile's rows.
#pragma once
#include "../core/vec.h"
#include "cpu.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Vectors of a tile's row.
template <class V>
constexpr int W = tile_lanes / lanes<V>;

template <class S>
constexpr DType dtype_of = sizeof(S) == 8 ? DType::float64 : DType::float32;

// Up to piece_tiles neighbouring tiles of one segment.
struct Piece {
  const HrnnTensor& tensor;
  int64_t task, segment;
  int64_t index;  // among all pieces
  int64_t first;  // first coordinate in the segment
  int tiles;

  MK_INLINE int64_t param(int tile) const { return task * tensor.coordinates + first + tile * tile_lanes; }
  // First element of a tile in an array [T, rows, n].
  MK_INLINE int64_t row(int rows, int tile) const {
    return task * rows * tensor.coordinates + first + tile * tile_lanes;
  }
  MK_INLINE int used(int tile) const {
    const int64_t left = tensor.coordinates - first - tile * tile_lanes;
    return left < tile_lanes ? int(left) : tile_lanes;
  }
};

// f(piece) for every piece that starts in the range of tiles.
template <class F>
void for_each_piece(const HrnnStepProblem& p, const HrnnStepArguments& args, int64_t first_tile, int64_t last_tile,
                    const F& f) {
  int64_t low = 0, high = p.num_tensors;  // binary search for the last tensor that starts at or before the range
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (args.tensors[middle].first_tile <= first_tile ? low : high) = middle;
  }
  int64_t tile = first_tile;
  for (int64_t m = low; m < p.num_tensors && tile < last_tile; ++m) {
    const HrnnTensor& tensor = args.tensors[m];
    if (tensor.tiles == 0) continue;
    const int64_t local = tile - tensor.first_tile;
    int64_t task = local / tensor.tiles, k = (local % tensor.tiles + piece_tiles - 1) / piece_tiles;
    for (; task < p.num_tasks && tile < last_tile; ++task, k = 0)
      for (; k < tensor.pieces; ++k) {
        const int64_t in_segment = k * piece_tiles, left = tensor.tiles - in_segment;
        tile = tensor.first_tile + task * tensor.tiles + in_segment;
        if (tile >= last_tile) return;
        f(Piece{tensor, task, m * p.num_tasks + task, tensor.first_piece + task * tensor.pieces + k,
                in_segment * tile_lanes, int(left < piece_tiles ? left : piece_tiles)});
      }
    tile = args.tensors[m + 1].first_tile;
  }
}

// Prefetches the next tile of an array of rows: too many streams for the processor to follow by itself.
template <class S>
MK_INLINE void prefetch_next(const S* rows, int64_t stride, int count) {
  constexpr int line = 64 / sizeof(S);
  for (int r = 0; r < count; ++r)
    for (int at = 0; at < tile_lanes; at += line) __builtin_prefetch(rows + r * stride + tile_lanes + at);
}

// `rows` rows of a tile from an array of rows `stride` elements apart; zeros after the `used` lanes.
template <class V>
MK_INLINE void read_tile(const lane_t<V>* from, int64_t stride, int rows, int used, V (*out)[W<V>]) {
  if (used == tile_lanes) {
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < W<V>; ++n) out[r][n] = load<V>(from + r * stride + n * lanes<V>);
    return;
  }
  const int whole = used / lanes<V>, rest = used % lanes<V>;
  for (int r = 0; r < rows; ++r) {
    const lane_t<V>* row = from + r * stride;
    for (int n = 0; n < W<V>; ++n) out[r][n] = broadcast<V>(0);
    for (int n = 0; n < whole; ++n) out[r][n] = load<V>(row + n * lanes<V>);
    if (rest > 0) __builtin_memcpy(&out[r][whole], row + whole * lanes<V>, rest * sizeof(lane_t<V>));
  }
}
template <class V>
MK_INLINE void write_tile(lane_t<V>* to, int64_t stride, int rows, int used, const V (*in)[W<V>]) {
  if (used == tile_lanes) {
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < W<V>; ++n) store(to + r * stride + n * lanes<V>, in[r][n]);
    return;
  }
  for (int r = 0; r < rows; ++r) __builtin_memcpy(to + r * stride, in[r], used * sizeof(lane_t<V>));
}

// The same for one row in a parameter's dtype.
template <class V>
MK_INLINE void read_params(const void* data, DType dtype, int64_t first, int used, V (&out)[W<V>]) {
  if (dtype == dtype_of<lane_t<V>>) {
    read_tile<V>(static_cast<const lane_t<V>*>(data) + first, 0, 1, used, &out);
    return;
  }
  alignas(64) lane_t<V> numbers[tile_lanes];
  read_lanes(data, dtype, first, used, numbers);
  __builtin_memcpy(out, numbers, sizeof(numbers));
}
template <class V>
MK_INLINE void write_params(void* data, DType dtype, int64_t first, int used, const V (&in)[W<V>]) {
  if (dtype == dtype_of<lane_t<V>>) {
    write_tile<V>(static_cast<lane_t<V>*>(data) + first, 0, 1, used, &in);
    return;
  }
  alignas(64) lane_t<V> numbers[tile_lanes];
  __builtin_memcpy(numbers, in, sizeof(numbers));
  write_lanes(data, dtype, first, used, numbers);
}

// Sets the lanes from `used` on to zero, so that they count in no sum.
template <class V>
MK_INLINE void clear_padding(V (*rows)[W<V>], int count, int used) {
  if (used == tile_lanes) return;
  int_t<V> lane;
  for (int i = 0; i < lanes<V>; ++i) lane[i] = i;
  const int whole = used / lanes<V>;
  const auto kept = lane < used % lanes<V>;
  for (int r = 0; r < count; ++r) {
    rows[r][whole] = kept ? rows[r][whole] : broadcast<V>(0);
    for (int n = whole + 1; n < W<V>; ++n) rows[r][n] = broadcast<V>(0);
  }
}

// Vectors that hold coordinates.
template <class V>
MK_INLINE int columns_of(int used) {
  return (used + lanes<V> - 1) / lanes<V>;
}

// Sums of `Count` rows over the tiles of a piece.
template <class V, int Count>
class RowSums {
  static constexpr int padded = (Count + lanes<V> - 1) / lanes<V> * lanes<V>;
  V sums_[padded];

 public:
  MK_INLINE RowSums() {
    for (int r = 0; r < padded; ++r) sums_[r] = broadcast<V>(0);
  }
  // Adds `count` rows of a tile from row `first` of the sums on.
  MK_INLINE void add(int first, int count, const V (*rows)[W<V>]) {
    for (int r = 0; r < count; ++r) {
      V sum = rows[r][0];
#pragma GCC unroll 16
      for (int n = 1; n < W<V>; ++n) sum += rows[r][n];
      sums_[first + r] += sum;
    }
  }
  void write(double* out) const {
    lane_t<V> totals[padded];
    for (int r = 0; r < padded; r += lanes<V>) store(totals + r, sum_lanes_of_each<V>(sums_ + r));
    for (int r = 0; r < Count; ++r) out[r] = double(totals[r]);
  }
};

// Adds the rows up by a fixed tree, in place: the sum ends in the first.
inline __attribute__((always_inline)) void add_tree(double* rows, int64_t count, int64_t width) {
  for (int64_t step = 1; step < count; step *= 2)
    for (int64_t i = 0; i + step < count; i += 2 * step)
      for (int64_t j = 0; j < width; ++j) rows[i * width + j] += rows[(i + step) * width + j];
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
