// torch's services for bindings of CUDA kernels: device guard, current stream, memory; and messages of launch errors.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <sstream>
#include <string>

#include "checks.h"
#include "launch_result.h"

// Missing in torch's CPU build. As weak symbols they are null there, and one build serves both.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_create_cuda_guard(int32_t device_index, CUDAGuardHandle* guard);
__attribute__((weak)) AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle guard);
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
}

namespace metakern {

// Guard that makes a tensor's device the current one; provides its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    const int32_t device = t.get_device_index();
    check(aoti_torch_create_cuda_guard != nullptr, "this torch was built without CUDA");
    check(aoti_torch_create_cuda_guard(device, &guard_) == 0, "torch could not switch to cuda:", device);
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
      aoti_torch_delete_cuda_guard(guard_);
      fail("torch has no current stream on cuda:", device);
    }
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

// Text for messages: the architectures that the kernels were compiled for, and the device's own.
inline std::string architectures(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  std::ostringstream out;
  out << "; the device has compute capability " << major << '.' << minor << ", metakern was built for "
      << METAKERN_CUDA_ARCHITECTURES;
  return out.str();
}

inline void check_cuda(const CudaResult& result) {
  if (result.ok()) return;
  int device = 0;
  const bool wrong_architecture =
      result.error == cudaErrorNoKernelImageForDevice || result.error == cudaErrorInvalidDeviceFunction;
  const std::string detail =
      wrong_architecture && cudaGetDevice(&device) == cudaSuccess ? architectures(device) : std::string();
  fail(result.call, " failed: ", cudaGetErrorString(result.error), " (", cudaGetErrorName(result.error), ')', detail);
}

// Adds a reason to a failed allocation; torch's shims report only where it happened.
template <class Allocate>
Tensor allocated(const char* what, int64_t bytes, Allocate allocate) {
  try {
    return allocate();
  } catch (const std::exception& error) {
    fail("out of memory? could not allocate ", bytes, " bytes for ", what, ": ", error.what());
  }
}

inline Tensor empty_like(const char* what, const Tensor& t) {
  return allocated(what, t.numel() * int64_t(t.element_size()), [&] { return torch::stable::new_empty(t, t.sizes()); });
}

}  // namespace metakern
