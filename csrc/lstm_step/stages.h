// Table of the stages that lstm_step's kernels are compiled for: features of math/features.h × LSTM cells × a head of
// math/heads.h. To add a stage, define it there and add a row here.
#pragma once
#include "../math/features.h"
#include "../math/heads.h"
#include "problem.h"

// X(features, head, context). The first row is lstm_step itself, the second RNNProp, the third Meta-LSTM.
// clang-format off
#define MK_LSTM_STAGES(X, ...)                  \
  X(GradientFeatures, AddHead, __VA_ARGS__)     \
  X(MomentFeatures, TanhHead, __VA_ARGS__)      \
  X(LossFeatures, GateHead, __VA_ARGS__)
// clang-format on

namespace metakern {
inline namespace MK_CAPABILITY {

// Both stages of a call. Rows of state, coordinate inputs and weights of the features come before those of the head.
template <class Features_, class Head_>
struct Stages {
  using Features = Features_;
  using Head = Head_;
  static constexpr int states = Features::states + Head::states;
  static constexpr int coordinate_inputs = Features::coordinate_inputs + Head::coordinate_inputs;
  static constexpr int weights = Features::weights + Head::weights;

  Features features;
  Head head;

  static MK_INLINE StageSizes sizes(int features) {
    return {Features::inputs(features), Head::outputs, states, coordinate_inputs, Features::weights, Head::weights};
  }
};

// The stages with a call's parameters. Host code.
template <class S>
PreprocessScale<S> preprocess_scalars(const LstmStepProblem& p) {
  return {S(__builtin_exp(p.preprocess_scale)), S(__builtin_exp(-p.preprocess_scale)), S(1 / p.preprocess_scale)};
}
template <class S>
void set_up(const LstmStepProblem& p, GradientFeatures<S>* stage) {
  *stage = {Preprocess(p.features), preprocess_scalars<S>(p)};
}
template <class S>
void set_up(const LstmStepProblem& p, MomentFeatures<S>* stage) {
  *stage = {S(p.beta1), S(p.beta2), S(1 - p.beta1), S(1 - p.beta2)};
}
template <class S>
void set_up(const LstmStepProblem& p, LossFeatures<S>* stage) {
  stage->scale = preprocess_scalars<S>(p);
}
template <class S>
void set_up(const LstmStepProblem& p, AddHead<S>* stage) {
  stage->scale = S(p.output_scale);
}
template <class S>
void set_up(const LstmStepProblem& p, TanhHead<S>* stage) {
  stage->scale = S(p.output_scale);
}
template <class S>
void set_up(const LstmStepProblem&, GateHead<S>*) {}

// f(stages of scalar S) for the row that serves these features and this head. False where there is none.
template <class S, class F>
bool with_stages(const LstmStepProblem& p, const F& f) {
#define MK_TRY(Features_, Head_, ...)                                 \
  if (Features_<S>::serves(p.features) && Head_<S>::serves(p.head)) { \
    Stages<Features_<S>, Head_<S>> stages;                            \
    set_up(p, &stages.features);                                      \
    set_up(p, &stages.head);                                          \
    f(stages);                                                        \
    return true;                                                      \
  }
  MK_LSTM_STAGES(MK_TRY, )
#undef MK_TRY
  return false;
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
