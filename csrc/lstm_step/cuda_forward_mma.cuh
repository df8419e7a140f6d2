// The forward kernel's products on tensor cores: float32 sums of products of weights and hidden states that are rounded
// to TF32 (10 fraction bits) or bfloat16 (7 fraction bits). Everything else stays float32.
//
// The plain stages alone: learned optimizers with other stages have no option for coarser products.
//
// A product of two rounded factors is off by at most 2^-10 of itself (TF32) or 2^-7 (bfloat16).
#pragma once
#include "cuda_forward.cuh"

namespace metakern {
inline namespace MK_CAPABILITY {

// Depth of one product, row strides for loads of B without bank conflicts, and the rounding of the operands.
struct Tf32 {
  static constexpr int depth = 8, stride = 40;
  // Rows of x that this thread feeds to register r: the first of one.
  static __device__ __forceinline__ int row(int t, int r) { return t + 4 * r; }
  template <class Load>
  static __device__ __forceinline__ uint32_t operand(int row, Load load) {
    return to_tf32(load(row));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
};
struct Bf16 {
  static constexpr int depth = 16, stride = 36;
  // The first of two.
  static __device__ __forceinline__ int row(int t, int r) { return 2 * t + 8 * r; }
  template <class Load>
  static __device__ __forceinline__ uint32_t operand(int row, Load load) {
    return pack_bfloat16(load(row), load(row + 1));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bfloat16(d, a, b);
  }
};

// Eight units are a pair of 16-row operands: i and f, then g and o. So the four gates of a unit meet in one thread,
// that of lane 4 * unit + t, for coordinates 8 * n + 2 * t and the next.
template <class Kind, class StoreType, int FixedH>
struct MmaUnits {
  using Stages = PlainStages<float>;
  using Scalar = float;
  using Store = StoreType;
  using Size = Sizes<Stages, FixedH>;
  static constexpr int fixed_hidden = FixedH;
  static constexpr int x_stride = Kind::stride;
  static constexpr int state_stride = sizeof(Store) == 2 ? 40 : Kind::stride;
  static constexpr int max_warps = 12;
  static constexpr int pairs = (FixedH + 7) / 8, blocks = tile_lanes / 8;
  static constexpr int pass_pairs = pairs <= 3 ? pairs : 2;  // whose accumulators fit the registers
  static constexpr bool single_pass = pairs == pass_pairs;
  static_assert(pairs % pass_pairs == 0, "the last pass is a whole one");

  // Shared memory: per layer the bias as [pairs * 8][gate] and the weights as
  // [step of depth inputs, then of hidden units][pair][half][lane][register]; then the head.
  static constexpr int bias_words = pairs * 8 * 4, step_words = pairs * 2 * warp_lanes * 4;
  static MK_INLINE constexpr int steps(int count) { return (count + Kind::depth - 1) / Kind::depth; }
  static MK_INLINE constexpr int layer_inputs(int l) { return l == 0 ? Size::feature_rows : FixedH; }
  static MK_INLINE constexpr int layer_words(int l) {
    return bias_words + (steps(layer_inputs(l)) + steps(FixedH)) * step_words;
  }
  static MK_INLINE constexpr int words_before(int l) { return l == 0 ? 0 : layer_words(0) + (l - 1) * layer_words(1); }
  static MK_INLINE int packed_bytes(int, int layers) { return (words_before(layers) + round_up(FixedH + 1, 4)) * 4; }

  float* memory;
  Weights<float, Size> weights;

  __device__ __forceinline__ MmaUnits(const ForwardArguments<Stages>& a, char* shared)
      : memory(reinterpret_cast<float*>(shared)),
        weights{{FixedH}, nullptr, a.pointers.weights, a.problem.num_layers, a.problem.stages.inputs} {}
  __device__ __forceinline__ const float* head_memory() const { return memory + words_before(weights.layers); }
  __device__ __forceinline__ const Weights<float, Size>& tensors() const { return weights; }
  __device__ __forceinline__ float head(int, int unit) const { return head_memory()[unit]; }
  __device__ __forceinline__ float head_bias(int) const { return head_memory()[FixedH]; }

  __device__ void pack() {
    for (int l = 0; l < weights.layers; ++l) {
      const auto w = weights.layer(l);
      float* out = memory + words_before(l);
      for (int i = threadIdx.x; i < bias_words; i += blockDim.x) out[i] = w.from_tensors(0, i / 4, i % 4);
      out = pack_rows(w, 1, w.inputs, out + bias_words);
      pack_rows(w, 1 + w.inputs, FixedH, out);
    }
    float* out = memory + words_before(weights.layers);
    for (int i = threadIdx.x; i <= FixedH; i += blockDim.x)
      out[i] = i < FixedH ? weights.tensor(4 * weights.layers)[i] : weights.tensor(4 * weights.layers + 1)[0];
  }
  __device__ float* pack_rows(const LayerWeights<float, Size>& w, int first, int count, float* out) const {
    const int words = steps(count) * step_words;
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
      const int reg = i % 4, lane = i / 4 % warp_lanes, half = i / 4 / warp_lanes % 2;
      const int pair = i / 4 / warp_lanes / 2 % pairs, step = i / step_words;
      const int unit = pair * 8 + lane / 4, gate = half * 2 + reg % 2;
      const auto weight = [&](int k) { return k < count ? w.from_tensors(first + k, unit, gate) : 0.0f; };
      out[i] = bit_copy<float>(Kind::operand(step * Kind::depth + Kind::row(lane % 4, reg / 2), weight));
    }
    return out + words;
  }

  using Accumulators = float[pass_pairs][2][blocks][4];

  __device__ __forceinline__ void layer(int l, const LayerIO<MmaUnits>& io) const {
    const int lane = threadIdx.x % warp_lanes;
    const float* bias = memory + words_before(l);
    const float* w = bias + bias_words + lane * 4;
    const int inputs = layer_inputs(l);
#pragma unroll 1
    for (int pair = 0; pair < pairs; pair += pass_pairs) {
      Accumulators acc;
      set_bias(acc, bias + (pair * 8 + lane / 4) * 4);
      const float* pass = w + pair * 2 * warp_lanes * 4;
      add_rows(acc, pass, io.x, x_stride, inputs);
      add_rows(acc, pass + steps(inputs) * step_words, io.h, state_stride, FixedH);
      if (single_pass) __syncwarp();  // new_x may be x
#pragma unroll
      for (int p = 0; p < pass_pairs; ++p)
        if ((pair + p) * 8 + lane / 4 < FixedH) finish_unit(acc[p], io, (pair + p) * 8 + lane / 4);
    }
  }

  static __device__ __forceinline__ void set_bias(Accumulators& acc, const float* bias) {
#pragma unroll
    for (int p = 0; p < pass_pairs; ++p) {
      const Vec4<float> b = load4(bias + p * 8 * 4);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < blocks; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[p][half][n][i] = b[half * 2 + i / 2];
    }
  }

  // acc += weights * x for `count` rows of x; further rows count as zero.
  template <class Element>
  static __device__ __forceinline__ void add_rows(Accumulators& acc, const float* w, const Element* x, int stride,
                                                  int count) {
    const int lane = threadIdx.x % warp_lanes;
#pragma unroll 1
    for (int k = 0; k < count; k += Kind::depth, w += step_words) {
      uint32_t b[blocks][2];
#pragma unroll
      for (int n = 0; n < blocks; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          b[n][r] = Kind::operand(k + Kind::row(lane % 4, r), [&](int row) {
            return row < count ? load1(x + row * stride + n * 8 + lane / 4) : 0.0f;
          });
#pragma unroll
      for (int p = 0; p < pass_pairs; ++p)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Vec4<float> words = load4(w + (p * 2 + half) * warp_lanes * 4);
          const uint32_t a[4] = {bit_copy<uint32_t>(words[0]), bit_copy<uint32_t>(words[1]),
                                 bit_copy<uint32_t>(words[2]), bit_copy<uint32_t>(words[3])};
#pragma unroll
          for (int n = 0; n < blocks; ++n) Kind::multiply(acc[p][half][n], a, b[n]);
        }
    }
  }

  static __device__ __forceinline__ void finish_unit(const float (&acc)[2][blocks][4], const LayerIO<MmaUnits>& io,
                                                     int unit) {
#pragma unroll
    for (int n = 0; n < blocks; ++n) {
      const int at = n * 8 + threadIdx.x % 4 * 2;
      LstmOutput<float> out[2];
#pragma unroll
      for (int q = 0; q < 2; ++q)
        out[q] = lstm_unit<float>({acc[0][n][q], acc[0][n][2 + q], acc[1][n][q], acc[1][n][2 + q]},
                                  load1(io.c + unit * state_stride + at + q));
      store2(io.new_x + unit * x_stride + at, out[0].h, out[1].h);
      store2_global(io.new_h + unit * tile_lanes + at, out[0].h, out[1].h);
      store2_global(io.new_c + unit * tile_lanes + at, out[0].c, out[1].c);
    }
  }
};

}  // namespace MK_CAPABILITY
}  // namespace metakern
