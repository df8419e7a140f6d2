// lstm_step's operator schemas, and the limits exported to Python.
#include <torch/csrc/stable/library.h>

#include "../core/module.h"
#include "../math/preprocess.h"
#include "problem.h"

namespace metakern {
namespace {

const ModulePart part([](pybind11::module_& m) {
  m.attr("max_hidden") = max_hidden;
  m.attr("max_layers") = max_layers;
  m.attr("log_and_clip_epsilon") = log_and_clip_epsilon;
});

}  // namespace
}  // namespace metakern

STABLE_TORCH_LIBRARY_FRAGMENT(metakern, m) {
  m.def(
      "lstm_step(Tensor params, Tensor grads, Tensor state, Tensor[] weights, int preprocess, float preprocess_scale, "
      "float output_scale, int precision) -> (Tensor, Tensor)");
  m.def(
      "lstm_step_(Tensor(a!) params, Tensor grads, Tensor(b!) state, Tensor[] weights, int preprocess, "
      "float preprocess_scale, float output_scale, int precision) -> ()");
  m.def(
      "lstm_step_backward(Tensor grad_new_params, Tensor grad_new_state, Tensor grads, Tensor state, Tensor[] weights, "
      "int preprocess, float preprocess_scale, float output_scale, int precision) -> (Tensor, Tensor, Tensor[])");
  m.def(
      "lstm_step_with_gates(Tensor params, Tensor grads, Tensor state, Tensor[] weights, int preprocess, "
      "float preprocess_scale, float output_scale, int precision) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lstm_step_with_gates_backward(Tensor grad_new_params, Tensor grad_new_state, Tensor grads, Tensor state, "
      "Tensor gates, Tensor[] weights, int preprocess, float preprocess_scale, float output_scale, int precision) -> "
      "(Tensor, Tensor, Tensor[])");
  m.def(
      "lstm_step_staged(Tensor params, Tensor grads, Tensor state, Tensor stage_state, Tensor coordinate_inputs, "
      "Tensor[] weights, int features, int head, float features_scale, float beta1, float beta2, float head_scale, "
      "int precision) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lstm_step_stacked(Tensor params, Tensor grads, Tensor state, Tensor stage_state, Tensor coordinate_inputs, "
      "Tensor[] weights, int features, int head, float features_scale, float beta1, float beta2, float head_scale, "
      "int precision) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lstm_step_staged_(Tensor(a!) params, Tensor grads, Tensor(b!) state, Tensor(c!) stage_state, "
      "Tensor coordinate_inputs, Tensor[] weights, int features, int head, float features_scale, float beta1, "
      "float beta2, float head_scale, int precision) -> ()");
  m.def(
      "lstm_step_staged_backward(Tensor grad_new_params, Tensor grad_new_state, Tensor grad_new_stage_state, "
      "Tensor params, Tensor grads, Tensor state, Tensor stage_state, Tensor coordinate_inputs, Tensor[] weights, "
      "int features, int head, float features_scale, float beta1, float beta2, float head_scale, int precision) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "lstm_step_staged_with_gates(Tensor params, Tensor grads, Tensor state, Tensor stage_state, "
      "Tensor coordinate_inputs, Tensor[] weights, int features, int head, float features_scale, float beta1, "
      "float beta2, float head_scale, int precision) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lstm_step_staged_with_gates_backward(Tensor grad_new_params, Tensor grad_new_state, "
      "Tensor grad_new_stage_state, Tensor params, Tensor grads, Tensor state, Tensor stage_state, "
      "Tensor coordinate_inputs, Tensor gates, Tensor[] weights, int features, int head, float features_scale, "
      "float beta1, float beta2, float head_scale, int precision) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor[])");
}
