// The checks of mlp_inner_loop's arguments that hold on every device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../core/checks.h"
#include "problem.h"

namespace metakern {

// What every operator of this folder takes.
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

inline void check_mlp_params(MlpInnerLoopProblem& p, const std::vector<Tensor>& params, int64_t num_tasks) {
  check(!params.empty() && params.size() % 2 == 0 && params.size() <= size_t(max_mlp_tensors),
        "params must hold a weight and a bias for 1 to ", max_mlp_layers, " layers, got ", params.size(), " tensors");
  p.num_layers = int(params.size() / 2);
  const ScalarType dtype = params[0].scalar_type();
  const bool half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || (half && params[0].is_cuda()),
        "params must be float32 or float64, on a GPU also bfloat16 or float16");
  p.is_double = dtype == ScalarType::Double;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& t = params[i];
    const int64_t own = i % 2 == 0 ? 2 : 1;
    check(t.dim() == own || t.dim() == own + 1, "params[", i, "] must have ", own,
          " axes, or one more for the tasks, got ", shape_string(t.sizes()));
    p.shared[i] = t.dim() == own;
    if (!p.shared[i])
      check(t.size(0) == num_tasks, "params[", i, "] must share the task axis, T = ", num_tasks, ", got ",
            shape_string(t.sizes()));
    const int64_t units = t.size(t.dim() - own), inputs = i % 2 == 0 ? t.size(t.dim() - 1) : 0;
    check(units >= 1 && units <= (int64_t(1) << 20) && inputs <= (int64_t(1) << 20), "params[", i,
          "] must have at least 1 unit, got ", shape_string(t.sizes()));
    if (i == 0) p.widths[0] = int(inputs);
    if (i % 2 == 0) {
      check(inputs == p.widths[i / 2] && inputs >= 1, "params[", i, "] must take ", p.widths[i / 2], " inputs, got ",
            shape_string(t.sizes()));
      p.widths[i / 2 + 1] = int(units);
    } else {
      check(units == p.widths[i / 2 + 1], "params[", i, "] must have ", p.widths[i / 2 + 1], " units, got ",
            shape_string(t.sizes()));
    }
    check_dtype(t, "params", dtype);
    check_same_device(t, "params", params[0], "params[0]");
  }
}

inline void check_mlp_rates(MlpInnerLoopProblem& p, const MlpInnerLoopArguments& a) {
  const size_t tensors = a.params.size();
  check(a.lr.empty() || a.lr.size() == 1 || a.lr.size() == tensors, "lr must hold no tensor, 1 or one for each of the ",
        tensors, " params, got ", a.lr.size());
  p.rate = a.rate;
  for (size_t i = 0; i < tensors; ++i) {
    p.adapted[i] = (a.adapted >> i) & 1;
    p.rates[i] = {nullptr, 0, false};
    if (a.lr.empty()) continue;
    const Tensor& lr = a.lr[a.lr.size() == 1 ? 0 : i];
    check_dtype(lr, "lr", a.params[0].scalar_type());
    check_same_device(lr, "lr", a.params[0], "params");
    const int64_t size = p.tensor_size(int(i)), own = lr.numel() / (a.per_step ? p.steps : 1);
    check(own == 1 || (own == size && a.lr.size() > 1), "lr[", i, "] must hold 1 or ", size, " rates",
          a.per_step ? " a step" : "", ", got ", shape_string(lr.sizes()));
    check(lr.numel() == own * (a.per_step ? p.steps : 1), "lr[", i, "] must have one entry a step, ", p.steps, ", got ",
          shape_string(lr.sizes()));
    p.rates[i].per_parameter = own != 1 || size == 1;
    p.rates[i].step = a.per_step ? own : 0;
  }
}

// Samples of one set: shapes, dtypes, labels that name an output.
inline int check_mlp_samples(const MlpInnerLoopProblem& p, const char* name, const Tensor& x, const Tensor& y,
                             const std::optional<Tensor>& mask, const Tensor& like) {
  if (x.dim() != 3 || x.size(0) != p.num_tasks || x.size(1) < 1 || x.size(2) != p.widths[0])
    fail(name, "_x must be [", p.num_tasks, ", samples, ", p.widths[0], "], got ", shape_string(x.sizes()));
  check_dtype(x, "x", like.scalar_type());
  check_same_device(x, "x", like, "params");
  check_same_device(y, "y", like, "params");
  check(x.size(1) <= (1 << 20), name, "_x must have at most ", 1 << 20, " samples, got ", x.size(1));
  if (p.loss == TaskLoss::cross_entropy) {
    check_shape(y, "labels", {p.num_tasks, x.size(1)});
    check(y.scalar_type() == ScalarType::Long, name, "_y must hold int64 labels");
  } else {
    check_shape(y, "targets", {p.num_tasks, x.size(1), p.outputs()});
    check_dtype(y, "targets", like.scalar_type());
  }
  if (mask.has_value()) {
    check_shape(*mask, "mask", {p.num_tasks, x.size(1)});
    check(mask->scalar_type() == ScalarType::Bool, name, "_mask must be bool");
    check_same_device(*mask, "mask", like, "params");
  }
  return int(x.size(1));
}

inline void check_mlp_activations(MlpInnerLoopProblem& p, const MlpInnerLoopArguments& a) {
  const size_t hidden = size_t(p.num_layers - 1), count = a.activations.size();
  check(count == hidden || count == 1, "activation must hold 1 kind or one for each of the ", hidden,
        " hidden layers, got ", count);
  check(a.slopes.empty() || a.slopes.size() == count, "slopes must hold none or one for each of the ", count,
        " activations, got ", a.slopes.size());
  for (size_t i = 0; i < count; ++i)
    check(a.activations[i] >= 0 && a.activations[i] <= int(Activation::leaky_relu), "activation must be 0 to ",
          int(Activation::leaky_relu), ", got ", a.activations[i]);
  for (const double slope : a.slopes)
    check(std::isfinite(slope) && slope >= 0, "slopes must be finite and not negative, got ", slope);
  for (size_t l = 0; l < hidden; ++l) {
    const size_t from = count == 1 ? 0 : l;
    p.activations[l] = Activation(a.activations[from]);
    p.slopes[l] = a.slopes.empty() ? 0 : a.slopes[from];
  }
}

inline MlpInnerLoopProblem checked_mlp_problem(const MlpInnerLoopArguments& a, const Tensor& x, const Tensor& y,
                                               const std::optional<Tensor>& mask) {
  MlpInnerLoopProblem p{};
  check(x.dim() == 3 && x.size(0) >= 1, "support_x must be [T, S, inputs] with at least 1 task");
  p.num_tasks = x.size(0);
  check(a.steps >= 1 && a.steps <= (1 << 20), "steps must be 1 to ", 1 << 20, ", got ", a.steps);
  check(a.loss >= 0 && a.loss <= 2, "loss must be 0, 1 or 2, got ", a.loss);
  check(a.checkpoint_every >= 1 && a.checkpoint_every <= a.steps, "checkpoint_every must be 1 to ", a.steps, ", got ",
        a.checkpoint_every);
  check(std::isfinite(a.rate), "rate must be finite, got ", a.rate);
  if (a.clip_norm)
    check(std::isfinite(*a.clip_norm) && *a.clip_norm > 0, "clip_norm must be positive and finite, got ", *a.clip_norm);
  p.steps = int(a.steps);
  p.loss = TaskLoss(a.loss);
  p.checkpoint_every = int(a.checkpoint_every);
  p.clip_norm = a.clip_norm.value_or(0);
  check_mlp_params(p, a.params, p.num_tasks);
  check_mlp_activations(p, a);
  check_mlp_rates(p, a);
  p.support_samples = check_mlp_samples(p, "support", x, y, mask, a.params[0]);
  return p;
}

}  // namespace metakern
