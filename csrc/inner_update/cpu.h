// Interface between the inner_update binding and its vectorised loops.
#pragma once
#include "../core/instruction_sets.h"
#include "problem.h"

namespace metakern {

constexpr int64_t update_tile = 4096;  // elements per work item of a thread, and per partial sum of squares

MK_INLINE int64_t update_tiles(int64_t elements) { return (elements + update_tile - 1) / update_tile; }

// The loops of one instruction set. Ranges of elements are half-open.
struct InnerUpdateKernels {
  void (*update)(const InnerUpdateProblem&, const InnerUpdateTensor&, int64_t first, int64_t last);
  double (*sum_of_squares)(const InnerUpdateTensor&, int64_t first, int64_t last);  // of grads
};

MK_DECLARE_KERNELS(InnerUpdateKernels, inner_update_kernels, )

}  // namespace metakern
