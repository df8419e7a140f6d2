// Device-independent checks of mlp_inner_loop's arguments.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../core/checks.h"
#include "problem.h"

namespace metakern {

// Arguments common to the operators of this folder.
struct MlpInnerLoopArguments {
  const std::vector<Tensor>& params;
  const std::vector<Tensor>& lr;
  double rate;
  int64_t steps;
  bool per_step;
  int64_t adapted;                          // bit i: whether params[i] is
  const std::vector<int64_t>& activations;  // one for every hidden layer, or one for all
  int64_t loss;
  int64_t checkpoint_every;
  const std::vector<double>& slopes;  // of leaky_relu, one for every activation; or none
  std::optional<double> clip_norm;
};

inline void check_mlp_param(MlpInnerLoopProblem& p, const Tensor& t, size_t i, const Tensor& first) {
  const Element name{"params", i};
  const int64_t own = i % 2 == 0 ? 2 : 1, most = int64_t(1) << 20;
  if (t.dim() != own && t.dim() != own + 1)
    fail_value(name, " must have ", own, " axes, or one more for the tasks, got ", shape_string(t.sizes()));
  p.shared[i] = t.dim() == own;
  if (!p.shared[i] && t.size(0) != p.num_tasks)
    fail_value(name, " must share the task axis, T = ", p.num_tasks, ", got ", shape_string(t.sizes()));
  const int64_t units = t.size(t.dim() - own), inputs = i % 2 == 0 ? t.size(t.dim() - 1) : 0;
  if (units < 1 || units > most || inputs > most)
    fail_value(name, " must have 1 to ", most, " units and inputs, got ", shape_string(t.sizes()));
  if (i == 0) p.widths[0] = int(inputs);
  if (i % 2 == 0) {
    if (inputs != p.widths[i / 2] || inputs < 1)
      fail_value(name, " must take ", p.widths[i / 2], " inputs, got ", shape_string(t.sizes()));
    p.widths[i / 2 + 1] = int(units);
  } else if (units != p.widths[i / 2 + 1]) {
    fail_value(name, " must have ", p.widths[i / 2 + 1], " units, got ", shape_string(t.sizes()));
  }
  check_dtype(t, name, first.scalar_type());
  check_same_device(t, name, first, "params[0]");
}

inline void check_mlp_params(MlpInnerLoopProblem& p, const std::vector<Tensor>& params) {
  check_value(!params.empty() && params.size() % 2 == 0 && params.size() <= size_t(max_mlp_tensors),
              "params must hold a weight and a bias for 1 to ", max_mlp_layers, " layers, got ", params.size(),
              " tensors");
  p.num_layers = int(params.size() / 2);
  const std::optional<DType> dtype = float_dtype(params[0].scalar_type());
  const bool native = dtype == DType::float32 || dtype == DType::float64;
  if (!native && !(dtype && params[0].is_cuda()))
    fail_type("params must be float32 or float64, on a GPU also bfloat16 or float16, got ",
              dtype_name(params[0].scalar_type()));
  p.is_double = dtype == DType::float64;
  for (size_t i = 0; i < params.size(); ++i) check_mlp_param(p, params[i], i, params[0]);
}

inline void check_mlp_rates(MlpInnerLoopProblem& p, const MlpInnerLoopArguments& a) {
  const size_t tensors = a.params.size();
  check_value(a.lr.empty() || a.lr.size() == 1 || a.lr.size() == tensors,
              "lr must hold no tensor, 1 or one for each of the ", tensors, " params, got ", a.lr.size());
  p.rate = a.rate;
  for (size_t i = 0; i < tensors; ++i) {
    p.adapted[i] = (a.adapted >> i) & 1;
    p.rates[i] = {nullptr, 0, false};
    if (a.lr.empty()) continue;
    const size_t at = a.lr.size() == 1 ? 0 : i;
    const Element name{"lr", at};
    const Tensor& lr = a.lr[at];
    check_dtype(lr, name, a.params[0].scalar_type());
    check_same_device(lr, name, a.params[0], "params[0]");
    const int64_t size = p.tensor_size(int(i)), own = lr.numel() / (a.per_step ? p.steps : 1);
    if (own != 1 && (own != size || a.lr.size() == 1))
      fail_value(name, " must hold 1 or ", size, " rates", a.per_step ? " a step" : "", ", got ",
                 shape_string(lr.sizes()));
    if (lr.numel() != own * (a.per_step ? p.steps : 1))
      fail_value(name, " must have one entry a step, ", p.steps, ", got ", shape_string(lr.sizes()));
    p.rates[i].per_parameter = own != 1 || size == 1;
    p.rates[i].step = a.per_step ? own : 0;
  }
}

// Name of a set's tensor in messages: support_x.
struct SetName {
  const char* set;
  const char* tensor;

  friend std::ostream& operator<<(std::ostream& out, const SetName& name) { return out << name.set << name.tensor; }
};

// Checks shapes, dtypes and devices of the set "support" or "query", and returns its number of samples.
inline int check_mlp_samples(const MlpInnerLoopProblem& p, const char* set, const Tensor& x, const Tensor& y,
                             const std::optional<Tensor>& mask, const Tensor& like) {
  const SetName x_name{set, "_x"}, y_name{set, "_y"}, mask_name{set, "_mask"};
  if (x.dim() != 3 || x.size(0) != p.num_tasks || x.size(1) < 1 || x.size(2) != p.widths[0])
    fail_value(x_name, " must be [", p.num_tasks, ", samples, ", p.widths[0], "], got ", shape_string(x.sizes()));
  check_dtype(x, x_name, like.scalar_type());
  check_same_device(x, x_name, like, "params[0]");
  check_same_device(y, y_name, like, "params[0]");
  check_value(x.size(1) <= (1 << 20), x_name, " must have at most ", 1 << 20, " samples, got ", x.size(1));
  if (p.loss == TaskLoss::cross_entropy) {
    check_shape(y, y_name, {p.num_tasks, x.size(1)});
    check_dtype(y, y_name, ScalarType::Long);
  } else {
    check_shape(y, y_name, {p.num_tasks, x.size(1), p.outputs()});
    check_dtype(y, y_name, like.scalar_type());
  }
  if (mask.has_value()) {
    check_shape(*mask, mask_name, {p.num_tasks, x.size(1)});
    check_dtype(*mask, mask_name, ScalarType::Bool);
    check_same_device(*mask, mask_name, like, "params[0]");
  }
  return int(x.size(1));
}

inline void check_mlp_activations(MlpInnerLoopProblem& p, const MlpInnerLoopArguments& a) {
  const size_t hidden = size_t(p.num_layers - 1), count = a.activations.size();
  check_value(count == hidden || count == 1, "activation must hold 1 kind or one for each of the ", hidden,
              " hidden layers, got ", count);
  check_value(a.slopes.empty() || a.slopes.size() == count, "slopes must hold none or one for each of the ", count,
              " activations, got ", a.slopes.size());
  for (size_t i = 0; i < count; ++i)
    check_value(a.activations[i] >= 0 && a.activations[i] <= int(Activation::leaky_relu), "activation must be 0 to ",
                int(Activation::leaky_relu), ", got ", a.activations[i]);
  for (const double slope : a.slopes)
    check_value(std::isfinite(slope) && slope >= 0, "slopes must be finite and not negative, got ", slope);
  for (size_t l = 0; l < hidden; ++l) {
    const size_t from = count == 1 ? 0 : l;
    p.activations[l] = Activation(a.activations[from]);
    p.slopes[l] = a.slopes.empty() ? 0 : a.slopes[from];
  }
}

inline MlpInnerLoopProblem checked_mlp_problem(const MlpInnerLoopArguments& a, const Tensor& x, const Tensor& y,
                                               const std::optional<Tensor>& mask) {
  MlpInnerLoopProblem p{};
  if (x.dim() != 3 || x.size(0) < 1)
    fail_value("support_x must be [T, S, inputs] with at least 1 task, got ", shape_string(x.sizes()));
  p.num_tasks = x.size(0);
  check_value(a.steps >= 1 && a.steps <= (1 << 20), "steps must be 1 to ", 1 << 20, ", got ", a.steps);
  check_value(a.loss >= 0 && a.loss <= 2, "loss must be 0, 1 or 2, got ", a.loss);
  check_value(a.checkpoint_every >= 1 && a.checkpoint_every <= a.steps, "checkpoint_every must be 1 to ", a.steps,
              ", got ", a.checkpoint_every);
  check_value(std::isfinite(a.rate), "rate must be finite, got ", a.rate);
  if (a.clip_norm)
    check_value(std::isfinite(*a.clip_norm) && *a.clip_norm > 0, "clip_norm must be positive and finite, got ",
                *a.clip_norm);
  p.steps = int(a.steps);
  p.loss = TaskLoss(a.loss);
  p.checkpoint_every = int(a.checkpoint_every);
  p.clip_norm = a.clip_norm.value_or(0);
  check_mlp_params(p, a.params);
  check_mlp_activations(p, a);
  check_mlp_rates(p, a);
  p.support_samples = check_mlp_samples(p, "support", x, y, mask, a.params[0]);
  return p;
}

}  // namespace metakern
