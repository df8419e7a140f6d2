// Gradient preprocessing of learned optimizers (Andrychowicz et al. 2016, arXiv 1606.04474, appendix A).
//
// Each turns a gradient g into one or two features. A non-finite gradient makes every feature NaN (the term g - g below
// is zero otherwise), as a saturated step would look plausible.
#pragma once
#include "activations.h"

namespace metakern {

// The values are the indices of PREPROCESS in the Python reference.
enum class Preprocess : int { none = 0, log_sign = 1, log_and_clip = 2 };

MK_INLINE constexpr int num_features(Preprocess kind) { return kind == Preprocess::none ? 1 : 2; }

inline namespace MK_CAPABILITY {

template <class V>
struct Features {
  V x[2];
};

// Scalars that depend on the scale p only, computed once a call: e^p, e^-p, 1/p.
template <class S>
struct PreprocessScale {
  S exp_p, exp_neg_p, inverse;
};

// Term in log_and_clip's logarithm: the float32 machine epsilon, for every dtype.
constexpr double log_and_clip_epsilon = 1.1920928955078125e-07;

template <class V>
MK_INLINE V absolute(V g) {
  return g < broadcast<V>(0) ? -g : g;
}

template <class V>
MK_INLINE Features<V> preprocess(Preprocess kind, const PreprocessScale<lane_t<V>>& p, V g) {
  using S = lane_t<V>;
  const V poison = g - g;
  const V size = absolute(g);
  switch (kind) {
    case Preprocess::log_sign: {
      const auto large = size >= broadcast<V>(p.exp_neg_p);
      const V sign = g < broadcast<V>(0) ? broadcast<V>(-1) : broadcast<V>(1);
      const V logarithm = log(large ? size : broadcast<V>(1)) * p.inverse;
      return {{(large ? logarithm : broadcast<V>(-1)) + poison, (large ? sign : g * p.exp_p) + poison}};
    }
    case Preprocess::log_and_clip: {
      const V logarithm = log(size + S(log_and_clip_epsilon)) * p.inverse;
      return {{at_least(logarithm, S(-1)) + poison, at_least(at_most(g * p.exp_p, S(1)), S(-1)) + poison}};
    }
    default: return {{g + poison, poison}};
  }
}

// Gradient of the features' weighted sum with respect to g; grad holds the weights.
template <class V>
MK_INLINE V preprocess_backward(Preprocess kind, const PreprocessScale<lane_t<V>>& p, V g, const Features<V>& grad) {
  using S = lane_t<V>;
  const V zero = broadcast<V>(0);
  const V size = absolute(g);
  const V sign = g < zero ? broadcast<V>(-1) : broadcast<V>(1);
  switch (kind) {
    case Preprocess::log_sign: {
      const auto large = size >= broadcast<V>(p.exp_neg_p);
      const V slope = sign * p.inverse / (large ? size : broadcast<V>(1));
      return large ? grad.x[0] * slope : grad.x[1] * p.exp_p;
    }
    case Preprocess::log_and_clip: {
      const V shifted = size + S(log_and_clip_epsilon);
      const auto unclamped = log(shifted) * p.inverse >= broadcast<V>(-1);
      const V sign_or_zero = size > zero ? sign : zero;
      const V from_log = unclamped ? grad.x[0] * sign_or_zero * p.inverse / shifted : zero;
      const V clipped = g * p.exp_p;
      const V bounded = absolute(clipped) <= broadcast<V>(1) ? grad.x[1] * p.exp_p : zero;
      return from_log + bounded;
    }
    default: return grad.x[0];
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
