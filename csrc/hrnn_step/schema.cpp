// hrnn_step's operator schemas.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(metakern, m) {
  m.def(
      "hrnn_step(Tensor[] params, Tensor[] grads, Tensor[] states, Tensor biases, Tensor mean_rate, Tensor[] weights) "
      "-> (Tensor[], Tensor[], Tensor, Tensor[], Tensor[], Tensor)");
  m.def(
      "hrnn_step_stacked(Tensor[] params, Tensor[] grads, Tensor[] states, Tensor biases, Tensor mean_rate, "
      "Tensor[] weights) -> (Tensor[], Tensor[], Tensor, Tensor[])");
  m.def(
      "hrnn_step_backward(Tensor[] grad_new_params, Tensor[] grad_new_states, Tensor grad_means, "
      "Tensor[] grad_attended, Tensor[] grads, Tensor[] states, Tensor[] steps, Tensor rms, Tensor biases, "
      "Tensor mean_rate, Tensor[] weights) -> (Tensor[], Tensor[], Tensor, Tensor, Tensor[])");
}
