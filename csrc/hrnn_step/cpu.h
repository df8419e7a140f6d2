// Interface between the hrnn_step binding and its vectorised loops.
#pragma once
#include "../core/instruction_sets.h"
#include "problem.h"

namespace metakern {

// A segment's coordinates go in tiles of tile_lanes, and its tiles in pieces, whose sums are added up by a fixed tree.
// Both start at the segment's first coordinate: its bits depend neither on threads nor on the other tensors.
constexpr int piece_tiles = 16;

// Partial weight gradients at most; a function of the shapes alone, so threads do not change bits.
constexpr int max_hrnn_groups = 128;

// One tensor of all tasks, contiguous. The last part is of backward alone.
struct HrnnTensor {
  int64_t coordinates;              // n
  int64_t tiles, pieces;            // of one segment
  int64_t first_tile, first_piece;  // counted over all tensors and tasks
  const void* params;
  const void* grads;
  const void* state;
  void* new_params;
  void* new_state;
  void* attended;  // null without attention
  void* steps;     // exp(l_step + o) delta, and exp(l_step) delta of attention

  const void* grad_new_params;
  const void* grad_new_state;
  const void* grad_attended;
  const void* saved_steps;
  void* grad_grads;
  void* grad_state;
};

struct HrnnWeights {
  const void* data[5];  // gates, candidate, readouts, scales, scalars
};

// Sums over a piece: forward adds up h', x, l' and the squares of delta and of attention's delta.
constexpr int forward_sums = hrnn_means + 2;
// Backward, first pass: gradient times step, of the params and of the attended points.
constexpr int dot_sums = 2;
// Backward, second pass: gradients of the pre-activations, of the last feature, then those of all coordinates: of the
// readouts' biases, o and m.
constexpr int row_grad_feature = hrnn_gates, row_grad_readouts = hrnn_gates + 1;
constexpr int row_grad_offset = row_grad_readouts + max_readouts, row_grad_momentum = row_grad_offset + 1;
constexpr int backward_sums = row_grad_momentum + 1;

// Flat layout of one partial copy of the weight gradients; the columns of x and h are apart.
constexpr int flat_x = 0;                                                       // [3H, X]: gates, then candidate
constexpr int flat_gates_h = flat_x + hrnn_gates * hrnn_features;               // [2H, H]
constexpr int flat_candidate_h = flat_gates_h + 2 * hrnn_hidden * hrnn_hidden;  // [H, H]
constexpr int flat_readouts = flat_candidate_h + hrnn_hidden * hrnn_hidden;     // [5, H]
constexpr int flat_scales = flat_readouts + max_readouts * hrnn_hidden;         // [4]
constexpr int flat_scalars = flat_scales + num_scales;                          // as rows row_grad_readouts to the end
constexpr int flat_weights = flat_scalars + max_readouts + 2;

struct HrnnStepArguments {
  const HrnnTensor* tensors;  // [M], and one more whose first_tile and first_piece are the totals
  HrnnWeights weights;
  const HrnnWeights* task_weights;  // [T] where each task has its own; null where all share `weights`
  const void* biases;
  const void* mean_rate;
  double* sums;  // [pieces, the pass's number of sums]
  void* means;
  void* rms;

  const void* grad_means;
  const void* saved_rms;
  double* factors;     // [segments, 2]: of delta in its gradient, and of attention's delta
  double* partials;    // [groups, flat_weights]
  double* grad_rates;  // [segments]: sums of the last feature's gradient
  void* grad_biases;
  void* grad_mean_rate;
  void* grad_weights[5];

  MK_INLINE const HrnnWeights& weights_of(int64_t task) const {
    return task_weights == nullptr ? weights : task_weights[task];
  }
  MK_INLINE int64_t num_tiles(const HrnnStepProblem& p) const { return tensors[p.num_tensors].first_tile; }
  MK_INLINE int64_t num_pieces(const HrnnStepProblem& p) const { return tensors[p.num_tensors].first_piece; }
  MK_INLINE int64_t num_groups(const HrnnStepProblem& p) const {
    const int64_t blocks = (num_tiles(p) + piece_tiles - 1) / piece_tiles;
    return blocks < max_hrnn_groups ? blocks : max_hrnn_groups;
  }
};

// The loops of one instruction set and compute dtype. Ranges are half-open. A range of tiles stands for the pieces that
// start in it.
struct HrnnStepKernels {
  // In this order: new states, steps and sums; means and rms; new params and attended points.
  void (*forward)(const HrnnStepProblem&, const HrnnStepArguments&, int64_t first_tile, int64_t last_tile);
  void (*finish_forward)(const HrnnStepProblem&, const HrnnStepArguments&, int64_t first_segment, int64_t last_segment);
  void (*apply)(const HrnnStepProblem&, const HrnnStepArguments&, int64_t first_tile, int64_t last_tile);

  // Sums for the factors; the factors; everything else, with sums of its own; gradients of the biases; of the rest.
  void (*dots)(const HrnnStepProblem&, const HrnnStepArguments&, int64_t first_tile, int64_t last_tile);
  void (*finish_dots)(const HrnnStepProblem&, const HrnnStepArguments&, int64_t first_segment, int64_t last_segment);
  int64_t scratch_bytes;
  void (*backward)(const HrnnStepProblem&, const HrnnStepArguments&, void* scratch, int64_t first_group,
                   int64_t last_group);
  void (*finish_backward)(const HrnnStepProblem&, const HrnnStepArguments&, int64_t first_segment,
                          int64_t last_segment);
  void (*reduce)(const HrnnStepProblem&, const HrnnStepArguments&);
};

MK_DECLARE_KERNELS(HrnnStepKernels, hrnn_step_kernels, bool is_double)

}  // namespace metakern
