// The checks of inner_update's arguments that hold on every device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../core/checks.h"
#include "problem.h"

namespace metakern {

// Elements of `rate` that one step uses. They lie at `step` times as many, and repeat along `params`.
inline int64_t checked_rate_period(const Tensor& rate, const Tensor& params, int64_t step) {
  const int64_t leading = step >= 0 ? 1 : 0;
  check(rate.dim() >= leading, "lr must have a leading axis of inner steps to select step ", step,
        " from, got shape []");
  if (leading != 0)
    check(step < rate.size(0), "step must be less than the inner steps that lr holds, ", rate.size(0), ", got ", step);
  const int64_t axes = rate.dim() - leading, skipped = params.dim() - axes;
  bool fits = skipped >= 0;
  int64_t period = 1;
  for (int64_t axis = 0; fits && axis < axes; ++axis) {
    fits = rate.size(leading + axis) == params.size(skipped + axis);
    period *= rate.size(leading + axis);
  }
  if (!fits)
    fail("lr must be one number or have the last axes of its params, ", shape_string(params.sizes()),
         leading ? ", behind that of the inner steps" : "", ", got shape ", shape_string(rate.sizes()));
  return period;
}

// The operator's arguments, contiguous and checked; the tensors keep alive what the problem points to.
struct InnerUpdateArguments {
  std::vector<Tensor> params, grads, rates;
  std::optional<Tensor> active;
  std::vector<InnerUpdateTensor> tensors;  // without `updated`
  InnerUpdateProblem problem;
};

inline void check_task_axis(const InnerUpdateArguments& args, int64_t num_tasks) {
  for (const Tensor& p : args.params)
    if (p.dim() == 0 || p.size(0) != num_tasks)
      fail("params must have one leading axis of ", num_tasks, " tasks for clip_norm and active, got shape ",
           shape_string(p.sizes()));
}

// All must be on the device of the first tensor of params.
inline InnerUpdateArguments checked_inner_update(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                                 const std::vector<Tensor>& lr, double rate, int64_t step,
                                                 std::optional<double> clip_norm, const std::optional<Tensor>& active) {
  check(!params.empty(), "params must hold a tensor");
  check(grads.size() == params.size(), "grads must hold as many tensors as params, ", params.size(), ", got ",
        grads.size());
  check(step >= -1, "step must be -1, for lr without an axis of inner steps, or an index, got ", step);
  const bool shared = lr.size() == 1 && lr[0].numel() == 1;
  check(lr.empty() || shared || lr.size() == params.size(),
        "lr must hold no tensor, one of one element, or one for each of ", params.size(), " params, got ", lr.size());
  InnerUpdateArguments args;
  for (const Tensor& r : lr) {
    check_same_device(r, "lr", params[0], "params");
    args.rates.push_back(as_contiguous(r));
  }
  const int64_t start = step < 0 ? 0 : step;
  if (shared) check(start == 0, "step must be 0 for the one step that lr holds, got ", step);
  for (size_t i = 0; i < params.size(); ++i) {
    check_like(grads[i], "grads", params[i], "params");
    check_same_device(params[i], "params", params[0], "params[0]");
    args.params.push_back(as_contiguous(params[i]));
    args.grads.push_back(as_contiguous(grads[i]));
    InnerUpdateTensor t{};
    t.params = args.params[i].const_data_ptr();
    t.grads = args.grads[i].const_data_ptr();
    t.numel = params[i].numel();
    t.rate_period = 1;
    t.dtype = t.rate_dtype = float_dtype(params[i], "params");
    if (!lr.empty()) {
      const Tensor& r = args.rates[shared ? 0 : i];
      t.rate_dtype = float_dtype(r, "lr");
      if (!shared) t.rate_period = checked_rate_period(r, params[i], step);
      t.rates = static_cast<const char*>(r.const_data_ptr()) + start * t.rate_period * int64_t(r.element_size());
    }
    args.tensors.push_back(t);
  }
  InnerUpdateProblem& p = args.problem;
  p = {nullptr, int64_t(params.size()), 1, rate, clip_norm.value_or(0), nullptr, nullptr};
  if (!clip_norm && !active) return args;
  p.num_tasks = params[0].dim() == 0 ? 0 : params[0].size(0);
  check_task_axis(args, p.num_tasks);
  if (clip_norm)
    check(std::isfinite(*clip_norm) && *clip_norm > 0, "clip_norm must be positive and finite, got ", *clip_norm);
  if (active) {
    check_shape(*active, "active", {p.num_tasks});
    check(active->scalar_type() == ScalarType::Bool, "active must be bool");
    check_same_device(*active, "active", params[0], "params");
    args.active = as_contiguous(*active);
    p.active = static_cast<const uint8_t*>(args.active->const_data_ptr());
  }
  return args;
}

}  // namespace metakern
