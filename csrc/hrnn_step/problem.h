// The problem that every implementation of hrnn_step solves. No torch header: the loops are compiled without, because
// inline functions of other libraries must not be compiled once per instruction set.
//
// Axis legend, here and in every file of this folder:
//   M tensors, T tasks, n coordinates of one tensor of one task (a segment; n differs by tensor and may be 0)
//   H = 10 hidden units, X = 12 features, R = 21 rows of the state, A = 1 with attention and otherwise 0
//   params, grads: [T, n] for each tensor;  state: [T, R, n];  steps: [T, 1 + A, n]
//   biases: [M, T, 3H], for r, u and c;  means: [M, T, H + X + 1], of h', x and l';  rms: [M, T, 1 + A]
//   gates [2H, X + H], candidate [H, X + H], readouts [4 + A, H], scales [4], scalars [5]
#pragma once
#include <stdint.h>

#include "../core/dtypes.h"
#include "../core/portable.h"
#include "../math/rate_readout.h"
#include "../math/scale_features.h"

namespace metakern {

constexpr int hrnn_hidden = 10;
constexpr int hrnn_features = num_scale_features + 1;  // the last is the log rate minus the task's mean
constexpr int hrnn_inputs = hrnn_features + hrnn_hidden;
constexpr int hrnn_gates = 3 * hrnn_hidden;
constexpr int hrnn_means = hrnn_hidden + hrnn_features + 1;

// Rows of the state.
constexpr int row_mean = hrnn_hidden, row_square = row_mean + num_scales;
constexpr int row_rate = row_square + num_scales, row_scale_decay = row_rate + 1, row_input_decay = row_rate + 2;
constexpr int hrnn_rows = row_input_decay + 1;

// Elements of `scalars`: biases of three readouts, o, and m before its sigmoid.
constexpr int scalar_rate_bias = 0, scalar_scale_bias = 1, scalar_input_bias = 2, scalar_offset = 3;
constexpr int scalar_momentum = 4, hrnn_scalars = 5;

constexpr double rms_epsilon = 1e-16;

struct HrnnStepProblem {
  int64_t num_tensors;
  int64_t num_tasks;
  bool attention;
  DType dtype;  // of params and grads; the arithmetic is double for float64 and float otherwise

  // Inlined by force: as weak symbols, one instruction set's copy could serve all.
  MK_INLINE int64_t num_segments() const { return num_tensors * num_tasks; }
  MK_INLINE int directions() const { return attention ? 2 : 1; }  // 1 + A
  MK_INLINE int readouts() const { return num_readouts + (attention ? 1 : 0); }
};

}  // namespace metakern
