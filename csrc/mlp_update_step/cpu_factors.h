// The factors R and C of a segment from its moving means r and c, and sums over its blocks in a fixed order.
#pragma once
#include "cpu_segment.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// r's entries as [blocks, count, inner]: `count` along the second largest axis, over which r's mean runs.
struct MeanAxis {
  int64_t blocks, count, inner;

  MK_INLINE explicit MeanAxis(const FactoredShape& s)
      : blocks(s.rows_are_x ? s.outer : s.outer * s.middle),
        count(s.rows_are_x ? s.first : s.second),
        inner(s.rows_are_x ? s.middle * s.inner : s.inner) {}
};

// Mean of r over the second largest axis, for one of the other indices.
template <class S>
MK_INLINE S mean_over(const MeanAxis& axis, const S* r) {
  double sum = 0;
  for (int64_t i = 0; i < axis.count; ++i) sum += double(r[i * axis.inner]);
  return S(sum / double(axis.count));
}

template <class S>
void row_factors(const Segment<S>& s, const Table<S>& t) {
  const MeanAxis axis(s.shape);
  for (int k = 0; k < 3; ++k)
    for (int64_t block = 0; block < axis.blocks; ++block)
      for (int64_t inner = 0; inner < axis.inner; ++inner) {
        const int64_t at = k * t.entries + block * axis.count * axis.inner + inner;
        const S mean = mean_over(axis, t.now + at) + S(1e-9);
        for (int64_t i = 0; i < axis.count; ++i)
          t.factor[at + i * axis.inner] = safe_inverse_root<S>(t.now[at + i * axis.inner] / mean);
      }
}

template <class S>
void column_factors(const Table<S>& t) {
  for (int64_t i = 0; i < 3 * t.entries; ++i) t.factor[i] = safe_inverse_root<S>(t.now[i]);
}

// The sums of a segment's blocks over its rows and columns: [K, x_size], then [K, y_size].
template <class S>
double* add_blocks(const Segment<S>& s, int K) {
  const FactoredShape& shape = s.shape;
  const int64_t x_size = shape.x_size(), y_size = shape.y_size();
  double* x = s.call.entry_sums + s.place.tables * K;
  double* y = x + K * x_size;
  for (int64_t i = 0; i < K * (x_size + y_size); ++i) x[i] = 0;
  for (int64_t i = 0; i < s.place.num_blocks; ++i) {
    const MlpBlock& b = s.call.blocks[s.place.first_block + i];
    const S *from_x = s.block_sums_x(b), *from_y = s.block_sums_y(b, K);
    const int64_t rows = (b.middle[1] - b.middle[0]) * shape.inner, span = b.y_size(shape);
    const int64_t y_at = ((b.outer * shape.middle + b.middle[0]) * shape.second + b.second[0]) * shape.inner;
    for (int k = 0; k < K; ++k) {
      for (int64_t first = b.first[0]; first < b.first[1]; ++first) {
        double* to = x + k * x_size + ((b.outer * shape.first + first) * shape.middle + b.middle[0]) * shape.inner;
        for (int64_t j = 0; j < rows; ++j) to[j] += double(*from_x++);
      }
      for (int64_t j = 0; j < span; ++j) y[k * y_size + y_at + j] += double(*from_y++);
    }
  }
  return x;
}

// A number of the segment's blocks, added up.
template <class S>
MK_INLINE double sum_of_blocks(const Segment<S>& s, int number) {
  double sum = 0;
  for (int64_t i = 0; i < s.place.num_blocks; ++i)
    sum += s.call.block_sums[(s.place.first_block + i) * block_numbers + number];
  return sum;
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
