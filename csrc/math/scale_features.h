// Features of a gradient at several time scales (Wichrowska et al. 2017, arXiv 1703.04813), for one coordinate or one
// SIMD vector of coordinates.
//
// With the decays d_1 = d, d_{k+1} = sqrt(d_k) and the scale decay s:
//   a_k' = (1 - d_k) g + d_k a_k                       moving means of the gradient
//   q_k' = (1 - s) (a_k'^2 + 1e-12) + s q_k            moving means of their squares; s counts as 0 while q_k is 0
//   y_k = asinh(a_k' / sqrt(q_k' + 1e-16))             normalised gradients
// and the features are y_k, y_k y_{k+1}, and log(q_k' + 1e-16) minus its mean over the scales.
#pragma once
#include "activations.h"

namespace metakern {

constexpr int num_scales = 4;
constexpr int num_scale_features = 3 * num_scales - 1;

inline namespace MK_CAPABILITY {

// A coordinate's state: a_k, q_k, s and d.
template <class V>
struct ScaleState {
  V mean[num_scales], square[num_scales];
  V scale_decay, input_decay;
};

// s, or 0 before the first step, when q_k is still 0.
template <class V>
MK_INLINE V kept_decay(const ScaleState<V>& state, int k) {
  const V zero = broadcast<V>(0);
  return state.square[k] == zero ? zero : state.scale_decay;
}

// The new means, and what the features and their derivatives need.
template <class V>
struct ScaleMeans {
  V decay[num_scales];       // d_k
  V mean[num_scales];        // a_k'
  V square[num_scales];      // q_k'
  V variance[num_scales];    // q_k' + 1e-16
  V normalised[num_scales];  // a_k' / sqrt(variance)
  V inverse_root[num_scales];

  ScaleMeans() = default;
  MK_INLINE ScaleMeans(V g, const ScaleState<V>& state) {
    using S = lane_t<V>;
    decay[0] = state.input_decay;
#pragma GCC unroll 4
    for (int k = 1; k < num_scales; ++k) {
      const auto positive = decay[k - 1] > broadcast<V>(0);
      decay[k] = positive ? square_root(decay[k - 1]) : decay[k - 1];
    }
#pragma GCC unroll 4
    for (int k = 0; k < num_scales; ++k) {
      mean[k] = (S(1) - decay[k]) * g + decay[k] * state.mean[k];
      const V kept = kept_decay(state, k);
      square[k] = (S(1) - kept) * (mean[k] * mean[k] + S(1e-12)) + kept * state.square[k];
      variance[k] = square[k] + S(1e-16);
      inverse_root[k] = S(1) / square_root(variance[k]);
      normalised[k] = mean[k] * inverse_root[k];
    }
  }

  MK_INLINE void features(V* x) const {
    using S = lane_t<V>;
    V logs[num_scales], sum = broadcast<V>(0);
#pragma GCC unroll 4
    for (int k = 0; k < num_scales; ++k) {
      x[k] = asinh(normalised[k]) + (normalised[k] - normalised[k]);
      logs[k] = log(variance[k]) + (variance[k] - variance[k]);  // NaN unless it is finite
      sum += logs[k];
    }
    sum *= S(1) / S(num_scales);
#pragma GCC unroll 4
    for (int k = 0; k < num_scales; ++k) x[2 * num_scales - 1 + k] = logs[k] - sum;
#pragma GCC unroll 3
    for (int k = 0; k + 1 < num_scales; ++k) x[num_scales + k] = x[k] * x[k + 1];
  }
};

// Gradients of g and of the state.
template <class V>
struct ScaleGrad {
  V g;
  ScaleState<V> state;
};

// y: the first features; grad_x: gradient of the features; grad_new_mean, grad_new_square: those of a' and q'. The
// infinite derivative of sqrt(d) at d = 0 is taken as 0.
template <class V>
MK_INLINE ScaleGrad<V> scale_features_backward(const ScaleMeans<V>& now, V g, const ScaleState<V>& old, const V* y,
                                               const V* grad_x, const V* grad_new_mean, const V* grad_new_square) {
  using S = lane_t<V>;
  const V zero = broadcast<V>(0);
  const V* grad_log = grad_x + 2 * num_scales - 1;
  V grad_logs = grad_log[0], grad_decay[num_scales];
#pragma GCC unroll 4
  for (int k = 1; k < num_scales; ++k) grad_logs += grad_log[k];
  grad_logs *= S(1) / S(num_scales);
  ScaleGrad<V> out;
  out.g = zero;
  out.state.scale_decay = zero;
#pragma GCC unroll 4
  for (int k = 0; k < num_scales; ++k) {
    V grad_y = grad_x[k];
    if (k > 0) grad_y += grad_x[num_scales + k - 1] * y[k - 1];
    if (k + 1 < num_scales) grad_y += grad_x[num_scales + k] * y[k + 1];
    const V z = now.normalised[k];
    const V bounded = at_least(at_most(z, constants<S>::asinh_bound), -constants<S>::asinh_bound);
    const V grad_z = grad_y / square_root(S(1) + bounded * bounded);
    const V inverse = now.inverse_root[k] * now.inverse_root[k];
    const V grad_square = grad_new_square[k] + ((grad_log[k] - grad_logs) - grad_z * z * S(0.5)) * inverse;
    const V kept = kept_decay(old, k);
    const V grad_mean =
        grad_new_mean[k] + grad_z * now.inverse_root[k] + grad_square * (S(1) - kept) * (S(2) * now.mean[k]);
    out.state.square[k] = grad_square * kept;
    const V grad_kept = grad_square * (old.square[k] - (now.mean[k] * now.mean[k] + S(1e-12)));
    out.state.scale_decay += old.square[k] == zero ? zero : grad_kept;
    out.g += grad_mean * (S(1) - now.decay[k]);
    out.state.mean[k] = grad_mean * now.decay[k];
    grad_decay[k] = grad_mean * (old.mean[k] - g);
  }
#pragma GCC unroll 3
  for (int k = num_scales - 1; k > 0; --k)
    grad_decay[k - 1] += now.decay[k] > zero ? grad_decay[k] / (S(2) * now.decay[k]) : zero;
  out.state.input_decay = grad_decay[0];
  return out;
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
