// The CPU operator inner_update: check the arguments, allocate the results, hand tiles of elements to the loops of the
// instruction set in use.
#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "../core/capability.h"
#include "../core/parallel.h"
#include "../core/result_cache.h"
#include "arguments.h"

namespace metakern {

namespace {

const InnerUpdateKernels& kernels() {
  return with_cpu_capability(
      [&](auto capability) -> const InnerUpdateKernels& { return inner_update_kernels<capability.value>(); });
}

constexpr int64_t grain_tiles = 8;

// Calls f(index of a tensor, tile of it) for a range of the tiles of all tensors, `starts[i]` being tensor i's first.
template <class F>
void for_each_tile(const std::vector<int64_t>& starts, int64_t first, int64_t last, const F& f) {
  int64_t i = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
  for (int64_t at = first; at < last; ++at) {
    while (at >= starts[i + 1]) ++i;  // an empty tensor has no tile
    f(i, at - starts[i]);
  }
}

template <class F>
void parallel_tiles(const std::vector<int64_t>& starts, const F& f) {
  const auto range = [&](int64_t first, int64_t last) { for_each_tile(starts, first, last, f); };
  if (starts.back() <= grain_tiles)
    range(0, starts.back());
  else
    parallel_for(0, starts.back(), grain_tiles, range);
}

double sum_by_tree(double* values, int64_t count) {
  for (; count > 1; count = (count + 1) / 2)
    for (int64_t i = 0; i < count / 2; ++i) values[i] += values[i + (count + 1) / 2];
  return count == 1 ? values[0] : 0.0;
}

// Factors that clip the norms of the tasks' gradients to clip_norm. An inactive task has a factor of 1.
std::vector<double> clip_coefficients(const InnerUpdateKernels& k, const InnerUpdateProblem& p) {
  std::vector<int64_t> task_starts{0}, starts{0};  // tiles of one task's part of a tensor; of all tasks'
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    task_starts.push_back(task_starts.back() + update_tiles(p.task_size(p.tensors[i])));
    starts.push_back(task_starts.back() * p.num_tasks);
  }
  const int64_t task_tiles = task_starts.back();
  std::vector<double> partials(size_t(p.num_tasks * task_tiles), 0.0), coefficients(size_t(p.num_tasks), 1.0);
  parallel_tiles(starts, [&](int64_t i, int64_t at) {
    const InnerUpdateTensor& t = p.tensors[i];
    const int64_t tiles = task_starts[i + 1] - task_starts[i], size = p.task_size(t);
    const int64_t task = at / tiles, tile = at % tiles, first = tile * update_tile;
    if (p.active != nullptr && p.active[task] == 0) return;
    partials[task * task_tiles + task_starts[i] + tile] =
        k.sum_of_squares(t, task * size + first, task * size + std::min(first + update_tile, size));
  });
  for (int64_t task = 0; task < p.num_tasks; ++task) {
    const double squares = sum_by_tree(partials.data() + task * task_tiles, task_tiles);
    if (!(squares <= p.clip_norm * p.clip_norm)) coefficients[task] = p.clip_norm / std::sqrt(squares);  // NaN too
  }
  return coefficients;
}

std::vector<Tensor> inner_update(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                 const std::vector<Tensor>& lr, double rate, int64_t step,
                                 std::optional<double> clip_norm, std::optional<Tensor> active) {
  InnerUpdateArguments args = checked_inner_update(params, grads, lr, rate, step, clip_norm, active);
  std::vector<Tensor> updated;
  std::vector<int64_t> starts{0};
  for (size_t i = 0; i < params.size(); ++i) {
    updated.push_back(empty_result(args.params[i]));
    args.tensors[i].updated = updated[i].mutable_data_ptr();
    starts.push_back(starts[i] + update_tiles(args.tensors[i].numel));
  }
  if (starts.back() == 0) return updated;
  InnerUpdateProblem& p = args.problem;
  p.tensors = args.tensors.data();
  const InnerUpdateKernels& k = kernels();
  std::vector<double> coefficients;
  if (clip_norm) {
    coefficients = clip_coefficients(k, p);
    p.coefficients = coefficients.data();
  }
  parallel_tiles(starts, [&](int64_t i, int64_t tile) {
    const InnerUpdateTensor& t = p.tensors[i];
    k.update(p, t, tile * update_tile, std::min((tile + 1) * update_tile, t.numel));
  });
  return updated;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) { m.impl("inner_update", TORCH_BOX(&inner_update)); }

}  // namespace metakern
