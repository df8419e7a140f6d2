// The CPU operators of mlp_inner_loop: check the arguments, allocate the results, hand groups of tasks to the loops.
#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <tuple>

#include "../core/capability.h"
#include "../core/parallel.h"
#include "../core/result_cache.h"
#include "arguments.h"

namespace metakern {

namespace {

const MlpInnerLoopKernels& mlp_kernels(const MlpInnerLoopProblem& p) {
  return with_cpu_capability([&](auto capability) -> const MlpInnerLoopKernels& {
    return mlp_inner_loop_kernels<capability.value>(p.is_double);
  });
}

void check_labels(const MlpInnerLoopProblem& p, const char* name, const Tensor& y) {
  if (p.loss != TaskLoss::cross_entropy) return;
  const auto* labels = static_cast<const int64_t*>(y.const_data_ptr());
  for (int64_t i = 0; i < y.numel(); ++i)
    if (labels[i] < 0 || labels[i] >= p.outputs())
      fail_value(name, "_y must be 0 to ", p.outputs() - 1, ", as the model has ", p.outputs(), " outputs, got ",
                 labels[i]);
}

// A call's tensors, contiguous, alive as long as the pointers are used.
class Call {
 public:
  Call(MlpInnerLoopProblem& p, const MlpInnerLoopArguments& a, const std::optional<Tensor>& second_order)
      : p_(p), tensors_(a.params.size()) {
    for (size_t i = 0; i < tensors_; ++i) call_.params[i] = pointer(a.params[i]);
    call_.flat = p.num_params();
    for (size_t i = 0; i < tensors_; ++i) {
      call_.rate_slots[i] = -1;
      if (a.lr.empty()) continue;
      const bool one = a.lr.size() == 1;
      p.rates[i].data = pointer(a.lr[one ? 0 : i]);
      if (one && i > 0) {
        call_.rate_slots[i] = call_.rate_slots[0];
        continue;
      }
      call_.rate_slots[i] = call_.flat;
      call_.flat += a.lr[one ? 0 : i].numel();
    }
    if (!second_order.has_value()) return;
    check_shape(*second_order, "second_order", {p.steps});
    check_dtype(*second_order, "second_order", ScalarType::Bool);
    check_on_cpu(*second_order, "second_order");
    call_.second_order = static_cast<const uint8_t*>(pointer(*second_order));
  }

  MlpInnerLoopCall& operator*() { return call_; }
  MlpInnerLoopCall* operator->() { return &call_; }

  MlpSamples samples(const char* name, const Tensor& x, const Tensor& y, const std::optional<Tensor>& mask) {
    const MlpSamples set{pointer(x), pointer(y), mask ? static_cast<const uint8_t*>(pointer(*mask)) : nullptr};
    check_labels(p_, name, kept_[kept_.size() - (mask ? 2 : 1)]);
    return set;
  }

  // Runs the loops over all units of tasks.
  void run(const MlpInnerLoopKernels& k, MlpRun loop) {
    const int64_t bytes = k.scratch_bytes(p_, call_);
    parallel_for(0, k.units(p_).count(), 1, [&](int64_t first, int64_t last) {
      const CachedMemory scratch(bytes);
      loop(p_, call_, scratch.data(), first, last);
    });
  }

  const void* pointer(const Tensor& t) {
    kept_.push_back(as_contiguous(t));
    return kept_.back().const_data_ptr();
  }

 private:
  MlpInnerLoopProblem& p_;
  size_t tensors_;
  std::vector<Tensor> kept_;
  MlpInnerLoopCall call_{};
};

// A result in lanes: `elements` per task. Memory after the last unit is set to zero, so that results are deterministic.
Tensor in_lanes(const MlpInnerLoopProblem& p, const Tensor& like, int64_t elements) {
  Tensor result = empty_result(like, {p.padded_tasks() * elements});
  const MlpUnits u = mlp_kernels(p).units(p);
  const int64_t used = u.first_task(u.count()) * elements;
  const int64_t size = int64_t(like.element_size());
  if (result.numel() == used) return result;  // memset takes no null pointer, of nothing either
  std::memset(static_cast<char*>(result.mutable_data_ptr()) + used * size, 0, size_t((result.numel() - used) * size));
  return result;
}

// Gradients of params and rates, summed over the tasks that share them.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> reduced(const MlpInnerLoopProblem& p,
                                                             const MlpInnerLoopArguments& a,
                                                             const MlpInnerLoopCall& call, const void* weights,
                                                             const Tensor& task_grads) {
  std::vector<Tensor> grads, rate_grads;
  const MlpInnerLoopKernels& k = mlp_kernels(p);
  int64_t first = 0;
  const auto next = [&](const Tensor& like, int64_t count, bool shared) {
    Tensor out = torch::stable::new_empty(like, like.sizes());
    k.reduce(p, {weights, task_grads.const_data_ptr(), call.flat, first, count, shared, out.mutable_data_ptr()});
    first += count;
    return out;
  };
  for (size_t i = 0; i < a.params.size(); ++i) grads.push_back(next(a.params[i], p.tensor_size(int(i)), p.shared[i]));
  for (const Tensor& lr : a.lr) rate_grads.push_back(next(lr, lr.numel(), true));
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
  Call call(p, a, second_order);
  call->support = call.samples("support", x, y, mask);
  Tensor trajectory = in_lanes(p, params[0], keep ? p.num_checkpoints() * p.num_params() : 0);
  if (keep) call->trajectory = trajectory.mutable_data_ptr();
  std::vector<Tensor> results;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t units = p.units(int(i)), inputs = p.inputs(int(i));
    results.push_back(i % 2 == 0 ? torch::stable::new_empty(params[i], {p.num_tasks, units, inputs})
                                 : torch::stable::new_empty(params[i], {p.num_tasks, units}));
    call->adapted[i] = results.back().mutable_data_ptr();
  }
  const MlpInnerLoopKernels& k = mlp_kernels(p);
  call.run(k, k.adapt);
  return {results, trajectory};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> mlp_inner_loop_backward(
    const std::vector<Tensor>& grad_adapted, const Tensor& trajectory, const std::vector<Tensor>& params,
    const Tensor& x, const Tensor& y, const std::optional<Tensor>& mask, const std::vector<Tensor>& lr, double rate,
    int64_t steps, bool per_step, int64_t adapted, const std::vector<int64_t>& activation, int64_t loss,
    int64_t checkpoint_every, const Tensor& second_order, const std::vector<double>& slopes,
    std::optional<double> clip_norm) {
  const MlpInnerLoopArguments a{params,           lr,     rate,     steps, per_step, adapted, activation, loss,
                                checkpoint_every, slopes, clip_norm};
  MlpInnerLoopProblem p = checked_mlp_problem(a, x, y, mask);
  check_value(grad_adapted.size() == params.size(), "grad_adapted must hold one tensor for each of params, ",
              params.size(), ", got ", grad_adapted.size());
  Call call(p, a, second_order);
  call->support = call.samples("support", x, y, mask);
  check_value(trajectory.numel() == p.padded_tasks() * p.num_checkpoints() * p.num_params(),
              "trajectory must be the one of this problem, got ", trajectory.numel(), " elements");
  check_dtype(trajectory, "trajectory", params[0].scalar_type());
  check_on_cpu(trajectory, "trajectory");
  call->trajectory = const_cast<void*>(call.pointer(trajectory));
  for (size_t i = 0; i < params.size(); ++i) {
    if (grad_adapted[i].numel() != p.num_tasks * p.tensor_size(int(i)))
      fail_value(Element{"grad_adapted", i}, " must have the shape of the adapted tensor, got ",
                 shape_string(grad_adapted[i].sizes()));
    check_dtype(grad_adapted[i], Element{"grad_adapted", i}, params[0].scalar_type());
    check_on_cpu(grad_adapted[i], Element{"grad_adapted", i});
    call->grad_adapted[i] = call.pointer(grad_adapted[i]);
  }
  Tensor task_grads = in_lanes(p, params[0], call->flat);
  call->task_grads = task_grads.mutable_data_ptr();
  const MlpInnerLoopKernels& k = mlp_kernels(p);
  call.run(k, k.adapt_backward);
  return reduced(p, a, *call, nullptr, task_grads);
}

// The weighted sum of every task's query losses, from the first step to the last.
template <class S>
void add_weighted(const MlpInnerLoopProblem& p, const MlpInnerLoopCall& call, Tensor& total) {
  const S* losses = static_cast<const S*>(call.losses);
  const S* weights = static_cast<const S*>(call.step_weights);
  S* out = static_cast<S*>(total.mutable_data_ptr());
  for (int64_t task = 0; task < p.num_tasks; ++task) {
    out[task] = S(0);
    for (int step = 0; step < p.steps; ++step)
      if (weights[step] != S(0)) out[task] += weights[step] * losses[step * p.num_tasks + task];
  }
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
  p.query_samples = check_mlp_samples(p, "query", query_x, query_y, query_mask, params[0]);
  Call call(p, a, second_order);
  call->support = call.samples("support", x, y, mask);
  call->query = call.samples("query", query_x, query_y, query_mask);
  check_shape(step_weights, "step_weights", {steps});
  check_dtype(step_weights, "step_weights", params[0].scalar_type());
  check_on_cpu(step_weights, "step_weights");
  call->step_weights = call.pointer(step_weights);
  Tensor losses = torch::stable::new_empty(params[0], {steps, p.num_tasks});
  call->losses = losses.mutable_data_ptr();
  Tensor task_grads = in_lanes(p, params[0], with_grads ? call->flat : 0);
  if (with_grads) call->task_grads = task_grads.mutable_data_ptr();
  const MlpInnerLoopKernels& k = mlp_kernels(p);
  call.run(k, k.meta_loss);
  Tensor total = torch::stable::new_empty(params[0], {p.num_tasks});
  p.is_double ? add_weighted<double>(p, *call, total) : add_weighted<float>(p, *call, total);
  return {total, task_grads};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> mlp_meta_loss_backward(
    const Tensor& grad_losses, const Tensor& task_grads, const std::vector<Tensor>& params, const Tensor& x,
    const Tensor& y, const std::vector<Tensor>& lr, int64_t steps, bool per_step, int64_t loss) {
  const std::vector<int64_t> activation{0};  // which plays no part
  const std::vector<double> slopes;
  const MlpInnerLoopArguments a{params, lr, 0.0, steps, per_step, -1, activation, loss, 1, slopes, std::nullopt};
  MlpInnerLoopProblem p = checked_mlp_problem(a, x, y, std::nullopt);
  Call call(p, a, std::nullopt);
  check_shape(grad_losses, "grad_losses", {p.num_tasks});
  check_dtype(grad_losses, "grad_losses", params[0].scalar_type());
  check_on_cpu(grad_losses, "grad_losses");
  check_value(task_grads.numel() == p.padded_tasks() * call->flat, "task_grads must be those of this problem, got ",
              task_grads.numel(), " elements");
  check_dtype(task_grads, "task_grads", params[0].scalar_type());
  check_on_cpu(task_grads, "task_grads");
  return reduced(p, a, *call, call.pointer(grad_losses), as_contiguous(task_grads));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) {
  m.impl("mlp_inner_loop", TORCH_BOX(&mlp_inner_loop));
  m.impl("mlp_inner_loop_backward", TORCH_BOX(&mlp_inner_loop_backward));
  m.impl("mlp_meta_loss", TORCH_BOX(&mlp_meta_loss));
  m.impl("mlp_meta_loss_backward", TORCH_BOX(&mlp_meta_loss_backward));
}

}  // namespace metakern
