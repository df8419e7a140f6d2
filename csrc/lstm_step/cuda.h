// Interface between the lstm_step binding and its CUDA kernels; problem.h has the axis legend.
//
// Every function works on the current device (the caller holds the guard), allocates nothing, copies nothing to the
// host and never waits: calls can be captured in a CUDA graph. All pointers are device pointers to contiguous memory,
// aligned to 16 bytes where a state is meant.
#pragma once
#include "../core/launch_result.h"
#include "problem.h"

namespace metakern {

// In the order of the operator's list (problem.h). float64 for float64 params, float32 otherwise.
struct CudaWeights {
  const void* tensor[max_weights];
};

// The stages' state and inputs; not read where the stages have none.
struct CudaStages {
  const void* state;   // [ceil(N / tile_lanes), E, tile_lanes]
  const void* inputs;  // [K, N]
};

struct CudaLstmStepForward {
  CudaWeights weights;
  const void* params;  // [N]
  const void* grads;   // [N]
  const void* state;
  void* new_params;  // [N], may be params
  void* new_state;   // may be state
  CudaStages stages;
  void* new_stage_state;  // may be stages.state
};

struct CudaLstmStepBackward {
  CudaWeights weights;
  const void* grads;  // [N]
  const void* state;
  const void* grad_new_params;  // [N]
  const void* grad_new_state;   // dtype and shape of state
  void* grad_grads;             // [N]
  void* grad_state;             // dtype and shape of state
  void* grad_weights[max_weights];
  void* workspace;  // cuda_lstm_step_workspace_bytes(problem), aligned to 16 bytes
  CudaStages stages;
  const void* params;                // [N]
  const void* grad_new_stage_state;  // dtype and shape of the stages' state
  void* grad_params;                 // [N]; not written for an additive head, whose gradient is that of the new params
  void* grad_stage_state;            // dtype and shape of the stages' state
  void* grad_inputs;                 // [K, N]
};

// Workspace of backward; depends on the problem alone. Never 0.
int64_t cuda_lstm_step_workspace_bytes(const LstmStepProblem& p);

// The products of the plain stages honour problem.precision for float32 arithmetic and 20 or 32 hidden units; others
// are computed in float32 or, for float64 params, float64.
CudaResult cuda_lstm_step_forward(const LstmStepProblem& p, const CudaLstmStepForward& args, cudaStream_t stream);

// Products are float32 (or float64); problem.precision is ignored. The same bits in every run on a device.
CudaResult cuda_lstm_step_backward(const LstmStepProblem& p, const CudaLstmStepBackward& args, cudaStream_t stream);

}  // namespace metakern
