// The CPU operators: check the arguments, allocate the results, run ranges of tiles with the loops of the instruction
// set in use. Uses torch's stable C++ interface, so that one build serves every torch from 2.11 on.
#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../core/result_cache.h"
#include "arguments.h"
#include "cpu_run.h"

namespace metakern {

namespace {

LstmStepProblem cpu_problem(const Tensor& params, const Tensor& state, const std::vector<Tensor>& weights,
                            const LstmStepOptions& options, const char* name = "grads", int64_t copies = shared) {
  const auto p = checked_problem(params, state, weights, options, name, copies);
  check(p.state_dtype != DType::bfloat16,
        "state must be torch.float32 on the CPU, whose kernels keep no bfloat16, got torch.bfloat16");
  return p;
}

Buffer pack(const LstmStepKernels& k, const LstmStepProblem& p, const std::vector<Tensor>& weights, bool for_forward,
            bool for_backward) {
  std::vector<Tensor> contiguous;
  std::vector<const void*> pointers;
  for (const Tensor& w : weights) {
    contiguous.push_back(as_contiguous(w));
    pointers.push_back(contiguous.back().const_data_ptr());
  }
  return pack(k, p, pointers.data(), for_forward, for_backward);
}

// Completes `args` and runs backward; returns the gradients of the weights.
std::vector<Tensor> run_backward(const LstmStepProblem& p, const std::vector<Tensor>& weights, LstmStepBackward args) {
  const LstmStepKernels& k = kernels_for(p);
  const Buffer packed = pack(k, p, weights, args.gates == nullptr, true);
  std::vector<Tensor> grad_weights;
  std::vector<void*> pointers;
  for (const Tensor& w : weights) {
    grad_weights.push_back(torch::stable::new_empty(w, w.sizes()));
    pointers.push_back(grad_weights.back().mutable_data_ptr());
  }
  // Kept from call to call, as results are: fresh from the system, they cost more in page faults than their arithmetic.
  const CachedMemory partials(num_groups(p) * p.flat_weights() * int64_t(sizeof(double)));
  args.packed = packed.get();
  args.partials = static_cast<double*>(partials.data());
  parallel_for(0, num_groups(p), 1, [&](int64_t first, int64_t last) {
    const CachedMemory scratch(k.scratch_bytes(p));
    k.backward(p, args, scratch.data(), first, last);
  });
  const int64_t grain = (1 << 16) / std::max<int64_t>(1, num_groups(p));  // a few partials are not worth two threads
  parallel_for(0, p.flat_weights(), grain,
               [&](int64_t first, int64_t last) { k.sum_partials(p, args.partials, first, last); });
  k.write_weight_gradients(p, args.partials, pointers.data());
  return grad_weights;
}

// Completes `args` with the contiguous tensors that every step has, and takes it; the new ones may be the old ones.
void step_into(const LstmStepProblem& p, const std::vector<Tensor>& weights, const Tensor& params, const Tensor& grads,
               const Tensor& state, Tensor& new_params, Tensor& new_state, LstmStepForward args = {}) {
  const LstmStepKernels& k = kernels_for(p);  // looked up once: packing and loops belong together
  const Buffer packed = pack(k, p, weights, true, false);
  args.packed = packed.get();
  args.params = params.const_data_ptr();
  args.grads = grads.const_data_ptr();
  args.state = state.const_data_ptr();
  args.new_params = new_params.mutable_data_ptr();
  args.new_state = new_state.mutable_data_ptr();
  run_forward(k, p, args);
}

// What forward keeps for backward (cpu_cell.h).
Tensor empty_gates(const LstmStepProblem& p, const Tensor& state) {
  return empty_result(state, {p.num_tiles(), p.num_layers, gate_rows_per_unit, p.hidden_size, tile_lanes});
}

void check_gates(const LstmStepProblem& p, const Tensor& gates, const Tensor& state) {
  check_shape(gates, "gates", {p.num_tiles(), p.num_layers, gate_rows_per_unit, p.hidden_size, tile_lanes});
  check_dtype(gates, "gates", state.scalar_type());
  check_same_device(gates, "gates", state, "state");
}

LstmStepProblem plain_problem(const Tensor& params, const Tensor& grads, const Tensor& state,
                              const std::vector<Tensor>& weights, int64_t preprocess, double preprocess_scale,
                              double output_scale, int64_t precision) {
  check_like(grads, "grads", params, "params");
  return cpu_problem(params, state, weights, plain_options(preprocess, preprocess_scale, output_scale, precision),
                     "params");
}

std::tuple<Tensor, Tensor> plain_step(const LstmStepProblem& p, const Tensor& params_, const Tensor& grads_,
                                      const Tensor& state_, const std::vector<Tensor>& weights, LstmStepForward args) {
  const Tensor params = as_contiguous(params_), grads = as_contiguous(grads_);
  const Tensor state = as_contiguous(state_);
  Tensor new_params = torch::stable::new_empty(params, params.sizes());
  Tensor new_state = empty_result(state);
  step_into(p, weights, params, grads, state, new_params, new_state, args);
  return {new_params, new_state};
}

std::tuple<Tensor, Tensor> lstm_step(const Tensor& params, const Tensor& grads, const Tensor& state,
                                     const std::vector<Tensor>& weights, int64_t preprocess, double preprocess_scale,
                                     double output_scale, int64_t precision) {
  const auto p = plain_problem(params, grads, state, weights, preprocess, preprocess_scale, output_scale, precision);
  return plain_step(p, params, grads, state, weights, {});
}

std::tuple<Tensor, Tensor, Tensor> lstm_step_with_gates(const Tensor& params, const Tensor& grads, const Tensor& state,
                                                        const std::vector<Tensor>& weights, int64_t preprocess,
                                                        double preprocess_scale, double output_scale,
                                                        int64_t precision) {
  const auto p = plain_problem(params, grads, state, weights, preprocess, preprocess_scale, output_scale, precision);
  Tensor gates = empty_gates(p, state);
  LstmStepForward args{};
  args.gates = gates.mutable_data_ptr();
  const auto [new_params, new_state] = plain_step(p, params, grads, state, weights, args);
  return {new_params, new_state, gates};
}

void lstm_step_(Tensor params, const Tensor& grads_, Tensor state, const std::vector<Tensor>& weights,
                int64_t preprocess, double preprocess_scale, double output_scale, int64_t precision) {
  const auto p = plain_problem(params, grads_, state, weights, preprocess, preprocess_scale, output_scale, precision);
  const Tensor grads = as_contiguous(grads_);
  check_in_place(params, grads, state);  // the weights are packed before: they may lie anywhere
  step_into(p, weights, params, grads, state, params, state);
}

using PlainGradients = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

// `gates` as forward kept them, null to recompute them.
PlainGradients plain_backward(const Tensor& grad_new_params_, const Tensor& grad_new_state_, const Tensor& grads_,
                              const Tensor& state_, const Tensor* gates_, const std::vector<Tensor>& weights,
                              const LstmStepOptions& options) {
  const LstmStepProblem p = cpu_problem(grads_, state_, weights, options);
  check_like(grad_new_params_, "grad_new_params", grads_, "grads");
  check_like(grad_new_state_, "grad_new_state", state_, "state");
  if (gates_ != nullptr) check_gates(p, *gates_, state_);
  const Tensor grad_new_params = as_contiguous(grad_new_params_);
  const Tensor grad_new_state = as_contiguous(grad_new_state_);
  const Tensor grads = as_contiguous(grads_), state = as_contiguous(state_);
  const Tensor gates = gates_ == nullptr ? state : as_contiguous(*gates_);
  Tensor grad_grads = torch::stable::new_empty(grads, grads.sizes());
  Tensor grad_state = empty_result(state);
  LstmStepBackward args{};
  args.grads = grads.const_data_ptr();
  args.state = state.const_data_ptr();
  args.grad_new_params = grad_new_params.const_data_ptr();
  args.grad_new_state = grad_new_state.const_data_ptr();
  args.grad_grads = grad_grads.mutable_data_ptr();
  args.grad_state = grad_state.mutable_data_ptr();
  if (gates_ != nullptr) args.gates = gates.const_data_ptr();
  const auto grad_weights = run_backward(p, weights, args);
  return {grad_grads, grad_state, grad_weights};
}

PlainGradients lstm_step_backward(const Tensor& grad_new_params, const Tensor& grad_new_state, const Tensor& grads,
                                  const Tensor& state, const std::vector<Tensor>& weights, int64_t preprocess,
                                  double preprocess_scale, double output_scale, int64_t precision) {
  return plain_backward(grad_new_params, grad_new_state, grads, state, nullptr, weights,
                        plain_options(preprocess, preprocess_scale, output_scale, precision));
}

PlainGradients lstm_step_with_gates_backward(const Tensor& grad_new_params, const Tensor& grad_new_state,
                                             const Tensor& grads, const Tensor& state, const Tensor& gates,
                                             const std::vector<Tensor>& weights, int64_t preprocess,
                                             double preprocess_scale, double output_scale, int64_t precision) {
  return plain_backward(grad_new_params, grad_new_state, grads, state, &gates, weights,
                        plain_options(preprocess, preprocess_scale, output_scale, precision));
}

// ------------------------------------------------------------------------------------------------ with any stages

LstmStepProblem staged_problem(const Tensor& params, const Tensor& grads, const Tensor& state,
                               const Tensor& stage_state, const Tensor& coordinate_inputs,
                               const std::vector<Tensor>& weights, const LstmStepOptions& options,
                               int64_t copies = shared) {
  check_like(grads, "grads", params, "params");
  const LstmStepProblem p = cpu_problem(params, state, weights, options, "params", copies);
  check_stage_tensors(p, params, stage_state, coordinate_inputs);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> staged_step(const LstmStepProblem& p, const Tensor& params_, const Tensor& grads_,
                                               const Tensor& state_, const Tensor& stage_state_,
                                               const Tensor& coordinate_inputs_, const std::vector<Tensor>& weights,
                                               LstmStepForward args) {
  const Tensor params = as_contiguous(params_), grads = as_contiguous(grads_), state = as_contiguous(state_);
  const Tensor stage_state = as_contiguous(stage_state_), coordinate_inputs = as_contiguous(coordinate_inputs_);
  Tensor new_params = torch::stable::new_empty(params, params.sizes());
  Tensor new_state = empty_result(state);
  Tensor new_stage_state = torch::stable::new_empty(stage_state, stage_state.sizes());
  args.stage_state = stage_state.const_data_ptr();
  args.coordinate_inputs = coordinate_inputs.const_data_ptr();
  args.new_stage_state = new_stage_state.mutable_data_ptr();
  step_into(p, weights, params, grads, state, new_params, new_state, args);
  return {new_params, new_state, new_stage_state};
}

std::tuple<Tensor, Tensor, Tensor> lstm_step_staged(const Tensor& params, const Tensor& grads, const Tensor& state,
                                                    const Tensor& stage_state, const Tensor& coordinate_inputs,
                                                    const std::vector<Tensor>& weights, int64_t features, int64_t head,
                                                    double features_scale, double beta1, double beta2,
                                                    double head_scale, int64_t precision) {
  const auto p = staged_problem(params, grads, state, stage_state, coordinate_inputs, weights,
                                {features, head, features_scale, beta1, beta2, head_scale, precision});
  return staged_step(p, params, grads, state, stage_state, coordinate_inputs, weights, {});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_step_staged_with_gates(
    const Tensor& params, const Tensor& grads, const Tensor& state, const Tensor& stage_state,
    const Tensor& coordinate_inputs, const std::vector<Tensor>& weights, int64_t features, int64_t head,
    double features_scale, double beta1, double beta2, double head_scale, int64_t precision) {
  const auto p = staged_problem(params, grads, state, stage_state, coordinate_inputs, weights,
                                {features, head, features_scale, beta1, beta2, head_scale, precision});
  Tensor gates = empty_gates(p, state);
  LstmStepForward args{};
  args.gates = gates.mutable_data_ptr();
  const auto [new_params, new_state, new_stage_state] =
      staged_step(p, params, grads, state, stage_state, coordinate_inputs, weights, args);
  return {new_params, new_state, new_stage_state, gates};
}

// Every weight has one more axis in front, of C copies; each of C equal runs of whole tiles has its own copy.
std::tuple<Tensor, Tensor, Tensor> lstm_step_stacked(const Tensor& params_, const Tensor& grads_, const Tensor& state_,
                                                     const Tensor& stage_state_, const Tensor& coordinate_inputs_,
                                                     const std::vector<Tensor>& weights, int64_t features, int64_t head,
                                                     double features_scale, double beta1, double beta2,
                                                     double head_scale, int64_t precision) {
  const int64_t copies = weights.empty() || weights[0].dim() == 0 ? 1 : weights[0].size(0);
  const auto p = staged_problem(params_, grads_, state_, stage_state_, coordinate_inputs_, weights,
                                {features, head, features_scale, beta1, beta2, head_scale, precision}, copies);
  check_value(copies > 0 && p.num_coordinates % (copies * tile_lanes) == 0,
              "params must hold the same number of coordinates for each of ", copies,
              " copies of the weights, a multiple of ", tile_lanes, ", got ", p.num_coordinates, " in all");
  const Tensor params = as_contiguous(params_), grads = as_contiguous(grads_), state = as_contiguous(state_);
  const Tensor stage_state = as_contiguous(stage_state_), coordinate_inputs = as_contiguous(coordinate_inputs_);
  Tensor new_params = torch::stable::new_empty(params, params.sizes());
  Tensor new_state = empty_result(state);
  Tensor new_stage_state = torch::stable::new_empty(stage_state, stage_state.sizes());
  std::vector<Tensor> contiguous;
  std::vector<const void*> pointers;
  std::vector<int64_t> sizes;
  for (const Tensor& w : weights) {
    contiguous.push_back(as_contiguous(w));
    pointers.push_back(contiguous.back().const_data_ptr());
    sizes.push_back(w.numel() / copies * int64_t(w.element_size()));
  }
  LstmStepForward args{};
  args.params = params.const_data_ptr();
  args.grads = grads.const_data_ptr();
  args.state = state.const_data_ptr();
  args.new_params = new_params.mutable_data_ptr();
  args.new_state = new_state.mutable_data_ptr();
  args.stage_state = stage_state.const_data_ptr();
  args.coordinate_inputs = coordinate_inputs.const_data_ptr();
  args.new_stage_state = new_stage_state.mutable_data_ptr();
  const LstmStepKernels& k = kernels_for(p);
  run_forward_copies(k, p, args, pack_copies(k, p, pointers, sizes, copies), copies);
  return {new_params, new_state, new_stage_state};
}

void lstm_step_staged_(Tensor params, const Tensor& grads_, Tensor state, Tensor stage_state,
                       const Tensor& coordinate_inputs_, const std::vector<Tensor>& weights, int64_t features,
                       int64_t head, double features_scale, double beta1, double beta2, double head_scale,
                       int64_t precision) {
  const auto p = staged_problem(params, grads_, state, stage_state, coordinate_inputs_, weights,
                                {features, head, features_scale, beta1, beta2, head_scale, precision});
  const Tensor grads = as_contiguous(grads_), coordinate_inputs = as_contiguous(coordinate_inputs_);
  check_stages_in_place(params, grads, state, stage_state, coordinate_inputs);
  LstmStepForward args{};
  args.stage_state = stage_state.const_data_ptr();
  args.coordinate_inputs = coordinate_inputs.const_data_ptr();
  args.new_stage_state = stage_state.mutable_data_ptr();
  step_into(p, weights, params, grads, state, params, state, args);
}

using StagedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

// `gates` as forward kept them, null to recompute them.
StagedGradients staged_backward(const Tensor& grad_new_params_, const Tensor& grad_new_state_,
                                const Tensor& grad_new_stage_state_, const Tensor& params_, const Tensor& grads_,
                                const Tensor& state_, const Tensor& stage_state_, const Tensor& coordinate_inputs_,
                                const Tensor* gates_, const std::vector<Tensor>& weights,
                                const LstmStepOptions& options) {
  const auto p = staged_problem(params_, grads_, state_, stage_state_, coordinate_inputs_, weights, options);
  check_like(grad_new_params_, "grad_new_params", params_, "params");
  check_like(grad_new_state_, "grad_new_state", state_, "state");
  check_like(grad_new_stage_state_, "grad_new_stage_state", stage_state_, "stage_state");
  if (gates_ != nullptr) check_gates(p, *gates_, state_);
  const Tensor grad_new_params = as_contiguous(grad_new_params_), grad_new_state = as_contiguous(grad_new_state_);
  const Tensor grad_new_stage_state = as_contiguous(grad_new_stage_state_), params = as_contiguous(params_);
  const Tensor grads = as_contiguous(grads_), state = as_contiguous(state_);
  const Tensor stage_state = as_contiguous(stage_state_), coordinate_inputs = as_contiguous(coordinate_inputs_);
  const Tensor gates = gates_ == nullptr ? state : as_contiguous(*gates_);
  Tensor grad_params = torch::stable::new_empty(params, params.sizes());
  Tensor grad_grads = torch::stable::new_empty(grads, grads.sizes());
  Tensor grad_state = empty_result(state);
  Tensor grad_stage_state = torch::stable::new_empty(stage_state, stage_state.sizes());
  Tensor grad_coordinate_inputs = torch::stable::new_empty(coordinate_inputs, coordinate_inputs.sizes());
  LstmStepBackward args{};
  args.grads = grads.const_data_ptr();
  args.state = state.const_data_ptr();
  args.grad_new_params = grad_new_params.const_data_ptr();
  args.grad_new_state = grad_new_state.const_data_ptr();
  args.grad_grads = grad_grads.mutable_data_ptr();
  args.grad_state = grad_state.mutable_data_ptr();
  args.params = params.const_data_ptr();
  args.stage_state = stage_state.const_data_ptr();
  args.coordinate_inputs = coordinate_inputs.const_data_ptr();
  args.grad_new_stage_state = grad_new_stage_state.const_data_ptr();
  args.grad_params = grad_params.mutable_data_ptr();
  args.grad_stage_state = grad_stage_state.mutable_data_ptr();
  args.grad_coordinate_inputs = grad_coordinate_inputs.mutable_data_ptr();
  if (gates_ != nullptr) args.gates = gates.const_data_ptr();
  const auto grad_weights = run_backward(p, weights, args);
  return {grad_params, grad_grads, grad_state, grad_stage_state, grad_coordinate_inputs, grad_weights};
}

StagedGradients lstm_step_staged_backward(const Tensor& grad_new_params, const Tensor& grad_new_state,
                                          const Tensor& grad_new_stage_state, const Tensor& params, const Tensor& grads,
                                          const Tensor& state, const Tensor& stage_state,
                                          const Tensor& coordinate_inputs, const std::vector<Tensor>& weights,
                                          int64_t features, int64_t head, double features_scale, double beta1,
                                          double beta2, double head_scale, int64_t precision) {
  return staged_backward(grad_new_params, grad_new_state, grad_new_stage_state, params, grads, state, stage_state,
                         coordinate_inputs, nullptr, weights,
                         {features, head, features_scale, beta1, beta2, head_scale, precision});
}

StagedGradients lstm_step_staged_with_gates_backward(const Tensor& grad_new_params, const Tensor& grad_new_state,
                                                     const Tensor& grad_new_stage_state, const Tensor& params,
                                                     const Tensor& grads, const Tensor& state,
                                                     const Tensor& stage_state, const Tensor& coordinate_inputs,
                                                     const Tensor& gates, const std::vector<Tensor>& weights,
                                                     int64_t features, int64_t head, double features_scale,
                                                     double beta1, double beta2, double head_scale, int64_t precision) {
  return staged_backward(grad_new_params, grad_new_state, grad_new_stage_state, params, grads, state, stage_state,
                         coordinate_inputs, &gates, weights,
                         {features, head, features_scale, beta1, beta2, head_scale, precision});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) {
  m.impl("lstm_step", TORCH_BOX(&lstm_step));
  m.impl("lstm_step_", TORCH_BOX(&lstm_step_));
  m.impl("lstm_step_backward", TORCH_BOX(&lstm_step_backward));
  m.impl("lstm_step_with_gates", TORCH_BOX(&lstm_step_with_gates));
  m.impl("lstm_step_with_gates_backward", TORCH_BOX(&lstm_step_with_gates_backward));
  m.impl("lstm_step_staged", TORCH_BOX(&lstm_step_staged));
  m.impl("lstm_step_stacked", TORCH_BOX(&lstm_step_stacked));
  m.impl("lstm_step_staged_", TORCH_BOX(&lstm_step_staged_));
  m.impl("lstm_step_staged_backward", TORCH_BOX(&lstm_step_staged_backward));
  m.impl("lstm_step_staged_with_gates", TORCH_BOX(&lstm_step_staged_with_gates));
  m.impl("lstm_step_staged_with_gates_backward", TORCH_BOX(&lstm_step_staged_with_gates_backward));
}

}  // namespace metakern
