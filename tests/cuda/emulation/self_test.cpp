// Kernels that are wrong in one way each, and right ones, to test the emulation itself (tests/cuda/test_emulation.py).
#define MK_CAPABILITY cuda
#include "../../../csrc/core/intrinsics.cuh"

namespace {

using namespace metakern;

struct Arguments {
  const float* in;
  float* out;
};

float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }

// Reverses the block's numbers by way of shared memory.
template <bool Barrier>
__global__ void reverse(Arguments a) {
  const int n = int(blockDim.x), i = int(threadIdx.x);
  shared_floats()[i] = a.in[blockIdx.x * n + i];
  if (Barrier) __syncthreads();
  a.out[blockIdx.x * n + i] = shared_floats()[n - 1 - i];
}

// The same within each warp.
template <bool Barrier>
__global__ void reverse_warps(Arguments a) {
  const int i = int(threadIdx.x), from = i / 32 * 32 + 31 - i % 32;
  shared_floats()[i] = a.in[i];
  if (Barrier) __syncwarp();
  a.out[i] = shared_floats()[from];
}

// The second round writes what the first may not have read yet.
template <bool Barrier>
__global__ void reuse(Arguments a) {
  const int n = int(blockDim.x), i = int(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    shared_floats()[i] = a.in[i] + float(round);
    __syncthreads();
    a.out[round * n + i] = shared_floats()[(i + 40) % n];
    if (Barrier) __syncthreads();
  }
}

__global__ void different_barriers(Arguments) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void some_at_no_barrier(Arguments) {
  if (threadIdx.x != 5) __syncthreads();
}
__global__ void half_a_warp(Arguments) {
  if (threadIdx.x % 32 < 16) __syncwarp();
}
__global__ void warp_and_block_barrier(Arguments) {
  if (threadIdx.x == 3) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}
__global__ void behind_the_end(Arguments) { shared_floats()[blockDim.x + threadIdx.x] = 1; }
__global__ void before_the_start(Arguments) { shared_floats()[-1] = 1; }
__global__ void read_before_written(Arguments a) { a.out[threadIdx.x] = shared_floats()[threadIdx.x]; }

// Each thread copies four numbers to shared memory and back.
template <bool Wait>
__global__ void copy(Arguments a) {
  const int i = 4 * int(threadIdx.x);
  copy_async_16(shared_floats() + i, a.in + i);
  copy_async_commit();
  if (Wait) copy_async_wait<0>();
  for (int k = 0; k < 4; ++k) a.out[i + k] = shared_floats()[i + k];
}
__global__ void misaligned_copy(Arguments a) {
  copy_async_16(shared_floats() + 4 * threadIdx.x, a.in + 4 * threadIdx.x + 1);
}
// The second copy overwrites what is read after it was issued, before it is waited for.
__global__ void copy_too_early(Arguments a) {
  const int i = 4 * int(threadIdx.x);
  copy_async_16(shared_floats() + i, a.in + i);
  copy_async_commit();
  copy_async_wait<0>();
  copy_async_16(shared_floats() + i, a.in + 4 * int(blockDim.x) + i);
  copy_async_commit();
  for (int k = 0; k < 4; ++k) a.out[i + k] = shared_floats()[i + k];
  copy_async_wait<0>();
}

// out[16, 8] = in[16, depth] in'[depth, 8] with in' behind in, by one warp.
__global__ void product_tf32(Arguments a) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  const float *x = a.in, *y = a.in + 16 * 8;
  const uint32_t rows[4] = {to_tf32(x[g * 8 + t]), to_tf32(x[(g + 8) * 8 + t]), to_tf32(x[g * 8 + t + 4]),
                            to_tf32(x[(g + 8) * 8 + t + 4])};
  const uint32_t columns[2] = {to_tf32(y[t * 8 + g]), to_tf32(y[(t + 4) * 8 + g])};
  float d[4] = {};
  mma_tf32(d, rows, columns);
  for (int i = 0; i < 4; ++i) a.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
__global__ void product_bfloat16(Arguments a) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  const float *x = a.in, *y = a.in + 16 * 16;
  const auto pair = [&](int row, int k) { return pack_bfloat16(x[row * 16 + k], x[row * 16 + k + 1]); };
  const auto column = [&](int k) { return pack_bfloat16(y[k * 8 + g], y[(k + 1) * 8 + g]); };
  const uint32_t rows[4] = {pair(g, 2 * t), pair(g + 8, 2 * t), pair(g, 2 * t + 8), pair(g + 8, 2 * t + 8)};
  const uint32_t columns[2] = {column(2 * t), column(2 * t + 8)};
  float d[4] = {};
  mma_bfloat16(d, rows, columns);
  for (int i = 0; i < 4; ++i) a.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
// Each lane adds what the others of its warp gave, in steps that double.
__global__ void warp_sums(Arguments a) {
  double x = a.in[threadIdx.x];
  for (int mask = 16; mask > 0; mask /= 2) x += from_lane_xor(x, mask);
  a.out[threadIdx.x] = float(x);
}
__global__ void approximations(Arguments a) {
  const int i = int(threadIdx.x), n = int(blockDim.x);
  a.out[i] = exp2_approx(a.in[i]);
  a.out[n + i] = reciprocal_approx(a.in[i]);
  a.out[2 * n + i] = min_or_nan(a.in[i], 1.0f);
}

struct Entry {
  const char* name;
  void (*kernel)(Arguments);
};
const Entry kernels[] = {{"reverse", reverse<true>},
                         {"reverse without a barrier", reverse<false>},
                         {"reverse warps", reverse_warps<true>},
                         {"reverse warps without a barrier", reverse_warps<false>},
                         {"reuse", reuse<true>},
                         {"reuse without a barrier", reuse<false>},
                         {"different barriers", different_barriers},
                         {"some at no barrier", some_at_no_barrier},
                         {"half a warp", half_a_warp},
                         {"warp and block barrier", warp_and_block_barrier},
                         {"behind the end", behind_the_end},
                         {"before the start", before_the_start},
                         {"read before written", read_before_written},
                         {"copy", copy<true>},
                         {"copy without a wait", copy<false>},
                         {"misaligned copy", misaligned_copy},
                         {"copy too early", copy_too_early},
                         {"product in TF32", product_tf32},
                         {"product in bfloat16", product_bfloat16},
                         {"warp sums", warp_sums},
                         {"approximations", approximations}};

}  // namespace

extern "C" {

// -1 for a name that is not known.
int run_kernel(const char* name, int blocks, int threads, int shared_bytes, const float* in, float* out) {
  for (const Entry& entry : kernels) {
    if (std::string(entry.name) != name) continue;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    return cudaLaunchKernelEx(&config, entry.kernel, Arguments{in, out});
  }
  return -1;
}

}  // extern "C"
