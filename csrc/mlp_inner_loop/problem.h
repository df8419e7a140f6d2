// The problem that every implementation of mlp_inner_loop solves. No torch header.
//
// Axis legend, here and in every file of this folder:
//   T tasks;  S support samples and Q query samples of a task;  K inner steps;  L layers
//   widths: inputs, then the units of every layer
//   params: per layer weight [units, inputs] and bias [units], shared by the tasks or with a leading task axis
#pragma once
#include <stdint.h>

#include "../core/portable.h"
#include "../math/mlp_kinds.h"

namespace metakern {

constexpr int max_mlp_layers = 8;  // keep in step with MAX_LAYERS in metakern/ops/mlp_inner_loop/__init__.py
constexpr int max_mlp_tensors = 2 * max_mlp_layers;
constexpr int task_lanes = 16;  // tasks are padded to a multiple of this, for every instruction set

// Location of one parameter tensor's learning rates.
struct Rates {
  const void* data;    // null: `rate` of the problem
  int64_t step;        // elements between two steps, 0 where all steps share
  bool per_parameter;  // one for every element of the tensor
};

// Its functions are inlined by force: as weak symbols, one instruction set's copy could serve all.
struct MlpInnerLoopProblem {
  int64_t num_tasks;
  int num_layers;
  int widths[max_mlp_layers + 1];
  int support_samples;
  int query_samples;  // 0 without a query set
  int steps;
  Activation activations[max_mlp_layers];  // of every hidden layer
  double slopes[max_mlp_layers];           // of leaky_relu at and below zero
  TaskLoss loss;
  bool is_double;
  bool shared[max_mlp_tensors];   // one tensor for all tasks
  bool adapted[max_mlp_tensors];  // whether the inner steps change it
  double rate;
  Rates rates[max_mlp_tensors];
  int checkpoint_every;  // steps between two parameters that are kept
  double clip_norm;      // largest norm of a task's gradient by all that adapts; 0: gradients are taken as they are

  MK_INLINE int num_tensors() const { return 2 * num_layers; }
  MK_INLINE int inputs(int tensor) const { return widths[tensor / 2]; }
  MK_INLINE int units(int tensor) const { return widths[tensor / 2 + 1]; }
  MK_INLINE int64_t tensor_size(int tensor) const {
    return tensor % 2 == 0 ? int64_t(units(tensor)) * inputs(tensor) : units(tensor);
  }
  // Offset of a tensor in a task's parameters; one past the last tensor gives their total number.
  MK_INLINE int64_t offset(int tensor) const {
    int64_t n = 0;
    for (int i = 0; i < tensor; ++i) n += tensor_size(i);
    return n;
  }
  MK_INLINE int64_t num_params() const { return offset(num_tensors()); }
  MK_INLINE bool clips() const { return clip_norm > 0; }
  // Whether a hidden layer has this activation.
  MK_INLINE bool has(Activation activation) const {
    for (int l = 0; l + 1 < num_layers; ++l)
      if (activations[l] == activation) return true;
    return false;
  }
  // Whether every activation is linear on either side of zero, with a second derivative of zero.
  MK_INLINE bool is_piecewise_linear() const {
    return !has(Activation::tanh) && !has(Activation::sigmoid) && !has(Activation::gelu);
  }
  MK_INLINE int outputs() const { return widths[num_layers]; }
  MK_INLINE int64_t padded_tasks() const { return (num_tasks + task_lanes - 1) / task_lanes * task_lanes; }
  MK_INLINE int num_checkpoints() const { return (steps + checkpoint_every - 1) / checkpoint_every; }
};

}  // namespace metakern
