// The checks of lstm_step's arguments that hold on every device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "../core/checks.h"
#include "problem.h"
#include "stages.h"

namespace metakern {

inline void check_weights(const LstmStepProblem& p, const std::vector<Tensor>& weights, ScalarType dtype) {
  const int64_t H = p.hidden_size;
  for (int l = 0; l < p.num_layers; ++l) {
    check_shape(weights[l * 4], "weights[weight_ih]", {4 * H, p.inputs(l)});
    check_shape(weights[l * 4 + 1], "weights[weight_hh]", {4 * H, H});
    check_shape(weights[l * 4 + 2], "weights[bias_ih]", {4 * H});
    check_shape(weights[l * 4 + 3], "weights[bias_hh]", {4 * H});
  }
  int at = p.num_layers * 4;
  check_shape(weights[at++], "weights[head.weight]", {p.stages.outputs, H});
  check_shape(weights[at++], "weights[head.bias]", {p.stages.outputs});
  if (p.stages.features_weights > 0) check_shape(weights[at++], "weights[features]", {p.stages.features_weights});
  if (p.stages.head_weights > 0) check_shape(weights[at++], "weights[head]", {p.stages.head_weights});
  for (const Tensor& w : weights) check_dtype(w, "weights", dtype);
}

// What a call chooses beside its tensors.
struct LstmStepOptions {
  int64_t features, head;
  double preprocess_scale, output_scale;
  int64_t precision;
};

// Of the operators without stages of their own: the head adds.
inline LstmStepOptions plain_options(int64_t preprocess, double preprocess_scale, double output_scale,
                                     int64_t precision) {
  check(preprocess >= 0 && preprocess <= 2, "preprocess must be 0, 1 or 2, got ", preprocess);
  return {preprocess, 0, preprocess_scale, output_scale, precision};
}

// The problem that an operator's arguments describe. All must be on the device of `grads`.
inline LstmStepProblem checked_problem(const Tensor& grads, const Tensor& state, const std::vector<Tensor>& weights,
                                       const LstmStepOptions& options) {
  const auto [features, head, preprocess_scale, output_scale, precision] = options;
  check(preprocess_scale > 0 && std::isfinite(preprocess_scale), "preprocess_scale must be positive and finite, got ",
        preprocess_scale);
  check(std::isfinite(output_scale), "output_scale must be finite, got ", output_scale);
  check(precision >= 0 && precision <= 2, "precision must be 0, 1 or 2, got ", precision);
  if (state.dim() != 5)
    fail("state must have 5 axes [tiles, L, 2, H, ", tile_lanes, "], got ", shape_string(state.sizes()));
  const int64_t L = state.size(1), H = state.size(3);
  check(L >= 1 && L <= max_layers, "state must have 1 to ", max_layers, " layers, got ", L);
  check(H >= 1 && H <= max_hidden, "state must have 1 to ", max_hidden, " hidden units, got ", H);
  LstmStepProblem p;
  p.num_coordinates = grads.numel();
  p.hidden_size = int(H);
  p.num_layers = int(L);
  p.features = int(features);
  p.head = int(head);
  p.num_tasks = 1;
  p.preprocess_scale = preprocess_scale;
  p.output_scale = output_scale;
  p.precision = Precision(precision);
  p.dtype = float_dtype(grads, "grads");
  p.state_dtype = float_dtype(state, "state");
  if (features < 0 || head < 0 ||
      !with_stages<float>(p, [&](const auto& stages) { p.stages = stages.sizes(p.features); }))
    fail("features ", features, " and head ", head, " are no stages that the kernels are compiled for");
  const char* own = p.stages.own_weights() > 0 ? ", and those of the stages" : "";
  check(weights.size() == size_t(p.num_weights()), "weights must hold 4 tensors a layer and 2 of the head", own, ", ",
        p.num_weights(), " for ", L, " layers, got ", weights.size());
  const ScalarType dtype = p.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  check_shape(state, "state", {p.num_tiles(), L, 2, H, tile_lanes});
  if (p.dtype == DType::float64 || p.state_dtype != DType::bfloat16) check_dtype(state, "state", dtype);
  check_same_device(state, "state", grads, "grads");
  for (const Tensor& w : weights) check_same_device(w, "weights", grads, "grads");
  check_weights(p, weights, dtype);
  return p;
}

// The tensors of the stages, for a problem whose other arguments are checked; sets the number of tasks.
inline void check_stage_tensors(LstmStepProblem& p, const Tensor& grads, const Tensor& stage_state,
                                const Tensor& task_inputs) {
  const ScalarType dtype = p.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  check_shape(stage_state, "stage_state", {p.stages.states, p.num_coordinates});
  if (task_inputs.dim() != 2 || task_inputs.size(1) != p.stages.task_inputs)
    fail("task_inputs must have shape [tasks, ", p.stages.task_inputs, "], got ", shape_string(task_inputs.sizes()));
  p.num_tasks = task_inputs.size(0);
  const bool divides = p.num_tasks > 0 ? p.num_coordinates % p.num_tasks == 0 : p.num_coordinates == 0;
  check(divides, "task_inputs must have a row for each task, and as many coordinates in every task: got ", p.num_tasks,
        " rows for ", p.num_coordinates, " coordinates");
  for (const auto& [t, name] : {std::pair(stage_state, "stage_state"), std::pair(task_inputs, "task_inputs")}) {
    check_dtype(t, name, dtype);
    check_same_device(t, name, grads, "grads");
  }
}

// What the in-place operator asks of its arguments: tiles are read while others are written.
inline void check_in_place(const Tensor& params, const Tensor& grads, const Tensor& state) {
  check(params.is_contiguous(), "params must be contiguous to be updated in place");
  check(state.is_contiguous(), "state must be contiguous to be updated in place");
  check(!overlap(params, state) && !overlap(grads, state), "params, grads and state must not share memory");
  check(!overlap(params, grads) || params.const_data_ptr() == grads.const_data_ptr(),
        "grads must not share a part of params' memory");
}

}  // namespace metakern
