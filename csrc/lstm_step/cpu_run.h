// Common part of all CPU calls of lstm_step: select the loops of the instruction set in use, pack the weights, run.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../core/capability.h"
#include "../core/checks.h"
#include "../core/parallel.h"
#include "cpu.h"

namespace metakern {

inline const LstmStepKernels& kernels_for(const LstmStepProblem& p) {
  const bool is_double = p.dtype == DType::float64;
  return with_cpu_capability(
      [&](auto capability) -> const LstmStepKernels& { return lstm_step_kernels<capability.value>(is_double); });
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

inline Buffer allocate(int64_t bytes) {
  void* p = nullptr;
  check(posix_memalign(&p, 64, size_t(bytes > 0 ? bytes : 64)) == 0, "out of memory: lstm_step could not allocate ",
        bytes, " bytes of working memory");
  return Buffer(p);
}

// Packs contiguous weights in the order in which the loops read them.
inline Buffer pack(const LstmStepKernels& k, const LstmStepProblem& p, const void* const* weights, bool for_forward,
                   bool for_backward) {
  Buffer packed = allocate(k.packed_bytes(p, for_backward));
  k.pack(p, weights, for_forward, for_backward, packed.get());
  return packed;
}

// Several sets of packed weights, one after the other.
struct PackedCopies {
  Buffer memory;
  int64_t bytes;  // of one set, a multiple of 64

  const void* of(int64_t copy) const { return static_cast<const char*>(memory.get()) + copy * bytes; }
};

// Packs contiguous weights [C, *shape]; `sizes` are the bytes of one copy of each.
inline PackedCopies pack_copies(const LstmStepKernels& k, const LstmStepProblem& p,
                                const std::vector<const void*>& weights, const std::vector<int64_t>& sizes,
                                int64_t copies) {
  const int64_t bytes = (k.packed_bytes(p, false) + 63) / 64 * 64;
  PackedCopies packed{allocate(copies * bytes), bytes};
  parallel_for(0, copies, 4, [&](int64_t first, int64_t last) {
    std::vector<const void*> own(weights.size());
    for (int64_t copy = first; copy < last; ++copy) {
      for (size_t i = 0; i < weights.size(); ++i) own[i] = static_cast<const char*>(weights[i]) + copy * sizes[i];
      k.pack(p, own.data(), true, false, const_cast<void*>(packed.of(copy)));
    }
  });
  return packed;
}

constexpr int64_t grain_tiles = 8;

inline void run_forward(const LstmStepKernels& k, const LstmStepProblem& p, const LstmStepForward& args) {
  parallel_for(0, p.num_tiles(), grain_tiles, [&](int64_t first, int64_t last) { k.forward(p, args, first, last); });
}

// Forward of a range of tiles; each of C equal runs of tiles has weights of its own.
inline void forward_copies(const LstmStepKernels& k, const LstmStepProblem& p, LstmStepForward args,
                           const PackedCopies& packed, int64_t copies, int64_t first, int64_t last) {
  const int64_t run = p.num_tiles() / copies;
  for (int64_t stop; first < last; first = stop) {
    const int64_t copy = first / run;
    stop = std::min(last, (copy + 1) * run);
    args.packed = packed.of(copy);
    k.forward(p, args, first, stop);
  }
}

inline void run_forward_copies(const LstmStepKernels& k, const LstmStepProblem& p, const LstmStepForward& args,
                               const PackedCopies& packed, int64_t copies) {
  parallel_for(0, p.num_tiles(), grain_tiles,
               [&](int64_t first, int64_t last) { forward_copies(k, p, args, packed, copies, first, last); });
}

}  // namespace metakern
