// Device-independent checks of mlp_update_step's arguments.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <utility>
#include <vector>

#include "../core/checks.h"
#include "problem.h"

namespace metakern {

using Tensors = std::vector<Tensor>;

// Axes of a tensor [T, *shape]. Of equal axes, the later one counts as the larger; one axis has no second.
struct FactoredAxes {
  int largest, second;
};

inline FactoredAxes factored_axes(const Tensor& params) {
  FactoredAxes axes{1, -1};
  for (int axis = 2; axis < int(params.dim()); ++axis) {
    const int64_t size = params.size(axis);
    if (size >= params.size(axes.largest)) {
      axes = {axis, axes.largest};
    } else if (axes.second < 0 || size >= params.size(axes.second)) {
      axes.second = axis;
    }
  }
  return axes;
}

// Checks the shape [T, *axes], or [T, 3, *axes] for a moving mean with three decays; the axes are those of `params`
// without `gone`, or all of them for -1.
inline void check_moment(const Tensor& t, const Element& name, const Tensor& params, bool has_decays, int gone) {
  std::vector<int64_t> expected{params.size(0)};
  if (has_decays) expected.push_back(factor_decays);
  for (int64_t axis = 1; axis < params.dim(); ++axis)
    if (axis != gone) expected.push_back(params.size(axis));
  if (!equal_shapes(t.sizes(), expected))
    fail_value(name, " must have shape ", shape_string(expected), ", got ", shape_string(t.sizes()));
}

inline void check_weights(MlpUpdateProblem& p, const Tensors& weights, const Tensor& decays, ScalarType dtype) {
  const int64_t copies = p.stacked ? p.num_tasks : shared;
  const size_t count = weights.size();
  check_value(count % 2 == 0 && count >= 4 && count <= 2 * (most_hidden_layers + 1),
              "weights must hold 4, 6, 8 or 10 tensors, two a layer, got ", count);
  const Tensor& first = weights[0];
  const int axis = p.stacked ? 1 : 0;
  if (first.dim() != axis + 2 || first.size(axis) < smallest_width || first.size(axis) > largest_width)
    fail_value("weights[0] must have shape [", p.stacked ? "T, " : "", "W, ", mlp_inputs, "] with W of ",
               smallest_width, " to ", largest_width, ", got ", shape_string(first.sizes()));
  p.width = int(first.size(axis));
  p.hidden_layers = int(count) / 2 - 1;
  for (size_t i = 0; i < count; ++i) {
    const int layer = int(i) / 2;
    const Element name{"weights", i};
    if (i % 2)
      check_shape(weights[i], name, {p.outputs(layer)}, copies);
    else
      check_shape(weights[i], name, {p.outputs(layer), layer == 0 ? mlp_inputs : p.width}, copies);
    check_dtype(weights[i], name, dtype);
    check_same_device(weights[i], name, decays, "decays");
  }
}

// The numbers that all tensors share. The messages are those of metakern/ops/mlp_update_step.
inline void check_numbers(MlpUpdateProblem& p, size_t count, const Tensor& decays, const Tensor& rates,
                          const Tensor& keep, const Tensor& steps, double exp_mult) {
  check_value(std::isfinite(exp_mult), "exp_mult must be finite, got ", exp_mult);
  p.exp_mult = exp_mult;
  const bool is_double = decays.scalar_type() == ScalarType::Double;
  const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
  if (!p.stacked) check_shape(decays, "decays", {num_decays});
  check_dtype(decays, "decays", dtype);
  if (steps.dim() != 1) fail_value("steps must have shape [T], got ", shape_string(steps.sizes()));
  if (p.stacked) check_shape(decays, "decays", {num_decays}, steps.size(0));
  check_dtype(steps, "steps", ScalarType::Long);
  check_same_device(steps, "steps", decays, "decays");
  p.num_tensors = int64_t(count);
  p.num_tasks = steps.size(0);
  for (const auto& [t, name] : {std::pair(&rates, "rates"), std::pair(&keep, "keep")}) {
    check_shape(*t, name, {p.num_tensors, p.num_tasks});
    check_dtype(*t, name, dtype);
    check_same_device(*t, name, decays, "decays");
  }
}

struct MlpUpdateLists {
  const Tensors &params, &grads, &m, &v, &r, &c;
};

// Checks element i of the lists.
inline void check_tensor(const MlpUpdateProblem& p, const MlpUpdateLists& lists, size_t i, const Tensor& decays) {
  const Tensor& params = lists.params[i];
  const Element name{"params", i};
  const ScalarType dtype = decays.scalar_type();
  if (params.dim() < 2 || params.dim() > 5 || params.size(0) != p.num_tasks)
    fail_value(name, " must have shape [T, *shape] with T = ", p.num_tasks, " and 1 to 4 axes behind it, got ",
               shape_string(params.sizes()));
  const bool is_double = dtype == ScalarType::Double;
  const auto found = float_dtype(params.scalar_type());
  if (!found || (*found == DType::float64) != is_double)
    fail_type(name, " must be ", is_double ? "float64" : "float32, bfloat16 or float16", " for ", dtype_name(dtype),
              " decays, got ", dtype_name(params.scalar_type()));
  check_dtype(params, name, lists.params[0].scalar_type());
  check_same_device(params, name, decays, "decays");
  check_like(lists.grads[i], Element{"grads", i}, params, "its params");
  const FactoredAxes axes = factored_axes(params);
  const bool is_factored = axes.second > 0;
  check_moment(lists.m[i], {"m", i}, params, true, -1);
  check_moment(lists.v[i], {"v", i}, params, false, -1);
  check_moment(lists.r[i], {"r", i}, params, true, is_factored ? axes.largest : -1);
  if (is_factored)
    check_moment(lists.c[i], {"c", i}, params, true, axes.second);
  else
    check_shape(lists.c[i], Element{"c", i}, {p.num_tasks, factor_decays, 0});
  for (const auto& [list, letter] :
       {std::pair(&lists.m, "m"), std::pair(&lists.v, "v"), std::pair(&lists.r, "r"), std::pair(&lists.c, "c")}) {
    check_dtype((*list)[i], Element{letter, i}, dtype);
    check_same_device((*list)[i], Element{letter, i}, decays, "decays");
  }
}

// The shape of a tensor [T, *shape] that check_tensor has passed.
inline FactoredShape factored_shape_of(const Tensor& params) {
  const FactoredAxes axes = factored_axes(params);
  if (axes.second < 0) return {1, 1, 1, params.size(1), 1, false, false};
  const int one = axes.largest < axes.second ? axes.largest : axes.second;
  const int other = axes.largest + axes.second - one;
  FactoredShape shape{1, params.size(one), 1, params.size(other), 1, true, axes.largest == other};
  for (int axis = 1; axis < int(params.dim()); ++axis)
    if (axis != one && axis != other)
      (axis < one ? shape.outer : axis < other ? shape.middle : shape.inner) *= params.size(axis);
  if (shape.second == 1 && shape.first > 1) {  // no other axis has more than one index: make one long row of it
    std::swap(shape.first, shape.second);
    shape.rows_are_x = !shape.rows_are_x;
  }
  return shape;
}

// The problem that the arguments describe, without its pointers. All must be on the device of `decays` and have its
// dtype, or a dtype that belongs to it.
inline MlpUpdateProblem checked_mlp_update(const MlpUpdateLists& lists, const Tensors& weights, const Tensor& decays,
                                           const Tensor& rates, const Tensor& keep, const Tensor& steps,
                                           double exp_mult, bool stacked = false) {
  MlpUpdateProblem p{};
  p.stacked = stacked;
  const size_t count = lists.params.size();
  check_numbers(p, count, decays, rates, keep, steps, exp_mult);
  check_weights(p, weights, decays, decays.scalar_type());
  for (const auto& [list, name] : {std::pair(&lists.grads, "grads"), std::pair(&lists.m, "m"), std::pair(&lists.v, "v"),
                                   std::pair(&lists.r, "r"), std::pair(&lists.c, "c")})
    check_value(list->size() == count, name, " must hold a tensor for each of params, ", count, ", got ", list->size());
  for (size_t i = 0; i < count; ++i) check_tensor(p, lists, i, decays);
  p.dtype = count > 0                                    ? *float_dtype(lists.params[0].scalar_type())
            : decays.scalar_type() == ScalarType::Double ? DType::float64
                                                         : DType::float32;
  return p;
}

}  // namespace metakern
