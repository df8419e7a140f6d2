// Device-independent checks of inner_update's arguments.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../core/checks.h"
#include "problem.h"

namespace metakern {

// Number of elements of `rate` for one step. They start at `step` times this number, and repeat along `params`.
inline int64_t checked_rate_period(const Element& name, const Tensor& rate, const Tensor& params, int64_t step) {
  const int64_t leading = step >= 0 ? 1 : 0;
  check_value(rate.dim() >= leading, name, " must have a leading axis of inner steps for step=", step,
              ", got shape []");
  if (leading != 0)
    check_value(step < rate.size(0), "step must be less than the ", rate.size(0), " inner steps that ", name,
                " holds, got ", step);
  const int64_t axes = rate.dim() - leading, skipped = params.dim() - axes;
  bool fits = skipped >= 0;
  int64_t period = 1;
  for (int64_t axis = 0; fits && axis < axes; ++axis) {
    fits = rate.size(leading + axis) == params.size(skipped + axis);
    period *= rate.size(leading + axis);
  }
  if (!fits)
    fail_value(name, " must have shape [] or the last axes of its params, ", shape_string(params.sizes()),
               leading ? ", behind that of the inner steps" : "", ", got ", shape_string(rate.sizes()));
  return period;
}

// The operator's arguments, contiguous and checked; the tensors keep alive what the problem points to.
struct InnerUpdateArguments {
  std::vector<Tensor> params, grads, rates;
  std::optional<Tensor> active;
  std::vector<InnerUpdateTensor> tensors;  // without `updated`
  InnerUpdateProblem problem;
};

// The number of tasks, the first axis of every tensor of params and of `active`.
inline int64_t checked_tasks(const std::vector<Tensor>& params, const std::optional<Tensor>& active) {
  if (active) {
    check_type(active->scalar_type() == ScalarType::Bool, "active must be a tensor of bool, got ",
               dtype_name(active->scalar_type()));
    if (active->dim() != 1) fail_value("active must have shape [T], got ", shape_string(active->sizes()));
    check_same_device(*active, "active", params[0], "params[0]");
  }
  const int64_t tasks = active ? active->size(0) : params[0].dim() == 0 ? 0 : params[0].size(0);
  bool fits = true;
  for (const Tensor& p : params) fits = fits && p.dim() > 0 && p.size(0) == tasks;
  if (!fits) {
    std::string shapes;
    for (const Tensor& p : params) shapes += (shapes.empty() ? "" : ", ") + shape_string(p.sizes());
    const std::string wanted = active ? joined("a leading axis of the ", tasks, " tasks") : "one leading axis of tasks";
    fail_value("params must have ", wanted, " for clip_norm and active, got shapes [", shapes, ']');
  }
  return tasks;
}

// Element i of params and grads, checked; made contiguous and kept in `args`.
inline InnerUpdateTensor checked_tensor(InnerUpdateArguments& args, const Tensor& params, const Tensor& grads,
                                        const Tensor& first) {
  const size_t i = args.params.size();
  const Element name{"params", i};
  check_same_device(params, name, first, "params[0]");
  check_same_device(grads, Element{"grads", i}, first, "params[0]");
  InnerUpdateTensor t{};
  t.dtype = t.rate_dtype = float_dtype(params, name);
  check_same_shape(grads, Element{"grads", i}, params, "its params");
  check_same_dtype(grads, Element{"grads", i}, params, "its params");
  args.params.push_back(as_contiguous(params));
  args.grads.push_back(as_contiguous(grads));
  t.params = args.params[i].const_data_ptr();
  t.grads = args.grads[i].const_data_ptr();
  t.numel = params.numel();
  t.rate_period = 1;
  return t;
}

// All must be on the device of the first tensor of params.
inline InnerUpdateArguments checked_inner_update(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                                 const std::vector<Tensor>& lr, double rate, int64_t step,
                                                 std::optional<double> clip_norm, const std::optional<Tensor>& active) {
  check_value(!params.empty(), "params must hold a tensor");
  check_value(grads.size() == params.size(), "grads must hold as many tensors as params, ", params.size(), ", got ",
              grads.size());
  check_value(step >= -1, "step must be -1, for lr without an axis of inner steps, or an index, got ", step);
  const bool shared = lr.size() == 1 && lr[0].numel() == 1;
  check_value(lr.empty() || shared || lr.size() == params.size(), "lr must hold one tensor for each of params, ",
              params.size(), ", got ", lr.size());
  if (shared) check_value(step <= 0, "step must be 0 for the one step that lr holds, got ", step);
  InnerUpdateArguments args;
  for (size_t i = 0; i < params.size(); ++i) {
    InnerUpdateTensor t = checked_tensor(args, params[i], grads[i], params[0]);
    if (!lr.empty()) {
      const size_t at = shared ? 0 : i;
      const Element name{"lr", at};
      t.rate_dtype = float_dtype(lr[at], name);
      check_same_device(lr[at], name, params[0], "params[0]");
      if (!shared) t.rate_period = checked_rate_period(name, lr[at], params[i], step);
      if (at == args.rates.size()) args.rates.push_back(as_contiguous(lr[at]));
      const Tensor& r = args.rates[at];
      const int64_t start = step < 0 ? 0 : step;
      t.rates = static_cast<const char*>(r.const_data_ptr()) + start * t.rate_period * int64_t(r.element_size());
    }
    args.tensors.push_back(t);
  }
  InnerUpdateProblem& p = args.problem;
  p = {nullptr, int64_t(params.size()), 1, rate, clip_norm.value_or(0), nullptr, nullptr};
  if (clip_norm)
    check_value(std::isfinite(*clip_norm) && *clip_norm > 0, "clip_norm must be positive and finite, got ", *clip_norm);
  if (!clip_norm && !active) return args;
  p.num_tasks = checked_tasks(params, active);
  if (active) {
    args.active = as_contiguous(*active);
    p.active = static_cast<const uint8_t*>(args.active->const_data_ptr());
  }
  return args;
}

}  // namespace metakern
