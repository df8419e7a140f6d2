// The forward CPU operator: check the arguments, allocate the results, run the passes with the loops of the instruction
// set in use.
#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu_run.h"

namespace metakern {
namespace {

// Segments of one block run all passes at once, neighbouring ones together up to so many coordinates.
constexpr int64_t job_target = 8192;
// Segments of several blocks do so too, as far as the third-level cache holds what they read: 24 bytes a coordinate.
constexpr int64_t group_target = int64_t(1) << 19;

struct Job {
  int64_t first, last;  // segments
};

// Segments of several blocks, and all of their blocks.
struct Group {
  std::vector<int64_t> segments, blocks;
};

struct Schedule {
  std::vector<Job> jobs;  // of segments of one block
  std::vector<Group> groups;
};

Schedule schedule_of(const MlpPlan& plan, const MlpUpdateProblem& p) {
  Schedule schedule;
  int64_t size = job_target, group_size = group_target;
  for (int64_t i = 0; i < int64_t(plan.segments().size()); ++i) {
    const MlpSegment& s = plan.segments()[i];
    const int64_t n = p.tensors[s.tensor].shape.numel();
    if (s.num_blocks > 1) {
      if (group_size + n > group_target) {
        schedule.groups.emplace_back();
        group_size = 0;
      }
      schedule.groups.back().segments.push_back(i);
      for (int64_t b = 0; b < s.num_blocks; ++b) schedule.groups.back().blocks.push_back(s.first_block + b);
      group_size += n;
      size = job_target;
      continue;
    }
    if (size >= job_target) {
      schedule.jobs.push_back({i, i});
      size = 0;
    }
    schedule.jobs.back().last = i + 1;
    size += n;
  }
  return schedule;
}

void run_forward(const MlpUpdateKernels& k, const MlpPlan& plan, const MlpUpdateCall& call) {
  const Schedule schedule = schedule_of(plan, *call.problem);
  const int64_t scratch_bytes = k.scratch_bytes(*call.problem, plan.longest_column());
  parallel_for(0, int64_t(schedule.jobs.size()), 1, [&](int64_t first, int64_t last) {
    const CachedMemory scratch(scratch_bytes);
    for (int64_t job = first; job < last; ++job)
      for (int64_t s = schedule.jobs[job].first; s < schedule.jobs[job].last; ++s) {
        const int64_t block = call.segments[s].first_block;
        k.squares(call, block, scratch.data());
        k.factors(call, s);
        k.feature_squares(call, block, scratch.data());
        k.norms(call, s);
        k.update(call, block, scratch.data());
      }
  });
  for (const Group& group : schedule.groups) {
    const auto blocks = [&](void (*pass)(const MlpUpdateCall&, int64_t, void*)) {
      parallel_for(0, int64_t(group.blocks.size()), 1, [&](int64_t first, int64_t last) {
        const CachedMemory scratch(scratch_bytes);
        for (int64_t i = first; i < last; ++i) pass(call, group.blocks[i], scratch.data());
      });
    };
    blocks(k.squares);
    each(group.segments, [&](int64_t segment) { k.factors(call, segment); });
    blocks(k.feature_squares);
    each(group.segments, [&](int64_t segment) { k.norms(call, segment); });
    blocks(k.update);
  }
}

using Step = std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors, Tensor>;

Step forward_step(const MlpUpdateLists& lists, const Tensors& weights, const Tensor& decays, const Tensor& rates,
                  const Tensor& keep, const Tensor& steps, double exp_mult, bool stacked) {
  const auto& [params, grads, m, v, r, c] = lists;
  MlpUpdateProblem p = checked_mlp_update(lists, weights, decays, rates, keep, steps, exp_mult, stacked);
  Contiguous kept;
  set_shared(&p, &kept, weights, decays, rates, keep, steps);
  Results new_params(params), new_m(m), new_v(v), new_r(r), new_c(c);
  std::vector<MlpUpdateTensor> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    MlpUpdateTensor t = old_tensor(&kept, lists, i);
    t.new_params = new_params.data(i);
    t.new_m = new_m.data(i);
    t.new_v = new_v.data(i);
    t.new_r = new_r.data(i);
    t.new_c = new_c.data(i);
    if (t.shape.numel() == 0) {
      copy_factor(r[i], t.r, t.new_r);
      copy_factor(c[i], t.c, t.new_c);
    }
    tensors.push_back(t);
  }
  p.tensors = tensors.data();
  Tensor norms = torch::stable::new_zeros(decays, {p.num_tensors, p.num_tasks, tensor_features});
  p.norms = norms.mutable_data_ptr();
  const MlpPlan plan(p, forward_sums);
  const int64_t element = p.dtype == DType::float64 ? 8 : 4;
  const MlpWorkspace workspace(plan, forward_sums, element);
  const CachedMemory biases(p.num_tasks * p.width * element);
  const std::vector<double> time = time_of(p);
  MlpUpdateCall call = call_of(p, plan);
  call.biases = biases.data();
  workspace.set(&call);
  const MlpUpdateKernels& k = kernels_for(p);
  k.biases(p, time.data(), biases.data());
  run_forward(k, plan, call);
  return {new_params.take(), new_m.take(), new_v.take(), new_r.take(), new_c.take(), norms};
}

Step mlp_update_step(const Tensors& params, const Tensors& grads, const Tensors& m, const Tensors& v, const Tensors& r,
                     const Tensors& c, const Tensors& weights, const Tensor& decays, const Tensor& rates,
                     const Tensor& keep, const Tensor& steps, double exp_mult) {
  return forward_step({params, grads, m, v, r, c}, weights, decays, rates, keep, steps, exp_mult, false);
}

// Each task has weights and decays of its own: they have one more axis in front, of T.
std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors> mlp_update_step_stacked(
    const Tensors& params, const Tensors& grads, const Tensors& m, const Tensors& v, const Tensors& r, const Tensors& c,
    const Tensors& weights, const Tensor& decays, const Tensor& rates, const Tensor& keep, const Tensor& steps,
    double exp_mult) {
  auto [new_params, new_m, new_v, new_r, new_c, norms] =
      forward_step({params, grads, m, v, r, c}, weights, decays, rates, keep, steps, exp_mult, true);
  return {new_params, new_m, new_v, new_r, new_c};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) {
  m.impl("mlp_update_step", TORCH_BOX(&mlp_update_step));
  m.impl("mlp_update_step_stacked", TORCH_BOX(&mlp_update_step_stacked));
}

}  // namespace metakern
