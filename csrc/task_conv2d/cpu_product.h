// The gathered product of cpu.h: tiles of rows in vectors times columns, whose sums stay in registers.
#pragma once
#include <stdint.h>

#include <utility>

#include "../core/vec.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// Vectors of rows at most in a tile, and columns at most, by the number of vectors: what the registers hold.
#if defined(__AVX512F__)
constexpr int max_vectors = 4;
constexpr int max_columns[max_vectors] = {8, 8, 8, 6};
#elif defined(__AVX2__)
constexpr int max_vectors = 2;
constexpr int max_columns[max_vectors] = {8, 6};
#else
constexpr int max_vectors = 2;
constexpr int max_columns[max_vectors] = {8, 4};
#endif
constexpr int most_columns = 8;

// Terms summed in registers before the sum is added to memory: the packed part stays in the first-level cache, and sums
// of sums lose less to rounding.
constexpr int64_t max_terms = 192;

// out[column][rows] of one tile, set or, if `add`, added to.
template <class S, int vectors, int columns>
void product_tile(const S* packed, int64_t terms, const int64_t* offsets, const S* source, const int64_t* bases, S* out,
                  bool add) {
  using V = vec_t<S>;
  constexpr int n = lanes<V>;
  V sums[columns][vectors] = {};
  const S* at[columns];
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j) at[j] = source + bases[j];
  for (int64_t k = 0; k < terms; ++k) {
    const int64_t offset = offsets[k];
    V a[vectors];
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) a[i] = load<V>(packed + i * n);
    packed += vectors * n;
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) {
      const S x = at[j][offset];
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) sums[j][i] += a[i] * x;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
      S* to = out + (j * vectors + i) * n;
      store(to, add ? load<V>(to) + sums[j][i] : sums[j][i]);
    }
}

template <class S>
using ProductTile = void (*)(const S*, int64_t, const int64_t*, const S*, const int64_t*, S*, bool);

template <class S, int vectors, int... J>
constexpr ProductTile<S> product_tile_of(int columns, std::integer_sequence<int, J...>) {
  constexpr ProductTile<S> tiles[] = {product_tile<S, vectors, J + 1>...};
  return tiles[columns - 1];
}

template <class S, int vectors = max_vectors>
ProductTile<S> product_tile_of(int count, int columns) {
  if constexpr (vectors > 1)
    if (count < vectors) return product_tile_of<S, vectors - 1>(count, columns);
  return product_tile_of<S, vectors>(columns, std::make_integer_sequence<int, max_columns[vectors - 1]>());
}

// Rows in blocks of at most max_vectors vectors, of sizes as equal as possible.
struct RowBlocks {
  int64_t vectors, count;

  template <class S>
  static RowBlocks of(int64_t rows) {
    const int64_t vectors = (rows + lanes<vec_t<S>> - 1) / lanes<vec_t<S>>;
    return {vectors, (vectors + max_vectors - 1) / max_vectors};
  }
  int64_t first(int64_t block) const { return vectors * block / count; }  // vector
  // First block of a range of rows.
  int64_t range(int64_t range, int64_t ranges) const { return count * range / ranges; }
};

// The product of one block for all columns, [columns, vectors] in `out`. `packed` holds the block's terms.
template <class S>
void product_block(int64_t vectors, const S* packed, int64_t terms, const int64_t* offsets, const S* source,
                   const int64_t* bases, int64_t columns, S* out, bool add) {
  const int64_t width = vectors * lanes<vec_t<S>>;
  const int64_t most = max_columns[vectors - 1], tiles = (columns + most - 1) / most;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = columns * tile / tiles, last = columns * (tile + 1) / tiles;
    product_tile_of<S>(int(vectors), int(last - first))(packed, terms, offsets, source, bases + first,
                                                        out + first * width, add);
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
