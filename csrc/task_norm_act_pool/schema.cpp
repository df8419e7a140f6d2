// task_norm_act_pool's operator schemas.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(metakern, m) {
  m.def(
      "task_norm_act_pool(Tensor x, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var, "
      "int statistics, float eps, int activation, float slope, bool pool) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "task_norm_act_pool_backward(Tensor grad_y, Tensor x, Tensor? gamma, Tensor mean, Tensor var, Tensor index, "
      "int statistics, float eps, int activation, float slope, bool pool) -> (Tensor, Tensor, Tensor)");
  m.def(
      "task_norm_act_pool_backward_backward(Tensor grad_x, Tensor? grad_gamma, Tensor? grad_beta, Tensor grad_y, "
      "Tensor x, Tensor? gamma, Tensor mean, Tensor var, Tensor index, "
      "int statistics, float eps, int activation, float slope, bool pool) -> (Tensor, Tensor, Tensor)");
}
