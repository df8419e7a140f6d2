// Activations and losses of the inner loop with their first and second derivatives, over rows of vectors.
#pragma once
#include "../math/activations.h"
#include "../mlp_inner_loop.h"
#include "vec.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// phi(z), phi'(z) and phi''(z).
template <class V>
struct Curve {
  V value, slope, bend;
};

// Normal distribution function, by the C library lane by lane: no vectorised one has its accuracy.
template <class V>
inline V normal_cdf(V z) {
  V out;
  for (int lane = 0; lane < lanes<V>; ++lane)
    out[lane] = lane_t<V>(0.5) * lane_t<V>(__builtin_erfc(-double(z[lane]) * 0.70710678118654752440));
  return out;
}

template <class V>
MK_INLINE Curve<V> curve(Activation activation, V z) {
  using S = lane_t<V>;
  const V one = broadcast<V>(1), zero = broadcast<V>(0);
  switch (activation) {
    case Activation::relu: {
      const auto negative = z <= zero;  // false for NaN, which comes out
      return {negative ? zero : z, negative ? zero : one, zero};
    }
    case Activation::tanh: {
      const V h = tanh(z), slope = one - h * h;
      return {h, slope, S(-2) * h * slope};
    }
    case Activation::sigmoid: {
      const V h = sigmoid(z), slope = h * (one - h);
      return {h, slope, slope * (one - S(2) * h)};
    }
    default: {
      const V cdf = normal_cdf(z);
      const auto e = exp_parts(z * z, S(-0.5), constants<S>::exp_bound);
      const V density = (e.scale * e.tail + e.scale) * S(0.39894228040143267794);
      return {z * cdf, cdf + z * density, density * (S(2) - z * z)};
    }
  }
}

// Of one sample in every lane: rows of `outputs` vectors, `stride` apart.
template <class V>
struct LossSample {
  const V* prediction;
  const V* target;  // the value, or the label as a number
  int64_t stride;
  int outputs;
  V weight;  // of this sample in its task's mean, for every output
};

template <class V>
MK_INLINE V exponential(V x) {
  const auto e = exp_parts(x, lane_t<V>(1), constants<lane_t<V>>::exp_bound);
  return e.scale * e.tail + e.scale;
}

template <class V>
MK_INLINE V largest(const LossSample<V>& s) {
  V m = s.prediction[0];
  for (int o = 1; o < s.outputs; ++o) {
    const V p = s.prediction[o * s.stride];
    m = p > m ? p : m;
  }
  return m;
}

template <class V>
MK_INLINE V exponential_sum(const LossSample<V>& s, V m) {
  V sum = broadcast<V>(0);
  for (int o = 0; o < s.outputs; ++o) sum += exponential<V>(s.prediction[o * s.stride] - m);
  return sum;
}

template <class V>
inline V loss_value(TaskLoss loss, const LossSample<V>& s) {
  using S = lane_t<V>;
  V total = broadcast<V>(0);
  if (loss == TaskLoss::cross_entropy) {
    const V m = largest(s);
    V chosen = broadcast<V>(0);
    for (int o = 0; o < s.outputs; ++o) chosen = *s.target == S(o) ? s.prediction[o * s.stride] : chosen;
    return s.weight * (log(exponential_sum(s, m)) + m - chosen);
  }
  for (int o = 0; o < s.outputs; ++o) {
    const V p = s.prediction[o * s.stride], y = s.target[o * s.stride];
    if (loss == TaskLoss::mse) {
      total += (p - y) * (p - y);
      continue;
    }
    const V size = p < S(0) ? -p : p;
    const V e = exponential<V>(-size), one_e = S(1) + e;
    const V softplus = log(one_e) + (e - (one_e - S(1))) / one_e;  // log1p(e), what rounding took from 1 + e put back
    total += (p > S(0) ? p : broadcast<V>(0)) + (p - p) - p * y + softplus;
  }
  return s.weight * total;
}

// Derivative of the loss by every prediction.
template <class V>
inline void loss_gradient(TaskLoss loss, const LossSample<V>& s, V* out) {
  using S = lane_t<V>;
  if (loss == TaskLoss::cross_entropy) {
    const V m = largest(s), scale = s.weight / exponential_sum(s, m);
    for (int o = 0; o < s.outputs; ++o) {
      const V one_hot = *s.target == S(o) ? s.weight : broadcast<V>(0);
      out[o * s.stride] = exponential<V>(s.prediction[o * s.stride] - m) * scale - one_hot;
    }
    return;
  }
  for (int o = 0; o < s.outputs; ++o) {
    const V p = s.prediction[o * s.stride], y = s.target[o * s.stride];
    out[o * s.stride] = loss == TaskLoss::mse ? S(2) * s.weight * (p - y) : s.weight * (sigmoid(p) - y);
  }
}

// Derivative of that in the direction of `tangent` of the predictions; may overwrite `tangent`.
template <class V>
inline void loss_gradient_tangent(TaskLoss loss, const LossSample<V>& s, const V* tangent, V* out) {
  using S = lane_t<V>;
  if (loss == TaskLoss::cross_entropy) {
    const V m = largest(s), scale = S(1) / exponential_sum(s, m);
    V mean = broadcast<V>(0);
    for (int o = 0; o < s.outputs; ++o)
      mean += exponential<V>(s.prediction[o * s.stride] - m) * scale * tangent[o * s.stride];
    for (int o = 0; o < s.outputs; ++o) {
      const V share = exponential<V>(s.prediction[o * s.stride] - m) * scale;
      out[o * s.stride] = s.weight * share * (tangent[o * s.stride] - mean);
    }
    return;
  }
  for (int o = 0; o < s.outputs; ++o) {
    V bend = broadcast<V>(2);
    if (loss != TaskLoss::mse) {
      const V h = sigmoid(s.prediction[o * s.stride]);
      bend = h * (S(1) - h);
    }
    out[o * s.stride] = s.weight * bend * tangent[o * s.stride];
  }
}

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
