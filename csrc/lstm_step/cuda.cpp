// lstm_step's CUDA operators: check the arguments, allocate the results, launch on the current stream of the tensors'
// device.
#include "cuda.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <type_traits>

#include "../core/torch_device.h"
#include "arguments.h"

namespace metakern {
namespace {

// Pointers to contiguous weights in their natural layout. `kept` holds copies of non-contiguous ones until the launch
// is queued; torch's allocator then reuses their memory only for later work of this stream.
CudaWeights pointers(const std::vector<Tensor>& weights, std::vector<Tensor>& kept) {
  CudaWeights result{};
  for (size_t i = 0; i < weights.size(); ++i) {
    kept.push_back(as_contiguous(weights[i]));
    result.tensor[i] = kept.back().const_data_ptr();
  }
  return result;
}

// Tiles are read 16 bytes at a time, but a view may start at any address.
Tensor aligned(const Tensor& t) {
  const Tensor c = as_contiguous(t);
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : torch::stable::clone(c);
}

// Completes `args` and launches a step from tensors in the kernels' layout; the new ones may be the old ones.
void step_into(const LstmStepProblem& p, const std::vector<Tensor>& weights, const Tensor& params, const Tensor& grads,
               const Tensor& state, Tensor& new_params, Tensor& new_state, cudaStream_t stream,
               CudaLstmStepForward args = {}) {
  std::vector<Tensor> kept;
  args.weights = pointers(weights, kept);
  args.params = params.const_data_ptr();
  args.grads = grads.const_data_ptr();
  args.state = state.const_data_ptr();
  args.new_params = new_params.mutable_data_ptr();
  args.new_state = new_state.mutable_data_ptr();
  check_cuda(cuda_lstm_step_forward(p, args, stream));
}

// The same for backward, from grads, the state and the new state's gradient; returns the gradients of the weights.
std::vector<Tensor> run_backward(const LstmStepProblem& p, const std::vector<Tensor>& weights, const Tensor& grads,
                                 const Tensor& state, const Tensor& grad_new_state, Tensor& grad_grads,
                                 Tensor& grad_state, cudaStream_t stream, CudaLstmStepBackward args) {
  std::vector<Tensor> kept;
  args.weights = pointers(weights, kept);
  std::vector<Tensor> grad_weights;
  for (size_t i = 0; i < weights.size(); ++i) {
    grad_weights.push_back(empty_like("the gradient of a weight", weights[i]));
    args.grad_weights[i] = grad_weights.back().mutable_data_ptr();
  }
  const int64_t workspace_bytes = cuda_lstm_step_workspace_bytes(p);
  const Tensor workspace = allocated("partial gradients of the weights", workspace_bytes, [&] {
    return torch::stable::new_empty(grads, {workspace_bytes}, ScalarType::Byte);
  });
  args.grads = grads.const_data_ptr();
  args.state = state.const_data_ptr();
  args.grad_new_state = grad_new_state.const_data_ptr();
  args.grad_grads = grad_grads.mutable_data_ptr();
  args.grad_state = grad_state.mutable_data_ptr();
  args.workspace = workspace.mutable_data_ptr();
  check_cuda(cuda_lstm_step_backward(p, args, stream));
  return grad_weights;
}

// Checks of an in-place step beyond those of check_in_place.
void check_step_in_place(const Tensor& params, const Tensor& state, const std::vector<Tensor>& weights) {
  for (const Tensor& w : weights)  // every block reads them, while others already write
    check(!overlap(w, params) && !overlap(w, state), "weights must not share memory with params or state");
  check_value(reinterpret_cast<uintptr_t>(state.const_data_ptr()) % 16 == 0,
              "state must start at a multiple of 16 bytes to be updated in place");
}

// ---------------------------------------------------------------------------------------------- the plain stages

std::tuple<Tensor, Tensor> lstm_step(const Tensor& params_, const Tensor& grads_, const Tensor& state_,
                                     const std::vector<Tensor>& weights, int64_t preprocess, double preprocess_scale,
                                     double output_scale, int64_t precision) {
  check_like(grads_, "grads", params_, "params");
  const auto p = checked_problem(params_, state_, weights,
                                 plain_options(preprocess, preprocess_scale, output_scale, precision), "params");
  const OnDevice on(grads_);
  const Tensor params = as_contiguous(params_), grads = as_contiguous(grads_), state = aligned(state_);
  Tensor new_params = empty_like("the new parameters", params);
  Tensor new_state = empty_like("the new state", state);
  step_into(p, weights, params, grads, state, new_params, new_state, on.stream());
  return {new_params, new_state};
}

void lstm_step_(Tensor params, const Tensor& grads_, Tensor state, const std::vector<Tensor>& weights,
                int64_t preprocess, double preprocess_scale, double output_scale, int64_t precision) {
  check_like(grads_, "grads", params, "params");
  const auto p = checked_problem(params, state, weights,
                                 plain_options(preprocess, preprocess_scale, output_scale, precision), "params");
  const OnDevice on(grads_);
  const Tensor grads = as_contiguous(grads_);
  check_in_place(params, grads, state);
  check_step_in_place(params, state, weights);
  step_into(p, weights, params, grads, state, params, state, on.stream());
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> lstm_step_backward(const Tensor& grad_new_params_,
                                                                   const Tensor& grad_new_state_, const Tensor& grads_,
                                                                   const Tensor& state_,
                                                                   const std::vector<Tensor>& weights,
                                                                   int64_t preprocess, double preprocess_scale,
                                                                   double output_scale, int64_t precision) {
  const auto p =
      checked_problem(grads_, state_, weights, plain_options(preprocess, preprocess_scale, output_scale, precision));
  check_like(grad_new_params_, "grad_new_params", grads_, "grads");
  check_like(grad_new_state_, "grad_new_state", state_, "state");
  const OnDevice on(grads_);
  const Tensor grad_new_params = as_contiguous(grad_new_params_), grad_new_state = aligned(grad_new_state_);
  const Tensor grads = as_contiguous(grads_), state = aligned(state_);
  Tensor grad_grads = empty_like("the gradient of grads", grads);
  Tensor grad_state = empty_like("the gradient of the state", state);
  CudaLstmStepBackward args{};
  args.grad_new_params = grad_new_params.const_data_ptr();
  const auto grad_weights =
      run_backward(p, weights, grads, state, grad_new_state, grad_grads, grad_state, on.stream(), args);
  return {grad_grads, grad_state, grad_weights};
}

// ------------------------------------------------------------------------------------------------ with any stages

LstmStepProblem staged_problem(const Tensor& params, const Tensor& grads, const Tensor& state,
                               const Tensor& stage_state, const Tensor& coordinate_inputs,
                               const std::vector<Tensor>& weights, const LstmStepOptions& options) {
  check_like(grads, "grads", params, "params");
  const auto p = checked_problem(params, state, weights, options, "params");
  if (p.state_dtype == DType::bfloat16)  // kept by lstm_step alone, to compile fewer kernels
    fail_type("state must be torch.float32 for lstm_step_staged, got torch.bfloat16");
  check_stage_tensors(p, params, stage_state, coordinate_inputs);
  return p;
}

bool has_additive_head(const LstmStepProblem& p) {
  bool additive = false;
  with_stages<float>(p, [&](const auto& stages) { additive = std::decay_t<decltype(stages)>::Head::additive; });
  return additive;
}

std::tuple<Tensor, Tensor, Tensor> lstm_step_staged(const Tensor& params_, const Tensor& grads_, const Tensor& state_,
                                                    const Tensor& stage_state_, const Tensor& coordinate_inputs_,
                                                    const std::vector<Tensor>& weights, int64_t features, int64_t head,
                                                    double features_scale, double beta1, double beta2,
                                                    double head_scale, int64_t precision) {
  const auto p = staged_problem(params_, grads_, state_, stage_state_, coordinate_inputs_, weights,
                                {features, head, features_scale, beta1, beta2, head_scale, precision});
  const OnDevice on(grads_);
  const Tensor params = as_contiguous(params_), grads = as_contiguous(grads_), state = aligned(state_);
  const Tensor stage_state = as_contiguous(stage_state_), coordinate_inputs = as_contiguous(coordinate_inputs_);
  Tensor new_params = empty_like("the new parameters", params);
  Tensor new_state = empty_like("the new state", state);
  Tensor new_stage_state = empty_like("the stages' new state", stage_state);
  CudaLstmStepForward args{};
  args.stages = {stage_state.const_data_ptr(), coordinate_inputs.const_data_ptr()};
  args.new_stage_state = new_stage_state.mutable_data_ptr();
  step_into(p, weights, params, grads, state, new_params, new_state, on.stream(), args);
  return {new_params, new_state, new_stage_state};
}

void lstm_step_staged_(Tensor params, const Tensor& grads_, Tensor state, Tensor stage_state,
                       const Tensor& coordinate_inputs_, const std::vector<Tensor>& weights, int64_t features,
                       int64_t head, double features_scale, double beta1, double beta2, double head_scale,
                       int64_t precision) {
  const auto p = staged_problem(params, grads_, state, stage_state, coordinate_inputs_, weights,
                                {features, head, features_scale, beta1, beta2, head_scale, precision});
  const OnDevice on(grads_);
  const Tensor grads = as_contiguous(grads_), coordinate_inputs = as_contiguous(coordinate_inputs_);
  check_stages_in_place(params, grads, state, stage_state, coordinate_inputs);
  check_step_in_place(params, state, weights);
  for (const Tensor& w : weights) check(!overlap(w, stage_state), "weights must not share memory with stage_state");
  CudaLstmStepForward args{};
  args.stages = {stage_state.const_data_ptr(), coordinate_inputs.const_data_ptr()};
  args.new_stage_state = stage_state.mutable_data_ptr();
  step_into(p, weights, params, grads, state, params, state, on.stream(), args);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_step_staged_backward(
    const Tensor& grad_new_params_, const Tensor& grad_new_state_, const Tensor& grad_new_stage_state_,
    const Tensor& params_, const Tensor& grads_, const Tensor& state_, const Tensor& stage_state_,
    const Tensor& coordinate_inputs_, const std::vector<Tensor>& weights, int64_t features, int64_t head,
    double features_scale, double beta1, double beta2, double head_scale, int64_t precision) {
  const auto p = staged_problem(params_, grads_, state_, stage_state_, coordinate_inputs_, weights,
                                {features, head, features_scale, beta1, beta2, head_scale, precision});
  check_like(grad_new_params_, "grad_new_params", params_, "params");
  check_like(grad_new_state_, "grad_new_state", state_, "state");
  check_like(grad_new_stage_state_, "grad_new_stage_state", stage_state_, "stage_state");
  const OnDevice on(grads_);
  const Tensor grad_new_params = as_contiguous(grad_new_params_), grad_new_state = aligned(grad_new_state_);
  const Tensor grad_new_stage_state = as_contiguous(grad_new_stage_state_), params = as_contiguous(params_);
  const Tensor grads = as_contiguous(grads_), state = aligned(state_);
  const Tensor stage_state = as_contiguous(stage_state_), coordinate_inputs = as_contiguous(coordinate_inputs_);
  Tensor grad_params = has_additive_head(p) ? torch::stable::clone(grad_new_params)
                                            : empty_like("the gradient of the parameters", params);
  Tensor grad_grads = empty_like("the gradient of grads", grads);
  Tensor grad_state = empty_like("the gradient of the state", state);
  Tensor grad_stage_state = empty_like("the gradient of the stages' state", stage_state);
  Tensor grad_inputs = empty_like("the gradient of the coordinate inputs", coordinate_inputs);
  CudaLstmStepBackward args{};
  args.grad_new_params = grad_new_params.const_data_ptr();
  args.stages = {stage_state.const_data_ptr(), coordinate_inputs.const_data_ptr()};
  args.params = params.const_data_ptr();
  args.grad_new_stage_state = grad_new_stage_state.const_data_ptr();
  args.grad_params = grad_params.mutable_data_ptr();
  args.grad_stage_state = grad_stage_state.mutable_data_ptr();
  args.grad_inputs = grad_inputs.mutable_data_ptr();
  const auto grad_weights =
      run_backward(p, weights, grads, state, grad_new_state, grad_grads, grad_state, on.stream(), args);
  return {grad_params, grad_grads, grad_state, grad_stage_state, grad_inputs, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CUDA, m) {
  m.impl("lstm_step", TORCH_BOX(&lstm_step));
  m.impl("lstm_step_", TORCH_BOX(&lstm_step_));
  m.impl("lstm_step_backward", TORCH_BOX(&lstm_step_backward));
  m.impl("lstm_step_staged", TORCH_BOX(&lstm_step_staged));
  m.impl("lstm_step_staged_", TORCH_BOX(&lstm_step_staged_));
  m.impl("lstm_step_staged_backward", TORCH_BOX(&lstm_step_staged_backward));
}

}  // namespace metakern
