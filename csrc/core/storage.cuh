// Loads and stores of four neighbouring coordinates, with conversion between memory's and the arithmetic's dtype; warp
// sums.
#pragma once
#include "dtypes.h"
#include "half_precision.h"
#include "intrinsics.cuh"

namespace metakern {
inline namespace MK_CAPABILITY {

constexpr int warp_lanes = 32;

// Sum over a warp. All lanes must call it, and get the same bits.
template <class S>
__device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int mask = warp_lanes / 2; mask > 0; mask /= 2) x += from_lane_xor(x, mask);
  return x;
}

// Elements in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct Vec4 {
  S v[4];
  __device__ __forceinline__ S& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const S& operator[](int i) const { return v[i]; }
};

// p is aligned to 16 bytes, or to four elements where those are less.
__device__ __forceinline__ Vec4<float> load4(const float* p) {
  const float4 x = *reinterpret_cast<const float4*>(p);
  return {{x.x, x.y, x.z, x.w}};
}
__device__ __forceinline__ Vec4<double> load4(const double* p) {
  const double2 x = reinterpret_cast<const double2*>(p)[0], y = reinterpret_cast<const double2*>(p)[1];
  return {{x.x, x.y, y.x, y.y}};
}
__device__ __forceinline__ Vec4<float> load4(const BFloat16* p) {
  const uint2 x = *reinterpret_cast<const uint2*>(p);
  return {{bit_copy<float>(x.x << 16), bit_copy<float>(x.x & 0xffff0000u), bit_copy<float>(x.y << 16),
           bit_copy<float>(x.y & 0xffff0000u)}};
}
__device__ __forceinline__ Vec4<float> load4(const Float16* p) {
  const uint2 x = *reinterpret_cast<const uint2*>(p);
  return {{from_float16(uint16_t(x.x)), from_float16(uint16_t(x.x >> 16)), from_float16(uint16_t(x.y)),
           from_float16(uint16_t(x.y >> 16))}};
}

__device__ __forceinline__ void store4(float* p, const Vec4<float>& x) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store4(double* p, const Vec4<double>& x) {
  reinterpret_cast<double2*>(p)[0] = make_double2(x[0], x[1]);
  reinterpret_cast<double2*>(p)[1] = make_double2(x[2], x[3]);
}

// To global memory, by one instruction.
__device__ __forceinline__ void store4_global(float* p, const Vec4<float>& x) {
  store_global(p, make_uint4(bit_copy<uint32_t>(x[0]), bit_copy<uint32_t>(x[1]), bit_copy<uint32_t>(x[2]),
                             bit_copy<uint32_t>(x[3])));
}
__device__ __forceinline__ void store4_global(double* p, const Vec4<double>& x) { store4(p, x); }
__device__ __forceinline__ void store4_global(BFloat16* p, const Vec4<float>& x) {
  store_global(p, make_uint2(pack_bfloat16(x[0], x[1]), pack_bfloat16(x[2], x[3])));
}
__device__ __forceinline__ void store4_global(Float16* p, const Vec4<float>& x) {
  const auto pair = [](float low, float high) { return to_float16(low) | uint32_t(to_float16(high)) << 16; };
  store_global(p, make_uint2(pair(x[0], x[1]), pair(x[2], x[3])));
}

// Two neighbours, as the tensor cores' fragments hold them.
__device__ __forceinline__ void store2(float* p, float x, float y) {
  *reinterpret_cast<float2*>(p) = make_float2(x, y);
}
__device__ __forceinline__ void store2_global(float* p, float x, float y) {
  store_global(p, make_uint2(bit_copy<uint32_t>(x), bit_copy<uint32_t>(y)));
}
__device__ __forceinline__ void store2_global(BFloat16* p, float x, float y) {
  *reinterpret_cast<uint32_t*>(p) = pack_bfloat16(x, y);
}

__device__ __forceinline__ float load1(const float* p) { return *p; }
__device__ __forceinline__ float load1(const BFloat16* p) { return from_bfloat16(p->bits); }

// Element i of params, grads or their gradients.
template <class S>
__device__ __forceinline__ S read_lane(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float64: return S(static_cast<const double*>(data)[i]);
    case DType::float32: return S(static_cast<const float*>(data)[i]);
    case DType::bfloat16: return S(from_bfloat16(static_cast<const uint16_t*>(data)[i]));
    default: return S(from_float16(static_cast<const uint16_t*>(data)[i]));
  }
}
template <class S>
__device__ __forceinline__ void write_lane(void* data, DType dtype, int64_t i, S x) {
  switch (dtype) {
    case DType::float64: static_cast<double*>(data)[i] = double(x); break;
    case DType::float32: static_cast<float*>(data)[i] = float(x); break;
    case DType::bfloat16: static_cast<uint16_t*>(data)[i] = to_bfloat16(float(x)); break;
    default: static_cast<uint16_t*>(data)[i] = to_float16(float(x)); break;
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
