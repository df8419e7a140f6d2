// Common part of the CPU operators: contiguous arguments, results, the loop over blocks. Host code, compiled once.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "../core/capability.h"
#include "../core/parallel.h"
#include "arguments.h"
#include "cpu_plan.h"

namespace metakern {

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
    tensors_.reserve(like.size());
    for (const Tensor& t : like) tensors_.push_back(empty_result(t));
  }
  void* data(size_t i) { return tensors_[i].mutable_data_ptr(); }
  Tensors take() { return std::move(tensors_); }

 private:
  Tensors tensors_;
};

// Tables of the time features, [T, 11].
inline std::vector<double> time_of(const MlpUpdateProblem& p) {
  std::vector<double> time;
  for (int64_t task = 0; task < p.num_tasks; ++task)
    for (double scale : time_scales) time.push_back(std::tanh(double(p.steps[task]) / scale - 1));
  return time;
}

inline void set_shared(MlpUpdateProblem* p, Contiguous* kept, const Tensors& weights, const Tensor& decays,
                       const Tensor& rates, const Tensor& keep, const Tensor& steps) {
  for (size_t i = 0; i < weights.size(); ++i) p->weights[i] = kept->add(weights[i]);
  p->decays = kept->add(decays);
  p->rates = kept->add(rates);
  p->keep = kept->add(keep);
  p->steps = static_cast<const int64_t*>(kept->add(steps));
}

inline MlpUpdateTensor old_tensor(Contiguous* kept, const MlpUpdateLists& lists, size_t i) {
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
inline void copy_factor(const Tensor& old, const void* from, void* to) {
  if (old.numel() > 0) std::memcpy(to, from, size_t(old.numel()) * old.element_size());
}

// f(item) for all items, in parallel.
template <class F>
void each(const std::vector<int64_t>& items, const F& f) {
  parallel_for(0, int64_t(items.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(items[i]);
  });
}

// A call without working memory.
inline MlpUpdateCall call_of(const MlpUpdateProblem& p, const MlpPlan& plan) {
  MlpUpdateCall call{};
  call.problem = &p;
  call.segments = plan.segments().data();
  call.blocks = plan.blocks().data();
  call.num_segments = int64_t(plan.segments().size());
  call.num_blocks = int64_t(plan.blocks().size());
  return call;
}

inline const MlpUpdateKernels& kernels_for(const MlpUpdateProblem& p) {
  return with_cpu_capability([&](auto capability) -> const MlpUpdateKernels& {
    return mlp_update_kernels<capability.value>(p.dtype == DType::float64);
  });
}

}  // namespace metakern
