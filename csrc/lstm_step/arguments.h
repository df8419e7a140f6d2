// Device-independent checks of lstm_step's arguments.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "../core/checks.h"
#include "problem.h"
#include "stages.h"

namespace metakern {

// A weight's name in messages: weights[5] (weight_hh_l1).
struct WeightName {
  const LstmStepProblem& problem;
  int index;

  friend std::ostream& operator<<(std::ostream& out, const WeightName& name) {
    static const char* const of_a_layer[] = {"weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l"};
    out << "weights[" << name.index << "] (";
    const int layer = name.index / 4;
    if (layer < name.problem.num_layers) return out << of_a_layer[name.index % 4] << layer << ')';
    const int own = name.index - 4 * name.problem.num_layers;
    if (own < 2) return out << (own == 0 ? "head.weight)" : "head.bias)");
    return out << (own == 2 && name.problem.stages.features_weights > 0 ? "of the features)" : "of the head)");
  }
};

// `copies`: size of the weights' first axis where there are several sets of them, else `shared`.
inline void check_weights(const LstmStepProblem& p, const std::vector<Tensor>& weights, ScalarType dtype,
                          int64_t copies) {
  const int64_t H = p.hidden_size;
  int at = 0;
  const auto check_next = [&](std::initializer_list<int64_t> shape) {
    check_shape(weights[at], WeightName{p, at}, shape, copies);
    check_dtype(weights[at], WeightName{p, at}, dtype);
    ++at;
  };
  for (int l = 0; l < p.num_layers; ++l) {
    check_next({4 * H, p.inputs(l)});
    check_next({4 * H, H});
    check_next({4 * H});
    check_next({4 * H});
  }
  check_next({p.stages.outputs, H});
  check_next({p.stages.outputs});
  if (p.stages.features_weights > 0) check_next({p.stages.features_weights});
  if (p.stages.head_weights > 0) check_next({p.stages.head_weights});
}

// The non-tensor arguments of a call.
struct LstmStepOptions {
  int64_t features, head;
  double preprocess_scale, beta1, beta2, output_scale;
  int64_t precision;
};

// Options of the operators with the default head, "add".
inline LstmStepOptions plain_options(int64_t preprocess, double preprocess_scale, double output_scale,
                                     int64_t precision) {
  check_value(preprocess >= 0 && preprocess <= 2, "preprocess must be 0, 1 or 2, got ", preprocess);
  return {preprocess, 0, preprocess_scale, 0, 0, output_scale, precision};
}

// Checks the packed state of p.num_coordinates coordinates, and sets the problem's sizes from its shape.
inline void check_state(LstmStepProblem& p, const Tensor& state) {
  if (state.dim() != 5 || state.size(0) != p.num_tiles() || state.size(2) != 2 || state.size(4) != tile_lanes)
    fail_value("state.data must have shape [", p.num_tiles(), ", L, 2, H, ", tile_lanes,
               "] for N = ", p.num_coordinates, ", got ", shape_string(state.sizes()));
  const int64_t L = state.size(1), H = state.size(3);
  check_value(L >= 1 && L <= max_layers && H >= 1 && H <= max_hidden, "state must have 1 to ", max_layers,
              " layers and 1 to ", max_hidden, " hidden units, got ", L, " and ", H);
  p.num_layers = int(L);
  p.hidden_size = int(H);
}

inline void check_options(const LstmStepOptions& options) {
  check_value(options.preprocess_scale > 0 && std::isfinite(options.preprocess_scale),
              "preprocess_scale must be positive and finite, got ", options.preprocess_scale);
  for (const auto& [beta, name] : {std::pair(options.beta1, "beta1"), std::pair(options.beta2, "beta2")})
    check_value(beta >= 0 && beta < 1, name, " must be at least 0 and less than 1, got ", beta);
  check_value(std::isfinite(options.output_scale), "output_scale must be finite, got ", options.output_scale);
  check_value(options.precision >= 0 && options.precision <= 2, "precision must be 0, 1 or 2, got ", options.precision);
}

// The problem described by an operator's arguments. All must be on the device of `params` and have its dtype, or the
// dtype that belongs to it. `name` is the name of `params` in messages: backward passes the grads instead.
inline LstmStepProblem checked_problem(const Tensor& params, const Tensor& state, const std::vector<Tensor>& weights,
                                       const LstmStepOptions& options, const char* name = "grads",
                                       int64_t copies = shared) {
  check_options(options);
  LstmStepProblem p;
  p.num_coordinates = params.numel();
  p.features = int(options.features);
  p.head = int(options.head);
  p.preprocess_scale = options.preprocess_scale;
  p.beta1 = options.beta1;
  p.beta2 = options.beta2;
  p.output_scale = options.output_scale;
  p.precision = Precision(options.precision);
  if (options.features < 0 || options.head < 0 ||
      !with_stages<float>(p, [&](const auto& stages) { p.stages = stages.sizes(p.features); }))
    fail_value("features ", options.features, " and head ", options.head,
               " are no stages that the kernels are compiled for");
  p.dtype = float_dtype(params, name, "float32, bfloat16, float16 or float64");
  check_state(p, state);
  const ScalarType dtype = p.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  if (state.scalar_type() != dtype && (p.dtype == DType::float64 || state.scalar_type() != ScalarType::BFloat16))
    fail_type("state must be ", dtype_name(dtype), " for ", dtype_name(params.scalar_type()), ' ', name, ", got ",
              dtype_name(state.scalar_type()));
  p.state_dtype = float_dtype(state, "state");
  check_same_device(state, "state", params, name);
  const char* own = p.stages.own_weights() > 0 ? ", and those of the stages" : "";
  check_value(weights.size() == size_t(p.num_weights()), "weights must hold 4 tensors a layer and 2 of the head", own,
              ", ", p.num_weights(), " for the state's ", p.num_layers, " layers, got ", weights.size());
  for (int i = 0; i < p.num_weights(); ++i) check_same_device(weights[i], WeightName{p, i}, params, name);
  check_weights(p, weights, dtype, copies);
  return p;
}

// The tensors of the stages, for a problem whose other arguments are checked.
inline void check_stage_tensors(const LstmStepProblem& p, const Tensor& params, const Tensor& stage_state,
                                const Tensor& coordinate_inputs) {
  const ScalarType dtype = p.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  check_shape(stage_state, "stage_state", {p.num_tiles(), p.stages.states, tile_lanes});
  check_shape(coordinate_inputs, "coordinate_inputs", {p.stages.coordinate_inputs, p.num_coordinates});
  for (const auto& [t, name] :
       {std::pair(stage_state, "stage_state"), std::pair(coordinate_inputs, "coordinate_inputs")}) {
    check_dtype(t, name, dtype);
    check_same_device(t, name, params, "params");
  }
}

// Checks for the in-place operator, which reads some tiles while it writes others.
inline void check_in_place(const Tensor& params, const Tensor& grads, const Tensor& state) {
  check_contiguous_in_place(params, "params");
  check_contiguous_in_place(state, "state.data");
  check(!overlap(params, state) && !overlap(grads, state), "params, grads and state must not share memory");
  check(!overlap(params, grads) || params.const_data_ptr() == grads.const_data_ptr(),
        "grads must not share a part of params' memory");
}

// The same for the stages' tensors.
inline void check_stages_in_place(const Tensor& params, const Tensor& grads, const Tensor& state,
                                  const Tensor& stage_state, const Tensor& coordinate_inputs) {
  check_in_place(params, grads, state);
  check_contiguous_in_place(stage_state, "stage_state");
  for (const Tensor* other : {&params, &grads, &state, &coordinate_inputs})
    check(!overlap(stage_state, *other),
          "stage_state must share no memory with params, grads, state and coordinate_inputs");
  check(!overlap(coordinate_inputs, params) && !overlap(coordinate_inputs, state),
        "coordinate_inputs must share no memory with params and state");
}

}  // namespace metakern
