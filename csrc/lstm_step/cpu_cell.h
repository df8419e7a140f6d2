// One layer of LSTM cells for one tile: pre-activations of a few units at a time, then their activations.
#pragma once
#include "../math/activations_avx2.h"
#include "../math/activations_avx512.h"
#include "../math/lstm_cell.h"
#include "cpu_weights.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Arrays of the next tile, inputs and results, prefetched a few cache lines at a time into the second-level cache: a
// burst of all of a tile's lines would occupy the processor's few buffers for misses. Without it, stores of results
// stall as they wait for their lines.
class NextTile {
 public:
  // `steps` calls of prefetch fetch everything that is added.
  explicit NextTile(int steps) : steps_(steps) {}

  void add(const void* array, int64_t bytes) {
    const int64_t lines = (bytes + cache_line - 1) / cache_line;
    arrays_[count_++] = {static_cast<const char*>(array), bytes, (lines + steps_ - 1) / steps_ * cache_line};
  }
  MK_INLINE void prefetch() {
    for (int i = 0; i < count_; ++i) {
      Array& array = arrays_[i];
      const int64_t end = array.step < array.bytes ? array.step : array.bytes;
      for (int64_t at = 0; at < end; at += cache_line) __builtin_prefetch(array.next + at, 0, 2);
      array.next += end;
      array.bytes -= end;
    }
  }

 private:
  struct Array {
    const char* next;
    int64_t bytes;  // still to fetch
    int64_t step;   // bytes a call
  };
  static constexpr int64_t cache_line = 64;
  Array arrays_[4];
  int steps_, count_ = 0;
};

// What a layer's activations leave for backward, whose gates are quotients of it: i = 1 / [0], f = [1],
// g = [2] / ([2] + 2), o = 1 / [3], and with tanh_c = t, tanh(c') = t / (t + 2). Forward needs no more divisions for
// it.
template <class S>
struct LayerGates {
  S* gates;   // [H][4][tile_lanes]
  S* tanh_c;  // [H][tile_lanes]

  // Those of a layer in a tile's [L][5][H][tile_lanes].
  static MK_INLINE LayerGates of_layer(S* tile, int layer, int H) {
    S* const gates = tile + int64_t(layer) * gate_rows_per_unit * H * tile_lanes;
    return {gates, gates + int64_t(4) * H * tile_lanes};
  }
  MK_INLINE LayerGates from_unit(int unit) const {
    return {gates + int64_t(unit) * 4 * tile_lanes, tanh_c + int64_t(unit) * tile_lanes};
  }

  // h' of a unit as forward computes it.
  template <class V>
  MK_INLINE V hidden(int unit, int lane) const {
    const V t = load<V>(tanh_c + int64_t(unit) * tile_lanes + lane);
    const V o = load<V>(gates + (int64_t(unit) * 4 + 3) * tile_lanes + lane);
    return t / (o * (t + S(2)));
  }
  template <class V>
  MK_INLINE LstmActivations<V> activations(int unit, int lane) const {
    const S* at = gates + int64_t(unit) * 4 * tile_lanes + lane;
    const V one = broadcast<V>(1), g = load<V>(at + 2 * tile_lanes);
    const V t = load<V>(tanh_c + int64_t(unit) * tile_lanes + lane);
    LstmActivations<V> u;
    u.gates.i = one / load<V>(at);
    u.gates.f = load<V>(at + tile_lanes);
    u.gates.g = g / (g + S(2));
    u.gates.o = one / load<V>(at + 3 * tile_lanes);
    u.tanh_c = t / (t + S(2));
    u.h = u.gates.o * u.tanh_c;
    return u;
  }
};

// Memory that a layer's units read and write, each [rows][tile_lanes].
template <class S>
struct LayerIO {
  const S* x;          // [inputs]
  const S* h;          // [H]
  const S* c;          // [H]
  S* new_h;            // [H]
  S* new_c;            // [H]
  LayerGates<S> kept;  // null where nothing is kept for backward
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

// The activations of some units from their pre-activations, `rows.gates`, which are overwritten. Split into loops of
// short dependency chains: a unit's whole chain exceeds the processor's out-of-order window.
template <class V>
MK_INLINE void activate(const LayerIO<lane_t<V>>& io, const LayerGates<lane_t<V>>& rows, int first, int units,
                        int used_lanes) {
  for (int j = 0; j < units; ++j)
    for (int lane = 0; lane < used_lanes; lane += lanes<V>) {
      lane_t<V>* at = rows.gates + j * 4 * tile_lanes + lane;
      store(at, sigmoid_denominator(load<V>(at)));
      store(at + tile_lanes, sigmoid_denominator(load<V>(at + tile_lanes)));
      store(at + 2 * tile_lanes, tanh_numerator(load<V>(at + 2 * tile_lanes)));
      store(at + 3 * tile_lanes, sigmoid_denominator(load<V>(at + 3 * tile_lanes)));
    }
  for (int j = 0; j < units; ++j)
    for (int lane = 0; lane < used_lanes; lane += lanes<V>) {
      lane_t<V>* at = rows.gates + j * 4 * tile_lanes + lane;
      const int64_t to = int64_t(first + j) * tile_lanes + lane;
      const V i = load<V>(at), f = broadcast<V>(1) / load<V>(at + tile_lanes), g = load<V>(at + 2 * tile_lanes);
      const V c = f * load<V>(io.c + to) + g / (i * (g + lane_t<V>(2)));
      store(at + tile_lanes, f);
      store(io.new_c + to, c);
      store(rows.tanh_c + j * tile_lanes + lane, tanh_numerator(c));
    }
  for (int j = 0; j < units; ++j)
    for (int lane = 0; lane < used_lanes; lane += lanes<V>)
      store(io.new_h + int64_t(first + j) * tile_lanes + lane, rows.template hidden<V>(j, lane));
}

// Values written to unused lanes carry no meaning.
template <class V>
void forward_layer(const LayerIO<lane_t<V>>& io, const lane_t<V>* w, int inputs, int H, int used_lanes,
                   NextTile* next) {
  alignas(64) lane_t<V> gates[4 * group_units * tile_lanes], tanh_c[group_units * tile_lanes];
  for (int unit = 0; unit < H; unit += group_units) {
    const int units = H - unit < group_units ? H - unit : group_units;
    const LayerGates<lane_t<V>> rows =
        io.kept.gates == nullptr ? LayerGates<lane_t<V>>{gates, tanh_c} : io.kept.from_unit(unit);
    next->prefetch();
    for (int row = 0; row < 4 * units;) {
      const int count = row_block(4 * units - row);
      lane_t<V>* out = rows.gates + row * tile_lanes;
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
    activate<V>(io, rows, unit, units, used_lanes);
  }
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
