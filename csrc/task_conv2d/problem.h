// The problem that every implementation of task_conv2d solves. No torch header: the loops are compiled without, because
// inline functions of other libraries must not be compiled once per instruction set.
//
// Axis legend, here and in every file of this folder:
//   T tasks, S samples, C channels of x, O channels of y, [H, W] and [Ho, Wo] their images, [kh, kw] the kernel
//   x: [T, S, C, H, W];  weight: [T, O, C, kh, kw];  bias: [T, O];  y and its gradient: [T, S, O, Ho, Wo]
#pragma once
#include <stdint.h>

#include "../core/portable.h"

namespace metakern {

struct TaskConv2dProblem {
  int64_t num_tasks, num_samples;
  int64_t in_channels, out_channels;  // C, O
  int64_t size[2];                    // H, W; rows before columns, here and below
  int64_t out_size[2];                // Ho, Wo
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];
  bool is_double;

  // Inlined by force: as weak symbols, one instruction set's copy could serve all.
  MK_INLINE int64_t taps() const { return kernel[0] * kernel[1]; }
  MK_INLINE int64_t pixels() const { return size[0] * size[1]; }
  MK_INLINE int64_t out_pixels() const { return out_size[0] * out_size[1]; }
};

}  // namespace metakern
