// How a hierarchical RNN (Wichrowska et al. 2017, arXiv 1703.04813) uses the readouts of a coordinate's hidden state,
// for one coordinate or one SIMD vector of coordinates.
//
// Readouts, products with h' plus a bias:
//   direction            delta = o_direction + sum_k w_k y_k, with the normalised gradients y_k (scale_features.h)
//   rate                 l_step = clip(l + o_rate, +-33), the gradient passed straight through
//                        l' = m l + (1 - m) l_step
//   scale, input decay   s' = sigmoid(o), d' = sigmoid(o)
// A parameter's step is exp(l_step + offset) delta, with delta divided by the root of its mean square over the tensor.
#pragma once
#include "activations.h"

namespace metakern {

// Rows of the readouts; the last, the direction of the next gradient's point, only with attention.
constexpr int direction_readout = 0, rate_readout = 1, scale_decay_readout = 2, input_decay_readout = 3;
constexpr int num_readouts = 4, attention_readout = 4, max_readouts = 5;
constexpr double max_log_rate = 33;

inline namespace MK_CAPABILITY {

// l_step; NaN where the sum is not finite.
template <class V>
MK_INLINE V step_log_rate(V log_rate, V readout) {
  constexpr lane_t<V> bound = max_log_rate;
  const V sum = log_rate + readout;
  return at_least(at_most(sum, bound), -bound) + (sum - sum);
}

// The learning rate; infinite beyond the bound of the exponential, which an offset far from the initial one reaches.
template <class V>
MK_INLINE V learning_rate(V log_rate) {
  using S = lane_t<V>;
  const V infinity = broadcast<V>(S(__builtin_inf()));
  return log_rate > broadcast<V>(constants<S>::exp_bound) ? infinity : exponential(log_rate);
}

template <class V>
MK_INLINE V new_log_rate(V log_rate, V step, lane_t<V> momentum) {
  return momentum * log_rate + (lane_t<V>(1) - momentum) * step;
}

// Gradient of a decay's readout, from the new decay and its gradient.
template <class V>
MK_INLINE V decay_backward(V decay, V grad_decay) {
  return grad_decay * decay * (lane_t<V>(1) - decay);
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
