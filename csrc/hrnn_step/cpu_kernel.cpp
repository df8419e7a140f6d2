// hrnn_step on the CPU: coordinates in SIMD lanes, weights broadcast; a tile's rows stay in the first-level cache.
// Compiled once per instruction set; problem.h has the axis legend.
#include "cpu_backward.h"
#include "cpu_forward.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

template <class S>
constexpr HrnnStepKernels kernels{forward<S>,       finish_forward<S>, apply<S>,           dots<S>,  finish_dots<S>,
                                  scratch_bytes<S>, backward<S>,       finish_backward<S>, reduce<S>};

}  // namespace
}  // namespace MK_CAPABILITY

template <>
const HrnnStepKernels& hrnn_step_kernels<CpuCapability::MK_CAPABILITY>(bool is_double) {
  return is_double ? kernels<double> : kernels<float>;
}

}  // namespace metakern
