// Return type of launchers.
#pragma once
#include <cuda_runtime_api.h>

namespace metakern {

// A launcher's `error` and, unless it is cudaSuccess, the call that returned it, for a message such as
// "launch of the forward kernel failed: invalid device function (cudaErrorInvalidDeviceFunction)".
struct CudaResult {
  cudaError_t error = cudaSuccess;
  const char* call = "";

  bool ok() const { return error == cudaSuccess; }
};

}  // namespace metakern
