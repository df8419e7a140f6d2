// A segment as the loops of one instruction set see it, and the inputs of a tile of its coordinates.
#pragma once
#include "cpu_tile.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

template <class S>
MK_INLINE const S* offset(const void* data, int64_t elements) {
  return data == nullptr ? nullptr : static_cast<const S*>(data) + elements;
}
template <class S>
MK_INLINE S* offset(void* data, int64_t elements) {
  return data == nullptr ? nullptr : static_cast<S*>(data) + elements;
}

// Entries of r or c of a segment: the new moving means, and their tables.
template <class S>
struct Table {
  int64_t entries;
  const S* old;  // [3, entries], likewise all below
  S* now;        // read only in backward
  S* root;       // (now + 1e-8)^-1/2
  S* factor;     // R or C
};

template <class S>
struct Segment {
  const MlpUpdateCall& call;
  const MlpUpdateProblem& problem;
  const MlpSegment& place;
  const MlpUpdateTensor& tensor;
  const FactoredShape& shape;
  int64_t index, n, start;  // start: of the first coordinate in lists of [T, *shape]
  Decays<S> decays;

  MK_INLINE Segment(const MlpUpdateCall& c, int64_t segment)
      : call(c),
        problem(*c.problem),
        place(c.segments[segment]),
        tensor(problem.tensors[place.tensor]),
        shape(tensor.shape),
        index(segment),
        n(shape.numel()),
        start(place.task * n),
        decays(problem.template own<S>(problem.decays, place.task, num_decays)) {}

  MK_INLINE int64_t number() const { return place.tensor * problem.num_tasks + place.task; }  // in [M, T]
  MK_INLINE S* norms() const { return offset<S>(problem.norms, number() * tensor_features); }
  MK_INLINE Table<S> rows() const {
    const int64_t entries = shape.rows(), at = 3 * entries * place.task;
    S* tables = offset<S>(call.tables, place.tables * table_rows);
    return {entries, offset<S>(tensor.r, at), offset<S>(tensor.new_r, at), tables, tables + 3 * entries};
  }
  MK_INLINE Table<S> columns() const {
    const int64_t entries = shape.columns(), at = 3 * entries * place.task;
    S* tables = offset<S>(call.tables, (place.tables + shape.rows()) * table_rows);
    return {entries, offset<S>(tensor.c, at), offset<S>(tensor.new_c, at), tables, tables + 3 * entries};
  }
  MK_INLINE Table<S> table_x() const { return shape.rows_are_x ? rows() : columns(); }
  MK_INLINE Table<S> table_y() const { return shape.rows_are_x ? columns() : rows(); }
  MK_INLINE S* block_sums_x(const MlpBlock& b) const { return offset<S>(call.sums, b.sums); }
  MK_INLINE S* block_sums_y(const MlpBlock& b, int rows) const {
    return offset<S>(call.sums, b.sums + rows * b.x_size(shape));
  }
};

// What the features of a tile are computed from. Lanes after the last coordinate hold zeros.
template <class S>
struct TileInputs {
  using V = vec_t<S>;
  alignas(64) S g[tile_size], p[tile_size], m[3][tile_size], v[tile_size];
  alignas(64) S r[3][tile_size], c[3][tile_size], r_root[3][tile_size], c_root[3][tile_size];
  alignas(64) S row_factor[3][tile_size], column_factor[3][tile_size];

  void read(const Segment<S>& s, const TilePlace& tile) {
    const int64_t at = s.start + tile.start;
    read_tile(s.tensor.grads, s.problem.dtype, at, tile.count, g);
    read_tile(s.tensor.params, s.problem.dtype, at, tile.count, p);
    const S* old_m = offset<S>(s.tensor.m, 3 * s.start + tile.start);
    for (int k = 0; k < 3; ++k) copy_tile(old_m + k * s.n, tile.count, m[k]);
    copy_tile(offset<S>(s.tensor.v, at), tile.count, v);
    if (s.shape.is_factored) return;
    const S* old_full = offset<S>(s.tensor.r, 3 * s.start + tile.start);
    for (int k = 0; k < 3; ++k) copy_tile(old_full + k * s.n, tile.count, r[k]);
  }

  // Reads the factors R and C, of a segment with more than one axis.
  void read_factors(const Segment<S>& s, const TilePlace& tile) {
    const Table<S> rows = s.rows(), columns = s.columns();
    for (int k = 0; k < 3; ++k) {
      expand(s, tile, rows.factor + k * rows.entries, s.shape.rows_are_x, k, row_factor[k]);
      expand(s, tile, columns.factor + k * columns.entries, !s.shape.rows_are_x, k, column_factor[k]);
    }
  }

  // Reads r, c and their roots too.
  void read_tables(const Segment<S>& s, const TilePlace& tile) {
    const Table<S> rows = s.rows(), columns = s.columns();
    for (int k = 0; k < 3; ++k) {
      expand(s, tile, rows.now + k * rows.entries, s.shape.rows_are_x, 3 + k, r[k]);
      expand(s, tile, rows.root + k * rows.entries, s.shape.rows_are_x, 6 + k, r_root[k]);
      expand(s, tile, columns.now + k * columns.entries, !s.shape.rows_are_x, 3 + k, c[k]);
      expand(s, tile, columns.root + k * columns.entries, !s.shape.rows_are_x, 6 + k, c_root[k]);
    }
  }

  MK_INLINE NewMoments<V> moments(int lane, const Decays<S>& decays) const {
    const V old[3] = {load<V>(m[0] + lane), load<V>(m[1] + lane), load<V>(m[2] + lane)};
    return NewMoments<V>(load<V>(g + lane), old, load<V>(v + lane), decays);
  }

  // The factors of a coordinate; for one axis from the old V, in r.
  template <bool IsFactored>
  MK_INLINE Factors<V> factors(int lane, const Decays<S>& decays) const {
    if constexpr (!IsFactored) {
      V full[3];
      for (int k = 0; k < 3; ++k) full[k] = new_full_factor<V>(load<V>(g + lane), load<V>(r[k] + lane), k, decays);
      return full_factors<V>(full);
    }
    Factors<V> f;
    for (int k = 0; k < 3; ++k) {
      f.r[k] = load<V>(r[k] + lane);
      f.c[k] = load<V>(c[k] + lane);
      f.r_root[k] = load<V>(r_root[k] + lane);
      f.c_root[k] = load<V>(c_root[k] + lane);
      f.of_g[k] = f.of_m[k] = load<V>(row_factor[k] + lane) * load<V>(column_factor[k] + lane);
    }
    return f;
  }

 private:
  // One of X's 9 tables, or of Y's, for a tile.
  void expand(const Segment<S>& s, const TilePlace& tile, const S* table, bool is_x, int number, S* out) {
    const int64_t inner = s.shape.inner;
    if (!is_x)
      expand_y(tile, table, out);
    else if (inner > 1 && inner <= longest_pattern && tile.is_one_row())
      expand_pattern(tile, table, inner, number, out);
    else
      expand_x(tile, table, inner, out);
    for (int i = tile.count; i < tile_size; ++i) out[i] = S(0);
  }

  // Copies a tile from a row's repeated entries, which are kept for the row's next tile.
  void expand_pattern(const TilePlace& tile, const S* table, int64_t inner, int number, S* out) {
    const int64_t row = tile.x + tile.runs[0].x;
    if (pattern_rows_[number] != row) {
      pattern_rows_[number] = row;
      repeat_entries(table + row, inner, 0, int(inner) + tile_size, patterns_[number]);
    }
    __builtin_memcpy(out, patterns_[number] + tile.runs[0].position % inner, sizeof(S) * tile_size);
  }

  static constexpr int64_t longest_pattern = 64;
  int64_t pattern_rows_[9] = {-1, -1, -1, -1, -1, -1, -1, -1, -1};
  S patterns_[9][longest_pattern + tile_size];
};

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
