// The problem that every implementation of task_norm_act_pool solves. No torch header: the loops are compiled without,
// because inline functions of other libraries must not be compiled once per instruction set.
//
// Axis legend, here and in every file of this folder:
//   T tasks, S samples, C channels, [H, W] the images of x, [Ho, Wo] those of y; n = S H W values of a channel
//   x: [T, S, C, H, W];  y, index: [T, S, C, Ho, Wo];  gamma, beta, mean, var: [T, C]
#pragma once
#include <stdint.h>

#include "../core/portable.h"

namespace metakern {

// By their index in STATISTICS and ACTIVATIONS of metakern/ops/task_norm_act_pool/reference.py.
enum class NormStatistics : int64_t { batch, given, none };
enum class NormActivation : int64_t { relu, leaky_relu, identity };

struct TaskNormActPoolProblem {
  int64_t num_tasks, num_samples, channels;
  int64_t size[2];      // H, W; rows before columns, here and below
  int64_t out_size[2];  // Ho, Wo
  NormStatistics statistics;
  NormActivation activation;
  double eps, slope;
  bool pool, is_double;

  // Inlined by force: as weak symbols, one instruction set's copy could serve all.
  MK_INLINE int64_t pixels() const { return size[0] * size[1]; }
  MK_INLINE int64_t out_pixels() const { return out_size[0] * out_size[1]; }
  MK_INLINE int64_t values() const { return num_samples * pixels(); }
};

}  // namespace metakern
