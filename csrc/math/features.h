// Features stages: the inputs of a learned optimizer's lowest cell for a coordinate.
//
// A stage is a struct template over the arithmetic's scalar S, chosen at compile time. It declares
//   max_inputs   maximum number of features; inputs() is the actual number
//   states       number of state values per coordinate, kept from step to step
//   task_inputs  number of inputs per task (a loss, a decay, a bias correction)
//   weights      number of weights shared by all coordinates, with gradients
// and computes, for one coordinate or one SIMD vector V of them,
//   forward(g, states, task_inputs, weights, x, new_states)
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
  V task_inputs[at_least_one(Stage::task_inputs)];
  V weights[at_least_one(Stage::weights)];  // this coordinate's share
};

// One or two features of the gradient, by math/preprocess.h.
template <class S>
struct GradientFeatures {
  static constexpr int max_inputs = 2, states = 0, task_inputs = 0, weights = 0;
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

// The two features of RNNProp (Lv et al. 2017, arXiv 1703.03633): the gradient and its moving mean m, both divided by
// the root of the moving mean of squares v, with the bias of m and v corrected.
//   m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2,  r = 1 / (sqrt(c2 v') + 1e-8),  x = (g r, c1 m' r)
// States: m, v. Task inputs: b1, b2 and the corrections c1 = 1 / (1 - b1^t), c2 = 1 / (1 - b2^t) of step t. The root's
// infinite derivative at 0 is taken as 0.
template <class S>
struct MomentFeatures {
  static constexpr int max_inputs = 2, states = 2, task_inputs = 4, weights = 0;
  static constexpr S epsilon = S(1e-8);

  static MK_INLINE constexpr bool serves(int features) { return features == 3; }
  static MK_INLINE int inputs(int) { return 2; }

  template <class V>
  struct Moments {
    V m, v, root, factor;  // new m and v; sqrt(c2 v'); 1 / (root + epsilon)
    MK_INLINE Moments(V g, const V* state, const V* task)
        : m(task[0] * state[0] + (S(1) - task[0]) * g),
          v(task[1] * state[1] + (S(1) - task[1]) * (g * g)),
          root(square_root(task[3] * v)),
          factor(S(1) / (root + epsilon)) {}
  };

  template <class V>
  MK_INLINE void forward(V g, const V* state, const V* task, const S*, V* x, V* new_state) const {
    const Moments<V> now(g, state, task);
    const V poison = g - g;  // NaN for a gradient that is not finite
    x[0] = g * now.factor + poison;
    x[1] = task[2] * now.m * now.factor + poison;
    new_state[0] = now.m;
    new_state[1] = now.v;
  }
  template <class V>
  MK_INLINE void backward(V g, const V* state, const V* task, const S*, const V* grad_x, const V* grad_new_state,
                          FeaturesGradient<V, MomentFeatures>* out) const {
    const Moments<V> now(g, state, task);
    const V grad_factor = grad_x[0] * g + grad_x[1] * task[2] * now.m;
    const V grad_root = -grad_factor * now.factor * now.factor;
    const V zero = broadcast<V>(0);
    const V grad_square = now.root > zero ? grad_root / (S(2) * now.root) : zero;  // of c2 v'
    const V grad_m = grad_new_state[0] + grad_x[1] * task[2] * now.factor;
    const V grad_v = grad_new_state[1] + grad_square * task[3];
    out->grad = grad_x[0] * now.factor + grad_m * (S(1) - task[0]) + grad_v * (S(1) - task[1]) * (S(2) * g);
    out->states[0] = grad_m * task[0];
    out->states[1] = grad_v * task[1];
    out->task_inputs[0] = grad_m * (state[0] - g);
    out->task_inputs[1] = grad_v * (state[1] - g * g);
    out->task_inputs[2] = grad_x[1] * now.m * now.factor;
    out->task_inputs[3] = grad_square * now.v;
  }
};

}  // namespace MK_CAPABILITY
}  // namespace metakern
