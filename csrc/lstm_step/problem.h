// The problem that every implementation of lstm_step solves. No torch header: the loops and the kernels are compiled
// without, and inline functions of other libraries must not be compiled once per instruction set.
//
// Axis legend, here and in every file of this folder:
//   N coordinates, in tiles of `tile_lanes`;  H hidden units;  L layers;  F features;  R outputs of the head
//   E rows of the stages' own state;  K coordinate inputs
//   state: [ceil(N / tile_lanes), L, 2 (h, c), H, tile_lanes], contiguous
//   stage_state: [ceil(N / tile_lanes), E, tile_lanes]; coordinate_inputs: [K, N]
//   weights: per layer weight_ih [4H, F or H], weight_hh [4H, H], bias_ih [4H], bias_hh [4H]; head weight [R, H], bias
//   [R]; then the features' own weights, and the head's own, where there are any
#pragma once
#include <stdint.h>

#include "../core/dtypes.h"
#include "../core/portable.h"

namespace metakern {

constexpr int max_hidden = 64;
constexpr int max_layers = 3;
constexpr int gate_rows_per_unit = 5;  // rows of a unit that the CPU's forward can keep for backward (cpu_cell.h)
constexpr int max_weights = 4 * max_layers + 4;

// Precision of the products of weights and hidden states, named as in torch.set_float32_matmul_precision. A processor
// without the faster product uses a more precise one.
enum class Precision : int { highest, high, medium };  // float32, TF32, bfloat16

// Sizes of a call's stages (stages.h).
struct StageSizes {
  int inputs;             // F
  int outputs;            // R
  int states;             // E
  int coordinate_inputs;  // K
  int features_weights, head_weights;

  MK_INLINE int own_weights() const { return features_weights + head_weights; }
};

// Its functions are inlined by force: as weak symbols, one instruction set's copy could serve all.
struct LstmStepProblem {
  int64_t num_coordinates;
  int hidden_size;
  int num_layers;
  int features;  // index of the features stage; up to 2 metakern::Preprocess
  int head;      // index of the head stage
  StageSizes stages;
  double preprocess_scale;
  double beta1, beta2;  // decays of the moments
  double output_scale;
  Precision precision;
  DType dtype;        // of params and grads; the arithmetic is double for float64 and float otherwise
  DType state_dtype;  // float64 for float64 params, else float32 or bfloat16

  MK_INLINE int64_t num_tiles() const { return (num_coordinates + tile_lanes - 1) / tile_lanes; }
  MK_INLINE int64_t tile_state() const { return int64_t(num_layers) * 2 * hidden_size * tile_lanes; }
  MK_INLINE int64_t tile_gates() const { return int64_t(num_layers) * gate_rows_per_unit * hidden_size * tile_lanes; }
  MK_INLINE int64_t tile_stage_state() const { return int64_t(stages.states) * tile_lanes; }
  MK_INLINE int inputs(int layer) const { return layer == 0 ? stages.inputs : hidden_size; }
  MK_INLINE int num_weights() const {
    return 4 * num_layers + 2 + (stages.features_weights > 0) + (stages.head_weights > 0);
  }
  // Rows for a coordinate's features or their gradients, at least two.
  MK_INLINE int feature_rows() const { return stages.inputs < 2 ? 2 : stages.inputs; }
  // Elements of the head and the stages, which follow the layers in a flat copy.
  MK_INLINE int64_t flat_head() const { return int64_t(stages.outputs) * (hidden_size + 1) + stages.own_weights(); }
  // Elements of one flat copy of the weight gradients, the two equal biases of a layer counted once.
  MK_INLINE int64_t flat_weights() const {
    int64_t n = flat_head();
    for (int l = 0; l < num_layers; ++l) n += int64_t(4) * hidden_size * (inputs(l) + hidden_size + 1);
    return n;
  }
};

}  // namespace metakern
