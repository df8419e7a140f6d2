// mlp_inner_loop's operators.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(metakern, m) {
  m.def(
      "mlp_inner_loop(Tensor[] params, Tensor x, Tensor y, Tensor? mask, Tensor[] lr, float rate, int steps, "
      "bool per_step, int adapted, int[1] activation, int loss, int checkpoint_every, bool keep, Tensor second_order, "
      "float[] slopes=[], float? clip_norm=None) -> (Tensor[], Tensor)");
  m.def(
      "mlp_inner_loop_backward(Tensor[] grad_adapted, Tensor trajectory, Tensor[] params, Tensor x, Tensor y, "
      "Tensor? mask, Tensor[] lr, float rate, int steps, bool per_step, int adapted, int[1] activation, int loss, "
      "int checkpoint_every, Tensor second_order, float[] slopes=[], float? clip_norm=None) -> (Tensor[], Tensor[])");
  m.def(
      "mlp_meta_loss(Tensor[] params, Tensor x, Tensor y, Tensor? mask, Tensor query_x, Tensor query_y, "
      "Tensor? query_mask, Tensor[] lr, float rate, int steps, bool per_step, int adapted, int[1] activation, int "
      "loss, int checkpoint_every, Tensor second_order, Tensor step_weights, bool with_grads, float[] slopes=[], "
      "float? clip_norm=None) -> (Tensor, Tensor)");
  m.def(
      "mlp_meta_loss_backward(Tensor grad_losses, Tensor task_grads, Tensor[] params, Tensor x, Tensor y, "
      "Tensor[] lr, int steps, bool per_step, int loss) -> (Tensor[], Tensor[])");
}
