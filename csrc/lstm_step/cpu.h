// Interface between the lstm_step binding and its vectorised loops.
#pragma once
#include "../core/instruction_sets.h"
#include "problem.h"

namespace metakern {

constexpr int block_tiles = 16;  // tiles whose weight gradients are summed in the compute dtype before going to double
constexpr int max_groups = 128;  // partial weight gradients; a function of N alone, so threads do not change bits

MK_INLINE int64_t num_blocks(const LstmStepProblem& p) { return (p.num_tiles() + block_tiles - 1) / block_tiles; }
MK_INLINE int64_t num_groups(const LstmStepProblem& p) {
  return num_blocks(p) < max_groups ? num_blocks(p) : max_groups;
}

struct LstmStepForward {
  const void* packed;
  const void* params;  // [N]
  const void* grads;   // [N]
  const void* state;
  void* new_params;  // [N], may be params
  void* new_state;   // may be state
  const void* stage_state;
  const void* coordinate_inputs;  // [K, N]
  void* new_stage_state;          // may be stage_state
  void* gates;                    // [tiles, L, 5, H, tile_lanes], what is kept for backward; may be null
};

struct LstmStepBackward {
  const void* packed;
  const void* grads;  // [N]
  const void* state;
  const void* grad_new_params;  // [N]
  const void* grad_new_state;
  void* grad_grads;  // [N]
  void* grad_state;
  double* partials;    // [num_groups, flat_weights]
  const void* params;  // [N]; it and its gradient may be null where the head is additive
  const void* stage_state;
  const void* coordinate_inputs;  // [K, N]
  const void* grad_new_stage_state;
  void* grad_params;  // [N]
  void* grad_stage_state;
  void* grad_coordinate_inputs;  // [K, N]
  const void* gates;             // as forward kept them; null to recompute them
};

// The loops of one instruction set and compute dtype. Ranges are half-open.
struct LstmStepKernels {
  int64_t (*packed_bytes)(const LstmStepProblem&, bool for_backward);
  // The parts that a forward and a backward read; a backward whose gates are kept needs its own alone.
  void (*pack)(const LstmStepProblem&, const void* const* weights, bool for_forward, bool for_backward, void* packed);
  void (*forward)(const LstmStepProblem&, const LstmStepForward&, int64_t first_tile, int64_t last_tile);
  int64_t (*scratch_bytes)(const LstmStepProblem&);
  void (*backward)(const LstmStepProblem&, const LstmStepBackward&, void* scratch, int64_t first_group,
                   int64_t last_group);
  // Adds up a range of the elements of all partials, in place.
  void (*sum_partials)(const LstmStepProblem&, double* partials, int64_t first, int64_t last);
  // Writes the gradient of every weight from the sums.
  void (*write_weight_gradients)(const LstmStepProblem&, const double* partials, void* const* grad_weights);
};

MK_DECLARE_KERNELS(LstmStepKernels, lstm_step_kernels, bool is_double)

}  // namespace metakern
