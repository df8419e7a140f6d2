// The weights of lstm_step in the order in which its loops read them, and the flat layout of their gradients.
#pragma once
#include "../core/vec.h"
#include "../math/transpose.h"
#include "cpu.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Vectors of lanes that share one broadcast weight. With AVX-512 the multiplication itself broadcasts the weight;
// otherwise a separate load does, which two vectors share.
constexpr int U = vector_bytes == 64 ? 1 : 2;

// Units whose pre-activations are computed before their activations. Their rows of gates are processed in blocks whose
// accumulators fit the registers: 16 rows with AVX-512; with AVX2 6 (of two vectors each); otherwise 4.
constexpr int group_units = vector_bytes == 64 ? 4 : 3;
MK_INLINE constexpr int row_block(int rows) {
  if (vector_bytes == 64) return rows >= 16 ? 16 : rows >= 8 ? 8 : 4;
  return vector_bytes == 32 && rows % 6 == 0 ? 6 : 4;
}

// Inputs that a transposed product takes at once, for a pair of vectors: blocks of nearly one width, none of which is
// narrow.
constexpr int pair = 2;
constexpr int max_input_block = vector_bytes == 64 ? 12 : 6;
MK_INLINE constexpr int input_block(int inputs) {
  const int blocks = (inputs + max_input_block - 1) / max_input_block;
  return (inputs + blocks - 1) / blocks;
}

// Offsets of one layer's gradients in a flat copy: weight_ih [4H, inputs], weight_hh [4H, H], bias [4H] (both biases
// have the same gradient). The head's weight [R, H] and bias [R] follow, and the stages' own weights come last.
struct FlatLayer {
  int64_t weight_ih, weight_hh, bias;
  FlatLayer(const LstmStepProblem& p, int layer) {
    const int64_t H = p.hidden_size;
    int64_t at = 0;
    for (int l = 0; l < layer; ++l) at += 4 * H * (p.inputs(l) + H + 1);
    weight_ih = at;
    weight_hh = weight_ih + 4 * H * p.inputs(layer);
    bias = weight_hh + 4 * H * H;
  }
};

// One allocation: per layer the forward part, the head's weight and bias, the stages' own weights, then per layer the
// transposed parts, which only backward needs.
//   forward: rows of gates as [unit][gate], by their blocks: bias_ih + bias_hh [row], then [input, then hidden][row]
//   transposed x, transposed h: per block of inputs: [gate row][input]
template <class S>
class PackedWeights {
 public:
  PackedWeights(const LstmStepProblem& problem, S* memory) : p(problem), data(memory) {}

  S* forward(int layer) const {
    S* at = data;
    for (int l = 0; l < layer; ++l) at += 4 * H() * (p.inputs(l) + H() + 1);
    return at;
  }
  S* head() const { return forward(p.num_layers); }
  S* head_bias() const { return head() + p.stages.outputs * H(); }
  S* features_weights() const { return head_bias() + p.stages.outputs; }
  S* head_weights() const { return features_weights() + p.stages.features_weights; }
  S* transposed_x(int layer) const {
    S* at = head() + p.flat_head();
    for (int l = 0; l < layer; ++l) at += 4 * H() * (p.inputs(l) + H());
    return at;
  }
  S* transposed_h(int layer) const { return transposed_x(layer) + 4 * H() * p.inputs(layer); }
  int64_t elements(bool with_transposed) const {
    return (with_transposed ? transposed_x(p.num_layers) : head() + p.flat_head()) - data;
  }

 private:
  int64_t H() const { return p.hidden_size; }
  const LstmStepProblem& p;
  S* data;
};

// Packing stores whole vectors, so up to one vector is written after the last element.
template <class S>
int64_t packed_bytes(const LstmStepProblem& p, bool for_backward) {
  return (PackedWeights<S>(p, nullptr).elements(for_backward) + lanes<vec_t<S>>)*int64_t(sizeof(S));
}

// out[k * M + m] = rows[m][k] for M rows of `columns`. In vectors where one holds M elements: every store overwrites
// what the one before wrote after its M elements. Packing element by element took a tenth of a small step.
template <class S, int M>
MK_INLINE void pack_rows(const S* const rows[M], int columns, S* out) {
  using V = vec_t<S>;
  constexpr int n = lanes<V>;
  if constexpr (M <= n) {
    for (int k = 0; k < columns; k += n) {
      const int count = columns - k < n ? columns - k : n;
      V tile[n];
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m)
        tile[m] = m >= M ? V{} : count == n ? load<V>(rows[m] + k) : load_first<V>(rows[m] + k, count);
      transpose_lanes(tile);
      if (count == n) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store(out + (k + i) * M, tile[i]);
      } else {
        for (int i = 0; i < count; ++i) store(out + (k + i) * M, tile[i]);
      }
    }
  } else {
    for (int k = 0; k < columns; ++k)
      for (int m = 0; m < M; ++m) out[k * M + m] = rows[m][k];
  }
}

// The next M rows of gates from row `first` of a group of units on; returns where the packed ones end.
template <class S, int M>
S* pack_gate_rows(S* out, const S* const w[4], int inputs, int H, int unit, int first) {
  const S *x[M], *h[M];
  for (int m = 0; m < M; ++m) {
    const int row = (first + m) % 4 * H + unit + (first + m) / 4;
    out[m] = w[2][row] + w[3][row];
    x[m] = w[0] + row * inputs;
    h[m] = w[1] + row * H;
  }
  pack_rows<S, M>(x, inputs, out + M);
  pack_rows<S, M>(h, H, out + (1 + inputs) * M);
  return out + (1 + inputs + H) * M;
}

template <class S>
S* pack_forward(S* out, const S* const w[4], int inputs, int H) {
  for (int unit = 0; unit < H; unit += group_units) {
    const int rows = 4 * (H - unit < group_units ? H - unit : group_units);
    for (int first = 0; first < rows;) {
      const int count = row_block(rows - first);
      switch (count) {
        case 4: out = pack_gate_rows<S, 4>(out, w, inputs, H, unit, first); break;
        case 6: out = pack_gate_rows<S, 6>(out, w, inputs, H, unit, first); break;
#if defined(__AVX512F__)
        case 8: out = pack_gate_rows<S, 8>(out, w, inputs, H, unit, first); break;
        case 16: out = pack_gate_rows<S, 16>(out, w, inputs, H, unit, first); break;
#endif
      }
      first += count;
    }
  }
  return out;
}

template <class S>
S* pack_transposed(S* out, const S* w, int inputs, int H) {
  using V = vec_t<S>;
  for (int k = 0; k < inputs;) {
    const int count = input_block(inputs - k);
    const S* from = w + k;
    if (count <= lanes<V>) {  // as pack_rows stores
      for (int row = 0; row < 4 * H; ++row, from += inputs, out += count) store(out, load_first<V>(from, count));
    } else {
      for (int row = 0; row < 4 * H; ++row, from += inputs)
        for (int i = 0; i < count; ++i) *out++ = from[i];
    }
    k += count;
  }
  return out;
}

template <class S>
void pack_weights(const LstmStepProblem& p, const void* const* weights, bool for_forward, bool for_backward,
                  void* memory) {
  const int H = p.hidden_size;
  const PackedWeights<S> packed(p, static_cast<S*>(memory));
  for (int layer = 0; for_forward && layer < p.num_layers; ++layer) {
    const S* w[4];
    for (int i = 0; i < 4; ++i) w[i] = static_cast<const S*>(weights[layer * 4 + i]);
    pack_forward(packed.forward(layer), w, p.inputs(layer), H);
  }
  S* out = packed.head();
  int weight = p.num_layers * 4;
  const int counts[] = {p.stages.outputs * H, p.stages.outputs, p.stages.features_weights, p.stages.head_weights};
  for (const int count : counts) {
    if (count == 0) continue;
    const S* from = static_cast<const S*>(weights[weight++]);
    for (int i = 0; i < count; ++i) *out++ = from[i];
  }
  if (!for_backward) return;
  for (int layer = 0; layer < p.num_layers; ++layer) {
    out = pack_transposed(out, static_cast<const S*>(weights[layer * 4]), p.inputs(layer), H);
    out = pack_transposed(out, static_cast<const S*>(weights[layer * 4 + 1]), H, H);
  }
}

// Adds up elements [first, last) of the partials by a fixed tree, in spans that stay in the first-level cache.
inline void sum_partials(const LstmStepProblem& p, double* partials, int64_t first, int64_t last) {
  constexpr int64_t span = 256;
  const int64_t n = p.flat_weights(), groups = num_groups(p);
  for (int64_t at = first; at < last; at += span) {
    const int64_t end = at + span < last ? at + span : last;
    for (int64_t step = 1; step < groups; step *= 2)
      for (int64_t group = 0; group + step < groups; group += 2 * step)
        for (int64_t i = at; i < end; ++i) partials[group * n + i] += partials[(group + step) * n + i];
  }
}

template <class S>
void write_weight_gradients(const LstmStepProblem& p, const double* partials, void* const* grad_weights) {
  const int64_t n = p.flat_weights(), H = p.hidden_size;
  const auto copy = [&](int weight, int64_t from, int64_t count) {
    S* out = static_cast<S*>(grad_weights[weight]);
    for (int64_t i = 0; i < count; ++i) out[i] = p.num_coordinates ? S(partials[from + i]) : S(0);
  };
  for (int layer = 0; layer < p.num_layers; ++layer) {
    const FlatLayer at(p, layer);
    copy(layer * 4, at.weight_ih, 4 * H * p.inputs(layer));
    copy(layer * 4 + 1, at.weight_hh, 4 * H * H);
    copy(layer * 4 + 2, at.bias, 4 * H);
    copy(layer * 4 + 3, at.bias, 4 * H);
  }
  int weight = p.num_layers * 4;
  int64_t from = n - p.flat_head();
  const int64_t counts[] = {p.stages.outputs * H, p.stages.outputs, p.stages.features_weights, p.stages.head_weights};
  for (const int64_t count : counts) {
    if (count > 0) copy(weight++, from, count);
    from += count;
  }
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
