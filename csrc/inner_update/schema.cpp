// inner_update's operator.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(metakern, m) {
  m.def(
      "inner_update(Tensor[] params, Tensor[] grads, Tensor[] lr, float rate, int step, float? clip_norm, "
      "Tensor? active) -> Tensor[]");
}
