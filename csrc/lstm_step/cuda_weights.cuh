// The weights in the kernels' layout: a unit's four gates side by side, packed by each block into shared memory, or
// read directly from the tensors if they do not fit.
#pragma once
#include "../core/storage.cuh"
#include "cuda.h"

namespace metakern {
inline namespace MK_CAPABILITY {

constexpr MK_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Lane `l` of a warp owns coordinates 4 * (l % 8) ... + 3 of a tile, and units l / 8 + 4 * j of a pass, j < J. A warp
// takes a layer's units in passes of 4 * J; the accumulators of a pass stay in registers.
constexpr int unit_groups = 4;

template <int FixedH>
constexpr int units_per_thread = FixedH == 20   ? 5
                                 : FixedH == 32 ? 4
                                                : 2;

// Number of hidden units, a compile-time constant unless FixedH is 0, and the sizes that follow from the stages.
template <class Stages, int FixedH>
struct Sizes {
  static constexpr int fixed = FixedH;
  // Inputs of the lowest layer, at least two: a lone feature gets a second row with zero weights.
  static constexpr int feature_rows = Stages::Features::max_inputs < 2 ? 2 : Stages::Features::max_inputs;
  static constexpr int outputs = Stages::Head::outputs;
  static_assert(outputs <= 4, "the packed head has room for four biases");
  static constexpr int J = units_per_thread<FixedH>;
  static constexpr int pass_units = unit_groups * J;
  static constexpr bool exact = FixedH > 0 && FixedH % pass_units == 0;  // no padding units
  static constexpr bool single_pass = FixedH > 0 && FixedH <= pass_units;
  int any_hidden;

  MK_INLINE int hidden() const { return FixedH > 0 ? FixedH : any_hidden; }
  MK_INLINE int padded() const { return round_up(hidden(), pass_units); }
  // Four floats of padding spread the rows over the banks when lanes read different rows.
  MK_INLINE int packed_stride() const { return padded() * 4 + 4; }
  MK_INLINE int inputs(int layer) const { return layer == 0 ? feature_rows : hidden(); }
  // Rows of a layer: bias_ih + bias_hh, then one for each input, then one for each hidden unit; each [padded H][gate].
  MK_INLINE int layer_rows(int layer) const { return 1 + inputs(layer) + hidden(); }
  MK_INLINE int rows_before(int layer) const {
    return layer == 0 ? 0 : layer_rows(0) + (layer - 1) * (1 + 2 * hidden());
  }
  // The head follows: its weight [R][padded H], its bias in the last four.
  MK_INLINE int packed_head() const { return outputs * padded() + 4; }
  MK_INLINE int packed_elements(int layers) const { return rows_before(layers) * packed_stride() + packed_head(); }
};

// One layer's weights.
template <class S, class Size>
struct LayerWeights {
  Size sizes;
  const S* packed;  // [layer_rows][packed_stride], null: use the tensors
  const S* weight_ih;
  const S* weight_hh;
  const S* bias_ih;
  const S* bias_hh;
  int inputs;         // rows that the products take, a lone feature counted as two
  int tensor_inputs;  // columns of weight_ih

  // Row 0 is the bias, then come the inputs, then the hidden units.
  __device__ __forceinline__ Vec4<S> at(int row, int unit) const {
    if (Size::fixed > 0 || packed != nullptr) return load4(packed + row * sizes.packed_stride() + unit * 4);
    return from_tensors(row, unit);
  }
  __device__ __forceinline__ Vec4<S> from_tensors(int row, int unit) const {
    Vec4<S> w;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) w[gate] = from_tensors(row, unit, gate);
    return w;
  }
  // Zero for a padding unit or feature.
  __device__ __forceinline__ S from_tensors(int row, int unit, int gate) const {
    const int H = sizes.hidden(), k = row - 1, out = gate * H + unit;
    if (unit >= H || (k >= tensor_inputs && k < inputs)) return S(0);
    return row == 0     ? bias_ih[out] + bias_hh[out]
           : k < inputs ? weight_ih[out * tensor_inputs + k]
                        : weight_hh[out * H + k - inputs];
  }
};

// All weights.
template <class S, class Size>
struct Weights {
  Size sizes;
  const S* packed;  // in shared memory, or null
  const CudaWeights& tensors;
  int layers, features;

  __device__ __forceinline__ const S* tensor(int i) const { return static_cast<const S*>(tensors.tensor[i]); }
  __device__ __forceinline__ LayerWeights<S, Size> layer(int l) const {
    return {sizes,
            packed == nullptr ? nullptr : packed + sizes.rows_before(l) * sizes.packed_stride(),
            tensor(4 * l),
            tensor(4 * l + 1),
            tensor(4 * l + 2),
            tensor(4 * l + 3),
            sizes.inputs(l),
            l == 0 ? features : sizes.hidden()};
  }
  __device__ __forceinline__ const S* packed_head() const {
    return packed + sizes.rows_before(layers) * sizes.packed_stride();
  }
  __device__ __forceinline__ S head(int output, int unit) const {
    return Size::fixed > 0 || packed != nullptr ? packed_head()[output * sizes.padded() + unit]
                                                : tensor(4 * layers)[output * sizes.hidden() + unit];
  }
  __device__ __forceinline__ S head_bias(int output) const {
    return Size::fixed > 0 || packed != nullptr ? packed_head()[Size::outputs * sizes.padded() + output]
                                                : tensor(4 * layers + 1)[output];
  }
  __device__ __forceinline__ S packed_head_element(int i) const {
    const int bias = Size::outputs * sizes.padded(), output = i / sizes.padded(), unit = i % sizes.padded();
    if (i >= bias) return i - bias < Size::outputs ? tensor(4 * layers + 1)[i - bias] : S(0);
    return unit < sizes.hidden() ? tensor(4 * layers)[output * sizes.hidden() + unit] : S(0);
  }

  // Must be called by all threads of the block; the caller synchronises.
  __device__ void pack(S* out) const {
    for (int l = 0; l < layers; ++l) {
      const auto w = layer(l);
      S* rows = out + sizes.rows_before(l) * sizes.packed_stride();
      const int count = sizes.layer_rows(l) * sizes.padded();
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int row = i / sizes.padded(), unit = i % sizes.padded();
        store4(rows + row * sizes.packed_stride() + unit * 4, w.from_tensors(row, unit));
      }
    }
    S* head_out = out + sizes.rows_before(layers) * sizes.packed_stride();
    for (int i = threadIdx.x; i < sizes.packed_head(); i += blockDim.x) head_out[i] = packed_head_element(i);
  }
};

// acc[j][gate][q] += w(row, unit j)[gate] * x[q] over `count` rows of x, each of which holds `stride` elements.
template <class S, class Size, class Element, int J>
__device__ __forceinline__ void add_products(S (&acc)[J][4][4], const LayerWeights<S, Size>& w, int row, int unit,
                                             const Element* x, int stride, int count) {
#pragma unroll 2
  for (int k = 0; k < count; ++k) {
    const Vec4<S> value = load4(x + k * stride);
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const Vec4<S> weight = w.at(row + k, unit + j * unit_groups);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
#pragma unroll
        for (int q = 0; q < 4; ++q) acc[j][gate][q] += weight[gate] * value[q];
    }
  }
}

// Pre-activations of the units of one pass; x and h at the thread's first coordinate.
template <class S, class Size, class Element, int J>
__device__ __forceinline__ void preactivations(S (&acc)[J][4][4], const LayerWeights<S, Size>& w, int unit, const S* x,
                                               int x_stride, const Element* h, int h_stride) {
  const Vec4<S> value = load4(x);  // the first row apart: its products start from the bias
#pragma unroll
  for (int j = 0; j < J; ++j) {
    const Vec4<S> bias = w.at(0, unit + j * unit_groups), weight = w.at(1, unit + j * unit_groups);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
#pragma unroll
      for (int q = 0; q < 4; ++q) acc[j][gate][q] = bias[gate] + weight[gate] * value[q];
  }
  add_products(acc, w, 2, unit, x + x_stride, x_stride, w.inputs - 1);
  add_products(acc, w, 1 + w.inputs, unit, h, h_stride, w.sizes.hidden());
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
