// Interface between the mlp_inner_loop binding and its CUDA kernels; problem.h has the axis legend.
//
// The functions work on the current device (the caller holds the guard), allocate nothing, copy nothing to the host and
// never wait: calls can be captured in a CUDA graph. What they are given lies in the host's memory and is read before
// they return; all that it points to is contiguous device memory. The arithmetic is double for float64 and float for
// every other dtype; what is private to the operators is stored in it. The same bits in every run on every device.
#pragma once
#include "../core/dtypes.h"
#include "../core/launch_result.h"
#include "problem.h"

namespace metakern {

// The weights of the steps travel in the kernel's arguments. Keep in step with metakern/ops/mlp_inner_loop/__init__.py.
constexpr int max_cuda_mlp_steps = 256;

enum class MlpMode : int { adapt, adapt_backward, meta_loss };

// One set of every task; null pointers without it. A label that names no output makes its task's loss NaN.
struct MlpSetData {
  const void* x;        // [T, samples, inputs]
  const void* y;        // [T, samples, outputs], or int64 labels [T, samples]
  const uint8_t* mask;  // [T, samples], null where all count
};

// Private arrays have rows for padded_tasks() tasks; rows after the last task are set to zero.
struct MlpCudaCall {
  MlpMode mode;
  DType dtype;  // of all that is not private
  const void* params[max_mlp_tensors];
  MlpSetData support;
  MlpSetData query;                           // meta_loss
  void* adapted[max_mlp_tensors];             // adapt: [T, ...] each
  const void* grad_adapted[max_mlp_tensors];  // adapt_backward: [T, ...] each
  void* trajectory;  // [padded T][checkpoints][P], private; written by adapt unless null, read by adapt_backward
  void* task_grads;  // [padded T][flat], private; null where meta_loss wants no gradient
  int64_t flat;      // elements of a task's gradients: parameters, then rates
  int64_t rate_slots[max_mlp_tensors];             // where a tensor's rate gradients start in `flat`, -1 for none
  void* step_losses;                               // meta_loss: [T, K], private
  void* losses;                                    // meta_loss: [T]
  void* scratch;                                   // of MlpCudaPlan::scratch_bytes
  uint32_t second_order[max_cuda_mlp_steps / 32];  // a bit a step
  double step_weights[max_cuda_mlp_steps];         // meta_loss: of the query loss after every step
};

// Data of a task in shared memory beside the latest parameters and one step, most first; the rest is in scratch memory.
enum class MlpPlacement : int {
  all_steps,  // of a segment
  one_step,
  one_step_without_adjoint,
  no_way_back,  // nothing needed for gradients
};

// Resources of a call on the current device; depends on the problem, the mode and the device.
struct MlpCudaPlan {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int64_t scratch_bytes;
  MlpPlacement placement;
  int64_t shared_limit;  // of a block on this device; a problem that takes more is not served
};

// `with_grads`: whether meta_loss computes gradients.
CudaResult cuda_mlp_plan(const MlpInnerLoopProblem& p, MlpMode mode, bool with_grads, MlpCudaPlan* plan);

// One launch; each task runs in one block.
CudaResult cuda_mlp_inner_loop(const MlpInnerLoopProblem& p, const MlpCudaCall& call, const MlpCudaPlan& plan,
                               cudaStream_t stream);

// Sums over tasks of weight times gradient, from `task_grads`, for every tensor of parameters and rates.
struct MlpCudaReduction {
  static constexpr int capacity = 2 * max_mlp_tensors;
  struct Part {
    void* out;      // [elements], or [T, elements] where each task keeps its own
    int64_t first;  // in `flat`
    int64_t elements;
    bool shared;
  };
  Part parts[capacity];
  int num_parts;
  DType dtype;          // of weights and results
  const void* weights;  // [T], null for one
  const void* task_grads;
  int64_t flat;
  int64_t num_tasks;
};

CudaResult cuda_mlp_reduce(const MlpCudaReduction& r, cudaStream_t stream);

}  // namespace metakern
