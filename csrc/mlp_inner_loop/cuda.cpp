// mlp_inner_loop's CUDA operators: check the arguments, allocate the results, launch on the current stream of the
// tensors' device.
#include "cuda.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../core/torch_device.h"
#include "arguments.h"

namespace metakern {
namespace {

using Gradients = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;

ScalarType arithmetic(const MlpInnerLoopProblem& p) { return p.is_double ? ScalarType::Double : ScalarType::Float; }

Tensor new_tensor(const char* what, const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  const int64_t bytes = elements * (dtype == ScalarType::Byte ? 1 : dtype == ScalarType::Double ? 8 : 4);
  return allocated(what, bytes, [&] { return torch::stable::new_empty(like, shape, dtype); });
}

// A private result: `elements` per task, padding tasks included.
Tensor new_private(const char* what, const MlpInnerLoopProblem& p, const Tensor& like, int64_t elements) {
  return new_tensor(what, like, {p.padded_tasks() * elements}, arithmetic(p));
}

// A call's tensors, contiguous, kept alive until the launch.
class Call {
 public:
  Call(MlpMode mode, MlpInnerLoopProblem& p, const MlpInnerLoopArguments& a) : p_(p), like_(a.params[0]) {
    check_value(p.steps <= max_cuda_mlp_steps, "the CUDA kernels take at most ", max_cuda_mlp_steps, " steps, got ",
                p.steps);
    call_.mode = mode;
    call_.dtype = float_dtype(like_, "params");
    call_.flat = p.num_params();
    for (size_t i = 0; i < a.params.size(); ++i) {
      call_.params[i] = pointer(a.params[i]);
      call_.rate_slots[i] = -1;
      if (a.lr.empty()) continue;
      const bool one = a.lr.size() == 1;
      p.rates[i].data = one && i > 0 ? p.rates[0].data : pointer(a.lr[i]);
      call_.rate_slots[i] = one && i > 0 ? call_.rate_slots[0] : call_.flat;
      if (!one || i == 0) call_.flat += a.lr[i].numel();
    }
  }

  MlpCudaCall* operator->() { return &call_; }

  void set_second_order(const Tensor& flags) {
    check_shape(flags, "second_order", {p_.steps});
    check_dtype(flags, "second_order", ScalarType::Bool);
    check_on_cpu(flags, "second_order");
    const auto* data = static_cast<const uint8_t*>(pointer(flags));
    for (int step = 0; step < p_.steps; ++step) call_.second_order[step / 32] |= uint32_t(data[step] != 0) << step % 32;
  }
  void set_step_weights(const Tensor& weights) {
    check_shape(weights, "step_weights", {p_.steps});
    check_dtype(weights, "step_weights", arithmetic(p_));
    check_on_cpu(weights, "step_weights");
    const void* data = pointer(weights);
    for (int step = 0; step < p_.steps; ++step)
      call_.step_weights[step] =
          p_.is_double ? static_cast<const double*>(data)[step] : static_cast<const float*>(data)[step];
  }
  MlpSetData samples(const Tensor& x, const Tensor& y, const std::optional<Tensor>& mask) {
    return {pointer(x), pointer(y), mask ? static_cast<const uint8_t*>(pointer(*mask)) : nullptr};
  }
  const void* pointer(const Tensor& t) {
    kept_.push_back(as_contiguous(t));
    return kept_.back().const_data_ptr();
  }

  void run(const OnDevice& on) {
    MlpCudaPlan plan;
    check_cuda(cuda_mlp_plan(p_, call_.mode, call_.task_grads != nullptr, &plan));
    check(plan.shared_bytes <= plan.shared_limit, "a task of this size takes ", plan.shared_bytes,
          " bytes of a block's shared memory; the device has ", plan.shared_limit);
    const Tensor scratch = new_tensor("inner steps", like_, {plan.scratch_bytes}, ScalarType::Byte);
    call_.scratch = scratch.mutable_data_ptr();
    check_cuda(cuda_mlp_inner_loop(p_, call_, plan, on.stream()));
  }

 private:
  MlpInnerLoopProblem& p_;
  const Tensor& like_;
  std::vector<Tensor> kept_;
  MlpCudaCall call_{};
};

// Gradients of params and rates, summed over the tasks that share them.
Gradients reduced(const MlpInnerLoopProblem& p, const MlpInnerLoopArguments& a, int64_t flat, const void* weights,
                  const Tensor& task_grads, const OnDevice& on) {
  std::vector<Tensor> grads, rate_grads;
  MlpCudaReduction r{};
  const auto next = [&](std::vector<Tensor>& out, const Tensor& like, int64_t elements, bool shared) {
    out.push_back(empty_like("meta-gradients", like));
    const int64_t first = r.num_parts == 0 ? 0 : r.parts[r.num_parts - 1].first + r.parts[r.num_parts - 1].elements;
    r.parts[r.num_parts++] = {out.back().mutable_data_ptr(), first, elements, shared};
  };
  for (size_t i = 0; i < a.params.size(); ++i) next(grads, a.params[i], p.tensor_size(int(i)), p.shared[i]);
  for (const Tensor& lr : a.lr) next(rate_grads, lr, lr.numel(), true);
  r.dtype = float_dtype(a.params[0], "params");
  r.weights = weights;
  r.task_grads = task_grads.const_data_ptr();
  r.flat = flat;
  r.num_tasks = p.num_tasks;
  check_cuda(cuda_mlp_reduce(r, on.stream()));
  return {grads, rate_grads};
}

std::tuple<std::vector<Tensor>, Tensor> mlp_inner_loop(
    const std::vector<Tensor>& params, const Tensor& x, const Tensor& y, const std::optional<Tensor>& mask,
    const std::vector<Tensor>& lr, double rate, int64_t steps, bool per_step, int64_t adapted,
    const std::vector<int64_t>& activation, int64_t loss, int64_t checkpoint_every, bool keep,
    const Tensor& second_order, const std::vector<double>& slopes, std::optional<double> clip_norm) {
  const MlpInnerLoopArguments a{params,           lr,     rate,     steps, per_step, adapted, activation, loss,
                                checkpoint_every, slopes, clip_norm};
  MlpInnerLoopProblem p = checked_mlp_problem(a, x, y, mask);
  const OnDevice on(x);
  Call call(MlpMode::adapt, p, a);
  call.set_second_order(second_order);
  call->support = call.samples(x, y, mask);
  const int64_t kept = keep ? p.num_checkpoints() * p.num_params() : 0;
  Tensor trajectory = new_private("the parameters of every step", p, params[0], kept);
  if (keep) call->trajectory = trajectory.mutable_data_ptr();
  std::vector<Tensor> results;
  for (size_t i = 0; i < params.size(); ++i) {
    std::vector<int64_t> shape{p.num_tasks, p.units(int(i))};
    if (i % 2 == 0) shape.push_back(p.inputs(int(i)));
    results.push_back(new_tensor("adapted parameters", params[i], shape, params[i].scalar_type()));
    call->adapted[i] = results.back().mutable_data_ptr();
  }
  call.run(on);
  return {results, trajectory};
}

Gradients mlp_inner_loop_backward(const std::vector<Tensor>& grad_adapted, const Tensor& trajectory,
                                  const std::vector<Tensor>& params, const Tensor& x, const Tensor& y,
                                  const std::optional<Tensor>& mask, const std::vector<Tensor>& lr, double rate,
                                  int64_t steps, bool per_step, int64_t adapted, const std::vector<int64_t>& activation,
                                  int64_t loss, int64_t checkpoint_every, const Tensor& second_order,
                                  const std::vector<double>& slopes, std::optional<double> clip_norm) {
  const MlpInnerLoopArguments a{params,           lr,     rate,     steps, per_step, adapted, activation, loss,
                                checkpoint_every, slopes, clip_norm};
  MlpInnerLoopProblem p = checked_mlp_problem(a, x, y, mask);
  const OnDevice on(x);
  Call call(MlpMode::adapt_backward, p, a);
  call.set_second_order(second_order);
  call->support = call.samples(x, y, mask);
  check_value(trajectory.numel() == p.padded_tasks() * p.num_checkpoints() * p.num_params(),
              "trajectory must be the one of this problem, got ", trajectory.numel(), " elements");
  check_dtype(trajectory, "trajectory", arithmetic(p));
  check_same_device(trajectory, "trajectory", x, "support_x");
  call->trajectory = const_cast<void*>(call.pointer(trajectory));
  check_value(grad_adapted.size() == params.size(), "grad_adapted must hold one tensor for each of params, ",
              params.size(), ", got ", grad_adapted.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (grad_adapted[i].numel() != p.num_tasks * p.tensor_size(int(i)))
      fail_value(Element{"grad_adapted", i}, " must have the shape of the adapted tensor, got ",
                 shape_string(grad_adapted[i].sizes()));
    check_dtype(grad_adapted[i], Element{"grad_adapted", i}, params[0].scalar_type());
    check_same_device(grad_adapted[i], Element{"grad_adapted", i}, x, "support_x");
    call->grad_adapted[i] = call.pointer(grad_adapted[i]);
  }
  const Tensor task_grads = new_private("the tasks' gradients", p, params[0], call->flat);
  call->task_grads = task_grads.mutable_data_ptr();
  call.run(on);
  return reduced(p, a, call->flat, nullptr, task_grads, on);
}

std::tuple<Tensor, Tensor> mlp_meta_loss(const std::vector<Tensor>& params, const Tensor& x, const Tensor& y,
                                         const std::optional<Tensor>& mask, const Tensor& query_x,
                                         const Tensor& query_y, const std::optional<Tensor>& query_mask,
                                         const std::vector<Tensor>& lr, double rate, int64_t steps, bool per_step,
                                         int64_t adapted, const std::vector<int64_t>& activation, int64_t loss,
                                         int64_t checkpoint_every, const Tensor& second_order,
                                         const Tensor& step_weights, bool with_grads, const std::vector<double>& slopes,
                                         std::optional<double> clip_norm) {
  const MlpInnerLoopArguments a{params,           lr,     rate,     steps, per_step, adapted, activation, loss,
                                checkpoint_every, slopes, clip_norm};
  MlpInnerLoopProblem p = checked_mlp_problem(a, x, y, mask);
  const OnDevice on(x);
  p.query_samples = check_mlp_samples(p, "query", query_x, query_y, query_mask, params[0]);
  Call call(MlpMode::meta_loss, p, a);
  call.set_second_order(second_order);
  call.set_step_weights(step_weights);
  call->support = call.samples(x, y, mask);
  call->query = call.samples(query_x, query_y, query_mask);
  const Tensor step_losses = new_tensor("losses", params[0], {p.num_tasks, steps}, arithmetic(p));
  call->step_losses = step_losses.mutable_data_ptr();
  Tensor losses = new_tensor("losses", params[0], {p.num_tasks}, params[0].scalar_type());
  call->losses = losses.mutable_data_ptr();
  Tensor task_grads = new_private("the tasks' gradients", p, params[0], with_grads ? call->flat : 0);
  if (with_grads) call->task_grads = task_grads.mutable_data_ptr();
  call.run(on);
  return {losses, task_grads};
}

Gradients mlp_meta_loss_backward(const Tensor& grad_losses, const Tensor& task_grads, const std::vector<Tensor>& params,
                                 const Tensor& x, const Tensor& y, const std::vector<Tensor>& lr, int64_t steps,
                                 bool per_step, int64_t loss) {
  const std::vector<int64_t> activation{0};  // which plays no part
  const std::vector<double> slopes;
  const MlpInnerLoopArguments a{params, lr, 0.0, steps, per_step, -1, activation, loss, 1, slopes, std::nullopt};
  const MlpInnerLoopProblem p = checked_mlp_problem(a, x, y, std::nullopt);
  const OnDevice on(x);
  int64_t flat = p.num_params();
  for (const Tensor& rates : lr) flat += rates.numel();
  check_shape(grad_losses, "grad_losses", {p.num_tasks});
  check_dtype(grad_losses, "grad_losses", params[0].scalar_type());
  check_same_device(grad_losses, "grad_losses", x, "support_x");
  check_value(task_grads.numel() == p.padded_tasks() * flat, "task_grads must be those of this problem, got ",
              task_grads.numel(), " elements");
  check_dtype(task_grads, "task_grads", arithmetic(p));
  check_same_device(task_grads, "task_grads", x, "support_x");
  const Tensor weights = as_contiguous(grad_losses), grads = as_contiguous(task_grads);
  return reduced(p, a, flat, weights.const_data_ptr(), grads, on);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CUDA, m) {
  m.impl("mlp_inner_loop", TORCH_BOX(&mlp_inner_loop));
  m.impl("mlp_inner_loop_backward", TORCH_BOX(&mlp_inner_loop_backward));
  m.impl("mlp_meta_loss", TORCH_BOX(&mlp_meta_loss));
  m.impl("mlp_meta_loss_backward", TORCH_BOX(&mlp_meta_loss_backward));
}

}  // namespace metakern
