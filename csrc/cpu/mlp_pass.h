// One pass of small MLPs, a task in each lane: forward, gradient, and the product of the Hessian with a vector.
//
// Hessian products by forward over reverse (Pearlmutter 1994): the derivative of the gradient in a direction.
#pragma once
#include "lane_product.h"
#include "mlp_functions.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// The samples of a group of tasks, each array [features][samples].
template <class V>
struct LaneSamples {
  V* x;
  V* y;       // [outputs][samples], or labels as numbers [1][samples]
  V* weight;  // [samples], of a sample's elements in its task's mean loss
  int count;
};

// Activations of one pass, [units][samples] of each layer one behind the other.
template <class V>
struct Activations {
  V* z;      // before the activation; the predictions in the last layer
  V* h;      // after it
  V* e;      // gradient by h
  V* delta;  // gradient by z

  MK_INLINE Activations at(int64_t elements) const {
    return {z + elements, h + elements, e + elements, delta + elements};
  }
};

// A sink of lane_product.h that writes what it gets plus a bias.
template <class V>
struct StoreWithBias {
  V* out;
  int64_t row;
  const V* bias;  // [rows]

  MK_INLINE void operator()(int m, int n, V value) const { out[m * row + n] = value + bias[m]; }
};

template <class V>
struct Store {
  V* out;
  int64_t row;
  MK_INLINE void operator()(int m, int n, V value) const { out[m * row + n] = value; }
};

// The passes over one network.
template <class S>
class MlpPass {
 public:
  using V = vec_t<S>;

  explicit MlpPass(const MlpInnerLoopProblem& p) : p_(p), layers_(p.num_layers) {
    for (int i = 0; i <= p.num_tensors(); ++i) offset_[i] = p.offset(i);
    units_[0] = 0;
    for (int l = 0; l < layers_; ++l) units_[l + 1] = units_[l] + p.widths[l + 1];
  }

  // Of z, h, e or delta: elements for `samples` samples.
  static int64_t activation_elements(const MlpInnerLoopProblem& p, int samples) {
    int64_t units = 0;
    for (int l = 1; l <= p.num_layers; ++l) units += p.widths[l];
    return units * samples;
  }

  // Predictions and everything on the way.
  void forward(const V* theta, const LaneSamples<V>& data, const Activations<V>& a) const {
    for (int l = 0; l < layers_; ++l) {
      const LaneTerm<V> terms[1] = {{weight(theta, l), input(data, a, l), p_.widths[l]}};
      product<V>(terms, p_.widths[l + 1], data.count,
                 StoreWithBias<V>{layer(a.z, l, data.count), data.count, theta + offset_[2 * l + 1]});
      if (l + 1 < layers_) activate(layer(a.z, l, data.count), layer(a.h, l, data.count), elements(l, data.count));
    }
  }

  // Loss of every lane.
  V loss(const LaneSamples<V>& data, const Activations<V>& a) const {
    V total = broadcast<V>(0);
    for (int s = 0; s < data.count; ++s) total += loss_value<V>(p_.loss, sample(data, a, s));
    return total;
  }

  // Gradients by all pre-activations, after forward.
  void backward(const V* theta, const LaneSamples<V>& data, const Activations<V>& a) const {
    V* top = layer(a.delta, layers_ - 1, data.count);
    for (int s = 0; s < data.count; ++s) loss_gradient<V>(p_.loss, sample(data, a, s), top + s);
    for (int l = layers_ - 1; l > 0; --l) {
      const LaneTerm<V> terms[1] = {{weight(theta, l).transposed(), rows(a.delta, l, data.count), p_.widths[l + 1]}};
      V* e = layer(a.e, l - 1, data.count);
      product<V>(terms, p_.widths[l], data.count, Store<V>{e, data.count});
      V* delta = layer(a.delta, l - 1, data.count);
      const V* z = layer(a.z, l - 1, data.count);
      const V* h = layer(a.h, l - 1, data.count);
      each_slope(z, h, elements(l - 1, data.count), [&](int64_t i, V slope, V) { delta[i] = e[i] * slope; });
    }
  }

  // sink(element of the parameters, gradient by it) for all elements of a tensor.
  template <class Sink>
  void tensor_gradient(int tensor, const LaneSamples<V>& data, const Activations<V>& a, const Sink& sink) const {
    const int l = tensor / 2;
    if (tensor % 2) {
      const V* delta = layer(a.delta, l, data.count);
      for (int m = 0; m < p_.widths[l + 1]; ++m)
        sink(offset_[tensor] + m, row_sum(delta + int64_t(m) * data.count, data.count));
      return;
    }
    const LaneTerm<V> terms[1] = {{rows(a.delta, l, data.count), input(data, a, l).transposed(), data.count}};
    const int64_t first = offset_[tensor], row = p_.widths[l];
    product<V>(terms, p_.widths[l + 1], p_.widths[l], [&](int m, int n, V value) { sink(first + m * row + n, value); });
  }

  // out += the Hessian of the loss times `direction` (both in the layout of theta), after backward. `t` is working
  // memory like `a`; its z and h take the tangents of a's, its delta those of a's delta.
  void add_hessian_product(const V* theta, const V* direction, const LaneSamples<V>& data, const Activations<V>& a,
                           const Activations<V>& t, V* out) const {
    tangent_forward(theta, direction, data, a, t);
    V* top = layer(t.delta, layers_ - 1, data.count);
    const V* prediction = layer(t.z, layers_ - 1, data.count);
    for (int s = 0; s < data.count; ++s) loss_gradient_tangent<V>(p_.loss, sample(data, a, s), prediction + s, top + s);
    for (int l = layers_ - 1; l > 0; --l) {
      const LaneTerm<V> terms[2] = {
          {weight(theta, l).transposed(), rows(t.delta, l, data.count), p_.widths[l + 1]},
          {weight(direction, l).transposed(), rows(a.delta, l, data.count), p_.widths[l + 1]}};
      V* te = layer(t.e, l - 1, data.count);
      product<V>(terms, p_.widths[l], data.count, Store<V>{te, data.count});
      const V* e = layer(a.e, l - 1, data.count);
      const V* tz = layer(t.z, l - 1, data.count);
      V* td = layer(t.delta, l - 1, data.count);
      const V* z = layer(a.z, l - 1, data.count);
      const V* h = layer(a.h, l - 1, data.count);
      each_slope(z, h, elements(l - 1, data.count),
                 [&](int64_t i, V slope, V bend) { td[i] = te[i] * slope + e[i] * tz[i] * bend; });
    }
    for (int l = 0; l < layers_; ++l) add_gradient_tangents(l, data, a, t, out);
  }

 private:
  const MlpInnerLoopProblem& p_;
  int layers_;
  int64_t offset_[max_mlp_tensors + 1];
  int64_t units_[max_mlp_layers + 1];

  MK_INLINE int64_t elements(int l, int samples) const { return int64_t(p_.widths[l + 1]) * samples; }
  MK_INLINE V* layer(V* base, int l, int samples) const { return base + units_[l] * samples; }
  MK_INLINE LaneMatrix<V> rows(V* base, int l, int samples) const { return {layer(base, l, samples), samples, 1}; }
  MK_INLINE LaneMatrix<V> weight(const V* theta, int l) const { return {theta + offset_[2 * l], p_.widths[l], 1}; }
  MK_INLINE LaneMatrix<V> input(const LaneSamples<V>& data, const Activations<V>& a, int l) const {
    return l == 0 ? LaneMatrix<V>{data.x, data.count, 1} : rows(a.h, l - 1, data.count);
  }
  MK_INLINE LossSample<V> sample(const LaneSamples<V>& data, const Activations<V>& a, int s) const {
    return {layer(a.z, layers_ - 1, data.count) + s, data.y + s, data.count, p_.outputs(), data.weight[s]};
  }
  static MK_INLINE V row_sum(const V* row, int count) {
    V total = row[0];
    for (int s = 1; s < count; ++s) total += row[s];
    return total;
  }

  void activate(const V* z, V* h, int64_t count) const {
    switch (p_.activation) {
      case Activation::relu:
        for (int64_t i = 0; i < count; ++i) h[i] = curve<V>(Activation::relu, z[i]).value;
        return;
      case Activation::tanh:
        for (int64_t i = 0; i < count; ++i) h[i] = tanh(z[i]);
        return;
      case Activation::sigmoid:
        for (int64_t i = 0; i < count; ++i) h[i] = sigmoid(z[i]);
        return;
      default:
        for (int64_t i = 0; i < count; ++i) h[i] = z[i] * normal_cdf(z[i]);
    }
  }

  // use(i, phi'(z[i]), phi''(z[i])); from h where that says it, which saves the exponential.
  template <class Use>
  MK_INLINE void each_slope(const V* z, const V* h, int64_t count, const Use& use) const {
    const V one = broadcast<V>(1), zero = broadcast<V>(0);
    switch (p_.activation) {
      case Activation::relu:
        for (int64_t i = 0; i < count; ++i) use(i, z[i] <= zero ? zero : one, zero);
        return;
      case Activation::tanh:
        for (int64_t i = 0; i < count; ++i) {
          const V slope = one - h[i] * h[i];
          use(i, slope, S(-2) * h[i] * slope);
        }
        return;
      case Activation::sigmoid:
        for (int64_t i = 0; i < count; ++i) {
          const V slope = h[i] * (one - h[i]);
          use(i, slope, slope * (one - S(2) * h[i]));
        }
        return;
      default:
        for (int64_t i = 0; i < count; ++i) {
          const auto c = curve<V>(Activation::gelu, z[i]);
          use(i, c.slope, c.bend);
        }
    }
  }

  void tangent_forward(const V* theta, const V* direction, const LaneSamples<V>& data, const Activations<V>& a,
                       const Activations<V>& t) const {
    for (int l = 0; l < layers_; ++l) {
      const StoreWithBias<V> sink{layer(t.z, l, data.count), data.count, direction + offset_[2 * l + 1]};
      const LaneTerm<V> own{weight(direction, l), input(data, a, l), p_.widths[l]};
      if (l == 0) {
        const LaneTerm<V> terms[1] = {own};
        product<V>(terms, p_.widths[1], data.count, sink);
      } else {
        const LaneTerm<V> terms[2] = {own, {weight(theta, l), rows(t.h, l - 1, data.count), p_.widths[l]}};
        product<V>(terms, p_.widths[l + 1], data.count, sink);
      }
      if (l + 1 == layers_) return;
      V* th = layer(t.h, l, data.count);
      const V* tz = layer(t.z, l, data.count);
      each_slope(layer(a.z, l, data.count), layer(a.h, l, data.count), elements(l, data.count),
                 [&](int64_t i, V slope, V) { th[i] = tz[i] * slope; });
    }
  }

  void add_gradient_tangents(int l, const LaneSamples<V>& data, const Activations<V>& a, const Activations<V>& t,
                             V* out) const {
    const V* delta = layer(t.delta, l, data.count);
    V* bias = out + offset_[2 * l + 1];
    for (int m = 0; m < p_.widths[l + 1]; ++m) bias[m] += row_sum(delta + int64_t(m) * data.count, data.count);
    V* target = out + offset_[2 * l];
    const int64_t row = p_.widths[l];
    const auto sink = [=](int m, int n, V value) { target[m * row + n] += value; };
    const LaneTerm<V> moved{rows(t.delta, l, data.count), input(data, a, l).transposed(), data.count};
    if (l == 0) {
      const LaneTerm<V> terms[1] = {moved};
      product<V>(terms, p_.widths[1], p_.widths[0], sink);
    } else {
      const LaneTerm<V> terms[2] = {
          moved, {rows(a.delta, l, data.count), rows(t.h, l - 1, data.count).transposed(), data.count}};
      product<V>(terms, p_.widths[l + 1], p_.widths[l], sink);
    }
  }
};

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
