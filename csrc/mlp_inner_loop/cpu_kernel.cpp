// mlp_inner_loop on the CPU: the inner loops of a unit of tasks, within the cache. Compiled once per
// instruction set; problem.h has the axis legend.
#include "cpu.h"
#include "cpu_group.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Maximum bytes of a full group's parameters: larger ones do not fit the cache, and single tasks are faster.
constexpr int64_t max_group_bytes = int64_t(1) << 19;

// Up to lanes / lanes_per_single remaining tasks run as single tasks, no slower than as a group.
constexpr int lanes_per_single = 2;

template <class S>
MlpUnits units(const MlpInnerLoopProblem& p) {
  constexpr int width = lanes<vec_t<S>>;
  if (p.num_params() * vector_bytes > max_group_bytes) return {0, width, p.num_tasks};
  const int64_t left = p.num_tasks % width;
  if (left * lanes_per_single <= width) return {p.num_tasks / width, width, left};
  return {p.num_tasks / width + 1, width, 0};
}

template <class S>
int64_t scratch_bytes(const MlpInnerLoopProblem& p, const MlpInnerLoopCall& call) {
  const MlpUnits u = units<S>(p);
  const int64_t group = u.groups > 0 ? MlpGroup<TaskLanes<S>>(p, call, nullptr).bytes() : 0;
  const int64_t single = u.singles > 0 ? MlpGroup<SampleLanes<S>>(p, call, nullptr).bytes() : 0;
  return group > single ? group : single;
}

template <class Group, void (Group::*Run)(int64_t)>
void run_some(const MlpInnerLoopProblem& p, const MlpInnerLoopCall& call, void* scratch, const MlpUnits& u,
              int64_t first, int64_t last) {
  if (first >= last) return;
  Group group(p, call, scratch);
  for (int64_t unit = first; unit < last; ++unit) (group.*Run)(u.first_task(unit));
}

template <class S, void (MlpGroup<TaskLanes<S>>::*Grouped)(int64_t), void (MlpGroup<SampleLanes<S>>::*Single)(int64_t)>
void run(const MlpInnerLoopProblem& p, const MlpInnerLoopCall& call, void* scratch, int64_t first, int64_t last) {
  const MlpUnits u = units<S>(p);
  const int64_t border = first > u.groups ? first : (last < u.groups ? last : u.groups);
  run_some<MlpGroup<TaskLanes<S>>, Grouped>(p, call, scratch, u, first, border);
  run_some<MlpGroup<SampleLanes<S>>, Single>(p, call, scratch, u, border, last);
}

// Weight times gradient of a group's tasks: added to sums[column], or written for every task.
template <class S>
MK_INLINE void reduce_group(const MlpReduction& r, int64_t first_task, int tasks, int64_t at, int columns,
                            vec_t<S>* sums) {
  using V = vec_t<S>;
  const S* weights = static_cast<const S*>(r.weights);
  const S* grads = static_cast<const S*>(r.task_grads) + first_task * r.flat;
  V weight = broadcast<V>(1), used = broadcast<V>(1);
  if (tasks == lanes<V>) {
    if (weights != nullptr) weight = load<V>(weights + first_task);
  } else {
    for (int lane = 0; lane < lanes<V>; ++lane) {
      weight[lane] = lane >= tasks ? S(0) : (weights == nullptr ? S(1) : weights[first_task + lane]);
      used[lane] = S(lane < tasks);
    }
  }
  for (int i = 0; i < columns; ++i) {
    // Lanes after the last task hold copies of it, which must not be counted.
    const V grad = load<V>(grads + (r.first + at + i) * lanes<V>);
    const V term = used != S(0) ? grad * weight : broadcast<V>(0);
    sums[i] += term;
    if (!r.shared)
      for (int lane = 0; lane < tasks; ++lane)
        static_cast<S*>(r.out)[(first_task + lane) * r.count + at + i] = term[lane];
  }
}

// Groups one after another, then the lanes of their sum by a tree, then single tasks one after another.
template <class S>
void reduce(const MlpInnerLoopProblem& p, const MlpReduction& r) {
  using V = vec_t<S>;
  constexpr int width = lanes<V>;
  const MlpUnits u = units<S>(p);
  S* out = static_cast<S*>(r.out);
  for (int64_t at = 0; at < r.count; at += width) {
    const int columns = r.count - at < width ? int(r.count - at) : width;
    V sums[width];
    for (int i = 0; i < width; ++i) sums[i] = broadcast<V>(0);
    for (int64_t g = 0; g < u.groups; ++g) {
      const int64_t left = p.num_tasks - g * width;
      reduce_group<S>(r, g * width, left < width ? int(left) : width, at, columns, sums);
    }
    V total = sum_lanes_of_each<V>(sums);
    for (int64_t unit = u.groups; unit < u.count(); ++unit) {
      const int64_t task = u.first_task(unit);
      const S weight = r.weights == nullptr ? S(1) : static_cast<const S*>(r.weights)[task];
      const S* grads = static_cast<const S*>(r.task_grads) + task * r.flat + r.first + at;
      for (int i = 0; i < columns; ++i) {
        const S term = grads[i] * weight;
        total[i] += term;
        if (!r.shared) out[task * r.count + at + i] = term;
      }
    }
    for (int i = 0; r.shared && i < columns; ++i) out[at + i] = total[i];
  }
}

template <class S>
constexpr MlpInnerLoopKernels kernels{
    units<S>,
    scratch_bytes<S>,
    run<S, &MlpGroup<TaskLanes<S>>::adapt, &MlpGroup<SampleLanes<S>>::adapt>,
    run<S, &MlpGroup<TaskLanes<S>>::adapt_backward, &MlpGroup<SampleLanes<S>>::adapt_backward>,
    run<S, &MlpGroup<TaskLanes<S>>::meta_loss, &MlpGroup<SampleLanes<S>>::meta_loss>,
    reduce<S>};

}  // namespace
}  // namespace MK_CAPABILITY

template <>
const MlpInnerLoopKernels& mlp_inner_loop_kernels<CpuCapability::MK_CAPABILITY>(bool is_double) {
  return is_double ? kernels<double> : kernels<float>;
}

}  // namespace metakern
