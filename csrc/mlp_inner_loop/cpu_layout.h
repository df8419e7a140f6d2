// Vector layouts of a unit of work: TaskLanes, a task in each lane, or SampleLanes, one task with its samples, or a
// layer's inputs, in lanes. SampleLanes serves few or large tasks.
//
// row(n): vectors that n neighbouring numbers take. A weight is [units][row(inputs)], a bias [row(units)], samples and
// activations are [features][row(samples)]. Parameters are zero behind a row's end; samples repeat the last one.
#pragma once
#include "../core/vec.h"
#include "problem.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

template <class S>
struct TaskLanes {
  using V = vec_t<S>;
  using Number = V;  // one number of every task
  using Rate = S;    // of one parameter: all tasks share it
  static constexpr int tasks = lanes<V>;
  static constexpr bool transposes = false;
  static constexpr bool packed = true;  // results in lanes have the layout of the vectors here

  static constexpr int64_t row(int64_t n) { return n; }
  // Index of a feature's and sample's number in a lane, and the number of samples with padding.
  static MK_INLINE int64_t at(int64_t feature, int64_t sample, int64_t samples, int lane) {
    return (feature * samples + sample) * tasks + lane;
  }
  static int padded(int samples) { return samples; }

  // Reads a tensor of every task, `stride` apart, or with stride 0 one for all; lanes after the last task repeat it.
  static void read(const S* data, int64_t stride, int used, int64_t rows, int64_t columns, V* out) {
    const int64_t count = rows * columns;
    if (stride == 0) {
      for (int64_t i = 0; i < count; ++i) out[i] = broadcast<V>(data[i]);
      return;
    }
    for (int lane = 0; lane < tasks; ++lane) {
      const S* source = data + (lane < used ? lane : used - 1) * stride;
      S* to = reinterpret_cast<S*>(out) + lane;
      for (int64_t i = 0; i < count; ++i) to[i * tasks] = source[i];
    }
  }
  static void write(const V* in, int64_t rows, int64_t columns, S* data, int64_t stride, int used) {
    for (int lane = 0; lane < used; ++lane) {
      const S* source = reinterpret_cast<const S*>(in) + lane;
      for (int64_t i = 0; i < rows * columns; ++i) data[lane * stride + i] = source[i * tasks];
    }
  }

  // To and from the private layout of results in lanes: the vectors as they are.
  static void pack(const V* in, int64_t rows, int64_t columns, S* out) {
    __builtin_memcpy(out, in, sizeof(V) * uint64_t(rows * columns));
  }
  static void unpack(const S* in, int64_t rows, int64_t columns, V* out) {
    __builtin_memcpy(out, in, sizeof(V) * uint64_t(rows * columns));
  }

  // All rates of a tensor [rows, columns], as they lie.
  static const Rate* rates(const S* data, int64_t, int64_t, V*) { return data; }

  // sink(i, vector i of the sums of each of `units` rows).
  template <class Sink>
  static MK_INLINE void row_sums(const V* data, int units, int samples, const Sink& sink) {
    for (int m = 0; m < units; ++m, data += samples) {
      V total = data[0];
      for (int s = 1; s < samples; ++s) total += data[s];
      sink(m, total);
    }
  }

  // Reduces a sum over vectors of samples, or of parameters, to the sum of each task.
  static MK_INLINE V task_sum(V v) { return v; }
  // From sums in every lane, the sum of the task in one lane.
  template <class Sums>
  static double task_total(const Sums& sums, int lane) {
    return sums[lane];
  }
  // The lanes of a vector in a row of samples, or of parameters, that hold one.
  static MK_INLINE V used(V v, int, int) { return v; }

  static void transpose(const V*, int, int, V*) {}
};

template <class S>
struct SampleLanes {
  using V = vec_t<S>;
  using Number = S;
  using Rate = V;
  static constexpr int tasks = 1;
  static constexpr int width = lanes<V>;
  static constexpr bool transposes = true;
  static constexpr bool packed = false;

  static constexpr int64_t row(int64_t n) { return (n + width - 1) / width; }
  static MK_INLINE int64_t at(int64_t feature, int64_t sample, int64_t samples, int) {
    return feature * row(samples) * width + sample;
  }
  static int padded(int samples) { return int(row(samples)) * width; }

  static void read(const S* data, int64_t, int, int64_t rows, int64_t columns, V* out) {
    unpack(data, rows, columns, out);
  }
  static void write(const V* in, int64_t rows, int64_t columns, S* data, int64_t, int) {
    pack(in, rows, columns, data);
  }

  // To and from rows without padding.
  static void pack(const V* in, int64_t rows, int64_t columns, S* out) {
    for (int64_t r = 0; r < rows; ++r, in += row(columns), out += columns)
      __builtin_memcpy(out, in, sizeof(S) * uint64_t(columns));
  }
  static void unpack(const S* in, int64_t rows, int64_t columns, V* out) {
    for (int64_t r = 0; r < rows; ++r, in += columns, out += row(columns)) {
      out[row(columns) - 1] = broadcast<V>(0);
      __builtin_memcpy(out, in, sizeof(S) * uint64_t(columns));
    }
  }

  static const Rate* rates(const S* data, int64_t rows, int64_t columns, V* memory) {
    unpack(data, rows, columns, memory);
    return memory;
  }

  template <class Sink>
  static MK_INLINE void row_sums(const V* data, int units, int samples, const Sink& sink) {
    const int blocks = int(row(samples));
    for (int m = 0; m < units; m += width) {
      V sums[width];
      for (int i = 0; i < width; ++i) {
        sums[i] = broadcast<V>(0);
        if (m + i < units)
          for (int b = 0; b < blocks; ++b) sums[i] += used(data[(m + i) * int64_t(blocks) + b], b, samples);
      }
      sink(m / width, sum_lanes_of_each(sums));
    }
  }

  static MK_INLINE V task_sum(V v) {
    V out = broadcast<V>(0);
    out[0] = sum_lanes(v);
    return out;
  }
  template <class Sums>
  static double task_total(const Sums& sums, int) {
    double total = sums[0];
    for (int lane = 1; lane < width; ++lane) total += sums[lane];
    return total;
  }
  static MK_INLINE V used(V v, int block, int samples) {
    const int first = block * width;
    if (first + width <= samples) return v;
    for (int lane = samples - first; lane < width; ++lane) v[lane] = S(0);
    return v;
  }

  // [features][row(samples)] to [samples][row(features)].
  static void transpose(const V* in, int features, int samples, V* out) {
    const S* from = reinterpret_cast<const S*>(in);
    const int64_t in_row = row(samples) * width, out_row = row(features) * width;
    for (int s = 0; s < samples; ++s) {
      out[(s + 1) * row(features) - 1] = broadcast<V>(0);
      S* to = reinterpret_cast<S*>(out) + s * out_row;
      for (int f = 0; f < features; ++f) to[f] = from[f * in_row + s];
    }
  }
};

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
