// Activations and losses of an inner loop for one value or one sample, with their first and second derivatives.
#pragma once
#include <math.h>

#include "../mlp_inner_loop.h"
#include "activations.h"

namespace metakern {
inline namespace MK_CAPABILITY {

template <class S>
MK_INLINE S exponential(S x) {
  const auto e = exp_parts(x, S(1), constants<S>::exp_bound);
  return e.scale * e.tail + e.scale;
}

MK_INLINE float normal_cdf(float z) { return 0.5f * ::erfcf(z * -0.70710678f); }
MK_INLINE double normal_cdf(double z) { return 0.5 * ::erfc(z * -0.70710678118654752440); }

// phi(z); NaN comes out of every one.
template <class S>
MK_INLINE S activation_value(Activation activation, S z) {
  switch (activation) {
    case Activation::relu: return z <= S(0) ? S(0) : z;
    case Activation::tanh: return tanh(z);
    case Activation::sigmoid: return sigmoid(z);
    default: return z * normal_cdf(z);
  }
}

// phi'(z) and phi''(z).
template <class S>
struct Slopes {
  S slope, bend;
};

// From h = phi(z) alone, but for gelu, which needs z.
template <class S>
MK_INLINE Slopes<S> activation_slopes(Activation activation, S z, S h) {
  switch (activation) {
    case Activation::relu: return {h <= S(0) ? S(0) : S(1), S(0)};
    case Activation::tanh: {
      const S slope = S(1) - h * h;
      return {slope, S(-2) * h * slope};
    }
    case Activation::sigmoid: {
      const S slope = h * (S(1) - h);
      return {slope, slope * (S(1) - S(2) * h)};
    }
    default: {
      const auto e = exp_parts(z * z, S(-0.5), constants<S>::exp_bound);
      const S density = (e.scale * e.tail + e.scale) * S(0.39894228040143267794);
      return {normal_cdf(z) + z * density, density * (S(2) - z * z)};
    }
  }
}

// Predictions and targets of one sample, `stride` apart.
template <class S>
struct LossSample {
  const S* prediction;
  const S* target;  // the value, or the label as a number
  int stride;
  int outputs;
  S weight;  // of this sample in its task's mean, for every output
};

template <class S>
MK_INLINE S largest(const LossSample<S>& s) {
  S m = s.prediction[0];
  for (int o = 1; o < s.outputs; ++o) {
    const S p = s.prediction[o * s.stride];
    m = p > m ? p : m;
  }
  return m;
}

template <class S>
MK_INLINE S exponential_sum(const LossSample<S>& s, S m) {
  S sum = 0;
  for (int o = 0; o < s.outputs; ++o) sum += exponential(s.prediction[o * s.stride] - m);
  return sum;
}

template <class S>
MK_INLINE S loss_value(TaskLoss loss, const LossSample<S>& s) {
  if (loss == TaskLoss::cross_entropy) {
    const S m = largest(s);
    S chosen = 0;
    for (int o = 0; o < s.outputs; ++o) chosen = *s.target == S(o) ? s.prediction[o * s.stride] : chosen;
    return s.weight * (log(exponential_sum(s, m)) + m - chosen);
  }
  S total = 0;
  for (int o = 0; o < s.outputs; ++o) {
    const S p = s.prediction[o * s.stride], y = s.target[o * s.stride];
    if (loss == TaskLoss::mse) {
      total += (p - y) * (p - y);
      continue;
    }
    const S e = exponential(p < S(0) ? p : -p), one_e = S(1) + e;
    const S softplus = log(one_e) + (e - (one_e - S(1))) / one_e;  // log1p(e), what rounding took from 1 + e put back
    total += (p > S(0) ? p : S(0)) + (p - p) - p * y + softplus;
  }
  return s.weight * total;
}

// Derivative of the loss by every prediction.
template <class S>
MK_INLINE void loss_gradient(TaskLoss loss, const LossSample<S>& s, S* out) {
  if (loss == TaskLoss::cross_entropy) {
    const S m = largest(s), scale = s.weight / exponential_sum(s, m);
    for (int o = 0; o < s.outputs; ++o) {
      const S one_hot = *s.target == S(o) ? s.weight : S(0);
      out[o * s.stride] = exponential(s.prediction[o * s.stride] - m) * scale - one_hot;
    }
    return;
  }
  for (int o = 0; o < s.outputs; ++o) {
    const S p = s.prediction[o * s.stride], y = s.target[o * s.stride];
    out[o * s.stride] = loss == TaskLoss::mse ? S(2) * s.weight * (p - y) : s.weight * (sigmoid(p) - y);
  }
}

// Derivative of that in the direction of `tangent` of the predictions.
template <class S>
MK_INLINE void loss_gradient_tangent(TaskLoss loss, const LossSample<S>& s, const S* tangent, S* out) {
  if (loss == TaskLoss::cross_entropy) {
    const S m = largest(s), scale = S(1) / exponential_sum(s, m);
    S mean = 0;
    for (int o = 0; o < s.outputs; ++o)
      mean += exponential(s.prediction[o * s.stride] - m) * scale * tangent[o * s.stride];
    for (int o = 0; o < s.outputs; ++o) {
      const S share = exponential(s.prediction[o * s.stride] - m) * scale;
      out[o * s.stride] = s.weight * share * (tangent[o * s.stride] - mean);
    }
    return;
  }
  for (int o = 0; o < s.outputs; ++o) {
    const S h = loss == TaskLoss::mse ? S(0) : sigmoid(s.prediction[o * s.stride]);
    const S bend = loss == TaskLoss::mse ? S(2) : h * (S(1) - h);
    out[o * s.stride] = s.weight * bend * tangent[o * s.stride];
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
