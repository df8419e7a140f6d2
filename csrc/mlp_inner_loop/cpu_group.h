// Inner loops of one unit of work: the tasks in a vector's lanes, or a single task; see cpu_layout.h.
#pragma once
#include "cpu.h"
#include "cpu_clipping.h"
#include "cpu_pass.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Divides memory into arrays; without memory it only counts.
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

template <class Layout>
class MlpGroup {
 public:
  using V = typename Layout::V;
  using S = lane_t<V>;

  MlpGroup(const MlpInnerLoopProblem& p, const MlpInnerLoopCall& call, void* scratch)
      : p_(p), call_(call), pass_(p), size_(pass_.size()), arena_(static_cast<V*>(scratch)) {
    place_rates();
    walks_back_ = false;
    if (call.task_grads != nullptr) {
      walks_back_ = flat_ > size_;
      for (int step = 0; step < p.steps; ++step) walks_back_ |= call.second_order[step] != 0;
    }
    support_ = take_samples(p.support_samples);
    query_ = take_samples(p.query_samples);
    const int64_t kept = walks_back_ ? p.checkpoint_every : 1;
    // The query's activations and the tangents share memory, as they are never needed at once; without a backward the
    // support's activations share it too.
    const int most = p.query_samples > p.support_samples ? p.query_samples : p.support_samples;
    query_activations_ = take_activations(most, 1, walks_back_);
    tangents_ = query_activations_;
    steps_ = walks_back_ ? take_activations(p.support_samples, kept, false) : query_activations_;
    thetas_ = arena_.take(size_ * (walks_back_ ? kept + 1 : 1));
    const bool keeps = walks_back_ && call.trajectory == nullptr && p.num_checkpoints() > 1;
    checkpoints_ = arena_.take(keeps ? size_ * p.num_checkpoints() : 0);
    direction_ = arena_.take(walks_back_ ? size_ : 0);
    adjoint_ = arena_.take(Layout::packed || call.task_grads == nullptr ? 0 : flat_);
    rates_ = arena_.take(Layout::transposes ? size_ : 0);
    gradient_ = arena_.take(p.clips() ? size_ : 0);
  }
  int64_t bytes() const { return arena_.used() * int64_t(sizeof(V)); }

  void adapt(int64_t first_task) {
    start(first_task);
    for (int segment = 0; segment < p_.num_checkpoints(); ++segment) {
      if (call_.trajectory != nullptr) save(segment);
      run_segment(segment);
    }
    const V* result = next_theta(p_.steps - 1);
    for (int i = 0; i < p_.num_tensors(); ++i)
      if (call_.adapted[i] != nullptr) {
        const int64_t own = p_.tensor_size(i);
        S* to = static_cast<S*>(call_.adapted[i]) + first_task_ * own;
        Layout::write(result + pass_.offset(i), rows(i), columns(i), to, own, tasks_);
      }
  }

  void adapt_backward(int64_t first_task) {
    start(first_task);
    clear_adjoint();
    for (int i = 0; i < p_.num_tensors(); ++i)
      if (call_.grad_adapted[i] != nullptr) read_tensor(call_.grad_adapted[i], i, false, adjoint_ + pass_.offset(i));
    for (int segment = walks_back_ ? p_.num_checkpoints() - 1 : -1; segment >= 0; --segment) {
      restart(segment);
      for (int step = last_step(segment) - 1; step >= first_step(segment); --step) step_backward(step);
    }
    write_adjoint();
  }

  void meta_loss(int64_t first_task) {
    start(first_task);
    if (call_.task_grads != nullptr) clear_adjoint();
    walks_back_ ? meta_loss_and_back() : meta_loss_in_one_way();
    if (call_.task_grads != nullptr) write_adjoint();
  }

 private:
  const MlpInnerLoopProblem& p_;
  const MlpInnerLoopCall& call_;
  MlpPass<Layout> pass_;
  int64_t size_;  // of the parameters, and with their rates' gradients flat_, in vectors
  int64_t flat_ = 0;
  int64_t rate_slots_[max_mlp_tensors];  // where a tensor's rate gradients start in adjoint_, -1 for none
  int64_t rate_steps_[max_mlp_tensors];  // from one step's to the next's
  bool walks_back_;                      // whether the gradient goes through the steps, which are then kept
  Arena<V> arena_;
  LaneSamples<V> support_, query_;
  Activations<V> steps_, tangents_{}, query_activations_;
  V* thetas_;       // parameters along one segment of steps, or of the present one alone
  V* checkpoints_;  // [checkpoints][size_], unless the trajectory keeps them
  V* direction_;    // [size_]
  V* adjoint_;      // [flat_], in the result where the layouts are one
  V* rates_;        // [size_]
  V* gradient_;     // [size_] where gradients are clipped: of the step at hand, before that
  int64_t first_task_ = 0;
  int tasks_ = 0;

  int64_t rows(int tensor) const { return tensor % 2 == 0 ? p_.units(tensor) : 1; }
  int64_t columns(int tensor) const { return tensor % 2 == 0 ? p_.inputs(tensor) : p_.units(tensor); }
  int64_t vectors(int tensor) const { return pass_.offset(tensor + 1) - pass_.offset(tensor); }

  void place_rates() {
    flat_ = size_;
    for (int i = 0; i < p_.num_tensors(); ++i) {
      rate_slots_[i] = call_.rate_slots[i] < 0 ? -1 : flat_;
      rate_steps_[i] = p_.rates[i].step == 0 ? 0 : (p_.rates[i].per_parameter ? vectors(i) : 1);
      if (rate_slots_[i] < 0) continue;
      if (i > 0 && call_.rate_slots[i] == call_.rate_slots[0]) {  // one tensor is the rate of all
        rate_slots_[i] = rate_slots_[0];
        continue;
      }
      flat_ += rate_vectors(i);
    }
  }
  // All steps' rates of a tensor.
  int64_t rate_vectors(int tensor) const {
    return (p_.rates[tensor].step == 0 ? 1 : p_.steps) * (p_.rates[tensor].per_parameter ? vectors(tensor) : 1);
  }

  LaneSamples<V> take_samples(int count) {
    const int64_t targets = p_.loss == TaskLoss::cross_entropy ? 1 : p_.outputs(), row = Layout::row(count);
    V* swapped = arena_.take(Layout::transposes ? count * Layout::row(p_.widths[0]) : 0);
    return {arena_.take(p_.widths[0] * row), swapped, arena_.take(targets * row), arena_.take(row), count};
  }
  Activations<V> take_activations(int samples, int64_t passes, bool tangents) {
    const int64_t n = pass_.activation_vectors(samples) * passes;
    const bool straight = p_.is_piecewise_linear(), from_h = !p_.has(Activation::gelu);
    V* h = arena_.take(n);
    V* delta = arena_.take(n);
    V* e = straight ? delta : arena_.take(n);
    V* z = straight || (from_h && !tangents) ? h : arena_.take(n);
    return {z, h, e, delta, arena_.take(pass_.swapped_vectors(samples) * passes)};
  }
  Activations<V> activations(int step) const {
    const int64_t slot = walks_back_ ? step % p_.checkpoint_every : 0;
    const int64_t n = pass_.activation_vectors(p_.support_samples) * slot;
    const int64_t swapped = pass_.swapped_vectors(p_.support_samples) * slot;
    return {steps_.z + n, steps_.h + n, steps_.e + n, steps_.delta + n, steps_.swapped + swapped};
  }

  S* region(void* data, int64_t elements) const { return static_cast<S*>(data) + first_task_ * elements; }
  int first_step(int segment) const { return segment * p_.checkpoint_every; }
  int last_step(int segment) const {
    const int end = first_step(segment) + p_.checkpoint_every;
    return end < p_.steps ? end : p_.steps;
  }
  V* theta(int step) const { return walks_back_ ? thetas_ + size_ * (step % p_.checkpoint_every) : thetas_; }
  V* next_theta(int step) const { return walks_back_ ? theta(step) + size_ : thetas_; }
  void copy(const V* from, V* to) const {
    if (from != to) __builtin_memcpy(to, from, sizeof(V) * uint64_t(size_));
  }

  void read_tensor(const void* data, int tensor, bool shared, V* out) const {
    const int64_t own = p_.tensor_size(tensor);
    const S* from = static_cast<const S*>(data) + (shared ? 0 : first_task_ * own);
    Layout::read(from, shared ? 0 : own, tasks_, rows(tensor), columns(tensor), out);
  }

  // [T, samples, features] to [features][row(samples)].
  void read_features(const void* data, int samples, int features, V* out) const {
    for (int lane = 0; lane < Layout::tasks; ++lane) {
      const int64_t task = first_task_ + (lane < tasks_ ? lane : tasks_ - 1);
      const S* source = static_cast<const S*>(data) + task * samples * features;
      S* to = reinterpret_cast<S*>(out);
      for (int s = 0; s < Layout::padded(samples); ++s) {
        const S* from = source + int64_t(s < samples ? s : samples - 1) * features;
        for (int f = 0; f < features; ++f) to[Layout::at(f, s, samples, lane)] = from[f];
      }
    }
  }
  void read_set(const MlpSamples& set, const LaneSamples<V>& out) const {
    const int n = out.count;
    if (n == 0) return;
    const int64_t inputs = p_.widths[0];
    const bool labels = p_.loss == TaskLoss::cross_entropy;
    read_features(set.x, n, int(inputs), out.x);
    if constexpr (Layout::transposes)
      Layout::unpack(static_cast<const S*>(set.x) + first_task_ * n * inputs, n, inputs, out.swapped);
    if (!labels) read_features(set.y, n, p_.outputs(), out.y);
    for (int lane = 0; lane < Layout::tasks; ++lane) {
      const int64_t first = (first_task_ + (lane < tasks_ ? lane : tasks_ - 1)) * n;
      int used = n;
      if (set.mask != nullptr) {
        used = 0;
        for (int s = 0; s < n; ++s) used += set.mask[first + s] != 0;
      }
      const S weight = S(1) / (S(used) * S(labels ? 1 : p_.outputs()));
      for (int s = 0; s < Layout::padded(n); ++s) {
        const int64_t from = first + (s < n ? s : n - 1), to = Layout::at(0, s, n, lane);
        const bool counts = s < n && (set.mask == nullptr || set.mask[from] != 0);
        reinterpret_cast<S*>(out.weight)[to] = counts ? weight : S(0);
        if (labels) reinterpret_cast<S*>(out.y)[to] = S(static_cast<const int64_t*>(set.y)[from]);
      }
    }
  }

  void start(int64_t first_task) {
    first_task_ = first_task;
    const int64_t left = p_.num_tasks - first_task_;
    tasks_ = left < Layout::tasks ? int(left) : Layout::tasks;
    read_set(call_.support, support_);
    read_set(call_.query, query_);
    for (int i = 0; i < p_.num_tensors(); ++i) read_tensor(call_.params[i], i, p_.shared[i], thetas_ + pass_.offset(i));
  }

  // use(vector of the parameters, its learning rate) for all of a tensor.
  template <class Use>
  MK_INLINE void with_rates(int tensor, int step, const Use& use) const {
    const Rates& r = p_.rates[tensor];
    const S* data = static_cast<const S*>(r.data) + (r.data == nullptr ? 0 : step * r.step);
    const int64_t first = pass_.offset(tensor);
    if (r.data != nullptr && r.per_parameter) {
      const auto* rates = Layout::rates(data, rows(tensor), columns(tensor), rates_ + first);
      use([=](int64_t i) { return rates[i - first]; });
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
    const Clipping<V> clip = clip_gradient(a);
    for (int i = 0; i < p_.num_tensors(); ++i) {
      if (!p_.adapted[i]) {
        if (next != now)
          __builtin_memcpy(next + pass_.offset(i), now + pass_.offset(i), sizeof(V) * uint64_t(vectors(i)));
        continue;
      }
      with_rates(i, step, [&](const auto& rate) {
        step_gradient(i, a, clip, [&](int64_t at, V g) { next[at] = now[at] - g * rate(at); });
      });
    }
  }

  // use(i, vector i of the parameters, zero in a row's padding) for all adapted tensors.
  template <class Use>
  MK_INLINE void each_adapted(const V* values, const Use& use) const {
    for (int i = 0; i < p_.num_tensors(); ++i) {
      if (!p_.adapted[i]) continue;
      int64_t at = pass_.offset(i);
      const int64_t row = Layout::row(columns(i));
      for (int64_t r = 0; r < rows(i); ++r)
        for (int64_t n = 0; n < row; ++n, ++at) use(at, Layout::used(values[at], int(n), int(columns(i))));
    }
  }

  // Writes the gradient of all adapted tensors to gradient_, and returns its clipping; does nothing without clipping.
  Clipping<V> clip_gradient(const Activations<V>& a) {
    if (!p_.clips()) return {broadcast<V>(1), broadcast<V>(0)};
    for (int i = 0; i < p_.num_tensors(); ++i)
      if (p_.adapted[i]) pass_.tensor_gradient(i, support_, a, [&](int64_t at, V g) { gradient_[at] = g; });
    LaneSums<V> squares;
    each_adapted(gradient_, [&](int64_t, V g) { squares.add(g, g); });
    return clipping<Layout>(squares, p_.clip_norm);
  }

  // sink(vector of the parameters, the step's (clipped) gradient by it) for all vectors of an adapted tensor.
  template <class Sink>
  MK_INLINE void step_gradient(int tensor, const Activations<V>& a, const Clipping<V>& clip, const Sink& sink) const {
    if (!p_.clips()) return pass_.tensor_gradient(tensor, support_, a, sink);
    for (int64_t at = pass_.offset(tensor); at < pass_.offset(tensor + 1); ++at)
      sink(at, gradient_[at] * clip.coefficient);
  }

  // Applies the derivative of clipping to the direction d: c / |g| (d - <d, g> g / |g|^2) where g is clipped.
  void clip_direction(const Clipping<V>& clip) {
    LaneSums<V> products;
    each_adapted(gradient_, [&](int64_t at, V g) { products.add(direction_[at], g); });
    V along = clip.inverse;
    for (int lane = 0; lane < lanes<V>; ++lane)
      if (along[lane] != S(0)) along[lane] = S(double(along[lane]) * Layout::task_total(products, lane));
    for (int i = 0; i < p_.num_tensors(); ++i) {
      if (!p_.adapted[i]) continue;
      for (int64_t at = pass_.offset(i); at < pass_.offset(i + 1); ++at)
        direction_[at] = clip.coefficient * (direction_[at] - along * (clip.inverse * gradient_[at]));
    }
  }

  void run_segment(int segment) {
    for (int step = first_step(segment); step < last_step(segment); ++step) step_forward(step);
  }
  // Save and restore the parameters at the start of a segment.
  void save(int segment) {
    if (call_.trajectory == nullptr) {
      if (p_.num_checkpoints() > 1) copy(thetas_, checkpoints_ + segment * size_);
      return;
    }
    S* to = checkpoint(segment);
    for (int i = 0; i < p_.num_tensors(); ++i, to += Layout::tasks * p_.tensor_size(i - 1))
      Layout::pack(thetas_ + pass_.offset(i), rows(i), columns(i), to);
  }
  void restart(int segment) {
    if (call_.trajectory == nullptr) {
      copy(checkpoints_ + segment * size_, thetas_);
    } else {
      const S* from = checkpoint(segment);
      for (int i = 0; i < p_.num_tensors(); ++i, from += Layout::tasks * p_.tensor_size(i - 1))
        Layout::unpack(from, rows(i), columns(i), thetas_ + pass_.offset(i));
    }
    run_segment(segment);
  }
  S* checkpoint(int segment) const {
    return region(call_.trajectory, p_.num_checkpoints() * p_.num_params()) +
           int64_t(segment) * Layout::tasks * p_.num_params();
  }

  bool query_loss(int step) {
    if (static_cast<const S*>(call_.step_weights)[step] == S(0)) return false;
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

  // Without a backward through the steps: each may overwrite the one before.
  void meta_loss_in_one_way() {
    for (int step = 0; step < p_.steps; ++step) {
      step_forward(step);
      call_.task_grads == nullptr ? void(query_loss(step)) : query_backward(step);
    }
  }
  void meta_loss_and_back() {
    const int last = p_.num_checkpoints() - 1;
    for (int segment = 0; segment <= last; ++segment) {
      if (segment > 0) copy(next_theta(last_step(segment - 1) - 1), thetas_);
      save(segment);
      run_segment(segment);
    }
    for (int segment = last; segment >= 0; --segment) {
      if (segment != last) restart(segment);  // the last one's steps are still here
      for (int step = last_step(segment) - 1; step >= first_step(segment); --step) {
        query_backward(step);
        step_backward(step);
      }
    }
  }

  // Turns the adjoint of the parameters after a step into the adjoint of the parameters before it.
  void step_backward(int step) {
    const Activations<V> a = activations(step);
    const bool second_order = call_.second_order[step] != 0, of_rates = flat_ > size_;
    const Clipping<V> clip =
        second_order || of_rates ? clip_gradient(a) : Clipping<V>{broadcast<V>(1), broadcast<V>(0)};
    for (int i = 0; i < p_.num_tensors(); ++i) {
      if (!p_.adapted[i]) {
        for (int64_t at = pass_.offset(i); at < pass_.offset(i + 1); ++at) direction_[at] = broadcast<V>(0);
        continue;
      }
      if (rate_slots_[i] >= 0) rate_gradient(i, step, a, clip);
      if (!second_order) continue;
      with_rates(i, step, [&](const auto& rate) {
        for (int64_t at = pass_.offset(i), end = pass_.offset(i + 1); at < end; ++at)
          direction_[at] = -rate(at) * adjoint_[at];
      });
    }
    if (second_order && p_.clips()) clip_direction(clip);
    if (second_order) pass_.add_hessian_product(theta(step), direction_, support_, a, tangents_, adjoint_);
  }

  void rate_gradient(int tensor, int step, const Activations<V>& a, const Clipping<V>& clip) {
    V* slot = adjoint_ + rate_slots_[tensor] + step * rate_steps_[tensor];
    if (p_.rates[tensor].per_parameter) {
      const int64_t first = pass_.offset(tensor);
      step_gradient(tensor, a, clip, [&](int64_t at, V g) { slot[at - first] -= g * adjoint_[at]; });
      return;
    }
    V total = broadcast<V>(0);
    step_gradient(tensor, a, clip, [&](int64_t at, V g) { total += g * adjoint_[at]; });
    *slot -= Layout::task_sum(total);
  }

  void clear_adjoint() {
    if constexpr (Layout::packed) adjoint_ = reinterpret_cast<V*>(region(call_.task_grads, call_.flat));
    for (int64_t i = 0; i < flat_; ++i) adjoint_[i] = broadcast<V>(0);
  }
  void write_adjoint() const {
    if constexpr (Layout::packed) return;
    S* out = region(call_.task_grads, call_.flat);
    const auto pack = [&](int64_t from, int64_t rows, int64_t columns) {
      Layout::pack(adjoint_ + from, rows, columns, out);
      out += Layout::tasks * rows * columns;
    };
    for (int i = 0; i < p_.num_tensors(); ++i) pack(pass_.offset(i), rows(i), columns(i));
    for (int i = 0; i < p_.num_tensors(); ++i) {
      if (rate_slots_[i] < 0 || (i > 0 && rate_slots_[i] == rate_slots_[0])) continue;
      const int64_t steps = p_.rates[i].step == 0 ? 1 : p_.steps;
      if (p_.rates[i].per_parameter)
        pack(rate_slots_[i], steps * rows(i), columns(i));
      else
        pack(rate_slots_[i], steps, 1);
    }
  }
};

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
