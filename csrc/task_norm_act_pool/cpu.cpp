// The CPU operators task_norm_act_pool, its backward and the backward of that: check the arguments, allocate the
// results, hand ranges of channels to the loops of the instruction set in use.
#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../core/capability.h"
#include "../core/parallel.h"
#include "../core/result_cache.h"
#include "arguments.h"

namespace metakern {

namespace {

using Optional = std::optional<Tensor>;

const TaskNormActPoolKernels& kernels_for(const TaskNormActPoolProblem& p) {
  return with_cpu_capability([&](auto capability) -> const TaskNormActPoolKernels& {
    return task_norm_act_pool_kernels<capability.value>(p.is_double);
  });
}

// Runs `kernel` for every channel of every task.
template <class Pass>
void run(const TaskNormActPoolProblem& p, void (*TaskNormActPoolKernels::*kernel)(const Pass&, void*, int64_t, int64_t),
         const Pass& pass) {
  const TaskNormActPoolKernels& k = kernels_for(p);
  const int64_t bytes = k.scratch_bytes(p);
  parallel_for(0, p.num_tasks * p.channels, 1, [&](int64_t first, int64_t last) {
    const CachedMemory scratch(bytes);
    (k.*kernel)(pass, scratch.data(), first, last);
  });
}

Optional contiguous_if_any(const Optional& t) { return t ? Optional(as_contiguous(*t)) : Optional(); }

const void* data_of(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor> task_norm_act_pool(const Tensor& x, const Optional& gamma,
                                                              const Optional& beta, const Optional& running_mean,
                                                              const Optional& running_var, int64_t statistics,
                                                              double eps, int64_t activation, double slope, bool pool) {
  const TaskNormActPoolProblem p = checked_norm(x, {statistics, eps, activation, slope, pool});
  check_channels(p, gamma, "gamma", x);
  check_channels(p, beta, "beta", x);
  check_running(p, running_mean, "running_mean", x);
  check_running(p, running_var, "running_var", x);
  check_enough_values(p);
  const Tensor images = as_contiguous(x);
  const Optional scale = contiguous_if_any(gamma), shift = contiguous_if_any(beta);
  const Optional given_mean = contiguous_if_any(running_mean), given_var = contiguous_if_any(running_var);
  const std::initializer_list<int64_t> shape{p.num_tasks, p.num_samples, p.channels, p.out_size[0], p.out_size[1]};
  Tensor y = empty_result(x, shape);
  Tensor mean = empty_result(x, {p.num_tasks, p.channels}), var = empty_result(x, {p.num_tasks, p.channels});
  Tensor index = empty_result(torch::stable::new_empty(x, {0}, ScalarType::Byte), shape);
  const NormForward pass{p,
                         images.const_data_ptr(),
                         data_of(scale),
                         data_of(shift),
                         data_of(given_mean),
                         data_of(given_var),
                         y.mutable_data_ptr(),
                         mean.mutable_data_ptr(),
                         var.mutable_data_ptr(),
                         static_cast<uint8_t*>(index.mutable_data_ptr())};
  run(p, &TaskNormActPoolKernels::forward, pass);
  return {y, mean, var, index};
}

// Contiguous tensors that the derivatives read.
struct SavedTensors {
  Tensor grad_y, x;
  Optional gamma;
  Tensor mean, var, index;

  NormSaved of(const TaskNormActPoolProblem& p) const {
    return {p,
            grad_y.const_data_ptr(),
            x.const_data_ptr(),
            data_of(gamma),
            mean.const_data_ptr(),
            var.const_data_ptr(),
            static_cast<const uint8_t*>(index.const_data_ptr())};
  }
};

std::tuple<Tensor, Tensor, Tensor> task_norm_act_pool_backward(const Tensor& grad_y, const Tensor& x,
                                                               const Optional& gamma, const Tensor& mean,
                                                               const Tensor& var, const Tensor& index,
                                                               int64_t statistics, double eps, int64_t activation,
                                                               double slope, bool pool) {
  const TaskNormActPoolProblem p = checked_norm(x, {statistics, eps, activation, slope, pool});
  check_saved(p, grad_y, x, gamma, mean, var, index);
  const SavedTensors saved{as_contiguous(grad_y), as_contiguous(x),   contiguous_if_any(gamma),
                           as_contiguous(mean),   as_contiguous(var), as_contiguous(index)};
  Tensor grad_x = empty_result(x);
  Tensor grad_gamma = empty_result(x, {p.num_tasks, p.channels});
  Tensor grad_beta = empty_result(x, {p.num_tasks, p.channels});
  const NormBackward pass{saved.of(p), grad_x.mutable_data_ptr(), grad_gamma.mutable_data_ptr(),
                          grad_beta.mutable_data_ptr()};
  run(p, &TaskNormActPoolKernels::backward, pass);
  return {grad_x, grad_gamma, grad_beta};
}

std::tuple<Tensor, Tensor, Tensor> task_norm_act_pool_backward_backward(
    const Tensor& grad_x, const Optional& grad_gamma, const Optional& grad_beta, const Tensor& grad_y, const Tensor& x,
    const Optional& gamma, const Tensor& mean, const Tensor& var, const Tensor& index, int64_t statistics, double eps,
    int64_t activation, double slope, bool pool) {
  const TaskNormActPoolProblem p = checked_norm(x, {statistics, eps, activation, slope, pool});
  check_saved(p, grad_y, x, gamma, mean, var, index);
  check_like(grad_x, "grad_x", x, "x");
  check_channels(p, grad_gamma, "grad_gamma", x);
  check_channels(p, grad_beta, "grad_beta", x);
  const SavedTensors saved{as_contiguous(grad_y), as_contiguous(x),   contiguous_if_any(gamma),
                           as_contiguous(mean),   as_contiguous(var), as_contiguous(index)};
  const Tensor v = as_contiguous(grad_x);
  const Optional of_scale = contiguous_if_any(grad_gamma), of_shift = contiguous_if_any(grad_beta);
  Tensor of_grad_y = empty_result(grad_y), of_x = empty_result(x);
  Tensor of_gamma = empty_result(x, {p.num_tasks, p.channels});
  const NormSecond pass{saved.of(p),
                        v.const_data_ptr(),
                        data_of(of_scale),
                        data_of(of_shift),
                        of_grad_y.mutable_data_ptr(),
                        of_x.mutable_data_ptr(),
                        of_gamma.mutable_data_ptr()};
  run(p, &TaskNormActPoolKernels::second, pass);
  return {of_grad_y, of_x, of_gamma};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) {
  m.impl("task_norm_act_pool", TORCH_BOX(&task_norm_act_pool));
  m.impl("task_norm_act_pool_backward", TORCH_BOX(&task_norm_act_pool_backward));
  m.impl("task_norm_act_pool_backward_backward", TORCH_BOX(&task_norm_act_pool_backward_backward));
}

}  // namespace metakern
