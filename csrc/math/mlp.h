// Activations and losses of an inner loop with their first and second derivatives: of one value or one sample, or of
// one in every lane of a vector.
#pragma once
#include "activations.h"
#include "mlp_kinds.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// (z + 4) e^(z^2/2) (1 - cdf(z)) of the normal distribution for z >= 0, as a polynomial in t = (z - 4) / (z + 4).
// Interpolated at Chebyshev nodes up to where 1 - cdf(z) underflows; relative error below 1.9e-8, double 4.4e-16.
template <class V>
MK_INLINE V normal_tail(V t, float) {
  V p = broadcast<V>(-1.201844e-4f);
  p = p * t + 2.0126173e-4f;
  p = p * t + 1.5723179e-3f;
  p = p * t + -3.5261837e-3f;
  p = p * t + -7.5292507e-3f;
  p = p * t + 6.0406689e-2f;
  p = p * t + -1.8652268e-1f;
  p = p * t + 3.8713668e-1f;
  p = p * t + -6.0789662e-1f;
  return p * t + 7.5528514e-1f;
}
template <class V>
MK_INLINE V normal_tail(V t, double) {
  V p = broadcast<V>(7.6839662274656217e-9);
  p = p * t + 1.3173232900520232e-8;
  p = p * t + -6.1498004523488702e-8;
  p = p * t + -1.4926781301795255e-7;
  p = p * t + 2.449997467927893e-7;
  p = p * t + 1.0127911412131875e-6;
  p = p * t + -6.110812420800936e-7;
  p = p * t + -5.9135917841880871e-6;
  p = p * t + 7.0833183224575795e-7;
  p = p * t + 3.514181884092745e-5;
  p = p * t + -1.9058417262574088e-6;
  p = p * t + -2.3109418618490196e-4;
  p = p * t + 1.3334387008093189e-4;
  p = p * t + 1.6308183432700359e-3;
  p = p * t + -3.4796923194336436e-3;
  p = p * t + -7.5401889573416822e-3;
  p = p * t + 6.0396574888223107e-2;
  p = p * t + -1.8652185796000361e-1;
  p = p * t + 3.8713740074227552e-1;
  p = p * t + -6.0789664197188842e-1;
  return p * t + 7.5528513041575126e-1;
}

// Standard normal distribution at z, without cancellation far below zero.
template <class V>
struct Normal {
  V density, cdf;
};
template <class V>
MK_INLINE Normal<V> normal(V z) {
  using S = lane_t<V>;
  const V zero = broadcast<V>(0), square = z * z;
  const auto e = exp_parts(square, S(-0.5), constants<S>::exp_bound);
  const V power = square > broadcast<V>(2 * constants<S>::exp_bound) ? zero : e.scale * e.tail + e.scale;
  const V share = S(1) / ((z < zero ? -z : z) + S(4));
  const V above = power * (share * normal_tail(S(1) - S(8) * share, S{}));
  return {power * S(0.39894228040143267794), z < zero ? above : S(1) - above};
}

// phi(z); NaN propagates. `leak` is the slope of leaky_relu at and below zero.
template <class V>
MK_INLINE V activation_value(Activation activation, lane_t<V> leak, V z) {
  const V zero = broadcast<V>(0);
  switch (activation) {
    case Activation::relu: return z <= zero ? zero : z;
    case Activation::leaky_relu: return z > zero ? z : leak * z;
    case Activation::tanh: return tanh(z);
    case Activation::sigmoid: return sigmoid(z);
    default: return z * normal(z).cdf;
  }
}

// Derivatives at z, computed from h = phi(z) except for gelu, which needs z. relu and leaky_relu select instead of
// multiplying: an infinite gradient of a dead unit gives zero, as in PyTorch, not NaN.
template <class V>
struct ActivationAt {
  using S = lane_t<V>;
  Activation activation;
  S leak;
  V z, h;

  // phi'(z) v
  MK_INLINE V slope_times(V v) const {
    const V one = broadcast<V>(1), zero = broadcast<V>(0);
    switch (activation) {
      case Activation::relu: return h <= zero ? zero : v;
      case Activation::leaky_relu: return h > zero ? v : leak * v;
      case Activation::tanh: return v * (one - h * h);
      case Activation::sigmoid: return v * (h * (one - h));
      default: {
        const Normal<V> at = normal(z);
        return v * (at.cdf + z * at.density);
      }
    }
  }
  // phi'(z) v + phi''(z) a b
  MK_INLINE V tangent(V v, V a, V b) const {
    const V one = broadcast<V>(1);
    switch (activation) {
      case Activation::relu:
      case Activation::leaky_relu: return slope_times(v);
      case Activation::tanh: {
        const V slope = one - h * h;
        return v * slope + a * b * (S(-2) * h * slope);
      }
      case Activation::sigmoid: {
        const V slope = h * (one - h);
        return v * slope + a * b * (slope * (one - S(2) * h));
      }
      default: {
        const Normal<V> at = normal(z);
        return v * (at.cdf + z * at.density) + a * b * (at.density * (S(2) - z * z));
      }
    }
  }
};

// Predictions and targets of one sample, `stride` apart.
template <class V>
struct LossSample {
  const V* prediction;
  const V* target;  // the value, or the label as a number
  int64_t stride;
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
    const V softplus = log(one_e) + (e - (one_e - S(1))) / one_e;  // log1p(e), corrected for the rounding of 1 + e
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

// Derivative of the loss gradient in the direction `tangent` of the predictions; may overwrite `tangent`.
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
