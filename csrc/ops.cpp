// Every operator's schema, and the Python module with the facts of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/capability.h"
#include "cpu/lstm_step.h"
#include "cpu/result_cache.h"
#include "math/preprocess.h"

STABLE_TORCH_LIBRARY(metakern, m) {
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
      "loss, "
      "int checkpoint_every, Tensor second_order, Tensor step_weights, bool with_grads, float[] slopes=[], "
      "float? clip_norm=None) -> (Tensor, Tensor)");
  m.def(
      "mlp_meta_loss_backward(Tensor grad_losses, Tensor task_grads, Tensor[] params, Tensor x, Tensor y, "
      "Tensor[] lr, int steps, bool per_step, int loss) -> (Tensor[], Tensor[])");
  m.def(
      "inner_update(Tensor[] params, Tensor[] grads, Tensor[] lr, float rate, int step, float? clip_norm, "
      "Tensor? active) -> Tensor[]");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of metakern; importing it registers the operators torch.ops.metakern.*";
  m.attr("compiler") = METAKERN_COMPILER;
  m.attr("torch_version") = METAKERN_TORCH_VERSION;
#ifdef METAKERN_CUDA_ARCHITECTURES
  m.attr("cuda_architectures") = METAKERN_CUDA_ARCHITECTURES;
  m.attr("nvcc") = METAKERN_NVCC;
#else
  m.attr("cuda_architectures") = "";
  m.attr("nvcc") = "";
#endif
  m.attr("tile_lanes") = metakern::tile_lanes;
  m.attr("max_hidden") = metakern::max_hidden;
  m.attr("max_layers") = metakern::max_layers;
  m.attr("log_and_clip_epsilon") = metakern::log_and_clip_epsilon;
  m.def("available_cpu_capabilities", &metakern::available_cpu_capabilities,
        "Instruction sets that are compiled in and supported by this processor, slowest first.");
  m.def("cpu_capability", &metakern::cpu_capability_name,
        "The instruction set in use; ValueError if METAKERN_CPU_CAPABILITY names one that is not available.");
  m.def("set_cpu_capability", &metakern::set_cpu_capability, pybind11::arg("name"),
        "Use another of the available instruction sets from now on.");
  m.def("empty_cache", &metakern::empty_cache, "Free the memory that is kept for large results.");
  m.def("cached_bytes", &metakern::cached_bytes, "Bytes that are kept for large results.");
}
