// Head stages: the update of a parameter from the outputs of a learned optimizer's cells.
//
// The kernel computes the outputs o = W h + b of the top cell's h; a stage updates the parameter with them. It is a
// struct template over the arithmetic's scalar S, chosen at compile time, and declares
//   outputs                             rows of W
//   states, coordinate_inputs, weights  as in a features stage (features.h)
//   additive                            whether the new param is param plus a function of o: then backward does not
//                                       need param, whose gradient is that of the new param
//   reads_outputs                       whether backward reads o, which must be recomputed for it
// and computes, for one coordinate or one SIMD vector V of them,
//   forward(o, param, g, states, coordinate_inputs, weights, new_states) -> new param
//   backward(the same inputs, gradient of the new param, gradient of new_states, HeadGradient)
// An additive stage writes no gradient of param and g.
#pragma once
#include "features.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// Results of a head stage's backward.
template <class V, class Stage>
struct HeadGradient {
  V outputs[Stage::outputs];
  V param, grad;
  V states[at_least_one(Stage::states)];
  V coordinate_inputs[at_least_one(Stage::coordinate_inputs)];
  V weights[at_least_one(Stage::weights)];  // this coordinate's share
};

// Adds the scaled output (Andrychowicz et al. 2016, arXiv 1606.04474).
template <class S>
struct AddHead {
  static constexpr int outputs = 1, states = 0, coordinate_inputs = 0, weights = 0;
  static constexpr bool additive = true, reads_outputs = false;
  S scale;

  static MK_INLINE constexpr bool serves(int head) { return head == 0; }

  template <class V>
  MK_INLINE V forward(const V* o, V param, V, const V*, const V*, const S*, V*) const {
    return param + o[0] * scale;
  }
  template <class V>
  MK_INLINE void backward(const V*, V, V, const V*, const V*, const S*, V grad_new_param, const V*,
                          HeadGradient<V, AddHead>* out) const {
    out->outputs[0] = grad_new_param * scale;
  }
};

// Adds the scaled tanh of the output (RNNProp; Lv et al. 2017, arXiv 1703.03633).
template <class S>
struct TanhHead {
  static constexpr int outputs = 1, states = 0, coordinate_inputs = 0, weights = 0;
  static constexpr bool additive = true, reads_outputs = true;
  S scale;

  static MK_INLINE constexpr bool serves(int head) { return head == 2; }

  template <class V>
  MK_INLINE V forward(const V* o, V param, V, const V*, const V*, const S*, V*) const {
    return param + tanh(o[0]) * scale;
  }
  template <class V>
  MK_INLINE void backward(const V* o, V, V, const V*, const V*, const S*, V grad_new_param, const V*,
                          HeadGradient<V, TanhHead>* out) const {
    const V bent = tanh(o[0]);
    out->outputs[0] = grad_new_param * scale * (S(1) - bent * bent);
  }
};

// The gates of Meta-LSTM (Ravi & Larochelle 2017): the parameter is itself the cell of an LSTM.
//   f' = o0 + w0 param + w1 f,  i' = o1 + w2 param + w3 i,  new param = sigmoid(f') param - sigmoid(i') g
// States: f and i, before the sigmoid. Weights: w0 to w3.
template <class S>
struct GateHead {
  static constexpr int outputs = 2, states = 2, coordinate_inputs = 0, weights = 4;
  static constexpr bool additive = false, reads_outputs = true;

  static MK_INLINE constexpr bool serves(int head) { return head == 1; }

  template <class V>
  MK_INLINE V forward(const V* o, V param, V g, const V* state, const V*, const S* w, V* new_state) const {
    new_state[0] = o[0] + w[0] * param + w[1] * state[0];
    new_state[1] = o[1] + w[2] * param + w[3] * state[1];
    return sigmoid(new_state[0]) * param - sigmoid(new_state[1]) * g;
  }
  template <class V>
  MK_INLINE void backward(const V* o, V param, V g, const V* state, const V* inputs, const S* w, V grad_new_param,
                          const V* grad_new_state, HeadGradient<V, GateHead>* out) const {
    V gate[2];
    forward<V>(o, param, g, state, inputs, w, gate);
    const V forget = sigmoid(gate[0]), input = sigmoid(gate[1]);
    const V df = grad_new_state[0] + grad_new_param * param * forget * (S(1) - forget);
    const V di = grad_new_state[1] - grad_new_param * g * input * (S(1) - input);
    out->outputs[0] = df;
    out->outputs[1] = di;
    out->param = grad_new_param * forget + df * w[0] + di * w[2];
    out->grad = -grad_new_param * input;
    out->states[0] = df * w[1];
    out->states[1] = di * w[3];
    out->weights[0] = df * param;
    out->weights[1] = df * state[0];
    out->weights[2] = di * param;
    out->weights[3] = di * state[1];
  }
};

}  // namespace MK_CAPABILITY
}  // namespace metakern
