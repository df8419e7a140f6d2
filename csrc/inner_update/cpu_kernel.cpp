// compile with: -ffp-contract=off
//
// inner_update on the CPU. Compiled once per instruction set, without contraction of products and sums, so that all
// instruction sets and plain PyTorch give the same bits. The compiler vectorises the loops.
#include "../core/vec.h"
#include "cpu.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// `count` elements from `first` on within one task and one period of α; they share the clipping factor.
struct Run {
  int64_t first, count;
  int64_t rate_first;  // index into rates, where rate_period is not 1
  double coefficient;
};

template <class S>
S one_rate(const InnerUpdateProblem& p, const InnerUpdateTensor& t) {
  if (t.rates == nullptr) return S(p.rate);
  S lanes[tile_lanes];
  read_lanes(t.rates, t.rate_dtype, 0, 1, lanes);
  return lanes[0];
}

// Params, grads and rates all in the arithmetic's dtype.
template <class S>
void update_native(const InnerUpdateProblem& p, const InnerUpdateTensor& t, const Run& run) {
  const S* __restrict params = static_cast<const S*>(t.params) + run.first;
  const S* __restrict grads = static_cast<const S*>(t.grads) + run.first;
  S* __restrict updated = static_cast<S*>(t.updated) + run.first;
  const S c = S(run.coefficient);
  if (t.rate_period == 1) {
    const S rate = one_rate<S>(p, t);
    for (int64_t i = 0; i < run.count; ++i) updated[i] = params[i] - rate * (grads[i] * c);
  } else {
    const S* __restrict rates = static_cast<const S*>(t.rates) + run.rate_first;
    for (int64_t i = 0; i < run.count; ++i) updated[i] = params[i] - rates[i] * (grads[i] * c);
  }
}

template <class S>
void update_converted(const InnerUpdateProblem& p, const InnerUpdateTensor& t, const Run& run) {
  S params[tile_lanes], grads[tile_lanes], rates[tile_lanes];
  const S c = S(run.coefficient), rate = t.rate_period == 1 ? one_rate<S>(p, t) : S(0);
  for (S& r : rates) r = rate;
  for (int64_t done = 0; done < run.count; done += tile_lanes) {
    const int count = int(run.count - done < tile_lanes ? run.count - done : tile_lanes);
    read_lanes(t.params, t.dtype, run.first + done, count, params);
    read_lanes(t.grads, t.dtype, run.first + done, count, grads);
    if (t.rate_period != 1) read_lanes(t.rates, t.rate_dtype, run.rate_first + done, count, rates);
    for (int i = 0; i < tile_lanes; ++i) params[i] -= rates[i] * (grads[i] * c);
    write_lanes(t.updated, t.dtype, run.first + done, count, params);
  }
}

int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

void keep(const InnerUpdateTensor& t, const Run& run) {
  const int64_t size = element_size(t.dtype);
  __builtin_memcpy(static_cast<char*>(t.updated) + run.first * size,
                   static_cast<const char*>(t.params) + run.first * size, run.count * size);
}

void update_run(const InnerUpdateProblem& p, const InnerUpdateTensor& t, const Run& run) {
  const bool native = t.rate_period == 1 || t.rate_dtype == t.dtype;
  if (t.dtype == DType::float32 && native) return update_native<float>(p, t, run);
  if (t.dtype == DType::float64) return native ? update_native<double>(p, t, run) : update_converted<double>(p, t, run);
  update_converted<float>(p, t, run);
}

void update(const InnerUpdateProblem& p, const InnerUpdateTensor& t, int64_t first, int64_t last) {
  const int64_t task_size = p.task_size(t);
  const bool by_task = p.coefficients != nullptr || p.active != nullptr;
  while (first < last) {
    Run run{first, last - first, 0, 1.0};
    if (t.rate_period != 1) {
      run.rate_first = first % t.rate_period;
      if (run.count > t.rate_period - run.rate_first) run.count = t.rate_period - run.rate_first;
    }
    bool active = true;
    if (by_task) {
      const int64_t task = first / task_size, left = (task + 1) * task_size - first;
      if (run.count > left) run.count = left;
      if (p.coefficients != nullptr) run.coefficient = p.coefficients[task];
      active = p.active == nullptr || p.active[task] != 0;
    }
    if (active)
      update_run(p, t, run);
    else
      keep(t, run);
    first += run.count;
  }
}

template <class S>
double sum_of_squares_as(const InnerUpdateTensor& t, int64_t first, int64_t last) {
  double sums[tile_lanes] = {};
  S grads[tile_lanes];
  for (; first < last; first += tile_lanes) {
    const int count = int(last - first < tile_lanes ? last - first : tile_lanes);
    read_lanes(t.grads, t.dtype, first, count, grads);
    for (int i = 0; i < tile_lanes; ++i) sums[i] += double(grads[i]) * double(grads[i]);
  }
  for (int width = tile_lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

// In double, which holds every square of a float, so that no finite norm overflows.
double sum_of_squares(const InnerUpdateTensor& t, int64_t first, int64_t last) {
  return t.dtype == DType::float64 ? sum_of_squares_as<double>(t, first, last)
                                   : sum_of_squares_as<float>(t, first, last);
}

constexpr InnerUpdateKernels kernels{update, sum_of_squares};

}  // namespace
}  // namespace MK_CAPABILITY

template <>
const InnerUpdateKernels& inner_update_kernels<CpuCapability::MK_CAPABILITY>() {
  return kernels;
}

}  // namespace metakern
