// Interface between the lstm_step binding and its vectorised loops. No torch header: the loops are compiled once per
// instruction set, and inline functions of other libraries must not be.
//
// Axis legend, here and in lstm_step.cpp:
//   N coordinates, in tiles of `tile_lanes`;  H hidden units;  L layers;  F features (1 or 2)
//   state: [ceil(N / tile_lanes), L, 2 (h, c), H, tile_lanes], contiguous
//   weights: per layer weight_ih [4H, F or H], weight_hh [4H, H], bias_ih [4H], bias_hh [4H]; head weight [1, H], bias
//   [1]
#pragma once
#include <stdint.h>

#include "../math/portable.h"

namespace metakern {

constexpr int tile_lanes = 32;  // keep in step with TILE_LANES in metakern/ops/lstm_state.py
constexpr int max_hidden = 64;
constexpr int max_layers = 3;
constexpr int block_tiles = 16;  // tiles whose outer products are summed in the compute dtype before going to double
constexpr int max_groups = 128;  // partial weight gradients; a function of N alone, so threads do not change bits

enum class DType : int { float32, float64, bfloat16, float16 };

// Its functions are inlined by force: as weak symbols, one instruction set's copy could serve all.
struct LstmStepProblem {
  int64_t num_coordinates;
  int hidden_size;
  int num_layers;
  int preprocess;  // metakern::Preprocess
  int num_features;
  double preprocess_scale;
  double output_scale;
  DType dtype;  // of params and grads; the arithmetic is double for float64 and float otherwise

  MK_INLINE int64_t num_tiles() const { return (num_coordinates + tile_lanes - 1) / tile_lanes; }
  MK_INLINE int64_t tile_state() const { return int64_t(num_layers) * 2 * hidden_size * tile_lanes; }
  MK_INLINE int inputs(int layer) const { return layer == 0 ? num_features : hidden_size; }
  MK_INLINE int num_weights() const { return 4 * num_layers + 2; }
  // Elements of one flat copy of the weight gradients, the two equal biases of a layer counted once.
  MK_INLINE int64_t flat_weights() const {
    int64_t n = hidden_size + 1;
    for (int l = 0; l < num_layers; ++l) n += int64_t(4) * hidden_size * (inputs(l) + hidden_size + 1);
    return n;
  }
  MK_INLINE int64_t num_blocks() const { return (num_tiles() + block_tiles - 1) / block_tiles; }
  MK_INLINE int64_t num_groups() const { return num_blocks() < max_groups ? num_blocks() : max_groups; }
};

struct LstmStepForward {
  const void* packed;
  const void* params;  // [N]
  const void* grads;   // [N]
  const void* state;
  void* new_params;  // [N], may be params
  void* new_state;   // may be state
};

struct LstmStepBackward {
  const void* packed;
  const void* grads;  // [N]
  const void* state;
  const void* grad_new_params;  // [N]
  const void* grad_new_state;
  void* grad_grads;  // [N]
  void* grad_state;
  double* partials;  // [num_groups, flat_weights]
};

// The loops of one instruction set and compute dtype. Ranges are half-open.
struct LstmStepKernels {
  int64_t (*packed_bytes)(const LstmStepProblem&, bool for_backward);
  void (*pack)(const LstmStepProblem&, const void* const* weights, bool for_backward, void* packed);
  void (*forward)(const LstmStepProblem&, const LstmStepForward&, int64_t first_tile, int64_t last_tile);
  int64_t (*scratch_bytes)(const LstmStepProblem&);
  void (*backward)(const LstmStepProblem&, const LstmStepBackward&, void* scratch, int64_t first_group,
                   int64_t last_group);
  // Adds the partials up by a fixed tree (in place) and writes the gradient of every weight.
  void (*reduce)(const LstmStepProblem&, double* partials, void* const* grad_weights);
};

}  // namespace metakern
