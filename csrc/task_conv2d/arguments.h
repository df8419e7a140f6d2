// Checks of the arguments of task_conv2d and its companions, the same as in metakern/ops/task_conv2d/arguments.py.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../core/checks.h"
#include "problem.h"

namespace metakern {

constexpr int64_t max_conv_step = (int64_t(1) << 31) - 1;  // of padding and stride
constexpr int64_t max_conv_size = int64_t(1) << 40;        // of an axis of a padded image

// Two integers, of rows and columns.
inline void read_pair(const std::vector<int64_t>& values, const char* name, int64_t smallest, int64_t largest,
                      int64_t (&out)[2]) {
  check_value(values.size() == 2, name, " must hold 2 integers, of rows and columns, got ", values.size());
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t x = values[size_t(axis)];
    check_value(smallest <= x && x <= largest, name, " must be ", smallest, " to ", largest, ", got ", x);
    out[axis] = x;
  }
}

inline void read_steps(TaskConv2dProblem& p, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  read_pair(stride, "stride", 1, max_conv_step, p.stride);
  read_pair(padding, "padding", 0, max_conv_step, p.padding);
}

// Five axes, and the dtype and device, which are those of `other`.
inline void check_images(const Tensor& t, const char* name, const char* axes, const Tensor& other,
                         const char* other_name) {
  if (t.dim() != 5) fail_value(name, " must have shape [", axes, "], got ", shape_string(t.sizes()));
  check_type(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, name,
             " must be float32 or float64, got ", dtype_name(t.scalar_type()));
  check_same_dtype(t, name, other, other_name);
  check_same_device(t, name, other, other_name);
}

// Sets Ho and Wo of a problem with sizes, kernel, stride and padding.
inline void set_out_size(TaskConv2dProblem& p) {
  constexpr const char* axes[2] = {"rows", "columns"};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t k = p.kernel[axis], n = p.size[axis], padded = n + 2 * p.padding[axis];
    check_value(k >= 1, "the kernel must have at least one of ", axes[axis], ", got ", k);
    check_value(padded >= k, "x must have at least as many ", axes[axis], " as the kernel, ", k, ", got ", n,
                " and a padding of ", p.padding[axis]);
    check_value(padded <= max_conv_size, "x has too many ", axes[axis], " with its padding, ", padded);
    p.out_size[axis] = (padded - k) / p.stride[axis] + 1;
  }
}

inline void check_grad_size(const TaskConv2dProblem& p, const Tensor& grad) {
  check_shape(grad, "grad", {grad.size(0), grad.size(1), grad.size(2), p.out_size[0], p.out_size[1]});
}

inline TaskConv2dProblem checked_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  TaskConv2dProblem p{};
  read_steps(p, stride, padding);
  check_images(x, "x", "T, S, C, H, W", x, "x");
  check_images(weight, "weight", "T, O, C, kh, kw", x, "x");
  if (x.size(2) < 1) fail_value("x must have at least one channel, got shape ", shape_string(x.sizes()));
  if (weight.size(1) < 1)
    fail_value("weight must have at least one output channel, got shape ", shape_string(weight.sizes()));
  if (weight.size(0) != x.size(0) || weight.size(2) != x.size(2))
    fail_value("weight must have shape [", x.size(0), ", ", weight.size(1), ", ", x.size(2), ", ", weight.size(3), ", ",
               weight.size(4), "] for x of shape ", shape_string(x.sizes()), ", got ", shape_string(weight.sizes()));
  p.num_tasks = x.size(0);
  p.num_samples = x.size(1);
  p.in_channels = x.size(2);
  p.out_channels = weight.size(1);
  for (int axis = 0; axis < 2; ++axis) {
    p.size[axis] = x.size(3 + axis);
    p.kernel[axis] = weight.size(3 + axis);
  }
  set_out_size(p);
  if (bias) {
    check_shape(*bias, "bias", {p.num_tasks, p.out_channels});
    check_same_dtype(*bias, "bias", x, "x");
    check_same_device(*bias, "bias", x, "x");
  }
  p.is_double = x.scalar_type() == ScalarType::Double;
  return p;
}

inline TaskConv2dProblem checked_conv_input(const Tensor& grad, const Tensor& weight, const std::vector<int64_t>& size,
                                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  TaskConv2dProblem p{};
  read_pair(size, "size", 0, max_conv_step, p.size);
  read_steps(p, stride, padding);
  check_images(grad, "grad", "T, S, O, Ho, Wo", grad, "grad");
  check_images(weight, "weight", "T, O, C, kh, kw", grad, "grad");
  if (weight.size(2) < 1)
    fail_value("weight must have at least one input channel, got shape ", shape_string(weight.sizes()));
  if (grad.size(2) < 1) fail_value("grad must have at least one channel, got shape ", shape_string(grad.sizes()));
  check_shape(weight, "weight", {grad.size(0), grad.size(2), weight.size(2), weight.size(3), weight.size(4)});
  p.num_tasks = grad.size(0);
  p.num_samples = grad.size(1);
  p.in_channels = weight.size(2);
  p.out_channels = weight.size(1);
  for (int axis = 0; axis < 2; ++axis) p.kernel[axis] = weight.size(3 + axis);
  set_out_size(p);
  check_grad_size(p, grad);
  p.is_double = grad.scalar_type() == ScalarType::Double;
  return p;
}

inline TaskConv2dProblem checked_conv_weight(const Tensor& x, const Tensor& grad, const std::vector<int64_t>& kernel,
                                             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  TaskConv2dProblem p{};
  read_pair(kernel, "kernel_size", 1, max_conv_step, p.kernel);
  read_steps(p, stride, padding);
  check_images(x, "x", "T, S, C, H, W", x, "x");
  check_images(grad, "grad", "T, S, O, Ho, Wo", x, "x");
  if (x.size(2) < 1) fail_value("x must have at least one channel, got shape ", shape_string(x.sizes()));
  if (grad.size(2) < 1) fail_value("grad must have at least one channel, got shape ", shape_string(grad.sizes()));
  check_shape(grad, "grad", {x.size(0), x.size(1), grad.size(2), grad.size(3), grad.size(4)});
  p.num_tasks = x.size(0);
  p.num_samples = x.size(1);
  p.in_channels = x.size(2);
  p.out_channels = grad.size(2);
  for (int axis = 0; axis < 2; ++axis) p.size[axis] = x.size(3 + axis);
  set_out_size(p);
  check_grad_size(p, grad);
  p.is_double = x.scalar_type() == ScalarType::Double;
  return p;
}

}  // namespace metakern
