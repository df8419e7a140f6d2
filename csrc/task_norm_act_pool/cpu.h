// Interface between the task_norm_act_pool bindings and their vectorised loops. An item is a channel of a task.
#pragma once
#include "../core/instruction_sets.h"
#include "problem.h"

namespace metakern {

// All tensors are contiguous; gamma, beta and the running statistics may be null.
struct NormForward {
  TaskNormActPoolProblem problem;
  const void *x, *gamma, *beta, *running_mean, *running_var;
  void *y, *mean, *var;
  uint8_t* index;
};

struct NormSaved {
  TaskNormActPoolProblem problem;
  const void *grad_y, *x, *gamma, *mean, *var;
  const uint8_t* index;
};

struct NormBackward {
  NormSaved saved;
  void *grad_x, *grad_gamma, *grad_beta;
};

// The gradients of <grad_x, .> + <grad_gamma, .> + <grad_beta, .>, of which the last two may be null.
struct NormSecond {
  NormSaved saved;
  const void *grad_x, *grad_gamma, *grad_beta;
  void *of_grad_y, *of_x, *of_gamma;
};

struct TaskNormActPoolKernels {
  int64_t (*scratch_bytes)(const TaskNormActPoolProblem&);  // of each range of items
  void (*forward)(const NormForward&, void* scratch, int64_t first_item, int64_t last_item);
  void (*backward)(const NormBackward&, void* scratch, int64_t first_item, int64_t last_item);
  void (*second)(const NormSecond&, void* scratch, int64_t first_item, int64_t last_item);
};

MK_DECLARE_KERNELS(TaskNormActPoolKernels, task_norm_act_pool_kernels, bool is_double)

}  // namespace metakern
