// task_conv2d's operator schemas.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(metakern, m) {
  m.def("task_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding) -> Tensor");
  m.def("task_conv2d_input(Tensor grad, Tensor weight, int[2] size, int[2] stride, int[2] padding) -> Tensor");
  m.def("task_conv2d_weight(Tensor x, Tensor grad, int[2] kernel, int[2] stride, int[2] padding) -> (Tensor, Tensor)");
}
