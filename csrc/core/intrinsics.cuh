// Wrappers of all GPU instructions beyond standard C++. Tests that run the kernels on a CPU replace only this header
// (tests/cuda/emulation/intrinsics.h).
#pragma once
#include <stdint.h>

#include "portable.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "metakern's CUDA kernels need compute capability 8.0 or newer: asynchronous copies, minimum with NaN"
#endif

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace metakern {
inline namespace MK_CAPABILITY {

// The launch's dynamic shared memory.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// 2^x, relative error at most 2^-22; results below 2^-126 are 0. A host function only because its callers are compiled
// for the host too; it is never run there.
MK_INLINE float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __builtin_exp2f(x);
#endif
}

// 1 / x, relative error at most 2^-23; 0 for |x| > 2^126.
MK_INLINE float reciprocal_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// Minimum, NaN if either is NaN.
MK_INLINE float min_or_nan(float x, float y) {
#if defined(__CUDA_ARCH__)
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return y < x ? y : x;
#endif
}

// Asynchronous copy of 16 bytes from global to shared memory; both addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all of this thread's groups of copies but the latest `Pending` are complete.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Prefetches a line of global memory into the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Stores of 16 and 8 bytes to global memory by one instruction; the compiler would split the store of a float4.
__device__ __forceinline__ void store_global(void* p, const uint4& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_global(void* p, const uint2& x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y) : "memory");
}

// The value of the lane whose number differs in the bits of `mask`. All lanes of the warp must call it.
template <class S>
__device__ __forceinline__ S from_lane_xor(S x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// Products that the compiler does not contract with a sum to an FMA.
__device__ __forceinline__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double rounded_product(double x, double y) { return __dmul_rn(x, y); }

// x in the low half, y in the high one, rounded to nearest even.
__device__ __forceinline__ uint32_t pack_bfloat16(float x, float y) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
  return bits;
}
// Rounds to TF32's 10 fraction bits, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// d[16, 8] += a[16, 8] b[8, 8]. With g = lane / 4 and t = lane % 4 a thread holds
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b: (t, g), (t + 4, g);
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d[16, 8] += a[16, 16] b[16, 8]; d as above, each register of a and b two neighbours in k, the first in the low half:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8);  b: (2t, g), (2t + 8, g)
__device__ __forceinline__ void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
#else
#include <cuda_runtime.h>

#include "intrinsics.h"
#endif
