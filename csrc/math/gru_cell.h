// One hidden unit of a GRU cell whose reset gate is applied before the product, for one coordinate or one SIMD vector
// of coordinates:
//   r, u = sigmoid(W_g [x; h] + bias_g),  c = tanh(W_c [x; r * h] + bias_c),  h' = u * h + (1 - u) * c
// torch.nn.GRUCell is another cell: it multiplies W_c h by the reset gate.
//
// A cell needs two products, so that a unit has two stages, and its backward has them in the opposite order. The names
// pre_r, pre_u and pre_c stand for what goes into the activations.
#pragma once
#include "activations.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// A unit's gates and candidate, as its backward needs them.
template <class V>
struct GruUnit {
  V update, candidate;  // u, c

  static MK_INLINE GruUnit of(V pre_u, V pre_c) { return {sigmoid(pre_u), tanh(pre_c)}; }

  MK_INLINE V new_h(V h) const { return candidate + update * (h - candidate); }
};

// Gradients of the second stage's inputs; that of h lacks what flows through the gates.
template <class V>
struct GruOutputGrad {
  V pre_u, pre_c, h;
};

template <class V>
MK_INLINE GruOutputGrad<V> gru_output_backward(const GruUnit<V>& unit, V h, V grad_new_h) {
  const lane_t<V> one = 1;
  const V u = unit.update, c = unit.candidate;
  return {grad_new_h * (h - c) * u * (one - u), grad_new_h * (one - u) * (one - c * c), grad_new_h * u};
}

// Gradients of the first stage's inputs, r * h with r = sigmoid(pre_r).
template <class V>
struct GruResetGrad {
  V pre_r, h;
};

template <class V>
MK_INLINE GruResetGrad<V> gru_reset_backward(V r, V h, V grad_reset_h) {
  return {grad_reset_h * h * r * (lane_t<V>(1) - r), grad_reset_h * r};
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
