// Interface between the mlp_update_step binding and its vectorised loops.
//
// The work of a segment is cut into blocks by its shape alone, so that sums have the same order for any number of
// threads. A pass runs over blocks; between passes, sums of a segment's blocks are finished.
#pragma once
#include "../core/instruction_sets.h"
#include "problem.h"

namespace metakern {

constexpr int64_t most_groups = 128;  // partial weight gradients; a function of the blocks alone

// Part of a segment: ranges of `first`, `middle` and `second` for one index of `outer`. Either `second` is whole, or
// `middle` has one index. For every index of `first`, its coordinates are contiguous: a span.
struct MlpBlock {
  int64_t segment;
  int64_t outer;
  int64_t first[2], middle[2], second[2];
  int64_t sums;  // its part of the sums over rows and columns: [K, x_size], then [K, y_size]

  MK_INLINE int64_t x_size(const FactoredShape& s) const {
    return (first[1] - first[0]) * (middle[1] - middle[0]) * s.inner;
  }
  MK_INLINE int64_t y_size(const FactoredShape& s) const {  // also the length of a span
    return (middle[1] - middle[0]) * (second[1] - second[0]) * s.inner;
  }
};

// Coordinates of a block's rows: those of one index of `first` and `middle`.
MK_INLINE int64_t row_length(const FactoredShape& s, const MlpBlock& b) {
  return (b.second[1] - b.second[0]) * s.inner;
}

// Whether the forward passes go by rows (cpu_rows.h). Short rows would leave lanes of their vectors empty.
constexpr int64_t shortest_row = 16, longest_pattern = 256;
MK_INLINE bool goes_by_rows(const FactoredShape& s) {
  return !s.is_factored || (s.second * s.inner >= shortest_row && s.inner <= longest_pattern);
}

// Elements of an array that is read in whole vectors from any of its first n.
MK_INLINE int64_t padded(int64_t n) { return (n + 31) / 16 * 16; }

struct MlpSegment {
  int64_t tensor, task;
  int64_t first_block, num_blocks;
  int64_t tables;       // entries of r and c of the segments before it
  int64_t coordinates;  // of the segments before it
};

// The tables hold, for entries of r and then of c, rows of: ^-1/2 of them + 1e-8 (3), the factors R or C (3).
constexpr int table_rows = 6;
// Sums over rows and columns: of g^2 in forward; in backward of the gradients of the factors (3) and of r or c through
// features of their own (3), and of g^2.
constexpr int forward_sums = 1, backward_sums = 7;
// Sums of a block: one a feature; in backward then the gradients of the rate and of `keep`.
constexpr int block_numbers = tensor_features + 2, block_rate = tensor_features, block_keep = tensor_features + 1;

struct MlpUpdateCall {
  const MlpUpdateProblem* problem;
  const MlpSegment* segments;
  const MlpBlock* blocks;
  const void* biases;    // [T, W]: of the first layer, the time features' part added
  void* tables;          // per segment [table_rows, r's entries], then those of c
  void* sums;            // per block: sums over its rows and columns
  double* entry_sums;    // per segment [K, x_size], then [K, y_size]
  double* block_sums;    // [blocks, block_numbers]
  double* segment_sums;  // [segments, tensor_features]: forward: mean squares of r, c; backward: as `means` says
  int64_t num_blocks, num_segments;
  // of backward alone
  const double* time;   // [T, 11]
  void* kept_grads;     // between two passes, of all coordinates: gradients of grads, then of params; null for
  int64_t coordinates;  // params of the arithmetic's dtype, where the results hold them
  void* slopes;         // per segment: factors of g in its gradient, by rows and columns: [x_size], then [y_size]
  double* decay_sums;   // [blocks + segments, num_decays]
};

// The loops of one instruction set and compute dtype. Ranges are half-open.
struct MlpUpdateKernels {
  void (*biases)(const MlpUpdateProblem&, const double* time, void* biases);
  int64_t (*scratch_bytes)(const MlpUpdateProblem&, int64_t longest_column);
  void (*squares)(const MlpUpdateCall&, int64_t block, void* scratch);          // sums of g^2 over rows and columns
  void (*factors)(const MlpUpdateCall&, int64_t segment);                       // new r and c, and their tables
  void (*feature_squares)(const MlpUpdateCall&, int64_t block, void* scratch);  // sums of squares of the features
  void (*norms)(const MlpUpdateCall&, int64_t segment);
  void (*update)(const MlpUpdateCall&, int64_t block, void* scratch);  // the network; new params, m, v
};

struct MlpUpdateBackwardKernels {
  int64_t (*scratch_bytes)(const MlpUpdateProblem&);
  int64_t (*flat_weights)(const MlpUpdateProblem&);
  void (*tables)(const MlpUpdateCall&, int64_t segment);
  void (*network)(const MlpUpdateCall&, int64_t block, void* scratch, double* weight_sums);
  void (*means)(const MlpUpdateCall&, int64_t segment);
  void (*moments)(const MlpUpdateCall&, int64_t block);
  void (*factors)(const MlpUpdateCall&, int64_t segment);
  void (*grads)(const MlpUpdateCall&, int64_t block);
  // Adds the partial weight gradients up, and writes all gradients that the segments share.
  void (*reduce)(const MlpUpdateCall&, double* weight_sums, int64_t groups, void* const* grad_weights,
                 void* grad_decays, void* grad_rates, void* grad_keep);
};

MK_DECLARE_KERNELS(MlpUpdateKernels, mlp_update_kernels, bool is_double)
MK_DECLARE_KERNELS(MlpUpdateBackwardKernels, mlp_update_backward_kernels, bool is_double)

}  // namespace metakern
