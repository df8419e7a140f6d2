// Interface between the mlp_inner_loop binding and its vectorised loops.
#pragma once
#include "../core/instruction_sets.h"
#include "problem.h"

namespace metakern {

// One set of every task; null pointers without it.
struct MlpSamples {
  const void* x;        // [T, samples, inputs]
  const void* y;        // [T, samples, outputs], or int64 labels [T, samples]
  const uint8_t* mask;  // [T, samples], null where all count
};

// Pointers of a call. Arrays "in lanes" are private to the instruction set: for every group of tasks
// [elements][lanes], then for every single task [elements].
struct MlpInnerLoopCall {
  const void* params[max_mlp_tensors];
  MlpSamples support;
  MlpSamples query;
  void* adapted[max_mlp_tensors];  // [T, ...] each, null where it is not wanted
  void* trajectory;                // [checkpoints, P] in lanes: parameters before every checkpoint_every-th step
  const void* grad_adapted[max_mlp_tensors];  // [T, ...] each, null for zero
  const uint8_t* second_order;                // [K], zero: of first order
  const void* step_weights;                   // [K], of the query loss after every step
  void* losses;                               // [K, T], query losses after every step whose weight is not zero
  void* task_grads;                           // [flat] in lanes, null where no gradient is wanted
  int64_t rate_slots[max_mlp_tensors];        // where a tensor's rate gradients start in `flat`, -1 for none
  int64_t flat;                               // elements of a task's gradients: parameters, then rates
};

// Sum over tasks of weight times gradient, from `task_grads`.
struct MlpReduction {
  const void* weights;     // [T], null for one
  const void* task_grads;  // [flat] in lanes
  int64_t flat;
  int64_t first;  // of the elements that are wanted
  int64_t count;
  bool shared;  // sum over the tasks: [count]; otherwise [T, count]
  void* out;
};

// Split of the tasks into units of work: first groups with a task in each lane, then single tasks.
struct MlpUnits {
  int64_t groups;
  int64_t lanes;
  int64_t singles;

  MK_INLINE int64_t count() const { return groups + singles; }
  MK_INLINE int64_t first_task(int64_t unit) const {
    return unit < groups ? unit * lanes : groups * lanes + unit - groups;
  }
};

using MlpRun = void (*)(const MlpInnerLoopProblem&, const MlpInnerLoopCall&, void* scratch, int64_t first_unit,
                        int64_t last_unit);

// The loops of one instruction set and dtype.
struct MlpInnerLoopKernels {
  MlpUnits (*units)(const MlpInnerLoopProblem&);  // by the problem alone, so that results of its operators fit
  int64_t (*scratch_bytes)(const MlpInnerLoopProblem&, const MlpInnerLoopCall&);
  MlpRun adapt;
  MlpRun adapt_backward;
  MlpRun meta_loss;
  void (*reduce)(const MlpInnerLoopProblem&, const MlpReduction&);
};

MK_DECLARE_KERNELS(MlpInnerLoopKernels, mlp_inner_loop_kernels, bool is_double)

}  // namespace metakern
