// The problem that every implementation of inner_update solves. No torch header: see core/dtypes.h.
//
// Axis legend, here and in every file of this folder: T tasks, K inner steps, *shape one parameter tensor of the model.
#pragma once
#include <stdint.h>

#include "../core/dtypes.h"
#include "../core/portable.h"

namespace metakern {

// One tensor of the list, all of it contiguous.
struct InnerUpdateTensor {
  const void* params;  // [T, *shape]
  const void* grads;   // [T, *shape]
  void* updated;       // [T, *shape]
  const void* rates;   // α of the step, [rate_period], repeated along `params`; null: the problem's `rate`
  int64_t numel;
  int64_t rate_period;
  DType dtype;  // of params, grads and updated; the arithmetic is double for float64 and float otherwise
  DType rate_dtype;
};

struct InnerUpdateProblem {
  const InnerUpdateTensor* tensors;
  int64_t num_tensors;
  int64_t num_tasks;  // 1 where neither clipping nor `active` tells tasks apart
  double rate;
  double clip_norm;            // used where `coefficients` is not null
  const double* coefficients;  // [T], factors of the tasks' gradients, or null
  const uint8_t* active;       // [T], zero: rests; null: all step

  MK_INLINE int64_t task_size(const InnerUpdateTensor& t) const { return t.numel / num_tasks; }
};

}  // namespace metakern
