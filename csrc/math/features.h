// Features stages: the inputs of a learned optimizer's lowest cell for a coordinate.
//
// A stage is a struct template over the arithmetic's scalar S, chosen at compile time. It declares
//   max_inputs         maximum number of features; inputs() is the actual number
//   states             number of state values per coordinate, kept from step to step
//   coordinate_inputs  number of further inputs per coordinate, such as the loss of its task
//   weights            number of weights shared by all coordinates, with gradients
// and computes, for one coordinate or one SIMD vector V of them,
//   forward(g, states, coordinate_inputs, weights, x, new_states)
//   backward(the same inputs, gradient of x, gradient of new_states, FeaturesGradient)
#pragma once
#include "preprocess.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// Array size for n elements, where n may be 0.
MK_INLINE constexpr int at_least_one(int n) { return n > 0 ? n : 1; }

// Results of a features stage's backward.
template <class V, class Stage>
struct FeaturesGradient {
  V grad;
  V states[at_least_one(Stage::states)];
  V coordinate_inputs[at_least_one(Stage::coordinate_inputs)];
  V weights[at_least_one(Stage::weights)];  // this coordinate's share
};

// One or two features of the gradient, by math/preprocess.h.
template <class S>
struct GradientFeatures {
  static constexpr int max_inputs = 2, states = 0, coordinate_inputs = 0, weights = 0;
  Preprocess kind;
  PreprocessScale<S> scale;

  static MK_INLINE constexpr bool serves(int features) { return features <= int(Preprocess::log_and_clip); }
  static MK_INLINE int inputs(int features) { return num_features(Preprocess(features)); }

  template <class V>
  MK_INLINE void forward(V g, const V*, const V*, const S*, V* x, V*) const {
    const auto f = preprocess<V>(kind, scale, g);
    x[0] = f.x[0];
    x[1] = f.x[1];
  }
  template <class V>
  MK_INLINE void backward(V g, const V*, const V*, const S*, const V* grad_x, const V*,
                          FeaturesGradient<V, GradientFeatures>* out) const {
    out->grad = preprocess_backward<V>(kind, scale, g, {{grad_x[0], grad_x[1]}});
  }
};

// The four features of Meta-LSTM (Ravi & Larochelle 2017): the loss of the coordinate's task and the gradient, both by
// "log_sign". Coordinate input: the loss.
template <class S>
struct LossFeatures {
  static constexpr int max_inputs = 4, states = 0, coordinate_inputs = 1, weights = 0;
  PreprocessScale<S> scale;

  static MK_INLINE constexpr bool serves(int features) { return features == 4; }
  static MK_INLINE int inputs(int) { return 4; }

  template <class V>
  MK_INLINE void forward(V g, const V*, const V* loss, const S*, V* x, V*) const {
    const auto of_loss = preprocess<V>(Preprocess::log_sign, scale, loss[0]);
    const auto of_grad = preprocess<V>(Preprocess::log_sign, scale, g);
    x[0] = of_loss.x[0];
    x[1] = of_loss.x[1];
    x[2] = of_grad.x[0];
    x[3] = of_grad.x[1];
  }
  template <class V>
  MK_INLINE void backward(V g, const V*, const V* loss, const S*, const V* grad_x, const V*,
                          FeaturesGradient<V, LossFeatures>* out) const {
    out->coordinate_inputs[0] = preprocess_backward<V>(Preprocess::log_sign, scale, loss[0], {{grad_x[0], grad_x[1]}});
    out->grad = preprocess_backward<V>(Preprocess::log_sign, scale, g, {{grad_x[2], grad_x[3]}});
  }
};

// The features of RNNProp (Lv et al. 2017, arXiv 1703.03633): the gradient and its moving mean m, both divided by the
// root of the moving mean of squares v, with the bias of m and v corrected, then a linear map with ELU.
//   m' = b1 m + (1 - b1) g,    a' = b1 a + (1 - b1)
//   v' = b2 v + (1 - b2) g^2,  b' = b2 b + (1 - b2)
//   u = (g r, m'/a' r) with r = 1 / (sqrt(v'/b') + 1e-8),  x_k = elu(w_2k u_0 + w_2k+1 u_1 + w_40+k)
// States: m, v, a, b, initially zero. After t steps a is 1 - b1^t and b is 1 - b2^t, so no coordinate counts its steps.
// Weights: the map's matrix [20, 2], then its bias [20]. The root's infinite derivative at 0 is taken as 0.
template <class S>
struct MomentFeatures {
  static constexpr int width = 20;
  static constexpr int max_inputs = width, states = 4, coordinate_inputs = 0, weights = 3 * width;
  static constexpr S epsilon = S(1e-8);
  S beta1, beta2, rest1, rest2;  // rest is 1 - beta

  static MK_INLINE constexpr bool serves(int features) { return features == 3; }
  static MK_INLINE int inputs(int) { return width; }

  template <class V>
  struct Moments {
    V m, v, a, b;          // the new states
    V root, factor, mean;  // sqrt(v / b), 1 / (root + epsilon), m / a
    V u[2];
    MK_INLINE Moments(const MomentFeatures& stage, V g, const V* state)
        : m(stage.beta1 * state[0] + stage.rest1 * g),
          v(stage.beta2 * state[1] + stage.rest2 * (g * g)),
          a(stage.beta1 * state[2] + stage.rest1),
          b(stage.beta2 * state[3] + stage.rest2),
          root(square_root(v / b)),
          factor(S(1) / (root + epsilon)),
          mean(m / a) {
      const V poison = g - g;  // NaN for a gradient that is not finite
      u[0] = g * factor + poison;
      u[1] = mean * factor + poison;
    }
  };
  template <class V>
  static MK_INLINE V linear(const V* u, const S* w, int k) {
    return u[0] * w[2 * k] + (u[1] * w[2 * k + 1] + w[2 * width + k]);
  }

  template <class V>
  MK_INLINE void forward(V g, const V* state, const V*, const S* w, V* x, V* new_state) const {
    const Moments<V> now(*this, g, state);
    for (int k = 0; k < width; ++k) x[k] = elu(linear(now.u, w, k));
    new_state[0] = now.m;
    new_state[1] = now.v;
    new_state[2] = now.a;
    new_state[3] = now.b;
  }
  template <class V>
  MK_INLINE void backward(V g, const V* state, const V*, const S* w, const V* grad_x, const V* grad_new_state,
                          FeaturesGradient<V, MomentFeatures>* out) const {
    const Moments<V> now(*this, g, state);
    const V zero = broadcast<V>(0);
    V grad_u[2] = {zero, zero};
    for (int k = 0; k < width; ++k) {
      const V d = grad_x[k] * elu_slope(linear(now.u, w, k));
      grad_u[0] += d * w[2 * k];
      grad_u[1] += d * w[2 * k + 1];
      out->weights[2 * k] = d * now.u[0];
      out->weights[2 * k + 1] = d * now.u[1];
      out->weights[2 * width + k] = d;
    }
    const V grad_root = -(grad_u[0] * g + grad_u[1] * now.mean) * now.factor * now.factor;
    const V grad_square = now.root > zero ? grad_root / (S(2) * now.root) : zero;  // of v / b
    const V grad_mean = grad_u[1] * now.factor;
    const V grad_m = grad_new_state[0] + grad_mean / now.a;
    const V grad_v = grad_new_state[1] + grad_square / now.b;
    out->grad = grad_u[0] * now.factor + grad_m * rest1 + grad_v * rest2 * (S(2) * g);
    out->states[0] = grad_m * beta1;
    out->states[1] = grad_v * beta2;
    out->states[2] = (grad_new_state[2] - grad_mean * now.mean / now.a) * beta1;
    out->states[3] = (grad_new_state[3] - grad_square * (now.v / now.b) / now.b) * beta2;
  }
};

}  // namespace MK_CAPABILITY
}  // namespace metakern
