// One hidden unit of an LSTM cell for one coordinate (or one SIMD vector of coordinates), PyTorch's gate order
// i, f, g, o:  c' = f*c + i*g,  h' = o*tanh(c')  with  i, f, o = sigmoid(.),  g = tanh(.).
#pragma once
#include "activations.h"

namespace metakern {
inline namespace MK_CAPABILITY {

template <class V>
struct LstmGates {
  V i, f, g, o;
};

template <class V>
struct LstmOutput {
  V h, c;
};

// h' and c' alone, with three divisions for five activations.
template <class V>
MK_INLINE LstmOutput<V> lstm_unit(const LstmGates<V>& preactivation, V c) {
  const V new_c = sigmoid(preactivation.f) * c + sigmoid_tanh(preactivation.i, preactivation.g);
  return {sigmoid_tanh(preactivation.o, new_c), new_c};
}

// A unit's recomputed values for backward.
template <class V>
struct LstmActivations {
  LstmGates<V> gates;
  V tanh_c;  // tanh(c')
  V h;       // h'
};

template <class V>
MK_INLINE LstmActivations<V> lstm_unit_activations(const LstmGates<V>& preactivation, V c) {
  LstmActivations<V> u;
  u.gates.i = sigmoid(preactivation.i);
  u.gates.f = sigmoid(preactivation.f);
  u.gates.g = tanh(preactivation.g);
  u.gates.o = sigmoid(preactivation.o);
  u.tanh_c = tanh(u.gates.f * c + u.gates.i * u.gates.g);
  u.h = u.gates.o * u.tanh_c;
  return u;
}

template <class V>
struct LstmUnitGrad {
  LstmGates<V> preactivation;
  V c;  // gradient of the incoming c
};

// grad_h, grad_c: gradients of h' and c' (grad_c without the part that flows through h').
template <class V>
MK_INLINE LstmUnitGrad<V> lstm_unit_backward(const LstmGates<V>& gates, V tanh_c, V c, V grad_h, V grad_c) {
  const lane_t<V> one = 1;
  const V through_c = grad_c + grad_h * gates.o * (one - tanh_c * tanh_c);
  LstmUnitGrad<V> d;
  d.preactivation.i = through_c * gates.g * gates.i * (one - gates.i);
  d.preactivation.f = through_c * c * gates.f * (one - gates.f);
  d.preactivation.g = through_c * gates.i * (one - gates.g * gates.g);
  d.preactivation.o = grad_h * tanh_c * gates.o * (one - gates.o);
  d.c = through_c * gates.f;
  return d;
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
