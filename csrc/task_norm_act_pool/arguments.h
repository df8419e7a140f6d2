// Checks of the arguments of task_norm_act_pool and of its derivatives; those of the first are also in
// metakern/ops/task_norm_act_pool/arguments.py.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../core/checks.h"
#include "problem.h"

namespace metakern {

// The options of a call, in the order of the schemas.
struct NormOptions {
  int64_t statistics;
  double eps;
  int64_t activation;
  double slope;
  bool pool;
};

// The sizes of x and the options.
inline TaskNormActPoolProblem checked_norm(const Tensor& x, const NormOptions& options) {
  check_value(options.eps > 0 && options.eps - options.eps == 0, "eps must be positive and finite, got ", options.eps);
  check_value(options.slope >= 0 && options.slope - options.slope == 0, "slope must be finite and at least 0, got ",
              options.slope);
  check_value(0 <= options.statistics && options.statistics <= 2, "statistics must be 0 to 2, got ",
              options.statistics);
  check_value(0 <= options.activation && options.activation <= 2, "activation must be 0 to 2, got ",
              options.activation);
  if (x.dim() != 5) fail_value("x must have shape [T, S, C, H, W], got ", shape_string(x.sizes()));
  check_type(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
             "x must be float32 or float64, got ", dtype_name(x.scalar_type()));
  if (x.size(2) < 1) fail_value("x must have at least one channel, got shape ", shape_string(x.sizes()));
  TaskNormActPoolProblem p{};
  p.num_tasks = x.size(0);
  p.num_samples = x.size(1);
  p.channels = x.size(2);
  constexpr const char* axes[2] = {"rows", "columns"};
  for (int axis = 0; axis < 2; ++axis) {
    p.size[axis] = x.size(3 + axis);
    check_value(!options.pool || p.size[axis] >= 2, "x must have at least 2 ", axes[axis], " to be pooled, got ",
                p.size[axis]);
    p.out_size[axis] = options.pool ? p.size[axis] / 2 : p.size[axis];
  }
  p.statistics = NormStatistics(options.statistics);
  p.activation = NormActivation(options.activation);
  p.eps = options.eps;
  p.slope = options.slope;
  p.pool = options.pool;
  p.is_double = x.scalar_type() == ScalarType::Double;
  return p;
}

// A tensor [T, C] beside x.
inline void check_channels(const TaskNormActPoolProblem& p, const Tensor& t, const char* name, const Tensor& x) {
  check_shape(t, name, {p.num_tasks, p.channels});
  check_same_dtype(t, name, x, "x");
  check_same_device(t, name, x, "x");
}

inline void check_channels(const TaskNormActPoolProblem& p, const std::optional<Tensor>& t, const char* name,
                           const Tensor& x) {
  if (t) check_channels(p, *t, name, x);
}

inline void check_running(const TaskNormActPoolProblem& p, const std::optional<Tensor>& t, const char* name,
                          const Tensor& x) {
  check_channels(p, t, name, x);
  const bool wanted = p.statistics == NormStatistics::given;
  constexpr const char* kinds[2] = {"None", "a tensor"};
  check_value(t.has_value() == wanted, name, " must be ", kinds[wanted], " with these statistics, got ",
              kinds[t.has_value()]);
}

// PyTorch's own error.
inline void check_enough_values(const TaskNormActPoolProblem& p) {
  if (p.statistics == NormStatistics::batch && p.values() == 1)
    fail_value("Expected more than 1 value per channel when training, got input size torch.Size([", p.num_samples, ", ",
               p.channels, ", ", p.size[0], ", ", p.size[1], "])");
}

// What the derivatives take: y's gradient, and what the first operator returned.
inline void check_saved(const TaskNormActPoolProblem& p, const Tensor& grad_y, const Tensor& x,
                        const std::optional<Tensor>& gamma, const Tensor& mean, const Tensor& var,
                        const Tensor& index) {
  check_shape(grad_y, "grad_y", {p.num_tasks, p.num_samples, p.channels, p.out_size[0], p.out_size[1]});
  check_same_dtype(grad_y, "grad_y", x, "x");
  check_same_device(grad_y, "grad_y", x, "x");
  check_channels(p, gamma, "gamma", x);
  check_channels(p, mean, "mean", x);
  check_channels(p, var, "var", x);
  check_same_shape(index, "index", grad_y, "grad_y");
  check_dtype(index, "index", ScalarType::Byte);
  check_same_device(index, "index", x, "x");
}

}  // namespace metakern
