// mlp_update_step's operator schemas.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(metakern, m) {
  m.def(
      "mlp_update_step(Tensor[] params, Tensor[] grads, Tensor[] m, Tensor[] v, Tensor[] r, Tensor[] c, "
      "Tensor[] weights, Tensor decays, Tensor rates, Tensor keep, Tensor steps, float exp_mult) -> "
      "(Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor)");
  m.def(
      "mlp_update_step_stacked(Tensor[] params, Tensor[] grads, Tensor[] m, Tensor[] v, Tensor[] r, Tensor[] c, "
      "Tensor[] weights, Tensor decays, Tensor rates, Tensor keep, Tensor steps, float exp_mult) -> "
      "(Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])");
  m.def(
      "mlp_update_step_backward(Tensor[] grad_new_params, Tensor[] grad_new_m, Tensor[] grad_new_v, "
      "Tensor[] grad_new_r, Tensor[] grad_new_c, Tensor[] params, Tensor[] grads, Tensor[] m, Tensor[] v, Tensor[] r, "
      "Tensor[] c, Tensor[] new_r, Tensor[] new_c, Tensor norms, Tensor[] weights, Tensor decays, Tensor rates, "
      "Tensor keep, Tensor steps, float exp_mult) -> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], "
      "Tensor[], Tensor, Tensor, Tensor)");
}
