// Gradients of a segment's moving means r and c, from those of the factors R and C and of the features.
#pragma once
#include "cpu_factors.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Gradients of r or c but for what comes through R's mean.
template <class S>
struct EntryGradient {
  const Table<S>& table;
  const double* sums;   // [backward_sums, entries]
  const S* upstream;    // of the new r or c, [3, entries]
  int64_t count;        // coordinates of an entry
  const double* means;  // n^2 mean(dy y) of the feature and of its root, of the first decay

  MK_INLINE double own(int k, int64_t i) const {
    const int64_t at = k * table.entries + i;
    const double value = double(table.now[at]), root = double(table.root[at]), square = root * root;
    const double normal = -means[k] * value + 0.5 * means[feature_r_root - feature_r + k] * square * square;
    return double(upstream[at]) + sums[(3 + k) * table.entries + i] + double(count) * normal;
  }
  MK_INLINE double factor(int k, int64_t i) const { return sums[k * table.entries + i]; }
  MK_INLINE double mean_square(int64_t i) const { return sums[6 * table.entries + i] / double(count) + 1e-30; }
};

// Writes the gradient of an old entry; adds to those of the decays and to the slope of g.
template <class S>
MK_INLINE void finish_entry(const Segment<S>& s, const EntryGradient<S>& e, int k, int64_t i, double gradient, S* out,
                            S* slopes, double* decay_sums) {
  const int64_t at = k * e.table.entries + i;
  out[at] = S(gradient * double(s.decays.keep[decay_factors + k]));
  decay_sums[decay_factors + k] += gradient * (double(e.table.old[at]) - e.mean_square(i));
  slopes[i] += S(2 / double(e.count) * gradient * double(s.decays.add[decay_factors + k]));
}

template <class S>
void rows_backward(const Segment<S>& s, const EntryGradient<S>& e, S* out, S* slopes, double* decay_sums) {
  const MeanAxis axis(s.shape);
  for (int k = 0; k < 3; ++k)
    for (int64_t block = 0; block < axis.blocks; ++block)
      for (int64_t inner = 0; inner < axis.inner; ++inner) {
        const int64_t first = block * axis.count * axis.inner + inner;
        const S* now = e.table.now + k * e.table.entries + first;
        const S* root = e.table.factor + k * e.table.entries + first;
        const S mean = mean_over(axis, now) + S(1e-9);
        const auto grad_ratio = [&](int64_t at) {
          return e.factor(k, first + at) * double(safe_inverse_root_slope<S>(now[at] / mean, root[at]));
        };
        double grad_mean = 0;
        for (int64_t i = 0; i < axis.count; ++i)
          grad_mean -= grad_ratio(i * axis.inner) * double(now[i * axis.inner]) / (double(mean) * double(mean));
        for (int64_t i = 0; i < axis.count; ++i) {
          const int64_t at = i * axis.inner;
          const double through_factor = grad_ratio(at) / double(mean) + grad_mean / double(axis.count);
          finish_entry(s, e, k, first + at, e.own(k, first + at) + through_factor, out, slopes, decay_sums);
        }
      }
}

template <class S>
void columns_backward(const Segment<S>& s, const EntryGradient<S>& e, S* out, S* slopes, double* decay_sums) {
  for (int k = 0; k < 3; ++k)
    for (int64_t i = 0; i < e.table.entries; ++i) {
      const int64_t at = k * e.table.entries + i;
      const double slope = double(safe_inverse_root_slope<S>(e.table.now[at], e.table.factor[at]));
      finish_entry(s, e, k, i, e.own(k, i) + e.factor(k, i) * slope, out, slopes, decay_sums);
    }
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
