// Checks of hrnn_step's arguments, the same as in metakern/ops/hrnn_step/__init__.py.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../core/checks.h"
#include "problem.h"

namespace metakern {

constexpr int max_checked_hidden = 32;  // of the definition; these kernels have hrnn_hidden alone
constexpr int hrnn_weights = 5;
constexpr const char* hrnn_weight_names[hrnn_weights] = {"gates", "candidate", "readouts", "scales", "scalars"};

// Arguments that forward and backward share.
struct HrnnStepOperands {
  const std::vector<Tensor>& grads;
  const std::vector<Tensor>& states;
  const Tensor& biases;
  const Tensor& mean_rate;
  const std::vector<Tensor>& weights;

  ScalarType dtype() const { return biases.scalar_type(); }  // of the arithmetic
};

inline void check_count(const std::vector<Tensor>& list, const char* name, size_t count, const char* of = "params") {
  check_value(list.size() == count, name, " must hold a tensor for each of ", of, ", ", count, ", got ", list.size());
}

// A tensor of the arithmetic's dtype, of a given shape, beside biases.
template <class Name>
void check_operand(const Tensor& t, const Name& name, std::initializer_list<int64_t> shape, const Tensor& biases,
                   int64_t copies = shared) {
  check_shape(t, name, shape, copies);
  check_dtype(t, name, biases.scalar_type());
  check_same_device(t, name, biases, "biases");
}

// `copies`: T where each task has weights of its own, [T, *shape], else `shared`.
inline void check_hrnn_weights(HrnnStepProblem& p, const HrnnStepOperands& args, int64_t copies) {
  const std::vector<Tensor>& w = args.weights;
  check_value(w.size() == hrnn_weights, "weights must hold ", hrnn_weights, " tensors, got ", w.size());
  p.attention = w[2].dim() > 1 && w[2].size(w[2].dim() - 2) == max_readouts;
  const auto check_weight = [&](size_t i, std::initializer_list<int64_t> shape) {
    check_operand(w[i], Element{"weights", i, hrnn_weight_names[i]}, shape, args.biases, copies);
  };
  check_weight(0, {2 * hrnn_hidden, hrnn_inputs});
  check_weight(1, {hrnn_hidden, hrnn_inputs});
  check_weight(2, {p.readouts(), hrnn_hidden});
  check_weight(3, {num_scales});
  check_weight(4, {hrnn_scalars});
}

// Number n of coordinates of a segment, of a checked tensor [T, *shape].
inline int64_t segment_size(const Tensor& t) {
  int64_t n = 1;
  for (int axis = 1; axis < t.dim(); ++axis) n *= t.size(axis);
  return n;
}

// One tensor of grads or params, [T, *shape], named in messages as `list`.
inline void check_coordinates(const HrnnStepProblem& p, const Tensor& t, const Element& name, const Tensor& first,
                              const Tensor& biases) {
  if (t.dim() == 0 || t.size(0) != p.num_tasks)
    fail_value(name, " must have shape [T, *shape] with T = ", p.num_tasks, ", got ", shape_string(t.sizes()));
  const bool is_double = biases.scalar_type() == ScalarType::Double;
  const auto dtype = float_dtype(t.scalar_type());
  if (!dtype || (*dtype == DType::float64) != is_double)
    fail_type(name, " must be ", is_double ? "float64" : "float32, bfloat16 or float16", " for ",
              dtype_name(biases.scalar_type()), " biases, got ", dtype_name(t.scalar_type()));
  check_dtype(t, name, first.scalar_type());
  check_same_device(t, name, biases, "biases");
}

// The problem of an operator's arguments. `params` are those of forward; backward, which reads none, passes its grads.
inline HrnnStepProblem checked_hrnn_step(const std::vector<Tensor>& params, const char* params_name,
                                         const HrnnStepOperands& args, bool stacked = false) {
  HrnnStepProblem p{};
  p.num_tensors = int64_t(params.size());
  check_count(args.grads, "grads", params.size(), params_name);
  check_count(args.states, "states", params.size(), params_name);
  const Tensor& biases = args.biases;
  if (args.mean_rate.dim() != 1)
    fail_value("mean_rate must have shape [T], got ", shape_string(args.mean_rate.sizes()));
  p.num_tasks = args.mean_rate.size(0);
  if (biases.dim() != 3 || biases.size(2) % 3 != 0 || biases.size(2) < 3 || biases.size(2) > 3 * max_checked_hidden)
    fail_value("biases must have shape [M, T, 3H] with H of 1 to ", max_checked_hidden, ", got ",
               shape_string(biases.sizes()));
  check_shape(biases, "biases", {p.num_tensors, p.num_tasks, biases.size(2)});
  check_value(biases.size(2) == hrnn_gates, "biases must have shape [M, T, ", hrnn_gates,
              "], as the kernels are compiled ", "for ", hrnn_hidden, " hidden units, got ", biases.size(2) / 3,
              " hidden units");
  check_type(args.dtype() == ScalarType::Float || args.dtype() == ScalarType::Double, "biases must be ",
             dtype_name(ScalarType::Float), ", got ", dtype_name(args.dtype()));
  check_dtype(args.mean_rate, "mean_rate", args.dtype());
  check_same_device(args.mean_rate, "mean_rate", biases, "biases");
  p.dtype = args.dtype() == ScalarType::Double ? DType::float64 : DType::float32;
  for (size_t i = 0; i < params.size(); ++i) {
    check_coordinates(p, params[i], Element{params_name, i}, params[0], biases);
    check_like(args.grads[i], Element{"grads", i}, params[i], params_name);
    check_operand(args.states[i], Element{"states", i}, {p.num_tasks, hrnn_rows, segment_size(params[i])}, biases);
    p.dtype = *float_dtype(params[i].scalar_type());
  }
  check_hrnn_weights(p, args, stacked ? p.num_tasks : shared);
  return p;
}

}  // namespace metakern
