// One pass of small MLPs in one of the layouts of cpu_layout.h: forward, gradient, and Hessian-vector product.
//
// Hessian products by forward over reverse (Pearlmutter 1994): the derivative of the gradient in a direction.
#pragma once
#include <type_traits>

#include "../math/lane_product.h"
#include "../math/mlp.h"
#include "cpu_layout.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// The samples of a unit of tasks.
template <class V>
struct LaneSamples {
  V* x;        // [inputs][row(samples)]
  V* swapped;  // [samples][row(inputs)], where the layout transposes
  V* y;        // [outputs][row(samples)], or labels as numbers [1][row(samples)]
  V* weight;   // [row(samples)], of a sample's elements in its task's mean loss
  int count;
};

// Activations of one pass, [units][row(samples)] of all layers in a row. Arrays that an activation's formulas do not
// distinguish share memory; the predictions are in z, for the last layer.
template <class V>
struct Activations {
  V* z;        // before the activation
  V* h;        // after it
  V* e;        // gradient by h
  V* delta;    // gradient by z
  V* swapped;  // h as [samples][row(units)], where the layout transposes
};

// A sink of lane_product.h that adds a bias and writes the result.
template <class V, class Number>
struct StoreWithBias {
  V* out;
  int64_t row;
  const Number* bias;  // [rows]

  MK_INLINE void operator()(int m, int n, V value) const { out[m * row + n] = value + bias[m]; }
};

template <class V>
struct Store {
  V* out;
  int64_t row;
  MK_INLINE void operator()(int m, int n, V value) const { out[m * row + n] = value; }
};

// The passes over one network.
template <class Layout>
class MlpPass {
 public:
  using V = typename Layout::V;
  using Number = typename Layout::Number;
  using S = lane_t<V>;

  explicit MlpPass(const MlpInnerLoopProblem& p) : p_(p), layers_(p.num_layers) {
    offset_[0] = units_[0] = swapped_[0] = 0;
    for (int l = 0; l < layers_; ++l) {
      offset_[2 * l + 1] = offset_[2 * l] + p.widths[l + 1] * Layout::row(p.widths[l]);
      offset_[2 * l + 2] = offset_[2 * l + 1] + Layout::row(p.widths[l + 1]);
      units_[l + 1] = units_[l] + p.widths[l + 1];
      swapped_[l + 1] = swapped_[l] + Layout::row(p.widths[l + 1]);
    }
  }

  // Offset of a tensor in the parameters, in vectors; one past the last tensor gives their total number.
  int64_t offset(int tensor) const { return offset_[tensor]; }
  int64_t size() const { return offset_[2 * layers_]; }

  // Vectors of h and of its transpose for so many samples.
  int64_t activation_vectors(int samples) const { return units_[layers_] * Layout::row(samples); }
  int64_t swapped_vectors(int samples) const {
    return Layout::transposes ? swapped_[layers_ - 1] * int64_t(samples) : 0;
  }

  // Computes z and h of every layer, up to the predictions.
  void forward(const V* theta, const LaneSamples<V>& data, const Activations<V>& a) const {
    for (int l = 0; l < layers_; ++l) {
      const Term terms[1] = {{weight(theta, l), input(data, a, l), p_.widths[l]}};
      multiply(terms, p_.widths[l + 1], data.count, store_with_bias(theta, l, a.z, data.count));
      if (l + 1 == layers_) return;
      activate(l, layer(a.z, l, data.count), layer(a.h, l, data.count), vectors(l, data.count));
      transpose(l, data.count, a);
    }
  }

  // Loss of every task.
  V loss(const LaneSamples<V>& data, const Activations<V>& a) const {
    V total = broadcast<V>(0);
    for (int s = 0; s < Layout::row(data.count); ++s)
      total += Layout::used(loss_value<V>(p_.loss, sample(data, a, s)), s, data.count);
    return Layout::task_sum(total);
  }

  // Gradients by all pre-activations, after forward.
  void backward(const V* theta, const LaneSamples<V>& data, const Activations<V>& a) const {
    V* top = layer(a.delta, layers_ - 1, data.count);
    for (int s = 0; s < Layout::row(data.count); ++s) loss_gradient<V>(p_.loss, sample(data, a, s), top + s);
    for (int l = layers_ - 1; l > 0; --l) {
      const Term terms[1] = {{weight(theta, l).transposed(), rows(a.delta, l, data.count), p_.widths[l + 1]}};
      V* e = layer(a.e, l - 1, data.count);
      multiply(terms, p_.widths[l], data.count, Store<V>{e, Layout::row(data.count)});
      V* delta = layer(a.delta, l - 1, data.count);
      each_unit(l - 1, data.count, a, [=](int64_t i, const auto& at) { delta[i] = at.slope_times(e[i]); });
    }
  }

  // sink(vector of the parameters, gradient by it) for all vectors of a tensor.
  template <class Sink>
  MK_INLINE void tensor_gradient(int tensor, const LaneSamples<V>& data, const Activations<V>& a,
                                 const Sink& sink) const {
    const int l = tensor / 2;
    const int64_t first = offset_[tensor], row = Layout::row(p_.widths[l]);
    if (tensor % 2) {
      Layout::row_sums(layer(a.delta, l, data.count), p_.widths[l + 1], data.count,
                       [&](int m, V value) { sink(first + m, value); });
      return;
    }
    const Term terms[1] = {{numbers(a.delta, l, data.count), swapped_input(data, a, l), data.count}};
    product<V>(terms, p_.widths[l + 1], int(row), [&](int m, int n, V value) { sink(first + m * row + n, value); });
  }

  // out += the Hessian of the loss times `direction` (both in the layout of theta), after backward. `t` is working
  // memory like `a`; its z and h take the tangents of a's, its delta those of a's delta.
  void add_hessian_product(const V* theta, const V* direction, const LaneSamples<V>& data, const Activations<V>& a,
                           const Activations<V>& t, V* out) const {
    tangent_forward(theta, direction, data, a, t);
    V* top = layer(t.delta, layers_ - 1, data.count);
    const V* prediction = layer(t.z, layers_ - 1, data.count);
    for (int s = 0; s < Layout::row(data.count); ++s)
      loss_gradient_tangent<V>(p_.loss, sample(data, a, s), prediction + s, top + s);
    for (int l = layers_ - 1; l > 0; --l) {
      const Term terms[2] = {{weight(theta, l).transposed(), rows(t.delta, l, data.count), p_.widths[l + 1]},
                             {weight(direction, l).transposed(), rows(a.delta, l, data.count), p_.widths[l + 1]}};
      V* te = layer(t.e, l - 1, data.count);
      multiply(terms, p_.widths[l], data.count, Store<V>{te, Layout::row(data.count)});
      V* td = layer(t.delta, l - 1, data.count);
      const V* e = layer(a.e, l - 1, data.count);
      const V* tz = layer(t.z, l - 1, data.count);
      each_unit(l - 1, data.count, a, [=](int64_t i, const auto& at) { td[i] = at.tangent(te[i], e[i], tz[i]); });
    }
    for (int l = 0; l < layers_; ++l) add_gradient_tangents(l, data, a, t, out);
  }

 private:
  using Term = LaneTerm<V, Number>;

  const MlpInnerLoopProblem& p_;
  int layers_;
  int64_t offset_[max_mlp_tensors + 1];
  int64_t units_[max_mlp_layers + 1];
  int64_t swapped_[max_mlp_layers + 1];

  MK_INLINE int64_t vectors(int l, int samples) const { return p_.widths[l + 1] * Layout::row(samples); }
  MK_INLINE V* layer(V* base, int l, int samples) const { return base + units_[l] * Layout::row(samples); }
  MK_INLINE LaneMatrix<V> rows(V* base, int l, int samples) const {
    return {layer(base, l, samples), Layout::row(samples), 1};
  }
  static MK_INLINE const Number* as_numbers(const V* v) { return reinterpret_cast<const Number*>(v); }
  // Vectors a row, as numbers a row.
  static MK_INLINE int64_t row_numbers(int64_t n) { return Layout::row(n) * int64_t(sizeof(V) / sizeof(Number)); }

  MK_INLINE LaneMatrix<Number> numbers(const V* base, int l, int samples) const {
    return {as_numbers(base + units_[l] * Layout::row(samples)), row_numbers(samples), 1};
  }
  MK_INLINE LaneMatrix<Number> weight(const V* theta, int l) const {
    return {as_numbers(theta + offset_[2 * l]), row_numbers(p_.widths[l]), 1};
  }
  MK_INLINE LaneMatrix<V> input(const LaneSamples<V>& data, const Activations<V>& a, int l) const {
    return l == 0 ? LaneMatrix<V>{data.x, Layout::row(data.count), 1} : rows(a.h, l - 1, data.count);
  }
  // A layer's inputs as [samples][row(inputs)].
  MK_INLINE LaneMatrix<V> swapped_input(const LaneSamples<V>& data, const Activations<V>& a, int l) const {
    if constexpr (!Layout::transposes) return input(data, a, l).transposed();
    const V* at = l == 0 ? data.swapped : a.swapped + swapped_[l - 1] * data.count;
    return {at, Layout::row(p_.widths[l]), 1};
  }
  MK_INLINE void transpose(int l, int samples, const Activations<V>& a) const {
    Layout::transpose(layer(a.h, l, samples), p_.widths[l + 1], samples, a.swapped + swapped_[l] * samples);
  }
  MK_INLINE LossSample<V> sample(const LaneSamples<V>& data, const Activations<V>& a, int s) const {
    const int64_t stride = Layout::row(data.count);
    return {layer(a.z, layers_ - 1, data.count) + s, data.y + s, stride, p_.outputs(), data.weight[s]};
  }
  MK_INLINE StoreWithBias<V, Number> store_with_bias(const V* theta, int l, V* out, int samples) const {
    return {layer(out, l, samples), Layout::row(samples), as_numbers(theta + offset_[2 * l + 1])};
  }
  template <int Terms, class Sink>
  MK_INLINE void multiply(const Term (&terms)[Terms], int rows, int samples, const Sink& sink) const {
    product<V>(terms, rows, int(Layout::row(samples)), sink);
  }

  // body(activation as a compile-time constant), so that the loops have no branches.
  template <class Body>
  MK_INLINE void with_activation(int l, const Body& body) const {
    switch (p_.activations[l]) {
      case Activation::relu: return body(std::integral_constant<Activation, Activation::relu>());
      case Activation::leaky_relu: return body(std::integral_constant<Activation, Activation::leaky_relu>());
      case Activation::tanh: return body(std::integral_constant<Activation, Activation::tanh>());
      case Activation::sigmoid: return body(std::integral_constant<Activation, Activation::sigmoid>());
      default: return body(std::integral_constant<Activation, Activation::gelu>());
    }
  }

  void activate(int l, const V* z, V* h, int64_t count) const {
    const S leak = S(p_.slopes[l]);
    with_activation(l, [=](auto activation) {
      for (int64_t i = 0; i < count; ++i) h[i] = activation_value<V>(activation, leak, z[i]);
    });
  }

  // use(i, the derivatives at z[i]) for a layer.
  template <class Use>
  MK_INLINE void each_unit(int l, int samples, const Activations<V>& a, const Use& use) const {
    const int64_t count = vectors(l, samples);
    const V *z = layer(a.z, l, samples), *h = layer(a.h, l, samples);
    const S leak = S(p_.slopes[l]);
    with_activation(l, [=](auto activation) {
      for (int64_t i = 0; i < count; ++i) use(i, ActivationAt<V>{activation, leak, z[i], h[i]});
    });
  }

  void tangent_forward(const V* theta, const V* direction, const LaneSamples<V>& data, const Activations<V>& a,
                       const Activations<V>& t) const {
    for (int l = 0; l < layers_; ++l) {
      const auto sink = store_with_bias(direction, l, t.z, data.count);
      const Term own{weight(direction, l), input(data, a, l), p_.widths[l]};
      if (l == 0) {
        const Term terms[1] = {own};
        multiply(terms, p_.widths[1], data.count, sink);
      } else {
        const Term terms[2] = {own, {weight(theta, l), rows(t.h, l - 1, data.count), p_.widths[l]}};
        multiply(terms, p_.widths[l + 1], data.count, sink);
      }
      if (l + 1 == layers_) return;
      V* th = layer(t.h, l, data.count);
      const V* tz = layer(t.z, l, data.count);
      each_unit(l, data.count, a, [=](int64_t i, const auto& at) { th[i] = at.slope_times(tz[i]); });
      transpose(l, data.count, t);
    }
  }

  void add_gradient_tangents(int l, const LaneSamples<V>& data, const Activations<V>& a, const Activations<V>& t,
                             V* out) const {
    V* bias = out + offset_[2 * l + 1];
    Layout::row_sums(layer(t.delta, l, data.count), p_.widths[l + 1], data.count,
                     [&](int m, V value) { bias[m] += value; });
    V* target = out + offset_[2 * l];
    const int64_t row = Layout::row(p_.widths[l]);
    const auto sink = [=](int m, int n, V value) { target[m * row + n] += value; };
    const Term moved{numbers(t.delta, l, data.count), swapped_input(data, a, l), data.count};
    if (l == 0) {
      const Term terms[1] = {moved};
      product<V>(terms, p_.widths[1], int(row), sink);
    } else {
      const Term terms[2] = {moved, {numbers(a.delta, l, data.count), swapped_input(data, t, l), data.count}};
      product<V>(terms, p_.widths[l + 1], int(row), sink);
    }
  }
};

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
