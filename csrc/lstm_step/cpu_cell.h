// One layer of LSTM cells for one tile: pre-activations of a few units at a time, then their activations.
#pragma once
#include "../math/activations_avx2.h"
#include "../math/activations_avx512.h"
#include "../math/lstm_cell.h"
#include "cpu_weights.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Arrays of the next tile, prefetched a few cache lines at a time into the second-level cache: a burst of all of a
// tile's lines would occupy the processor's few buffers for misses.
struct NextTile {
  const void* arrays[2];  // either may be null
  int64_t bytes;          // of each
  int64_t fetched = 0;

  MK_INLINE void prefetch(int64_t count) {
    constexpr int64_t cache_line = 64;
    const int64_t end = fetched + count < bytes ? fetched + count : bytes;
    for (const void* array : arrays) {
      if (array == nullptr) continue;
      for (int64_t at = fetched; at < end; at += cache_line)
        __builtin_prefetch(static_cast<const char*>(array) + at, 0, 2);
    }
    fetched = end;
  }
};

// Memory that a layer's units read and write, each [rows][tile_lanes].
template <class S>
struct LayerIO {
  const S* x;  // [inputs]
  const S* h;  // [H]
  const S* c;  // [H]
  S* new_h;    // [H]
  S* new_c;    // [H], null when recomputing for backward
  S* gates;    // [4][H], null in forward
  S* tanh_c;   // [H], null in forward
};

// Pre-activations of M rows of gates: out[m] = bias[m] + sum over k of w[k][m] * rows[k], over the inputs x, then over
// h.
template <class V, int M>
MK_INLINE void gate_rows(const lane_t<V>* w, const LayerIO<lane_t<V>>& io, int inputs, int H, int used_lanes,
                         lane_t<V>* out) {
  for (int lane = 0; lane < used_lanes; lane += U * lanes<V>) {
    const lane_t<V>* at = w;
    V acc[M][U];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) acc[m][u] = broadcast<V>(at[m]);
    at += M;
    const auto add = [&](const lane_t<V>* rows, int count) __attribute__((always_inline)) {
      for (int k = 0; k < count; ++k, at += M, rows += tile_lanes) {
        V y[U];
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) y[u] = load<V>(rows + u * lanes<V>);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
          for (int u = 0; u < U; ++u) acc[m][u] += y[u] * at[m];
      }
    };
    add(io.x + lane, inputs);
    add(io.h + lane, H);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) store(out + m * tile_lanes + lane + u * lanes<V>, acc[m][u]);
  }
}

// The activations of some units from their pre-activations, [unit][gate][tile_lanes], which are overwritten. Split into
// loops of short dependency chains: a unit's whole chain exceeds the processor's out-of-order window.
template <class V>
MK_INLINE void activate(const LayerIO<lane_t<V>>& io, lane_t<V>* rows, int first, int units, int used_lanes) {
  for (int j = 0; j < units; ++j)
    for (int lane = 0; lane < used_lanes; lane += lanes<V>) {
      lane_t<V>* at = rows + j * 4 * tile_lanes + lane;
      store(at, sigmoid_denominator(load<V>(at)));
      store(at + tile_lanes, sigmoid_denominator(load<V>(at + tile_lanes)));
      store(at + 2 * tile_lanes, tanh_numerator(load<V>(at + 2 * tile_lanes)));
      store(at + 3 * tile_lanes, sigmoid_denominator(load<V>(at + 3 * tile_lanes)));
    }
  for (int j = 0; j < units; ++j)
    for (int lane = 0; lane < used_lanes; lane += lanes<V>) {
      lane_t<V>* at = rows + j * 4 * tile_lanes + lane;
      const int64_t to = int64_t(first + j) * tile_lanes + lane;
      const V i = load<V>(at), f = load<V>(at + tile_lanes), g = load<V>(at + 2 * tile_lanes);
      const V c = broadcast<V>(1) / f * load<V>(io.c + to) + g / (i * (g + lane_t<V>(2)));
      store(io.new_c + to, c);
      store(at, tanh_numerator(c));
    }
  for (int j = 0; j < units; ++j)
    for (int lane = 0; lane < used_lanes; lane += lanes<V>) {
      const lane_t<V>* at = rows + j * 4 * tile_lanes + lane;
      const V t = load<V>(at), o = load<V>(at + 3 * tile_lanes);
      store(io.new_h + int64_t(first + j) * tile_lanes + lane, t / (o * (t + lane_t<V>(2))));
    }
}

// The same, also keeping the values for backward.
template <class V>
MK_INLINE void activate_for_backward(const LayerIO<lane_t<V>>& io, const lane_t<V>* rows, int first, int units, int H) {
  const int64_t gate_stride = int64_t(H) * tile_lanes;
  for (int j = 0; j < units; ++j)
    for (int lane = 0; lane < tile_lanes; lane += lanes<V>) {
      const lane_t<V>* at = rows + j * 4 * tile_lanes + lane;
      lane_t<V>* to = io.gates + int64_t(first + j) * tile_lanes + lane;
      store(to, sigmoid(load<V>(at)));
      store(to + gate_stride, sigmoid(load<V>(at + tile_lanes)));
      store(to + 2 * gate_stride, tanh(load<V>(at + 2 * tile_lanes)));
      store(to + 3 * gate_stride, sigmoid(load<V>(at + 3 * tile_lanes)));
    }
  for (int j = 0; j < units; ++j)
    for (int lane = 0; lane < tile_lanes; lane += lanes<V>) {
      const int64_t at = int64_t(first + j) * tile_lanes + lane;
      const lane_t<V>* gates = io.gates + at;
      const V i = load<V>(gates), f = load<V>(gates + gate_stride), g = load<V>(gates + 2 * gate_stride);
      const V t = tanh(f * load<V>(io.c + at) + i * g);
      store(io.tanh_c + at, t);
      store(io.new_h + at, load<V>(gates + 3 * gate_stride) * t);
    }
}

// Values written to unused lanes carry no meaning.
template <class V>
void forward_layer(const LayerIO<lane_t<V>>& io, const lane_t<V>* w, int inputs, int H, int used_lanes,
                   NextTile* next) {
  alignas(64) lane_t<V> rows[4 * group_units * tile_lanes];
  for (int unit = 0; unit < H; unit += group_units) {
    const int units = H - unit < group_units ? H - unit : group_units;
    next->prefetch(int64_t(sizeof(lane_t<V>)) * 2 * units * tile_lanes);  // all of it over all layers
    for (int row = 0; row < 4 * units;) {
      const int count = row_block(4 * units - row);
      lane_t<V>* out = rows + row * tile_lanes;
      switch (count) {
        case 4: gate_rows<V, 4>(w, io, inputs, H, used_lanes, out); break;
        case 6: gate_rows<V, 6>(w, io, inputs, H, used_lanes, out); break;
#if defined(__AVX512F__)
        case 8: gate_rows<V, 8>(w, io, inputs, H, used_lanes, out); break;
        case 16: gate_rows<V, 16>(w, io, inputs, H, used_lanes, out); break;
#endif
      }
      w += count * (1 + inputs + H);
      row += count;
    }
    if (io.gates == nullptr)
      activate<V>(io, rows, unit, units, used_lanes);
    else
      activate_for_backward<V>(io, rows, unit, units, H);
  }
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
