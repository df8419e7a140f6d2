// Features of a per-parameter MLP optimizer (Metz et al. 2022, arXiv 2203.11860) for one coordinate or one SIMD vector
// of coordinates, before their normalisation, and their derivatives.
#pragma once
#include "activations.h"

namespace metakern {

// Order of the features: g, p, m (3), v, m root (3), root, g of_g (3), r (3), c (3), r_root (3), c_root (3), m of_m
// (3).
constexpr int tensor_features = 28, time_features = 11, mlp_inputs = tensor_features + time_features;
constexpr int feature_g = 0, feature_p = 1, feature_m = 2, feature_v = 5, feature_m_root = 6, feature_root = 9,
              feature_g_factor = 10, feature_r = 13, feature_c = 16, feature_r_root = 19, feature_c_root = 22,
              feature_m_factor = 25;

// Decays of m, v and the factors, in this order.
constexpr int num_decays = 7, decay_m = 0, decay_v = 3, decay_factors = 4;
constexpr int factor_decays = 3;

constexpr double time_scales[time_features] = {1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000};

inline namespace MK_CAPABILITY {

template <class V>
MK_INLINE V inverse_root(V x) {
  return lane_t<V>(1) / square_root(x);
}

// max(x, 1e-9)^-1/2, and its derivative from its value.
template <class V>
MK_INLINE V safe_inverse_root(V x) {
  return inverse_root<V>(at_least(x, lane_t<V>(1e-9)));
}
template <class V>
MK_INLINE V safe_inverse_root_slope(V x, V root) {
  const V zero = broadcast<V>(0);
  return x >= broadcast<V>(lane_t<V>(1e-9)) ? lane_t<V>(-0.5) * root * root * root : zero;
}

// b and 1 - b of every decay.
template <class S>
struct Decays {
  S keep[num_decays], add[num_decays];

  MK_INLINE explicit Decays(const S* values) {
    for (int k = 0; k < num_decays; ++k) {
      keep[k] = values[k];
      add[k] = S(1) - values[k];
    }
  }
};

// The new moving means of the gradient and of its square, and (v + 1e-6)^-1/2.
template <class V>
struct NewMoments {
  V m[3], v, root;

  MK_INLINE NewMoments(V g, const V* old_m, V old_v, const Decays<lane_t<V>>& decays) {
    for (int k = 0; k < 3; ++k) m[k] = decays.keep[decay_m + k] * old_m[k] + decays.add[decay_m + k] * g;
    v = decays.keep[decay_v] * old_v + decays.add[decay_v] * (g * g);
    root = inverse_root<V>(v + lane_t<V>(1e-6));
  }
};

// What a coordinate reads of the factors: r, c, (r + 1e-8)^-1/2, (c + 1e-8)^-1/2, and the factors of g and of m.
template <class V>
struct Factors {
  V r[3], c[3], r_root[3], c_root[3], of_g[3], of_m[3];
};

// With one axis: V, the moving mean of squares kept in full, in the place of r and c.
template <class V>
MK_INLINE Factors<V> full_factors(const V* full) {
  using S = lane_t<V>;
  Factors<V> f;
  for (int k = 0; k < 3; ++k) {
    f.r[k] = f.c[k] = full[k];
    f.r_root[k] = f.c_root[k] = inverse_root<V>(full[k] + S(1e-8));
    f.of_g[k] = safe_inverse_root<V>(full[k] + S(1e-9));
    f.of_m[k] = inverse_root<V>(full[k] + S(1e-6));
  }
  return f;
}

template <class V>
MK_INLINE V new_full_factor(V g, V old, int k, const Decays<lane_t<V>>& decays) {
  return decays.keep[decay_factors + k] * old + decays.add[decay_factors + k] * (g * g + lane_t<V>(1e-30));
}

// Those features that are no table's: all but r, c and their roots.
template <class V>
MK_INLINE void own_features(V g, V p, const NewMoments<V>& now, const V* of_g, const V* of_m, V* x) {
  x[feature_g] = g;
  x[feature_p] = p;
  x[feature_v] = now.v;
  x[feature_root] = now.root;
  for (int k = 0; k < 3; ++k) {
    x[feature_m + k] = now.m[k];
    x[feature_m_root + k] = now.m[k] * now.root;
    x[feature_g_factor + k] = g * of_g[k];
    x[feature_m_factor + k] = now.m[k] * of_m[k];
  }
}

template <class V>
MK_INLINE void table_features(const Factors<V>& f, V* x) {
  for (int k = 0; k < 3; ++k) {
    x[feature_r + k] = f.r[k];
    x[feature_c + k] = f.c[k];
    x[feature_r_root + k] = f.r_root[k];
    x[feature_c_root + k] = f.c_root[k];
  }
}

// Gradients of what the features are made of.
template <class V>
struct FeatureGradient {
  V g, p, m[3], v;
  V r[3], c[3];  // through r and c themselves and their roots
  V of_g[3], of_m[3];
};

// From the gradients dx of the features.
template <class V>
MK_INLINE FeatureGradient<V> features_backward(V g, const NewMoments<V>& now, const Factors<V>& f, const V* dx) {
  using S = lane_t<V>;
  FeatureGradient<V> out;
  out.g = dx[feature_g];
  out.p = dx[feature_p];
  V root = dx[feature_root];
  for (int k = 0; k < 3; ++k) {
    out.g += dx[feature_g_factor + k] * f.of_g[k];
    out.m[k] = dx[feature_m + k] + dx[feature_m_root + k] * now.root + dx[feature_m_factor + k] * f.of_m[k];
    root += dx[feature_m_root + k] * now.m[k];
    out.r[k] = dx[feature_r + k] - S(0.5) * dx[feature_r_root + k] * (f.r_root[k] * f.r_root[k] * f.r_root[k]);
    out.c[k] = dx[feature_c + k] - S(0.5) * dx[feature_c_root + k] * (f.c_root[k] * f.c_root[k] * f.c_root[k]);
    out.of_g[k] = dx[feature_g_factor + k] * g;
    out.of_m[k] = dx[feature_m_factor + k] * now.m[k];
  }
  out.v = dx[feature_v] - S(0.5) * root * (now.root * now.root * now.root);
  return out;
}

// Gradient of V from those of what is made of it.
template <class V>
MK_INLINE V full_factor_backward(const FeatureGradient<V>& d, const Factors<V>& f, int k) {
  using S = lane_t<V>;
  const V slope_g = safe_inverse_root_slope<V>(f.r[k] + S(1e-9), f.of_g[k]);
  return d.r[k] + d.c[k] + d.of_g[k] * slope_g - S(0.5) * d.of_m[k] * (f.of_m[k] * f.of_m[k] * f.of_m[k]);
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
