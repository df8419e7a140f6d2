// Common part of all CPU calls of lstm_step: select the loops of the instruction set in use, pack the weights, run.
#pragma once
#include <cstdlib>
#include <memory>

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
inline Buffer pack(const LstmStepKernels& k, const LstmStepProblem& p, const void* const* weights, bool for_backward) {
  Buffer packed = allocate(k.packed_bytes(p, for_backward));
  k.pack(p, weights, for_backward, packed.get());
  return packed;
}

constexpr int64_t grain_tiles = 8;

inline void run_forward(const LstmStepKernels& k, const LstmStepProblem& p, const LstmStepForward& args) {
  parallel_for(0, p.num_tiles(), grain_tiles, [&](int64_t first, int64_t last) { k.forward(p, args, first, last); });
}

}  // namespace metakern
