// The CPU operators: check the arguments, allocate the results, run the passes with the loops of the instruction set in
// use.
#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "../core/capability.h"
#include "../core/parallel.h"
#include "arguments.h"
#include "cpu_plan.h"

namespace metakern {
namespace {

// Contiguous copies of lists, whose memory a problem points to.
class Contiguous {
 public:
  const void* add(const Tensor& t) {
    kept_.push_back(as_contiguous(t));
    return kept_.back().const_data_ptr();
  }

 private:
  Tensors kept_;
};

// Results like the tensors of a list.
class Results {
 public:
  explicit Results(const Tensors& like) {
    for (const Tensor& t : like) tensors_.push_back(t.numel() > 0 && t.is_contiguous() ? empty_result(t) : empty(t));
  }
  void* data(size_t i) { return tensors_[i].mutable_data_ptr(); }
  Tensors take() { return std::move(tensors_); }

 private:
  static Tensor empty(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }
  Tensors tensors_;
};

// Tables of the time features, [T, 11].
std::vector<double> time_of(const MlpUpdateProblem& p) {
  std::vector<double> time;
  for (int64_t task = 0; task < p.num_tasks; ++task)
    for (double scale : time_scales) time.push_back(std::tanh(double(p.steps[task]) / scale - 1));
  return time;
}

void set_shared(MlpUpdateProblem* p, Contiguous* kept, const Tensors& weights, const Tensor& decays,
                const Tensor& rates, const Tensor& keep, const Tensor& steps) {
  for (size_t i = 0; i < weights.size(); ++i) p->weights[i] = kept->add(weights[i]);
  p->decays = kept->add(decays);
  p->rates = kept->add(rates);
  p->keep = kept->add(keep);
  p->steps = static_cast<const int64_t*>(kept->add(steps));
}

MlpUpdateTensor old_tensor(Contiguous* kept, const MlpUpdateLists& lists, size_t i) {
  MlpUpdateTensor t{};
  t.shape = factored_shape_of(lists.params[i]);
  t.params = kept->add(lists.params[i]);
  t.grads = kept->add(lists.grads[i]);
  t.m = kept->add(lists.m[i]);
  t.v = kept->add(lists.v[i]);
  t.r = kept->add(lists.r[i]);
  t.c = kept->add(lists.c[i]);
  return t;
}

// The factors of a tensor without coordinates stay as they are.
void copy_factor(const Tensor& old, const void* from, void* to) {
  if (old.numel() > 0) std::memcpy(to, from, size_t(old.numel()) * old.element_size());
}

// Segments of one block run all passes at once, neighbouring ones together up to so many coordinates.
constexpr int64_t job_target = 8192;

struct Job {
  int64_t first, last;  // segments
};

struct Schedule {
  std::vector<Job> jobs;             // of segments of one block
  std::vector<int64_t> large;        // segments of several blocks
  std::vector<int64_t> large_blocks;  // all of theirs
};

Schedule schedule_of(const MlpPlan& plan, const MlpUpdateProblem& p) {
  Schedule schedule;
  int64_t size = job_target;
  for (int64_t i = 0; i < int64_t(plan.segments().size()); ++i) {
    const MlpSegment& s = plan.segments()[i];
    if (s.num_blocks > 1) {
      schedule.large.push_back(i);
      for (int64_t b = 0; b < s.num_blocks; ++b) schedule.large_blocks.push_back(s.first_block + b);
      size = job_target;
      continue;
    }
    if (size >= job_target) {
      schedule.jobs.push_back({i, i});
      size = 0;
    }
    schedule.jobs.back().last = i + 1;
    size += p.tensors[s.tensor].shape.numel();
  }
  return schedule;
}

// f(item) for all items, in parallel.
template <class F>
void each(const std::vector<int64_t>& items, const F& f) {
  parallel_for(0, int64_t(items.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(items[i]);
  });
}

void run_forward(const MlpUpdateKernels& k, const MlpPlan& plan, const MlpUpdateCall& call) {
  const Schedule schedule = schedule_of(plan, *call.problem);
  parallel_for(0, int64_t(schedule.jobs.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t job = first; job < last; ++job)
      for (int64_t s = schedule.jobs[job].first; s < schedule.jobs[job].last; ++s) {
        const int64_t block = call.segments[s].first_block;
        k.squares(call, block);
        k.factors(call, s);
        k.feature_squares(call, block);
        k.norms(call, s);
        k.update(call, block);
      }
  });
  each(schedule.large_blocks, [&](int64_t block) { k.squares(call, block); });
  each(schedule.large, [&](int64_t segment) { k.factors(call, segment); });
  each(schedule.large_blocks, [&](int64_t block) { k.feature_squares(call, block); });
  each(schedule.large, [&](int64_t segment) { k.norms(call, segment); });
  each(schedule.large_blocks, [&](int64_t block) { k.update(call, block); });
}

using Step = std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors, Tensor>;

Step mlp_update_step(const Tensors& params, const Tensors& grads, const Tensors& m, const Tensors& v, const Tensors& r,
                     const Tensors& c, const Tensors& weights, const Tensor& decays, const Tensor& rates,
                     const Tensor& keep, const Tensor& steps, double exp_mult) {
  const MlpUpdateLists lists{params, grads, m, v, r, c};
  MlpUpdateProblem p = checked_mlp_update(lists, weights, decays, rates, keep, steps, exp_mult);
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
  const MlpPlan plan(p, 1);
  const int64_t element = p.dtype == DType::float64 ? 8 : 4;
  const MlpWorkspace workspace(plan, 1, element);
  const CachedMemory biases(p.num_tasks * p.width * element);
  const std::vector<double> time = time_of(p);
  MlpUpdateCall call{};
  call.problem = &p;
  call.segments = plan.segments().data();
  call.blocks = plan.blocks().data();
  call.num_segments = int64_t(plan.segments().size());
  call.num_blocks = int64_t(plan.blocks().size());
  call.biases = biases.data();
  workspace.set(&call);
  const MlpUpdateKernels& k = with_cpu_capability([&](auto capability) -> const MlpUpdateKernels& {
    return mlp_update_kernels<capability.value>(p.dtype == DType::float64);
  });
  k.biases(p, time.data(), biases.data());
  run_forward(k, plan, call);
  return {new_params.take(), new_m.take(), new_v.take(), new_r.take(), new_c.take(), norms};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) { m.impl("mlp_update_step", TORCH_BOX(&mlp_update_step)); }

}  // namespace metakern
