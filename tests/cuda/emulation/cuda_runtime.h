// Runs CUDA kernels on the CPU, thread by thread: the built-ins that csrc uses, for tests only.
//
// Looked for first, on PyPI and in Debian 12 (2026-11): of HIP-CPU, GPU Ocelot, CuPBoP, chipStar, AdaptiveCpp and pocl
// only the last can be had there, and it compiles OpenCL; the CUDA simulator of Numba runs kernels written in Python;
// clang and nvcc compile CUDA for devices only.
//
// The threads of a block are fibers. One runs until it reaches a barrier or a warp-wide operation, then the next one
// does, in an order that the test chooses: forward, each warp as far as it can; all that in reverse; or shuffled, warps
// and lanes. So a value that is read before the barrier that should protect it has been written in one order and not in
// another. Reported as errors: threads of a block at different barriers, a barrier that some threads never reach, a
// warp operation without all 32 lanes, writes outside the shared memory that was asked for. Shared memory holds NaN
// when a block starts.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <ucontext.h>

#include <string>
#include <utility>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int warp_lanes = 32;

enum class Order : int { forward, reverse, shuffled };

// What the device offers and what goes wrong, as the test wants it.
struct Device {
  int ordinal = 0;
  int multiprocessors = 3;
  int shared_bytes = 227 * 1024;
  Order order = Order::forward;
  uint32_t seed = 0;
  bool eager_copies = false;  // asynchronous copies land at once, else when they are waited for
  int fail_call = 0;          // how many more runtime calls until one returns `failure`; 0: none
  cudaError_t failure = cudaSuccess;
};
Device& device();
std::string& report();  // of the last launch; empty if nothing was wrong

char* shared_memory();

// Both suspend the running thread. `site` tells one barrier in the source from another.
void block_barrier(const void* site);
// Hands this lane's `in` to the warp and returns when all lanes have; lane_values(i) is what lane i gave.
void warp_barrier(const void* site, const void* in = nullptr);
const void* lane_value(int lane);
int lane();

// Asynchronous copies of 16 bytes, in groups, of the running thread.
void copy_16(void* shared, const void* global);
void require_alignment(const void* p, uintptr_t bytes);  // reports an address that is no multiple of it
void commit_copies();
void wait_for_copies(int pending_groups);

cudaError_t run(const cudaLaunchConfig_t& config, void (*body)(void*), void* argument);

}  // namespace emulation

// A macro, so that each use has an address of its own.
#define MK_SITE                         \
  ({                                    \
    static char mk_site;                \
    static_cast<const void*>(&mk_site); \
  })
#define __syncthreads() ::emulation::block_barrier(MK_SITE)
#define __syncwarp() ::emulation::warp_barrier(MK_SITE)

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... args) {
  auto call = [&]() { kernel(Expected(args)...); };
  using Call = decltype(call);
  return emulation::run(*config, [](void* f) { (*static_cast<Call*>(f))(); }, &call);
}
