// The backward CPU operator: check the arguments, allocate the gradients, run the passes over all blocks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu_run.h"

namespace metakern {
namespace {

// The lists that backward reads besides those of the forward operator.
struct BackwardLists {
  const Tensors &grad_new_params, &grad_new_m, &grad_new_v, &grad_new_r, &grad_new_c, &new_r, &new_c;
};

// Checks that a list holds tensors like those of another.
void check_list(const Tensors& list, const char* name, const Tensors& like, const char* like_name) {
  check_value(list.size() == like.size(), name, " must hold a tensor for each of params, ", like.size(), ", got ",
              list.size());
  for (size_t i = 0; i < list.size(); ++i) check_like(list[i], Element{name, i}, like[i], like_name);
}

void check_backward(const MlpUpdateProblem& p, const BackwardLists& b, const MlpUpdateLists& lists, const Tensor& norms,
                    const Tensor& decays) {
  check_list(b.grad_new_params, "grad_new_params", lists.params, "its params");
  check_list(b.grad_new_m, "grad_new_m", lists.m, "its m");
  check_list(b.grad_new_v, "grad_new_v", lists.v, "its v");
  check_list(b.grad_new_r, "grad_new_r", lists.r, "its r");
  check_list(b.grad_new_c, "grad_new_c", lists.c, "its c");
  check_list(b.new_r, "new_r", lists.r, "its r");
  check_list(b.new_c, "new_c", lists.c, "its c");
  check_shape(norms, "norms", {p.num_tensors, p.num_tasks, tensor_features});
  check_dtype(norms, "norms", decays.scalar_type());
  check_same_device(norms, "norms", decays, "decays");
}

// A range of blocks for each partial weight gradient.
int64_t groups_of(int64_t blocks) { return blocks < most_groups ? blocks : most_groups; }

// All passes; returns the number of partial weight gradients.
void run_backward(const MlpUpdateBackwardKernels& k, const MlpUpdateCall& call, double* weight_sums, int64_t groups) {
  const MlpUpdateProblem& p = *call.problem;
  const auto segments = [&](void (*pass)(const MlpUpdateCall&, int64_t)) {
    parallel_for(0, call.num_segments, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) pass(call, i);
    });
  };
  const auto blocks = [&](void (*pass)(const MlpUpdateCall&, int64_t)) {
    parallel_for(0, call.num_blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) pass(call, i);
    });
  };
  segments(k.tables);
  parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    const CachedMemory scratch(k.scratch_bytes(p));
    for (int64_t group = first; group < last; ++group) {
      double* sums = weight_sums + group * k.flat_weights(p);
      std::memset(sums, 0, size_t(k.flat_weights(p)) * sizeof(double));
      for (int64_t i = group * call.num_blocks / groups; i < (group + 1) * call.num_blocks / groups; ++i)
        k.network(call, i, scratch.data(), sums);
    }
  });
  segments(k.means);
  blocks(k.moments);
  segments(k.factors);
  blocks(k.grads);
}

using Gradients = std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensor, Tensor, Tensor>;

// The gradients of a tensor without coordinates: those of its factors pass through.
void copy_gradients(const MlpUpdateTensor& t, const MlpUpdateLists& lists, size_t i) {
  copy_factor(lists.r[i], t.grad_new_r, t.grad_r);
  copy_factor(lists.c[i], t.grad_new_c, t.grad_c);
}

Gradients mlp_update_step_backward(const Tensors& grad_new_params, const Tensors& grad_new_m, const Tensors& grad_new_v,
                                   const Tensors& grad_new_r, const Tensors& grad_new_c, const Tensors& params,
                                   const Tensors& grads, const Tensors& m, const Tensors& v, const Tensors& r,
                                   const Tensors& c, const Tensors& new_r, const Tensors& new_c, const Tensor& norms,
                                   const Tensors& weights, const Tensor& decays, const Tensor& rates,
                                   const Tensor& keep, const Tensor& steps, double exp_mult) {
  const MlpUpdateLists lists{params, grads, m, v, r, c};
  const BackwardLists more{grad_new_params, grad_new_m, grad_new_v, grad_new_r, grad_new_c, new_r, new_c};
  MlpUpdateProblem p = checked_mlp_update(lists, weights, decays, rates, keep, steps, exp_mult);
  check_backward(p, more, lists, norms, decays);
  Contiguous kept;
  set_shared(&p, &kept, weights, decays, rates, keep, steps);
  p.norms = const_cast<void*>(kept.add(norms));
  Results grad_params(params), grad_grads(grads), grad_m(m), grad_v(v), grad_r(r), grad_c(c), grad_weights(weights);
  Results numbers({decays, rates, keep});
  std::vector<MlpUpdateTensor> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    MlpUpdateTensor t = old_tensor(&kept, lists, i);
    t.new_r = const_cast<void*>(kept.add(new_r[i]));  // only read
    t.new_c = const_cast<void*>(kept.add(new_c[i]));
    t.grad_new_params = kept.add(grad_new_params[i]);
    t.grad_new_m = kept.add(grad_new_m[i]);
    t.grad_new_v = kept.add(grad_new_v[i]);
    t.grad_new_r = kept.add(grad_new_r[i]);
    t.grad_new_c = kept.add(grad_new_c[i]);
    t.grad_params = grad_params.data(i);
    t.grad_grads = grad_grads.data(i);
    t.grad_m = grad_m.data(i);
    t.grad_v = grad_v.data(i);
    t.grad_r = grad_r.data(i);
    t.grad_c = grad_c.data(i);
    if (t.shape.numel() == 0) copy_gradients(t, lists, i);
    tensors.push_back(t);
  }
  p.tensors = tensors.data();
  const MlpUpdateBackwardKernels& k = with_cpu_capability([&](auto capability) -> const MlpUpdateBackwardKernels& {
    return mlp_update_backward_kernels<capability.value>(p.dtype == DType::float64);
  });
  const MlpPlan plan(p, backward_sums);
  const int64_t element = p.dtype == DType::float64 ? 8 : 4;
  MlpUpdateCall call = call_of(p, plan);
  const MlpWorkspace workspace(plan, backward_sums, element);
  workspace.set(&call);
  const std::vector<double> time = time_of(p);
  call.time = time.data();
  const CachedMemory biases(p.num_tasks * p.width * element);
  call.biases = biases.data();
  const bool converts = p.dtype == DType::bfloat16 || p.dtype == DType::float16;
  const CachedMemory kept_grads(converts ? 2 * plan.coordinates() * element : 1);
  call.kept_grads = converts ? kept_grads.data() : nullptr;
  call.coordinates = plan.coordinates();
  const CachedMemory slopes(plan.entries() * element);
  call.slopes = slopes.data();
  const CachedMemory decay_sums((call.num_blocks + call.num_segments) * num_decays * int64_t(sizeof(double)));
  call.decay_sums = static_cast<double*>(decay_sums.data());
  const int64_t groups = groups_of(call.num_blocks);
  const int64_t weight_bytes = k.flat_weights(p) * int64_t(sizeof(double));
  const CachedMemory weight_sums(std::max<int64_t>(groups, 1) * weight_bytes);
  if (groups == 0) std::memset(weight_sums.data(), 0, size_t(weight_bytes));
  kernels_for(p).biases(p, time.data(), biases.data());
  run_backward(k, call, static_cast<double*>(weight_sums.data()), groups);
  std::vector<void*> pointers;
  for (size_t i = 0; i < weights.size(); ++i) pointers.push_back(grad_weights.data(i));
  k.reduce(call, static_cast<double*>(weight_sums.data()), groups, pointers.data(), numbers.data(0), numbers.data(1),
           numbers.data(2));
  const Tensors shared = numbers.take();
  return {grad_params.take(), grad_grads.take(),   grad_m.take(), grad_v.take(), grad_r.take(),
          grad_c.take(),      grad_weights.take(), shared[0],     shared[1],     shared[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) {
  m.impl("mlp_update_step_backward", TORCH_BOX(&mlp_update_step_backward));
}

}  // namespace metakern
