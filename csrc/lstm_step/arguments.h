// The checks of lstm_step's arguments that hold on every device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "../core/checks.h"
#include "../math/preprocess.h"
#include "problem.h"

namespace metakern {

// A weight as messages name it: weights[5] (weight_hh_l1).
struct WeightName {
  const LstmStepProblem& problem;
  int index;

  friend std::ostream& operator<<(std::ostream& out, const WeightName& name) {
    static const char* const of_a_layer[] = {"weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l"};
    out << "weights[" << name.index << "] (";
    const int layer = name.index / 4;
    if (layer < name.problem.num_layers) return out << of_a_layer[name.index % 4] << layer << ')';
    return out << (name.index % 4 == 0 ? "head.weight)" : "head.bias)");
  }
};

inline void check_weights(const LstmStepProblem& p, const std::vector<Tensor>& weights, ScalarType dtype) {
  const int64_t H = p.hidden_size;
  const auto check_one = [&](int index, std::initializer_list<int64_t> shape) {
    check_shape(weights[index], WeightName{p, index}, shape);
    check_dtype(weights[index], WeightName{p, index}, dtype);
  };
  for (int l = 0; l < p.num_layers; ++l) {
    check_one(l * 4, {4 * H, p.inputs(l)});
    check_one(l * 4 + 1, {4 * H, H});
    check_one(l * 4 + 2, {4 * H});
    check_one(l * 4 + 3, {4 * H});
  }
  check_one(p.num_layers * 4, {1, H});
  check_one(p.num_layers * 4 + 1, {1});
}

// The layout of the packed state of p.num_coordinates coordinates. Sets the problem's sizes that it holds.
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

inline void check_options(int64_t preprocess, double preprocess_scale, double output_scale, int64_t precision) {
  check_value(preprocess >= 0 && preprocess <= 2, "preprocess must be 0, 1 or 2, got ", preprocess);
  check_value(preprocess_scale > 0 && std::isfinite(preprocess_scale),
              "preprocess_scale must be positive and finite, got ", preprocess_scale);
  check_value(std::isfinite(output_scale), "output_scale must be finite, got ", output_scale);
  check_value(precision >= 0 && precision <= 2, "precision must be 0, 1 or 2, got ", precision);
}

// The problem that an operator's arguments describe. All must have the dtype of `params`, or the one that belongs to
// it, and its device. `name` is what messages call it: the backward has the grads instead.
inline LstmStepProblem checked_problem(const Tensor& params, const Tensor& state, const std::vector<Tensor>& weights,
                                       int64_t preprocess, double preprocess_scale, double output_scale,
                                       int64_t precision, const char* name = "grads") {
  check_options(preprocess, preprocess_scale, output_scale, precision);
  LstmStepProblem p;
  p.num_coordinates = params.numel();
  p.preprocess = int(preprocess);
  p.num_features = num_features(Preprocess(preprocess));
  p.preprocess_scale = preprocess_scale;
  p.output_scale = output_scale;
  p.precision = Precision(precision);
  p.dtype = float_dtype(params, name, "float32, bfloat16, float16 or float64");
  check_state(p, state);
  const ScalarType dtype = p.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  if (state.scalar_type() != dtype && (p.dtype == DType::float64 || state.scalar_type() != ScalarType::BFloat16))
    fail_type("state must be ", dtype_name(dtype), " for ", dtype_name(params.scalar_type()), ' ', name, ", got ",
              dtype_name(state.scalar_type()));
  p.state_dtype = float_dtype(state, "state");
  check_same_device(state, "state", params, name);
  check_value(weights.size() == size_t(p.num_weights()), "weights must hold 4 tensors a layer and 2 of the head, ",
              p.num_weights(), " for the state's ", p.num_layers, " layers, got ", weights.size());
  for (int i = 0; i < p.num_weights(); ++i) check_same_device(weights[i], WeightName{p, i}, params, name);
  check_weights(p, weights, dtype);
  return p;
}

// What the in-place operator asks of its arguments: tiles are read while others are written.
inline void check_in_place(const Tensor& params, const Tensor& grads, const Tensor& state) {
  check_contiguous_in_place(params, "params");
  check_contiguous_in_place(state, "state.data");
  check(!overlap(params, state) && !overlap(grads, state), "params, grads and state must not share memory");
  check(!overlap(params, grads) || params.const_data_ptr() == grads.const_data_ptr(),
        "grads must not share a part of params' memory");
}

}  // namespace metakern
