// Activations and losses of an inner loop with their first and second derivatives: of one value or one sample, or of
// one in every lane of a vector.
#pragma once
#include <math.h>

#include "../mlp_inner_loop.h"
#include "activations.h"

namespace metakern {
inline namespace MK_CAPABILITY {

template <class V>
MK_INLINE V exponential(V x) {
  const auto e = exp_parts(x, lane_t<V>(1), constants<lane_t<V>>::exp_bound);
  return e.scale * e.tail + e.scale;
}

MK_INLINE float normal_cdf(float z) { return 0.5f * ::erfcf(z * -0.70710678f); }
MK_INLINE double normal_cdf(double z) { return 0.5 * ::erfc(z * -0.70710678118654752440); }

// Lane by lane: no vectorised function has the C library's accuracy.
template <class V>
inline V normal_cdf(V z) {
  V out;
  for (int lane = 0; lane < int(sizeof(V) / sizeof(lane_t<V>)); ++lane)
    out[lane] = lane_t<V>(normal_cdf(double(z[lane])));
  return out;
}

// phi(z); NaN comes out of every one.
template <class V>
MK_INLINE V activation_value(Activation activation, V z) {
  const V zero = broadcast<V>(0);
  switch (activation) {
    case Activation::relu: return z <= zero ? zero : z;
    case Activation::tanh: return tanh(z);
    case Activation::sigmoid: return sigmoid(z);
    default: return z * normal_cdf(z);
  }
}

// phi'(z) and phi''(z).
template <class V>
struct Slopes {
  V slope, bend;
};

// From h = phi(z) alone, but for gelu, which needs z.
template <class V>
MK_INLINE Slopes<V> activation_slopes(Activation activation, V z, V h) {
  using S = lane_t<V>;
  const V one = broadcast<V>(1), zero = broadcast<V>(0);
  switch (activation) {
    case Activation::relu: return {h <= zero ? zero : one, zero};
    case Activation::tanh: {
      const V slope = one - h * h;
      return {slope, S(-2) * h * slope};
    }
    case Activation::sigmoid: {
      const V slope = h * (one - h);
      return {slope, slope * (one - S(2) * h)};
    }
    default: {
      const auto e = exp_parts(z * z, S(-0.5), constants<S>::exp_bound);
      const V density = (e.scale * e.tail + e.scale) * S(0.39894228040143267794);
      return {normal_cdf(z) + z * density, density * (S(2) - z * z)};
    }
  }
}

// Predictions and targets of one sample, `stride` apart.
template <class V>
struct LossSample {
  const V* prediction;
  const V* target;  // the value, or the label as a number
  int stride;
  int outputs;
  V weight;  // of this sample in its task's mean, for every output
};

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
MK_INLINE V loss_value(TaskLoss loss, const LossSample<V>& s) {
  using S = lane_t<V>;
  const V zero = broadcast<V>(0);
  V total = zero;
  if (loss == TaskLoss::cross_entropy) {
    const V m = largest(s);
    for (int o = 0; o < s.outputs; ++o) total = *s.target == broadcast<V>(S(o)) ? s.prediction[o * s.stride] : total;
    return s.weight * (log(exponential_sum(s, m)) + m - total);
  }
  for (int o = 0; o < s.outputs; ++o) {
    const V p = s.prediction[o * s.stride], y = s.target[o * s.stride];
    if (loss == TaskLoss::mse) {
      total += (p - y) * (p - y);
      continue;
    }
    const V e = exponential<V>(p < zero ? p : -p), one_e = S(1) + e;
    const V softplus = log(one_e) + (e - (one_e - S(1))) / one_e;  // log1p(e), what rounding took from 1 + e put back
    total += (p > zero ? p : zero) + (p - p) - p * y + softplus;
  }
  return s.weight * total;
}

// Derivative of the loss by every prediction.
template <class V>
MK_INLINE void loss_gradient(TaskLoss loss, const LossSample<V>& s, V* out) {
  using S = lane_t<V>;
  if (loss == TaskLoss::cross_entropy) {
    const V m = largest(s), scale = s.weight / exponential_sum(s, m);
    for (int o = 0; o < s.outputs; ++o) {
      const V one_hot = *s.target == broadcast<V>(S(o)) ? s.weight : broadcast<V>(0);
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
MK_INLINE void loss_gradient_tangent(TaskLoss loss, const LossSample<V>& s, const V* tangent, V* out) {
  const V one = broadcast<V>(1);
  if (loss == TaskLoss::cross_entropy) {
    const V m = largest(s), scale = one / exponential_sum(s, m);
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
      bend = h * (one - h);
    }
    out[o * s.stride] = s.weight * bend * tangent[o * s.stride];
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
