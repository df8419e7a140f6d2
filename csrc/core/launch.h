// Kernel launches: device properties, the shared memory limit, and errors of CUDA calls.
#pragma once
#include <atomic>

#include "launch_result.h"
#include "portable.h"

namespace metakern {
inline namespace MK_CAPABILITY {

// Return from a launcher with the error of a CUDA call. Also clears the runtime's last error, so that no later call
// reports it again.
#define MK_CUDA_CHECK(call, name)                    \
  do {                                               \
    const cudaError_t mk_error = (call);             \
    if (mk_error != cudaSuccess) {                   \
      static_cast<void>(cudaGetLastError());         \
      return ::metakern::CudaResult{mk_error, name}; \
    }                                                \
  } while (0)

constexpr int cached_devices = 64;

struct DeviceFacts {
  int device = 0;
  int multiprocessors = 0;
  int shared_bytes = 0;  // that one block may have
};

// Properties of the current device; cached for the first devices.
inline CudaResult device_facts(DeviceFacts* facts) {
  static std::atomic<int> known[cached_devices][2];
  MK_CUDA_CHECK(cudaGetDevice(&facts->device), "cudaGetDevice");
  const bool cached = facts->device < cached_devices;
  if (cached) {
    facts->multiprocessors = known[facts->device][0].load(std::memory_order_relaxed);
    facts->shared_bytes = known[facts->device][1].load(std::memory_order_relaxed);
    if (facts->multiprocessors > 0 && facts->shared_bytes > 0) return {};
  }
  MK_CUDA_CHECK(cudaDeviceGetAttribute(&facts->multiprocessors, cudaDevAttrMultiProcessorCount, facts->device),
                "cudaDeviceGetAttribute(MultiProcessorCount)");
  MK_CUDA_CHECK(cudaDeviceGetAttribute(&facts->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, facts->device),
                "cudaDeviceGetAttribute(MaxSharedMemoryPerBlockOptin)");
  if (cached) {
    known[facts->device][0].store(facts->multiprocessors, std::memory_order_relaxed);
    known[facts->device][1].store(facts->shared_bytes, std::memory_order_relaxed);
  }
  return {};
}

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
};

// A kernel that takes its arguments by value, with up to 48 KB of shared memory.
template <class Arguments>
CudaResult launch(void (*kernel)(Arguments), const LaunchShape& shape, const Arguments& args, cudaStream_t stream,
                  const char* name) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = stream;
  MK_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args), name);
  return {};
}

// More than 48 KB of shared memory must be asked for once per kernel and device.
template <class Arguments>
CudaResult launch(void (*kernel)(Arguments), std::atomic<bool> (&prepared)[cached_devices], const DeviceFacts& facts,
                  const LaunchShape& shape, const Arguments& args, cudaStream_t stream, const char* name) {
  const bool cached = facts.device < cached_devices;
  if (!cached || !prepared[facts.device].load(std::memory_order_relaxed)) {
    MK_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, facts.shared_bytes),
                  "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
    if (cached) prepared[facts.device].store(true, std::memory_order_relaxed);
  }
  return launch(kernel, shape, args, stream, name);
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
