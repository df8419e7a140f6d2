// Interface between the inner_update binding and its CUDA kernels; problem.h has the axis legend.
//
// Both functions work on the current device (the caller holds the guard), allocate nothing, copy nothing to the host
// and never wait: calls can be captured in a CUDA graph. The problem and its list lie in the host's memory and are read
// before the call returns; all that the list and `active` point to is contiguous device memory.
#pragma once
#include "../core/launch_result.h"
#include "problem.h"

namespace metakern {

// 0 without clipping, that is with a clip_norm of 0.
int64_t cuda_inner_update_workspace_bytes(const InnerUpdateProblem& p);

// One launch for the whole list, or two with clipping; a long list is split into parts of about fifty tensors.
// `workspace` is aligned to 8 bytes; `coefficients` is not read. The same bits in every run on every device.
CudaResult cuda_inner_update(const InnerUpdateProblem& p, void* workspace, cudaStream_t stream);

}  // namespace metakern
