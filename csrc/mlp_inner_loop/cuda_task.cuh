// The inner loop of one task by one block: forward steps, backward steps, and memory transfers.
#pragma once
#include "cuda.h"
#include "cuda_pass.cuh"

namespace metakern {
inline namespace MK_CAPABILITY {

struct MlpArguments {
  MlpInnerLoopProblem p;
  MlpCudaCall call;
  MlpLayout m;
  MlpPlacement placement;
  bool one_rate;  // of all parameters, which all adapt
};
static_assert(sizeof(MlpArguments) <= 4096, "the kernel's arguments must fit what every architecture takes");

// Whether one number is the rate of a whole tensor.
MK_INLINE bool has_one_rate(const MlpInnerLoopProblem& p, int tensor) {
  return !p.rates[tensor].per_parameter || p.tensor_size(tensor) == 1;
}
// Whether all parameters are adapted with one rate.
MK_INLINE bool has_one_rate(const MlpInnerLoopProblem& p) {
  for (int i = 0; i < p.num_tensors(); ++i)
    if (!p.adapted[i] || !has_one_rate(p, i) || p.rates[i].data != p.rates[0].data) return false;
  return true;
}

// Sizes, in elements, of the parts of a block's scratch: its checkpoints, then the data that is not in shared memory.
struct MlpScratch {
  int64_t checkpoints = 0;  // [checkpoints][P]
  int64_t steps = 0;        // [checkpoint_every][parameters, results of the passes]
  int64_t adjoint = 0;      // [parameters]

  MK_INLINE MlpScratch(const MlpInnerLoopProblem& p, const MlpLayout& m, MlpMode mode, MlpPlacement placement) {
    if (placement == MlpPlacement::no_way_back) return;
    if (mode == MlpMode::meta_loss && p.num_checkpoints() > 1) checkpoints = p.num_params() * p.num_checkpoints();
    if (placement == MlpPlacement::all_steps) return;
    steps = (int64_t(m.params) + m.slot_elements) * p.checkpoint_every;
    if (placement == MlpPlacement::one_step_without_adjoint) adjoint = m.params;
  }
  MK_INLINE int64_t elements() const { return checkpoints + steps + adjoint; }
};

template <class S>
class MlpTask {
 public:
  __device__ __forceinline__ MlpTask(const MlpArguments& a, int64_t task)
      : a_(a), p_(a.p), m_(a.m), pass_(a.p, a.m), task_(task) {
    const MlpScratch scratch(a.p, a.m, a.call.mode, a.placement);
    S* own = static_cast<S*>(a.call.scratch) + int64_t(blockIdx.x) * scratch.elements();
    steps_ = own + scratch.checkpoints;
    adjoint_ = scratch.adjoint > 0 ? steps_ + scratch.steps : memory() + m_.adjoint;
    checkpoints_ = scratch.checkpoints > 0 ? own : nullptr;
    if (a.call.trajectory != nullptr)
      checkpoints_ = static_cast<S*>(a.call.trajectory) + task * p_.num_params() * p_.num_checkpoints();
  }

  __device__ __forceinline__ void run() {
    const bool backward = a_.call.task_grads != nullptr;
    start();
    if (a_.call.mode != MlpMode::adapt_backward) {
      for (int segment = 0; segment < p_.num_checkpoints(); ++segment) {
        if (segment > 0) begin_segment();
        write_checkpoint(segment);
        run_segment(segment, backward);
      }
    }
    if (a_.call.mode == MlpMode::adapt) write_adapted();
    if (backward) run_backward();
    if (a_.call.mode == MlpMode::meta_loss) write_loss();
  }

 private:
  const MlpArguments& a_;
  const MlpInnerLoopProblem& p_;
  const MlpLayout& m_;
  MlpPass<S> pass_;
  int64_t task_;
  S* steps_;        // of this block
  S* adjoint_;      // in the layout of the parameters
  S* checkpoints_;  // [checkpoints][P] of this task, or null

  static __device__ __forceinline__ S* memory() { return shared_elements<S>(); }
  template <class Use>
  static __device__ __forceinline__ void each(int count, const Use& use) {
    MlpPass<S>::each(count, use);
  }
  __device__ __forceinline__ int first_step(int segment) const { return segment * p_.checkpoint_every; }
  __device__ __forceinline__ int last_step(int segment) const {
    const int end = first_step(segment) + p_.checkpoint_every;
    return end < p_.steps ? end : p_.steps;
  }
  __device__ __forceinline__ bool keeps_all() const { return a_.placement == MlpPlacement::all_steps; }
  __device__ __forceinline__ int slot(int step) const { return keeps_all() ? step % p_.checkpoint_every : 0; }
  // Parameters before and after a step. A single slot holds the latest.
  __device__ __forceinline__ int theta(int step) const { return m_.thetas + slot(step) * m_.params; }
  __device__ __forceinline__ int next_theta(int step) const { return theta(step) + (keeps_all() ? m_.params : 0); }
  __device__ __forceinline__ MlpSet support(int step) const {
    MlpSet set = m_.support;
    const int offset = slot(step) * m_.slot_elements;
    set.h += offset;
    set.z += offset;
    set.e += offset;
    set.delta += offset;
    return set;
  }

  // ------------------------------------------------------------------------------------------------ memory

  // use(number in the tensor, element of the parameters in shared memory) for every number of a tensor.
  template <class Use>
  __device__ __forceinline__ void each_of_tensor(int tensor, const Use& use) const {
    const int inputs = p_.inputs(tensor), row = matrix_row(inputs), first = m_.weights[tensor / 2];
    if (tensor % 2)
      each(p_.units(tensor), [&](int i) { use(i, first + i * row + inputs); });
    else
      each(p_.units(tensor) * inputs, [&](int i) { use(i, first + i / inputs * row + i % inputs); });
  }
  // use(number in the parameters of a task, element of them in shared memory) for all.
  template <class Use>
  __device__ __forceinline__ void each_parameter(const Use& use) const {
    int64_t offset = 0;
    for (int i = 0; i < p_.num_tensors(); offset += p_.tensor_size(i), ++i)
      each_of_tensor(i, [&](int number, int at) { use(offset + number, at); });
  }

  // Sum over all threads, returned to every thread. Ends in a barrier.
  __device__ __forceinline__ S block_sum(S x) const {
    S* sums = memory() + m_.partials;
    x = warp_sum(x);
    if (threadIdx.x % warp_lanes == 0) sums[threadIdx.x / warp_lanes] = x;
    __syncthreads();
    x = sums[0];
    for (int i = 1; i < int(blockDim.x) / warp_lanes; ++i) x += sums[i];
    __syncthreads();
    return x;
  }

  // The same in double, which holds every square of a float. An element of the memory may not be aligned for one.
  __device__ __forceinline__ double block_sum_double(double x) const {
    auto* sums = reinterpret_cast<uint32_t*>(memory() + m_.partials);
    x = warp_sum(x);
    if (threadIdx.x % warp_lanes == 0) {
      const auto bits = bit_copy<uint64_t>(x);
      sums[2 * (threadIdx.x / warp_lanes)] = uint32_t(bits);
      sums[2 * (threadIdx.x / warp_lanes) + 1] = uint32_t(bits >> 32);
    }
    __syncthreads();
    x = 0;
    for (int i = 0; i < int(blockDim.x) / warp_lanes; ++i)
      x += bit_copy<double>(uint64_t(sums[2 * i]) | uint64_t(sums[2 * i + 1]) << 32);
    __syncthreads();
    return x;
  }

  __device__ __forceinline__ void read_features(const void* data, int samples, int features, int to, int row) const {
    const int64_t first = task_ * samples * features;
    each(samples * features, [&](int i) {
      memory()[to + i % features * row + i / features] = read_lane<S>(data, a_.call.dtype, first + i);
    });
  }

  __device__ __forceinline__ void read_set(const MlpSetData& data, const MlpSet& set) const {
    if (data.x == nullptr) return;
    const bool labels = p_.loss == TaskLoss::cross_entropy;
    const uint8_t* mask = data.mask == nullptr ? nullptr : data.mask + task_ * set.count;
    S used = S(set.count);
    if (mask != nullptr) {
      used = 0;
      each(set.count, [&](int s) { used += S(mask[s] != 0); });
      used = block_sum(used);
    }
    read_features(data.x, set.count, p_.widths[0], set.x, set.row);
    if (!labels) read_features(data.y, set.count, p_.outputs(), set.y, set.row);
    const S share = S(1) / (used * S(labels ? 1 : p_.outputs()));
    each(set.count, [&](int s) {
      S weight = mask == nullptr || mask[s] != 0 ? share : S(0);
      if (labels) {
        const int64_t label = static_cast<const int64_t*>(data.y)[task_ * set.count + s];
        if (label < 0 || label >= p_.outputs()) weight = S(NAN);
        memory()[set.y + s] = S(label);
      }
      memory()[set.weight + s] = weight;
      memory()[set.x + p_.widths[0] * set.row + s] = S(1);
    });
  }

  // Samples, the first parameters, gradients of zero or of the adapted parameters. Ends in a barrier.
  __device__ __forceinline__ void start() const {
    const bool of_results = a_.call.mode == MlpMode::adapt_backward;
    read_set(a_.call.support, m_.support);
    read_set(a_.call.query, m_.query);
    for (int i = 0; i < p_.num_tensors(); ++i) {
      const int64_t own = task_ * p_.tensor_size(i), first = p_.shared[i] ? 0 : own;
      each_of_tensor(i, [&](int number, int at) {
        memory()[m_.thetas + at] = read_lane<S>(a_.call.params[i], a_.call.dtype, first + number);
        if (a_.placement != MlpPlacement::no_way_back)
          adjoint_[at] = of_results ? read_lane<S>(a_.call.grad_adapted[i], a_.call.dtype, own + number) : S(0);
      });
    }
    if (a_.call.task_grads != nullptr) {
      S* grads = task_grads();
      for (int64_t i = p_.num_params() + threadIdx.x; i < a_.call.flat; i += blockDim.x) grads[i] = S(0);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void write_adapted() const {
    const int last = next_theta(p_.steps - 1);
    for (int i = 0; i < p_.num_tensors(); ++i)
      each_of_tensor(i, [&](int number, int at) {
        write_lane(a_.call.adapted[i], a_.call.dtype, task_ * p_.tensor_size(i) + number, memory()[last + at]);
      });
  }
  __device__ __forceinline__ S* task_grads() const {
    return static_cast<S*>(a_.call.task_grads) + task_ * a_.call.flat;
  }

  // The parameters in the first slot, from and to a checkpoint.
  __device__ __forceinline__ void write_checkpoint(int segment) const {
    if (checkpoints_ == nullptr) return;
    S* to = checkpoints_ + segment * p_.num_params();
    each_parameter([&](int64_t number, int at) { to[number] = memory()[m_.thetas + at]; });
  }
  __device__ __forceinline__ void read_checkpoint(int segment) const {
    const S* from = checkpoints_ + segment * p_.num_params();
    each_parameter([&](int64_t number, int at) { memory()[m_.thetas + at] = from[number]; });
    __syncthreads();
  }
  // The parameters after one full segment become the first of the next.
  __device__ __forceinline__ void begin_segment() const {
    const int last = m_.thetas + m_.slots * m_.params;
    if (!keeps_all()) return;
    each(m_.params, [&](int i) { memory()[m_.thetas + i] = memory()[last + i]; });
    __syncthreads();
  }

  // If one slot serves all steps: loads and stores a step's data. The arrays written by its passes are contiguous.
  __device__ __forceinline__ S* saved(int step) const {
    return steps_ + int64_t(step % p_.checkpoint_every) * (int64_t(m_.params) + m_.slot_elements);
  }
  __device__ __forceinline__ void save(int step) const {
    S* to = saved(step);
    each(m_.params, [&](int i) { to[i] = memory()[m_.thetas + i]; });
    each(m_.slot_elements, [&](int i) { to[m_.params + i] = memory()[m_.support.h + i]; });
    __syncthreads();
  }
  __device__ __forceinline__ void load(int step) const {
    const S* from = saved(step);
    each(m_.params, [&](int i) { memory()[m_.thetas + i] = from[i]; });
    each(m_.slot_elements, [&](int i) { memory()[m_.support.h + i] = from[m_.params + i]; });
    __syncthreads();
  }

  // ------------------------------------------------------------------------------------------------ steps

  __device__ __forceinline__ S rate(int tensor, int step, int number) const {
    const Rates& r = p_.rates[tensor];
    if (r.data == nullptr) return S(p_.rate);
    return read_lane<S>(r.data, a_.call.dtype, step * r.step + (r.per_parameter ? number : 0));
  }

  // A number of a layer's matrix: its tensor, and its number in there.
  struct Place {
    int tensor, number;
  };
  __device__ __forceinline__ Place place(int l, int unit, int input) const {
    const int inputs = p_.widths[l];
    return input == inputs ? Place{2 * l + 1, unit} : Place{2 * l, unit * inputs + input};
  }

  __device__ __forceinline__ void run_segment(int segment, bool keep) const {
    for (int step = first_step(segment); step < last_step(segment); ++step) {
      const MlpSet set = support(step);
      const int now = theta(step), next = next_theta(step);
      const S first_rate = rate(0, step, 0);
      pass_.forward(now, set);
      pass_.backward(now, set);
      if (keep && !keeps_all()) save(step);
      if (p_.clips()) {
        clipped_update(step, set);
        __syncthreads();
        if (!keep && query_weight(step) != S(0)) query_loss(step);
        continue;
      }
      for (int l = 0; l < p_.num_layers; ++l) {
        const int first = m_.weights[l], row = matrix_row(p_.widths[l]);
        pass_.layer_gradient(l, set, [&](int unit, int input, S gradient) {
          const int at = first + unit * row + input;
          const S old = memory()[now + at];
          if (a_.one_rate) {
            memory()[next + at] = old - gradient * first_rate;
            return;
          }
          const Place to = place(l, unit, input);
          memory()[next + at] = p_.adapted[to.tensor] ? old - gradient * rate(to.tensor, step, to.number) : old;
        });
      }
      __syncthreads();
      if (!keep && query_weight(step) != S(0)) query_loss(step);
    }
  }

  // min(1, c / |g|) for the gradient g of a step and the norm c at which it is clipped, and 1 / |g| where it is, else
  // 0.
  struct Clipping {
    S coefficient, inverse;
  };
  // The gradient of a step, to memory, and its clipping. Ends in a barrier.
  __device__ __forceinline__ Clipping clip_gradient(const MlpSet& set) const {
    double squares = 0;
    for (int l = 0; l < p_.num_layers; ++l) {
      const int first = m_.gradient + m_.weights[l], row = matrix_row(p_.widths[l]);
      pass_.layer_gradient(l, set, [&](int unit, int input, S gradient) {
        memory()[first + unit * row + input] = gradient;
        if (p_.adapted[place(l, unit, input).tensor]) squares += double(gradient) * double(gradient);
      });
    }
    squares = block_sum_double(squares);
    if (squares <= p_.clip_norm * p_.clip_norm) return {S(1), S(0)};  // false for NaN
    const double length = sqrt(squares);
    return {S(p_.clip_norm / length), S(1 / length)};
  }

  // Needs a barrier afterwards.
  __device__ __forceinline__ void clipped_update(int step, const MlpSet& set) const {
    const int now = theta(step), next = next_theta(step);
    const S coefficient = clip_gradient(set).coefficient;
    for (int i = 0; i < p_.num_tensors(); ++i)
      each_of_tensor(i, [&](int number, int at) {
        const S old = memory()[now + at], gradient = memory()[m_.gradient + at] * coefficient;
        memory()[next + at] = p_.adapted[i] ? old - gradient * rate(i, step, number) : old;
      });
  }

  __device__ __forceinline__ S query_weight(int step) const {
    return a_.call.mode == MlpMode::meta_loss ? S(a_.call.step_weights[step]) : S(0);
  }

  // Written by one thread, which adds them in the order of the samples; needs a barrier before.
  __device__ __forceinline__ void write_step_loss(int step) const {
    if (threadIdx.x != 0) return;
    S sum = 0;
    for (int s = 0; s < m_.query.count; ++s) sum += memory()[m_.sample_losses + s];
    static_cast<S*>(a_.call.step_losses)[task_ * p_.steps + step] = sum;
  }
  __device__ __forceinline__ void query_loss(int step) const {
    pass_.forward(next_theta(step), m_.query);
    pass_.losses(m_.query, m_.sample_losses);
    __syncthreads();
    write_step_loss(step);
  }
  // Called by the thread that wrote the steps' losses.
  __device__ __forceinline__ void write_loss() const {
    if (threadIdx.x != 0) return;
    const S* losses = static_cast<const S*>(a_.call.step_losses) + task_ * p_.steps;
    S sum = 0;
    for (int step = 0; step < p_.steps; ++step)
      if (query_weight(step) != S(0)) sum += query_weight(step) * losses[step];
    write_lane(a_.call.losses, a_.call.dtype, task_, sum);
  }

  // ------------------------------------------------------------------------------------------------ the way back

  __device__ __forceinline__ void run_backward() const {
    const int last = p_.num_checkpoints() - 1;
    for (int segment = last; segment >= 0; --segment) {
      if (segment != last || a_.call.mode == MlpMode::adapt_backward) {  // otherwise its steps are still here
        read_checkpoint(segment);
        run_segment(segment, true);
      }
      for (int step = last_step(segment) - 1; step >= first_step(segment); --step) {
        if (query_weight(step) != S(0)) query_backward(step);
        if (!keeps_all()) load(step);
        step_backward(step);
      }
    }
    S* grads = task_grads();
    each_parameter([&](int64_t number, int at) { grads[number] = adjoint_[at]; });
  }

  __device__ __forceinline__ void query_backward(int step) const {
    const S weight = query_weight(step);
    pass_.forward(next_theta(step), m_.query);
    pass_.losses(m_.query, m_.sample_losses);
    pass_.backward(next_theta(step), m_.query);
    write_step_loss(step);
    for (int l = 0; l < p_.num_layers; ++l) {
      S* adjoint = adjoint_ + m_.weights[l];
      const int row = matrix_row(p_.widths[l]);
      pass_.layer_gradient(l, m_.query,
                           [&](int unit, int input, S gradient) { adjoint[unit * row + input] += gradient * weight; });
    }
    __syncthreads();
  }

  // Turns the adjoint of the parameters after a step into the adjoint of the parameters before it.
  __device__ __forceinline__ void step_backward(int step) const {
    const MlpSet set = support(step);
    if (p_.clips()) {
      write_clipped_direction(step, set);
    } else {
      rate_gradients(step, set, S(1));
      write_direction(step);
    }
    __syncthreads();
    if (a_.call.second_order[step / 32] >> (step % 32) & 1) pass_.add_hessian_product(theta(step), set, adjoint_);
  }

  // Minus the rates times the adjoint.
  __device__ __forceinline__ void write_direction(int step) const {
    if (a_.one_rate) {  // the padding too, which nobody reads
      const S factor = -rate(0, step, 0);
      each(m_.params, [=](int i) { memory()[m_.direction + i] = factor * adjoint_[i]; });
      return;
    }
    for (int i = 0; i < p_.num_tensors(); ++i)
      each_of_tensor(i, [&](int number, int at) {
        memory()[m_.direction + at] = p_.adapted[i] ? -rate(i, step, number) * adjoint_[at] : S(0);
      });
  }

  // Writes c / |g| (d - <d, g> g / |g|^2) for that direction d where the gradient g is clipped; overwrites g.
  __device__ __forceinline__ void write_clipped_direction(int step, const MlpSet& set) const {
    const Clipping clip = clip_gradient(set);
    double along = 0;
    for (int i = 0; i < p_.num_tensors(); ++i) {
      if (!p_.adapted[i]) continue;
      each_of_tensor(i, [&](int number, int at) {
        along -= double(rate(i, step, number) * adjoint_[at]) * double(memory()[m_.gradient + at]);
      });
    }
    along = block_sum_double(along);
    rate_gradients(step, set, clip.coefficient);
    const S share = clip.inverse == S(0) ? S(0) : S(along * double(clip.inverse));
    for (int i = 0; i < p_.num_tensors(); ++i)
      each_of_tensor(i, [&](int number, int at) {
        const S own = -rate(i, step, number) * adjoint_[at], g = memory()[m_.gradient + at];
        memory()[m_.direction + at] = p_.adapted[i] ? clip.coefficient * (own - share * (clip.inverse * g)) : S(0);
      });
  }

  __device__ __forceinline__ S* rate_slot(int tensor, int step) const {
    return task_grads() + a_.call.rate_slots[tensor] + step * p_.rates[tensor].step;
  }

  // Adds the rates' gradients, for a gradient scaled by `coefficient`.
  __device__ __forceinline__ void rate_gradients(int step, const MlpSet& set, S coefficient) const {
    if (a_.call.rate_slots[0] < 0) return;
    const int warps = int(blockDim.x) / warp_lanes, warp = int(threadIdx.x) / warp_lanes;
    for (int l = 0; l < p_.num_layers; ++l) {
      const S* adjoint = adjoint_ + m_.weights[l];
      const int row = matrix_row(p_.widths[l]);
      S weight_sum = 0, bias_sum = 0;
      pass_.layer_gradient(l, set, [&](int unit, int input, S gradient) {
        const Place to = place(l, unit, input);
        const S term = gradient * coefficient * adjoint[unit * row + input];
        if (!p_.adapted[to.tensor]) return;
        if (!has_one_rate(p_, to.tensor))
          rate_slot(to.tensor, step)[to.number] -= term;
        else if (to.tensor % 2)
          bias_sum += term;
        else
          weight_sum += term;
      });
      weight_sum = warp_sum(weight_sum);
      bias_sum = warp_sum(bias_sum);
      if (threadIdx.x % warp_lanes != 0) continue;
      memory()[m_.partials + 2 * l * warps + warp] = weight_sum;
      memory()[m_.partials + (2 * l + 1) * warps + warp] = bias_sum;
    }
    __syncthreads();
    add_rate_sums(step, warps);
  }

  // One thread for each tensor, or one for all where they share one rate.
  __device__ __forceinline__ void add_rate_sums(int step, int warps) const {
    const bool shared = p_.num_tensors() > 1 && a_.call.rate_slots[0] == a_.call.rate_slots[1];
    const int first = int(threadIdx.x), last = shared ? p_.num_tensors() : first + 1;
    if (first >= (shared ? 1 : p_.num_tensors())) return;
    S sum = 0;
    for (int tensor = first; tensor < last; ++tensor)
      if (has_one_rate(p_, tensor))
        for (int i = 0; i < warps; ++i) sum += memory()[m_.partials + tensor * warps + i];
    if (has_one_rate(p_, first)) *rate_slot(first, step) -= sum;
  }
};

}  // namespace MK_CAPABILITY
}  // namespace metakern
