// inner_update's kernels: partial sums of the tasks' squared gradients, and the update itself.
//
// The list is passed in the kernels' arguments. A warp processes units of 512 elements of one tensor, one task and one
// period of α; a lane takes four neighbours in every 128 elements, aligned or not. So no sum depends on addresses or on
// the number of multiprocessors.
#pragma once
#include "../core/storage.cuh"
#include "problem.h"

namespace metakern {
inline namespace MK_CAPABILITY {

constexpr int unit_elements = 512;
constexpr int lane_step = 4 * warp_lanes;
constexpr int update_warps = 8;
constexpr int update_threads = update_warps * warp_lanes;
constexpr int argument_bytes = 4096;  // supported by every architecture

constexpr MK_INLINE int64_t units_of(int64_t elements) { return (elements + unit_elements - 1) / unit_elements; }

struct UpdatePart {
  const void* params;
  const void* grads;
  void* updated;
  const void* rates;
  int64_t first_unit;  // units of the parts before this one
  int64_t row;         // elements that are cut into units: those of one task and one period of α
  int64_t task_size;
  int64_t rate_period;
  DType dtype, rate_dtype;
};

// Up to `capacity` tensors of the list.
struct UpdateArguments {
  static constexpr int capacity = 54;
  UpdatePart parts[capacity];
  int num_parts;
  int num_sums;  // of each task; 0: no clipping
  int64_t num_units;
  double rate;
  double clip_norm;
  const double* sums;     // [T][num_sums], of squared gradients
  const uint8_t* active;  // [T] or null
};
static_assert(sizeof(UpdateArguments) <= argument_bytes, "the list must fit the kernel's arguments");

struct NormPart {
  const void* grads;
  int64_t first_unit;  // of one task
  int64_t task_size;
  DType dtype;
};

struct NormArguments {
  static constexpr int capacity = 120;
  NormPart parts[capacity];
  int num_parts;
  int segments;       // blocks that share one task's units
  int first_sum;      // where this launch's sums of a task begin
  int num_sums;       // of each task
  int64_t num_units;  // of one task
  int64_t num_tasks;
  double* sums;           // [T][num_sums]
  const uint8_t* active;  // [T] or null
};
static_assert(sizeof(NormArguments) <= argument_bytes, "the list must fit the kernel's arguments");

template <DType dtype>
struct Stored;
template <>
struct Stored<DType::float32> {
  using Element = float;
  using Arithmetic = float;
};
template <>
struct Stored<DType::float64> {
  using Element = double;
  using Arithmetic = double;
};
template <>
struct Stored<DType::bfloat16> {
  using Element = BFloat16;
  using Arithmetic = float;
};
template <>
struct Stored<DType::float16> {
  using Element = Float16;
  using Arithmetic = float;
};

// The part that holds a unit.
template <class Arguments>
__device__ __forceinline__ const auto& part_of(const Arguments& a, int64_t unit) {
  int first = 0, last = a.num_parts - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (a.parts[middle].first_unit <= unit)
      first = middle;
    else
      last = middle - 1;
  }
  return a.parts[first];
}

// Whether four neighbours can be loaded or stored at once.
template <class Element>
__device__ __forceinline__ bool is_aligned(const Element* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(Element) == 2 ? 8 : 16) == 0;
}

// Elements i ... i + 3, zeros from `count` on.
template <DType dtype, class S = typename Stored<dtype>::Arithmetic>
__device__ __forceinline__ Vec4<S> read4(const typename Stored<dtype>::Element* p, int i, int count, bool aligned) {
  if (aligned && i + 4 <= count) return load4(p + i);
  Vec4<S> x;
#pragma unroll
  for (int q = 0; q < 4; ++q) x[q] = i + q < count ? read_lane<S>(p, dtype, i + q) : S(0);
  return x;
}

template <DType dtype, class S = typename Stored<dtype>::Arithmetic>
__device__ __forceinline__ void write4(typename Stored<dtype>::Element* p, int i, int count, bool aligned,
                                       const Vec4<S>& x) {
  if (aligned && i + 4 <= count) return store4_global(p + i, x);
#pragma unroll
  for (int q = 0; q < 4; ++q)
    if (i + q < count) write_lane(p, dtype, i + q, x[q]);
}

// α of a unit.
template <DType dtype>
class Rates {
 public:
  using S = typename Stored<dtype>::Arithmetic;
  using Element = typename Stored<dtype>::Element;

  // `first`: the unit's first element within the tensor.
  __device__ __forceinline__ Rates(const UpdateArguments& a, const UpdatePart& t, int64_t first)
      : data_(t.rate_period == 1 ? nullptr : t.rates), dtype_(t.rate_dtype) {
    if (t.rate_period == 1) {
      one_ = t.rates == nullptr ? S(a.rate) : read_lane<S>(t.rates, t.rate_dtype, 0);
    } else {
      first_ = first % t.rate_period;
      aligned_ = dtype_ == dtype && is_aligned(static_cast<const Element*>(data_) + first_);
    }
  }
  // α of elements i ... i + 3 of the unit.
  __device__ __forceinline__ Vec4<S> at(int i, int count) const {
    if (data_ == nullptr) return {{one_, one_, one_, one_}};
    if (dtype_ == dtype) return read4<dtype>(static_cast<const Element*>(data_) + first_, i, count, aligned_);
    Vec4<S> x;
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = i + q < count ? read_lane<S>(data_, dtype_, first_ + i + q) : S(0);
    return x;
  }

 private:
  const void* data_;  // null: one number for all
  DType dtype_;
  S one_ = S(0);
  int64_t first_ = 0;
  bool aligned_ = false;
};

// The elements of one tensor that one warp processes at a time.
struct Unit {
  int64_t first;
  int count;
};

template <DType dtype>
__device__ __forceinline__ void update_unit(const UpdateArguments& a, const UpdatePart& t, const Unit& unit,
                                            double coefficient) {
  using S = typename Stored<dtype>::Arithmetic;
  using Element = typename Stored<dtype>::Element;
  const Element* params = static_cast<const Element*>(t.params) + unit.first;
  const Element* grads = static_cast<const Element*>(t.grads) + unit.first;
  Element* updated = static_cast<Element*>(t.updated) + unit.first;
  const bool aligned = is_aligned(params) && is_aligned(grads) && is_aligned(updated);
  const Rates<dtype> rates(a, t, unit.first);
  const S c = S(coefficient);
  for (int i = 4 * (threadIdx.x % warp_lanes); i < unit.count; i += lane_step) {
    const Vec4<S> p = read4<dtype>(params, i, unit.count, aligned), g = read4<dtype>(grads, i, unit.count, aligned);
    const Vec4<S> rate = rates.at(i, unit.count);
    Vec4<S> x;
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = p[q] - rounded_product(rate[q], rounded_product(g[q], c));
    write4<dtype>(updated, i, unit.count, aligned, x);
  }
}

// Copies bits unchanged, also those of a NaN.
template <class Bits>
__device__ __forceinline__ void keep_unit(const UpdatePart& t, const Unit& unit) {
  const Bits* params = static_cast<const Bits*>(t.params) + unit.first;
  Bits* updated = static_cast<Bits*>(t.updated) + unit.first;
  for (int i = threadIdx.x % warp_lanes; i < unit.count; i += warp_lanes) updated[i] = params[i];
}

// A task's clipping factor, by all lanes of a warp; 1 for a zero norm, NaN for a NaN norm.
__device__ __forceinline__ double clip_coefficient(const UpdateArguments& a, int64_t task) {
  const double* sums = a.sums + task * a.num_sums;
  double squares = 0;
  for (int i = threadIdx.x % warp_lanes; i < a.num_sums; i += warp_lanes) squares += sums[i];
  squares = warp_sum(squares);
  return squares <= a.clip_norm * a.clip_norm ? 1.0 : a.clip_norm / sqrt(squares);
}

__global__ void __launch_bounds__(update_threads) update_kernel(const __grid_constant__ UpdateArguments a) {
  const int64_t step = int64_t(gridDim.x) * update_warps;
  for (int64_t at = int64_t(blockIdx.x) * update_warps + threadIdx.x / warp_lanes; at < a.num_units; at += step) {
    const UpdatePart& t = part_of(a, at);
    const int64_t row_units = units_of(t.row), row = (at - t.first_unit) / row_units;
    const int64_t begin = (at - t.first_unit - row * row_units) * unit_elements, left = t.row - begin;
    const Unit unit{row * t.row + begin, left < unit_elements ? int(left) : unit_elements};
    const int64_t task = unit.first / t.task_size;
    const bool active = a.active == nullptr || a.active[task] != 0;
    const double coefficient = active && a.num_sums > 0 ? clip_coefficient(a, task) : 1.0;
    switch (t.dtype) {
      case DType::float32:
        active ? update_unit<DType::float32>(a, t, unit, coefficient) : keep_unit<uint32_t>(t, unit);
        break;
      case DType::float64:
        active ? update_unit<DType::float64>(a, t, unit, coefficient) : keep_unit<uint64_t>(t, unit);
        break;
      case DType::bfloat16:
        active ? update_unit<DType::bfloat16>(a, t, unit, coefficient) : keep_unit<uint16_t>(t, unit);
        break;
      default: active ? update_unit<DType::float16>(a, t, unit, coefficient) : keep_unit<uint16_t>(t, unit); break;
    }
  }
}

// This lane's share of the sum of squares, in double, which holds every square of a float.
template <DType dtype>
__device__ __forceinline__ double sum_of_squares(const NormPart& t, const Unit& unit) {
  using Element = typename Stored<dtype>::Element;
  const Element* grads = static_cast<const Element*>(t.grads) + unit.first;
  const bool aligned = is_aligned(grads);
  double sum = 0;
  for (int i = 4 * (threadIdx.x % warp_lanes); i < unit.count; i += lane_step) {
    const auto g = read4<dtype>(grads, i, unit.count, aligned);
#pragma unroll
    for (int q = 0; q < 4; ++q) sum += double(g[q]) * double(g[q]);
  }
  return sum;
}

__device__ __forceinline__ double sum_of_squares(const NormArguments& a, int64_t task, int64_t at) {
  const NormPart& t = part_of(a, at);
  const int64_t begin = (at - t.first_unit) * unit_elements, left = t.task_size - begin;
  const Unit unit{task * t.task_size + begin, left < unit_elements ? int(left) : unit_elements};
  switch (t.dtype) {
    case DType::float32: return sum_of_squares<DType::float32>(t, unit);
    case DType::float64: return sum_of_squares<DType::float64>(t, unit);
    case DType::bfloat16: return sum_of_squares<DType::bfloat16>(t, unit);
    default: return sum_of_squares<DType::float16>(t, unit);
  }
}

// A block sums one segment of a task: each warp takes every n-th unit, n being the number of the task's warps. The sums
// of inactive tasks are neither written nor read.
__global__ void __launch_bounds__(update_threads) norm_kernel(const __grid_constant__ NormArguments a) {
  double* warps = reinterpret_cast<double*>(dynamic_shared());  // [update_warps]
  const int warp = threadIdx.x / warp_lanes;
  for (int64_t item = blockIdx.x; item < a.num_tasks * a.segments; item += gridDim.x) {
    const int64_t task = item / a.segments;
    const int segment = int(item - task * a.segments);
    if (a.active != nullptr && a.active[task] == 0) continue;
    double sum = 0;
    for (int64_t at = segment * update_warps + warp; at < a.num_units; at += int64_t(a.segments) * update_warps)
      sum += sum_of_squares(a, task, at);
    sum = warp_sum(sum);
    if (threadIdx.x % warp_lanes == 0) warps[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int other = 1; other < update_warps; ++other) sum += warps[other];
      a.sums[task * a.num_sums + a.first_sum + segment] = sum;
    }
    __syncthreads();  // before the next item's sums
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
