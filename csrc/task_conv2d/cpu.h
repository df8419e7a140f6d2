// Interface between the task_conv2d bindings and their vectorised loops.
//
// All three maps are the same product: out[column][row] = sum over terms k of packed[k][row] * source[bases[column] +
// offsets[k]]. Rows are channels of the result and lie in SIMD lanes; the source is a plane of images with borders of
// zeros, which is read where it lies, so nothing is unfolded.
//   y:              rows O, columns (s, ho, wo), terms (c, kh, kw), packed weight, source x
//   gradient by x:  rows C, columns (s, h, w),   terms (o, kh, kw), packed weight, source y's gradient
//   by the weight:  rows O, columns (c, kh, kw), terms (s, ho, wo), packed gradient of y, source x
#pragma once
#include "../core/instruction_sets.h"
#include "problem.h"

namespace metakern {

// The images of one operand, [T, S, channels, size], and their borders of zeros.
struct ConvImages {
  int64_t channels;
  int64_t size[2];
  int64_t before[2];  // rows above and columns to the left
  int64_t padded[2];  // rows and columns with all borders

  MK_INLINE bool copied() const { return padded[0] != size[0] || padded[1] != size[1]; }
  MK_INLINE int64_t plane() const { return padded[0] * padded[1]; }
  MK_INLINE int64_t sample() const { return channels * plane(); }
  MK_INLINE int64_t sample_in_memory() const { return channels * size[0] * size[1]; }
};

// How the samples of a task are cut into groups, and the rows of a result into ranges: functions of the shapes alone.
struct ConvCut {
  int64_t num_tasks, num_samples;
  int64_t group_samples, num_groups;
  int64_t num_ranges;

  MK_INLINE int64_t first_sample(int64_t group) const { return group * group_samples; }
  MK_INLINE int64_t samples_of(int64_t group) const {
    const int64_t left = num_samples - first_sample(group);
    return left < group_samples ? left : group_samples;
  }
};

// Pixels of a result with the same taps: all of y's. Of the gradient by x those with one remainder by the stride.
struct ConvPhase {
  int64_t terms;
  int64_t first_term;       // in the packed weights
  const int64_t* offsets;   // [terms]
  const int64_t* elements;  // [terms], of the weight, in row 0
  const int64_t* bases;     // [group_samples, size]
  int64_t first[2];         // the first pixel's place in the result
  int64_t size[2];

  MK_INLINE int64_t pixels() const { return size[0] * size[1]; }
};

// y, or the gradient by x.
struct ConvPass {
  ConvCut cut;
  ConvImages images;
  const ConvPhase* phases;
  int64_t num_phases;
  int64_t terms;  // of all phases
  int64_t rows;   // channels of the result
  int64_t out_size[2];
  int64_t step[2];          // from a phase's pixel to the next, in the result
  int64_t weight_pitch;     // from row to row in the weight
  int64_t weight_elements;  // of a task
  const void* source;       // [T, S, images]
  const void* weight;       // [T, O, C, kh, kw]
  const void* bias;         // [T, rows] or null
  void* packed;             // [T, packed_elements]
  void* out;                // [T, S, rows, out_size]
};

// The gradients by weight and bias.
struct ConvWeightPass {
  ConvCut cut;
  ConvImages images;
  int64_t rows;            // O
  int64_t columns;         // C taps
  int64_t pixels;          // Ho Wo
  const int64_t* bases;    // [columns]
  const int64_t* offsets;  // [group_samples, pixels]
  const void* source;      // x
  const void* grad;        // of y
  void* out;               // [T, O, columns]
  void* out_bias;          // [T, O]
};

// The loops of one instruction set and dtype. Ranges are half-open; an item is a task, a group of samples (of the
// first two maps alone) and a range of rows, the last varying fastest.
struct TaskConv2dKernels {
  int64_t (*packed_elements)(const ConvPass&);  // of one task
  void (*pack)(const ConvPass&, int64_t first_task, int64_t last_task);
  int64_t (*scratch_bytes)(const ConvPass&);
  void (*convolve)(const ConvPass&, void* scratch, int64_t first_item, int64_t last_item);

  int64_t (*weight_scratch_bytes)(const ConvWeightPass&);
  void (*weigh)(const ConvWeightPass&, void* scratch, int64_t first_item, int64_t last_item);
};

MK_DECLARE_KERNELS(TaskConv2dKernels, task_conv2d_kernels, bool is_double)

}  // namespace metakern
