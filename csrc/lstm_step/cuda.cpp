// lstm_step's CUDA operators: check the arguments, allocate the results, launch on the current stream of the tensors'
// device.
#include "cuda.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

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

std::tuple<Tensor, Tensor> lstm_step(const Tensor& params_, const Tensor& grads_, const Tensor& state_,
                                     const std::vector<Tensor>& weights, int64_t preprocess, double preprocess_scale,
                                     double output_scale, int64_t precision) {
  check_like(grads_, "grads", params_, "params");
  const auto p = checked_problem(params_, state_, weights,
                                 plain_options(preprocess, preprocess_scale, output_scale, precision), "params");
  const OnDevice on(grads_);
  const Tensor params = as_contiguous(params_), grads = as_contiguous(grads_), state = aligned(state_);
  std::vector<Tensor> kept;
  Tensor new_params = empty_like("the new parameters", params);
  Tensor new_state = empty_like("the new state", state);
  check_cuda(
      cuda_lstm_step_forward(p,
                             {pointers(weights, kept), params.const_data_ptr(), grads.const_data_ptr(),
                              state.const_data_ptr(), new_params.mutable_data_ptr(), new_state.mutable_data_ptr()},
                             on.stream()));
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
  for (const Tensor& w : weights)  // every block reads them, while others already write
    check(!overlap(w, params) && !overlap(w, state), "weights must not share memory with params or state");
  check_value(reinterpret_cast<uintptr_t>(state.const_data_ptr()) % 16 == 0,
              "state must start at a multiple of 16 bytes to be updated in place");
  std::vector<Tensor> kept;
  check_cuda(cuda_lstm_step_forward(p,
                                    {pointers(weights, kept), params.const_data_ptr(), grads.const_data_ptr(),
                                     state.const_data_ptr(), params.mutable_data_ptr(), state.mutable_data_ptr()},
                                    on.stream()));
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
  std::vector<Tensor> kept;
  CudaLstmStepBackward args{};
  args.weights = pointers(weights, kept);
  Tensor grad_grads = empty_like("the gradient of grads", grads);
  Tensor grad_state = empty_like("the gradient of the state", state);
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
  args.grad_new_params = grad_new_params.const_data_ptr();
  args.grad_new_state = grad_new_state.const_data_ptr();
  args.grad_grads = grad_grads.mutable_data_ptr();
  args.grad_state = grad_state.mutable_data_ptr();
  args.workspace = workspace.mutable_data_ptr();
  check_cuda(cuda_lstm_step_backward(p, args, on.stream()));
  return {grad_grads, grad_state, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CUDA, m) {
  m.impl("lstm_step", TORCH_BOX(&lstm_step));
  m.impl("lstm_step_", TORCH_BOX(&lstm_step_));
  m.impl("lstm_step_backward", TORCH_BOX(&lstm_step_backward));
}

}  // namespace metakern
