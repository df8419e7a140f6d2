// Table of the stages that lstm_step's kernels are compiled for: features of math/features.h × LSTM cells × a head of
// math/heads.h. To add a stage, define it there and add a row here.
#pragma once
#include "../math/features.h"
#include "../math/heads.h"
#include "problem.h"

// X(features, head, context). The first row is lstm_step itself, which the GPU has special kernels for.
// clang-format off
#define MK_LSTM_STAGES(X, ...)                  \
  X(GradientFeatures, AddHead, __VA_ARGS__)     \
  X(MomentFeatures, AddHead, __VA_ARGS__)       \
  X(GradientFeatures, GateHead, __VA_ARGS__)
// clang-format on

namespace metakern {
inline namespace MK_CAPABILITY {

// Both stages of a call. Rows of state, task inputs and weights of the features come before those of the head.
template <class Features_, class Head_>
struct Stages {
  using Features = Features_;
  using Head = Head_;
  static constexpr int states = Features::states + Head::states;
  static constexpr int task_inputs = Features::task_inputs + Head::task_inputs;
  static constexpr int weights = Features::weights + Head::weights;

  Features features;
  Head head;

  static MK_INLINE StageSizes sizes(int features) {
    return {Features::inputs(features), Head::outputs, states, task_inputs, Features::weights, Head::weights};
  }
};

// The stages with a call's parameters. Host code.
template <class S>
void set_up(const LstmStepProblem& p, GradientFeatures<S>* stage) {
  const double scale = p.preprocess_scale;
  *stage = {Preprocess(p.features), {S(__builtin_exp(scale)), S(__builtin_exp(-scale)), S(1 / scale)}};
}
template <class S>
void set_up(const LstmStepProblem& p, AddHead<S>* stage) {
  stage->scale = S(p.output_scale);
}
template <class Stage>
void set_up(const LstmStepProblem&, Stage*) {}

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
