// The problem that every implementation of mlp_update_step solves. No torch header: see core/dtypes.h.
//
// Axis legend, here and in every file of this folder:
//   M tensors;  T tasks;  n coordinates of a segment, one tensor of one task;  W hidden units;  L hidden layers
//   params and their like: [T, *shape];  m: [T, 3, *shape];  v: [T, *shape]
//   r: [T, 3, rows], c: [T, 3, columns]: means of squared gradients over the largest and the second largest axis
//   weights: [W, 39], [W], then [W, W], [W] for each further hidden layer, then [2, W], [2]
#pragma once
#include <stdint.h>

#include "../core/dtypes.h"
#include "../core/portable.h"
#include "../math/mlp_features.h"

namespace metakern {

constexpr int smallest_width = 4, largest_width = 64;
constexpr int most_hidden_layers = 4;
constexpr int network_outputs = 2;

// The shape of a tensor of one task, [outer, first, middle, second, inner]: `first` and `second` are the two largest
// axes in the order of memory, the others are joined. Entries of table X are means over `second`, indexed by
// (outer, first, middle, inner); those of table Y are means over `first`, indexed by (outer, middle, second, inner).
struct FactoredShape {
  int64_t outer, first, middle, second, inner;
  bool is_factored;  // else one axis, `second`, whose squared gradients are kept in full: r is indexed as Y
  bool rows_are_x;   // whether `second` is the largest axis, so that r is table X and c is table Y

  MK_INLINE int64_t numel() const { return outer * first * middle * second * inner; }
  MK_INLINE int64_t x_size() const { return outer * first * middle * inner; }
  MK_INLINE int64_t y_size() const { return outer * middle * second * inner; }
  MK_INLINE int64_t rows() const { return rows_are_x ? x_size() : y_size(); }
  MK_INLINE int64_t columns() const { return !is_factored ? 0 : rows_are_x ? y_size() : x_size(); }
  MK_INLINE int64_t x_count() const { return second; }  // coordinates of an entry
  MK_INLINE int64_t y_count() const { return first; }
};

// One tensor of all tasks, all of it contiguous. Gradients are null in the forward operator.
struct MlpUpdateTensor {
  FactoredShape shape;
  const void *params, *grads, *m, *v, *r, *c;
  void *new_params, *new_m, *new_v, *new_r, *new_c;
  const void *grad_new_params, *grad_new_m, *grad_new_v, *grad_new_r, *grad_new_c;
  void *grad_params, *grad_grads, *grad_m, *grad_v, *grad_r, *grad_c;
};

// Its functions are inlined by force: as weak symbols, one instruction set's copy could serve all.
struct MlpUpdateProblem {
  const MlpUpdateTensor* tensors;  // [M]
  int64_t num_tensors, num_tasks;
  int width, hidden_layers;
  double exp_mult;
  DType dtype;  // of params and grads; arithmetic: double for float64, else float
  const void* weights[2 * (most_hidden_layers + 1)];
  const void *decays, *rates, *keep;  // [7], [M, T], [M, T]
  bool stacked;                       // whether weights and decays have an axis of T in front: each task has its own
  const int64_t* steps;               // [T]
  void* norms;                        // [M, T, 28]: (1e-5 + mean x^2)^-1/2 of every feature

  // Inputs of a layer that differ between coordinates: of the first, without the time features.
  MK_INLINE int inputs(int layer) const { return layer == 0 ? tensor_features : width; }
  // The first element of a task's own weight of `numel` elements; of that of all tasks where they share it.
  template <class S>
  MK_INLINE const S* own(const void* weight, int64_t task, int64_t numel) const {
    return static_cast<const S*>(weight) + (stacked ? task * numel : 0);
  }
  MK_INLINE int outputs(int layer) const { return layer == hidden_layers ? network_outputs : width; }
};

}  // namespace metakern
