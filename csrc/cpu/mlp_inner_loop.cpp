// mlp_inner_loop on the CPU: a task in each SIMD lane, whole inner loops of a group of tasks without leaving the cache.
// Compiled once per instruction set; ../mlp_inner_loop.h has the axis legend.
#include "mlp_inner_loop.h"

#include "mlp_pass.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Cuts memory into arrays; without memory it only counts.
template <class V>
class Arena {
 public:
  explicit Arena(V* memory) : memory_(memory) {}
  V* take(int64_t elements) {
    V* at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += elements;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  V* memory_;
  int64_t used_ = 0;
};

template <class S>
class Group {
 public:
  using V = vec_t<S>;
  static constexpr int width = lanes<V>;

  Group(const MlpInnerLoopProblem& p, const MlpInnerLoopCall& call, void* scratch)
      : p_(p), call_(call), pass_(p), size_(p.num_params()), arena_(static_cast<V*>(scratch)) {
    support_ = take_samples(p.support_samples);
    query_ = take_samples(p.query_samples);
    support_elements_ = MlpPass<S>::activation_elements(p, p.support_samples);
    steps_ = take_activations(support_elements_ * p.checkpoint_every);
    tangents_ = take_activations(support_elements_);
    query_activations_ = take_activations(MlpPass<S>::activation_elements(p, p.query_samples));
    thetas_ = arena_.take(size_ * (p.checkpoint_every + 1));
    checkpoints_ = arena_.take(size_ * p.num_checkpoints());
    direction_ = arena_.take(size_);
    adjoint_ = arena_.take(call.flat > size_ ? call.flat : size_);
  }
  int64_t bytes() const { return arena_.used() * int64_t(sizeof(V)); }

  void adapt(int64_t group) {
    start(group);
    if (call_.trajectory != nullptr) checkpoints_ = trajectory(group);
    run_forward(false);
    for (int i = 0; i < p_.num_tensors(); ++i)
      if (call_.adapted[i] != nullptr)
        write_tasks(next_theta(p_.steps - 1) + p_.offset(i), call_.adapted[i], p_.tensor_size(i));
  }

  void adapt_backward(int64_t group) {
    start(group);
    checkpoints_ = trajectory(group);
    clear_adjoint();
    for (int i = 0; i < p_.num_tensors(); ++i)
      if (call_.grad_adapted[i] != nullptr)
        read_tasks(call_.grad_adapted[i], p_.tensor_size(i), adjoint_ + p_.offset(i));
    for (int segment = p_.num_checkpoints() - 1; segment >= 0; --segment) {
      restart_segment(segment);
      for (int step = last_step(segment) - 1; step >= first_step(segment); --step) step_backward(step);
    }
    write_adjoint(group);
  }

  void meta_loss(int64_t group) {
    start(group);
    const bool with_grads = call_.task_grads != nullptr;
    run_forward(!with_grads);
    if (!with_grads) return;
    clear_adjoint();
    for (int segment = p_.num_checkpoints() - 1; segment >= 0; --segment) {
      if (segment != p_.num_checkpoints() - 1) restart_segment(segment);  // the last one's steps are still here
      for (int step = last_step(segment) - 1; step >= first_step(segment); --step) {
        query_backward(step);
        step_backward(step);
      }
    }
    write_adjoint(group);
  }

 private:
  const MlpInnerLoopProblem& p_;
  const MlpInnerLoopCall& call_;
  MlpPass<S> pass_;
  int64_t size_;
  Arena<V> arena_;
  LaneSamples<V> support_, query_;
  Activations<V> steps_, tangents_, query_activations_;
  int64_t support_elements_;
  V* thetas_;       // [checkpoint_every + 1][P], the parameters along one segment of steps
  V* checkpoints_;  // [checkpoints][P]
  V* direction_;    // [P]
  V* adjoint_;      // [flat]
  int64_t first_task_ = 0;
  int tasks_ = 0;

  LaneSamples<V> take_samples(int count) {
    const int64_t n = count;
    const int64_t targets = p_.loss == TaskLoss::cross_entropy ? 1 : p_.outputs();
    return {arena_.take(n * p_.widths[0]), arena_.take(n * targets), arena_.take(n), count};
  }
  Activations<V> take_activations(int64_t elements) {
    return {arena_.take(elements), arena_.take(elements), arena_.take(elements), arena_.take(elements)};
  }
  V* trajectory(int64_t group) const {
    return static_cast<V*>(call_.trajectory) + group * size_ * p_.num_checkpoints();
  }
  int first_step(int segment) const { return segment * p_.checkpoint_every; }
  int last_step(int segment) const {
    const int end = first_step(segment) + p_.checkpoint_every;
    return end < p_.steps ? end : p_.steps;
  }
  V* theta(int step) const { return thetas_ + size_ * (step % p_.checkpoint_every); }
  V* next_theta(int step) const { return theta(step) + size_; }
  Activations<V> activations(int step) const { return steps_.at(support_elements_ * (step % p_.checkpoint_every)); }
  void copy(const V* from, V* to) const { __builtin_memcpy(to, from, sizeof(V) * uint64_t(size_)); }

  // Element i of every task's row [row elements], for the lanes of this group; lanes behind the last task repeat it.
  void read_tasks(const void* data, int64_t row, V* out) const {
    for (int lane = 0; lane < width; ++lane) {
      const S* source = static_cast<const S*>(data) + (first_task_ + (lane < tasks_ ? lane : tasks_ - 1)) * row;
      S* to = reinterpret_cast<S*>(out) + lane;
      for (int64_t i = 0; i < row; ++i) to[i * width] = source[i];
    }
  }
  void write_tasks(const V* in, void* data, int64_t row) const {
    for (int lane = 0; lane < tasks_; ++lane) {
      S* to = static_cast<S*>(data) + (first_task_ + lane) * row;
      const S* source = reinterpret_cast<const S*>(in) + lane;
      for (int64_t i = 0; i < row; ++i) to[i] = source[i * width];
    }
  }

  // [T, samples, features] to [features][samples] in lanes.
  void read_features(const void* data, int samples, int features, V* out) const {
    for (int lane = 0; lane < width; ++lane) {
      const int64_t task = first_task_ + (lane < tasks_ ? lane : tasks_ - 1);
      const S* source = static_cast<const S*>(data) + task * samples * features;
      S* to = reinterpret_cast<S*>(out) + lane;
      for (int s = 0; s < samples; ++s)
        for (int f = 0; f < features; ++f) to[(int64_t(f) * samples + s) * width] = source[int64_t(s) * features + f];
    }
  }
  void read_set(const MlpSamples& set, const LaneSamples<V>& out) const {
    const int n = out.count;
    if (n == 0) return;
    read_features(set.x, n, p_.widths[0], out.x);
    if (p_.loss != TaskLoss::cross_entropy) read_features(set.y, n, p_.outputs(), out.y);
    for (int lane = 0; lane < width; ++lane) {
      const int64_t at = (first_task_ + (lane < tasks_ ? lane : tasks_ - 1)) * n;
      int used = n;
      if (set.mask != nullptr) {
        used = 0;
        for (int s = 0; s < n; ++s) used += set.mask[at + s] != 0;
      }
      const S weight = S(1) / (S(used) * S(p_.loss == TaskLoss::cross_entropy ? 1 : p_.outputs()));
      for (int s = 0; s < n; ++s) {
        const bool counts = set.mask == nullptr || set.mask[at + s] != 0;
        reinterpret_cast<S*>(out.weight + s)[lane] = counts ? weight : S(0);
        if (p_.loss == TaskLoss::cross_entropy)
          reinterpret_cast<S*>(out.y + s)[lane] = S(static_cast<const int64_t*>(set.y)[at + s]);
      }
    }
  }

  void start(int64_t group) {
    first_task_ = group * width;
    const int64_t left = p_.num_tasks - first_task_;
    tasks_ = left < width ? int(left) : width;
    read_set(call_.support, support_);
    read_set(call_.query, query_);
    for (int i = 0; i < p_.num_tensors(); ++i) {
      V* to = thetas_ + p_.offset(i);
      if (!p_.shared[i]) {
        read_tasks(call_.params[i], p_.tensor_size(i), to);
        continue;
      }
      const S* source = static_cast<const S*>(call_.params[i]);
      for (int64_t n = 0; n < p_.tensor_size(i); ++n) to[n] = broadcast<V>(source[n]);
    }
  }

  // use(element of the parameters, its learning rate) for all of a tensor.
  template <class Use>
  MK_INLINE void with_rates(int tensor, int step, const Use& use) const {
    const Rates& r = p_.rates[tensor];
    const S* data = static_cast<const S*>(r.data) + (r.data == nullptr ? 0 : step * r.step);
    const int64_t first = p_.offset(tensor);
    if (r.data != nullptr && r.per_parameter) {
      use([=](int64_t i) { return data[i - first]; });
    } else {
      const S rate = r.data == nullptr ? S(p_.rate) : *data;
      use([=](int64_t) { return rate; });
    }
  }

  void step_forward(int step) {
    const V* now = theta(step);
    V* next = next_theta(step);
    const Activations<V> a = activations(step);
    pass_.forward(now, support_, a);
    pass_.backward(now, support_, a);
    for (int i = 0; i < p_.num_tensors(); ++i) {
      if (!p_.adapted[i]) {
        __builtin_memcpy(next + p_.offset(i), now + p_.offset(i), sizeof(V) * uint64_t(p_.tensor_size(i)));
        continue;
      }
      with_rates(i, step, [&](const auto& rate) {
        pass_.tensor_gradient(i, support_, a, [&](int64_t at, V g) { next[at] = now[at] - g * rate(at); });
      });
    }
  }

  void run_segment(int segment, bool with_losses) {
    for (int step = first_step(segment); step < last_step(segment); ++step) {
      step_forward(step);
      if (with_losses) query_loss(step);
    }
  }
  void run_forward(bool with_losses) {
    for (int segment = 0; segment < p_.num_checkpoints(); ++segment) {
      if (segment > 0) copy(next_theta(last_step(segment - 1) - 1), thetas_);
      copy(thetas_, checkpoints_ + segment * size_);
      run_segment(segment, with_losses);
    }
  }
  void restart_segment(int segment) {
    copy(checkpoints_ + segment * size_, thetas_);
    run_segment(segment, false);
  }

  bool query_loss(int step) {
    if (p_.query_samples == 0 || static_cast<const S*>(call_.step_weights)[step] == S(0)) return false;
    pass_.forward(next_theta(step), query_, query_activations_);
    const V loss = pass_.loss(query_, query_activations_);
    S* out = static_cast<S*>(call_.losses) + step * p_.num_tasks + first_task_;
    for (int lane = 0; lane < tasks_; ++lane) out[lane] = loss[lane];
    return true;
  }

  void query_backward(int step) {
    if (!query_loss(step)) return;
    const S weight = static_cast<const S*>(call_.step_weights)[step];
    pass_.backward(next_theta(step), query_, query_activations_);
    for (int i = 0; i < p_.num_tensors(); ++i)
      pass_.tensor_gradient(i, query_, query_activations_, [&](int64_t at, V g) { adjoint_[at] += g * weight; });
  }

  // From the adjoint of the parameters after a step to that of those before it.
  void step_backward(int step) {
    const Activations<V> a = activations(step);
    for (int i = 0; i < p_.num_tensors(); ++i) {
      if (!p_.adapted[i]) {
        for (int64_t at = p_.offset(i); at < p_.offset(i + 1); ++at) direction_[at] = broadcast<V>(0);
        continue;
      }
      if (call_.rate_slots[i] >= 0) rate_gradient(i, step, a);
      with_rates(i, step, [&](const auto& rate) {
        for (int64_t at = p_.offset(i), end = p_.offset(i + 1); at < end; ++at)
          direction_[at] = -rate(at) * adjoint_[at];
      });
    }
    if (call_.second_order[step]) pass_.add_hessian_product(theta(step), direction_, support_, a, tangents_, adjoint_);
  }

  void rate_gradient(int tensor, int step, const Activations<V>& a) {
    const Rates& r = p_.rates[tensor];
    V* slot = adjoint_ + call_.rate_slots[tensor] + step * r.step;
    if (r.per_parameter) {
      const int64_t first = p_.offset(tensor);
      pass_.tensor_gradient(tensor, support_, a, [&](int64_t at, V g) { slot[at - first] -= g * adjoint_[at]; });
      return;
    }
    V total = broadcast<V>(0);
    pass_.tensor_gradient(tensor, support_, a, [&](int64_t at, V g) { total += g * adjoint_[at]; });
    *slot -= total;
  }

  void clear_adjoint() {
    for (int64_t i = 0; i < call_.flat; ++i) adjoint_[i] = broadcast<V>(0);
  }
  void write_adjoint(int64_t group) const {
    V* out = static_cast<V*>(call_.task_grads) + group * call_.flat;
    __builtin_memcpy(out, adjoint_, sizeof(V) * uint64_t(call_.flat));
  }
};

template <class S>
int group_lanes() {
  return Group<S>::width;
}

template <class S>
int64_t scratch_bytes(const MlpInnerLoopProblem& p, const MlpInnerLoopCall& call) {
  return Group<S>(p, call, nullptr).bytes();
}

template <class S, void (Group<S>::*Run)(int64_t)>
void run(const MlpInnerLoopProblem& p, const MlpInnerLoopCall& call, void* scratch, int64_t first, int64_t last) {
  Group<S> group(p, call, scratch);
  for (int64_t i = first; i < last; ++i) (group.*Run)(i);
}

// Groups one after another, then the lanes of their sum by a tree.
template <class S>
void reduce(const MlpInnerLoopProblem& p, const MlpReduction& r) {
  using V = vec_t<S>;
  constexpr int width = lanes<V>;
  const int64_t groups = (p.num_tasks + width - 1) / width;
  const S* weights = static_cast<const S*>(r.weights);
  const V* grads = static_cast<const V*>(r.task_grads) + r.first;
  S* out = static_cast<S*>(r.out);
  for (int64_t at = 0; at < r.count; at += width) {
    const int columns = r.count - at < width ? int(r.count - at) : width;
    V sums[width];
    for (int i = 0; i < width; ++i) sums[i] = broadcast<V>(0);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t left = p.num_tasks - g * width;
      const int tasks = left < width ? int(left) : width;
      V weight = broadcast<V>(0), used = broadcast<V>(0);
      for (int lane = 0; lane < tasks; ++lane) {
        weight[lane] = weights == nullptr ? S(1) : weights[g * width + lane];
        used[lane] = S(1);
      }
      for (int i = 0; i < columns; ++i) {
        // Lanes behind the last task hold a copy of it, which counts once.
        const V term = used != S(0) ? grads[g * r.flat + at + i] * weight : broadcast<V>(0);
        sums[i] += term;
        if (!r.shared)
          for (int lane = 0; lane < tasks; ++lane) out[(g * width + lane) * r.count + at + i] = term[lane];
      }
    }
    if (!r.shared) continue;
    const V total = sum_lanes_of_each<V>(sums);
    for (int i = 0; i < columns; ++i) out[at + i] = total[i];
  }
}

template <class S>
constexpr MlpInnerLoopKernels kernels{group_lanes<S>,
                                      scratch_bytes<S>,
                                      run<S, &Group<S>::adapt>,
                                      run<S, &Group<S>::adapt_backward>,
                                      run<S, &Group<S>::meta_loss>,
                                      reduce<S>};

}  // namespace
}  // namespace MK_CAPABILITY

#define MK_JOIN_(a, b) a##b
#define MK_JOIN(a, b) MK_JOIN_(a, b)
const MlpInnerLoopKernels& MK_JOIN(mlp_inner_loop_kernels_, MK_CAPABILITY)(bool is_double) {
  return is_double ? kernels<double> : kernels<float>;
}

}  // namespace metakern
