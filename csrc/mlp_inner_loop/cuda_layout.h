// Layout of one task of mlp_inner_loop in a block's shared memory, for host and device. Keep cuda_shared_bytes in
// metakern/ops/mlp_inner_loop/__init__.py in step, which must be plain Python for torch.compile.
//
// The bias of a layer is one more column of its weight: a layer's matrix is [units][inputs + 1], and its inputs have
// one more row that is 1. Rows are padded to an odd length, so that neither rows nor columns meet in one memory bank.
#pragma once
#include "cuda.h"

namespace metakern {
inline namespace MK_CAPABILITY {

constexpr int max_mlp_threads = 512;
constexpr int mlp_warp_lanes = 32;

MK_INLINE int64_t odd(int64_t n) { return n + 1 - n % 2; }
// Elements from one row of a layer's matrix to the next.
MK_INLINE int matrix_row(int inputs) { return int(odd(int64_t(inputs) + 1)); }

// Offsets of one set's samples and of its passes' results, in elements of the shared memory.
struct MlpSet {
  int count;
  int row;     // elements from one row of samples to the next
  int x;       // [inputs + 1][row], the last one 1
  int y;       // [outputs, or 1 for labels][row]
  int weight;  // [row], of a sample in its task's mean
  int h;       // [all units, and a row of ones behind every layer's][row]; the last layer's are the predictions
  int z;       // the same before the activation; h where no derivative asks for it
  int e;       // gradients by h; -1 where they are not kept
  int delta;   // gradients by z
};

// Offsets in elements. A problem whose `elements` exceed the shared memory has other members that overflowed.
struct MlpLayout {
  int weights[max_mlp_layers + 1];  // where a layer's matrix starts in the parameters of a task
  int rows[max_mlp_layers + 1];     // where a layer's units start among all units
  MlpSet support;                   // its passes: those of the first slot
  MlpSet query;
  int params;              // elements of a task's parameters
  int slots;               // steps that are held at once: checkpoint_every, or 1, which the next overwrites
  int thetas;              // [slots + 1, or 1][params]
  int slot_elements;       // of the results of one step's passes
  int direction, adjoint;  // [params]; -1 where it is elsewhere or not needed
  int gradient;            // [params], of a step that is clipped, in the direction's place; -1 without clipping
  int tangent_z, tangent_h, tangent_delta;  // [all units ...][row of the support set], where the query's passes write
  int sample_losses;                        // [query samples]
  int partials;                             // [tensors][warps]
  int64_t elements;
};

// Allocates consecutive ranges of elements.
class LayoutCounter {
 public:
  MK_INLINE int take(int64_t elements) {
    const int64_t at = used_;
    used_ += elements;
    return int(at);
  }
  MK_INLINE int64_t used() const { return used_; }
  MK_INLINE void rewind(int64_t used) { used_ = used; }

 private:
  int64_t used_ = 0;
};

// Threads per block, by the largest product of a pass.
MK_INLINE int threads_of(const MlpInnerLoopProblem& p) {
  const int samples = p.support_samples > p.query_samples ? p.support_samples : p.query_samples;
  int64_t widest = 0;
  for (int l = 0; l < p.num_layers; ++l) {
    const int64_t outputs = int64_t(p.widths[l + 1]) * (p.widths[l] >= samples ? p.widths[l] + 1 : samples);
    widest = outputs > widest ? outputs : widest;
  }
  return widest <= 512 ? 128 : widest <= 4096 ? 256 : max_mlp_threads;
}

MK_INLINE MlpSet samples_layout(const MlpInnerLoopProblem& p, int count, LayoutCounter& memory) {
  MlpSet set{};
  const int64_t row = odd(count), targets = p.loss == TaskLoss::cross_entropy ? 1 : p.outputs();
  set.count = count;
  set.row = int(row);
  set.x = memory.take((int64_t(p.widths[0]) + 1) * row);
  set.y = memory.take(targets * row);
  set.weight = memory.take(row);
  return set;
}

MK_INLINE void passes_layout(const MlpInnerLoopProblem& p, int64_t units, bool with_e, MlpSet& set,
                             LayoutCounter& memory) {
  set.h = memory.take(units * set.row);
  set.z = p.has(Activation::gelu) ? memory.take(units * set.row) : set.h;
  set.e = with_e ? memory.take(units * set.row) : -1;
  set.delta = memory.take(units * set.row);
}

MK_INLINE MlpLayout mlp_layout(const MlpInnerLoopProblem& p, MlpPlacement placement) {
  const bool all_steps = placement == MlpPlacement::all_steps, way_back = placement != MlpPlacement::no_way_back;
  MlpLayout m{};
  int64_t params = 0, units = 0;
  for (int l = 0; l < p.num_layers; ++l) {
    m.weights[l] = int(params);
    m.rows[l] = int(units);
    params += int64_t(p.widths[l + 1]) * matrix_row(p.widths[l]);
    units += p.widths[l + 1] + 1;
  }
  LayoutCounter memory;
  m.params = int(params);
  m.slots = all_steps ? p.checkpoint_every : 1;
  m.support = samples_layout(p, p.support_samples, memory);
  m.query = samples_layout(p, p.query_samples, memory);
  m.thetas = memory.take(params * (all_steps ? m.slots + 1 : 1));
  m.direction = way_back || p.clips() ? memory.take(params) : -1;
  m.gradient = p.clips() ? m.direction : -1;
  m.adjoint = way_back && placement != MlpPlacement::one_step_without_adjoint ? memory.take(params) : -1;
  const int64_t before = memory.used();
  passes_layout(p, units, true, m.support, memory);
  m.slot_elements = int(memory.used() - before);
  memory.take((memory.used() - before) * (m.slots - 1));
  // The query's passes and the tangents are never needed at once.
  const int64_t shared_start = memory.used();
  passes_layout(p, units, false, m.query, memory);
  const int64_t query_end = memory.used();
  memory.rewind(shared_start);
  const int64_t tangents = way_back ? units * m.support.row : 0;
  m.tangent_z = memory.take(tangents);
  m.tangent_h = memory.take(tangents);
  m.tangent_delta = memory.take(tangents);
  if (query_end > memory.used()) memory.rewind(query_end);
  m.sample_losses = memory.take(p.query_samples);
  m.partials = memory.take(int64_t(p.num_tensors()) * (threads_of(p) / mlp_warp_lanes));
  m.elements = memory.used();
  return m;
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
