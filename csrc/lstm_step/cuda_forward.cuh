// lstm_step's forward kernel: a warp takes a tile of 32 coordinates through all layers.
//
// The state passes through a ring of two buffers of one layer each, filled by asynchronous copies while the layer
// before is computed: it is read once and, from registers, written once. How a layer's products are computed is the
// `Units` parameter: FmaUnits here, MmaUnits (tensor cores) in cuda_forward_mma.cuh.
#pragma once
#include "cuda_stages.cuh"

namespace metakern {
inline namespace MK_CAPABILITY {

template <class Stages>
struct ForwardArguments {
  LstmStepProblem problem;
  CudaLstmStepForward pointers;
  Stages stages;
  bool pack_weights;  // else they are read from the tensors
};

// One layer of one tile. x and h hold rows of a row's stride, the new state rows of tile_lanes.
template <class Units>
struct LayerIO {
  const typename Units::Scalar* x;  // [inputs]
  const typename Units::Store* h;   // [H]
  const typename Units::Store* c;   // [H]
  typename Units::Scalar* new_x;    // [H], may be x where a pass computes all units
  typename Units::Store* new_h;     // [H]
  typename Units::Store* new_c;     // [H]
};

// Products by fused multiply-adds: a thread has J units of 4 coordinates.
template <class StagesType, class StoreType, int FixedH>
struct FmaUnits {
  using Stages = StagesType;
  using Scalar = stage_scalar<Stages>;
  using S = Scalar;
  using Store = StoreType;
  using Size = Sizes<Stages, FixedH>;
  static constexpr int fixed_hidden = FixedH;
  static constexpr int max_warps = sizeof(S) == 8 ? 8
                                   : FixedH == 32 ? 8
                                                  : 12;  // limited by registers and shared memory
  static constexpr int x_stride = tile_lanes;
  static constexpr int state_stride = tile_lanes;
  static constexpr bool single_pass = Size::single_pass;

  Weights<S, Size> weights;
  static MK_INLINE int packed_bytes(int hidden, int layers) {
    return Size{hidden}.packed_elements(layers) * int(sizeof(S));
  }
  __device__ __forceinline__ FmaUnits(const ForwardArguments<Stages>& a, char* memory)
      : weights{{a.problem.hidden_size},
                FixedH > 0 || a.pack_weights ? reinterpret_cast<S*>(memory) : nullptr,
                a.pointers.weights,
                a.problem.num_layers,
                a.problem.stages.inputs} {}
  __device__ __forceinline__ void pack() {
    if (weights.packed != nullptr) weights.pack(const_cast<S*>(weights.packed));
  }
  __device__ __forceinline__ const Weights<S, Size>& tensors() const { return weights; }
  __device__ __forceinline__ S head(int output, int unit) const { return weights.head(output, unit); }
  __device__ __forceinline__ S head_bias(int output) const { return weights.head_bias(output); }

  __device__ __forceinline__ void layer(int l, const LayerIO<FmaUnits>& io) const {
    constexpr int J = Size::J;
    const auto w = weights.layer(l);
    const int lane = threadIdx.x % warp_lanes, first = lane % 8 * 4;
    for (int unit = lane / 8; unit < weights.sizes.padded(); unit += Size::pass_units) {
      S acc[J][4][4];
      preactivations(acc, w, unit, io.x + first, x_stride, io.h + first, state_stride);
      if (single_pass) __syncwarp();  // new_x may be x
#pragma unroll
      for (int j = 0; j < J; ++j)
        if (Size::exact || unit + j * unit_groups < weights.sizes.hidden())
          finish_unit(acc[j], io, unit + j * unit_groups, first);
    }
  }

  __device__ __forceinline__ void finish_unit(const S (&acc)[4][4], const LayerIO<FmaUnits>& io, int unit,
                                              int first) const {
    const Vec4<S> c = load4(io.c + unit * state_stride + first);
    Vec4<S> new_h, new_c;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const auto out = lstm_unit<S>({acc[0][q], acc[1][q], acc[2][q], acc[3][q]}, c[q]);
      new_h[q] = out.h;
      new_c[q] = out.c;
    }
    store4(io.new_x + unit * x_stride + first, new_h);
    store4_global(io.new_h + unit * tile_lanes + first, new_h);
    store4_global(io.new_c + unit * tile_lanes + first, new_c);
  }
};

// Shared memory of one warp.
template <class Units>
struct WarpMemory {
  using S = typename Units::Scalar;
  using Store = typename Units::Store;
  static constexpr int x_buffers = Units::single_pass ? 1 : 2;

  Store* state;  // [2][2 (h, c)][H][state_stride]
  S* x;          // [x_buffers][max(H, feature_rows)][x_stride]
  int hidden, x_rows;

  static MK_INLINE int rows_of_x(int hidden) {
    return hidden < Units::Size::feature_rows ? Units::Size::feature_rows : hidden;
  }
  static MK_INLINE int bytes(int hidden) {
    return 4 * hidden * Units::state_stride * int(sizeof(Store)) +
           x_buffers * rows_of_x(hidden) * Units::x_stride * int(sizeof(S));
  }
  __device__ __forceinline__ WarpMemory(char* memory, int H)
      : state(reinterpret_cast<Store*>(memory)),
        x(reinterpret_cast<S*>(memory + 4 * H * Units::state_stride * int(sizeof(Store)))),
        hidden(H),
        x_rows(rows_of_x(H)) {}
  __device__ __forceinline__ Store* state_buffer(int i) const { return state + i * 2 * hidden * Units::state_stride; }
  __device__ __forceinline__ S* x_buffer(int i) const { return x_buffers == 1 ? x : x + i * x_rows * Units::x_stride; }

  // h and c of a layer into a buffer. One group of copies, empty where there is no more layer.
  __device__ __forceinline__ void prefetch(const Store* from, int buffer) const {
    constexpr int elements = 16 / int(sizeof(Store)), row_chunks = tile_lanes / elements;
    if (from != nullptr) {
      const int lane = threadIdx.x % warp_lanes, column = lane % row_chunks * elements;
      Store* to = state_buffer(buffer) + column;
      const int rows = 2 * (Units::fixed_hidden > 0 ? Units::fixed_hidden : hidden);
#pragma unroll
      for (int row = lane / row_chunks; row < rows; row += warp_lanes / row_chunks)
        copy_async_16(to + row * Units::state_stride, from + row * tile_lanes + column);
    }
    copy_async_commit();
  }
};

// The gradient and parameter of this thread's coordinate of a tile.
template <class S>
struct Coordinate {
  S param, grad;

  template <class Stages>
  __device__ __forceinline__ static Coordinate read(const ForwardArguments<Stages>& a, int64_t tile) {
    const int64_t i = tile * tile_lanes + threadIdx.x % warp_lanes;
    if (i >= a.problem.num_coordinates) return {S(0), S(0)};
    return {read_lane<S>(a.pointers.params, a.problem.dtype, i), read_lane<S>(a.pointers.grads, a.problem.dtype, i)};
  }
};

// Writes zeros after the last coordinate. The warp must have synchronised since it wrote there.
template <class Store>
__device__ __forceinline__ void clear_lane(Store* rows, int count) {
  for (int i = 0; i < count; ++i) rows[i * tile_lanes] = Store{};
}

// The features of this thread's coordinate, as a column of x; writes their new state.
template <class Units, class S>
__device__ __forceinline__ void write_features(const ForwardArguments<typename Units::Stages>& a, const Units& units,
                                               const StageLane& at, S grad, S* x) {
  using Part = FeaturesPart<typename Units::Stages>;
  const Part part(at, a.pointers.stages, units.tensors());
  S rows[Part::Features::max_inputs], new_state[at_least_one(Part::states)];
  a.stages.features.template forward<S>(grad, part.state, part.input, part.weights, rows, new_state);
#pragma unroll
  for (int k = 0; k < Part::Features::max_inputs; ++k) x[k * Units::x_stride] = rows[k];
  Part::write_states(at, new_state, a.pointers.new_stage_state);
}

// The new parameter of this thread's coordinate, from its column of the top layer's h; writes the head's new state.
template <class Units, class S>
__device__ __forceinline__ S apply_head(const ForwardArguments<typename Units::Stages>& a, const Units& units,
                                        const StageLane& at, const Coordinate<S>& now, int H, const S* h) {
  using Part = HeadPart<typename Units::Stages>;
  constexpr int R = Part::Head::outputs;
  S o[R], new_state[at_least_one(Part::states)];
#pragma unroll
  for (int r = 0; r < R; ++r) o[r] = units.head_bias(r);
  for (int j = 0; j < H; ++j)
#pragma unroll
    for (int r = 0; r < R; ++r) o[r] += h[j * Units::x_stride] * units.head(r, j);
  const Part part(at, a.pointers.stages, units.tensors());
  const S param =
      a.stages.head.template forward<S>(o, now.param, now.grad, part.state, part.input, part.weights, new_state);
  Part::write_states(at, new_state, a.pointers.new_stage_state);
  return param;
}

template <class Units>
__global__ void __launch_bounds__(Units::max_warps* warp_lanes, 1)
    forward_kernel(const __grid_constant__ ForwardArguments<typename Units::Stages> a) {
  using S = typename Units::Scalar;
  using Store = typename Units::Store;
  const LstmStepProblem& p = a.problem;
  const int H = Units::fixed_hidden > 0 ? Units::fixed_hidden : p.hidden_size, L = p.num_layers;
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes;
  Units units(a, dynamic_shared());
  const int packed_bytes = Units::fixed_hidden > 0 || a.pack_weights ? Units::packed_bytes(H, L) : 0;
  const WarpMemory<Units> memory(dynamic_shared() + packed_bytes + warp * WarpMemory<Units>::bytes(H), H);
  const Store* state = static_cast<const Store*>(a.pointers.state);
  Store* new_state = static_cast<Store*>(a.pointers.new_state);
  const int64_t tiles = p.num_tiles(), tile_state = int64_t(L) * 2 * H * tile_lanes;
  const int layer_state = 2 * H * tile_lanes;

  // Neighbouring tiles go to different blocks: few tiles spread over all multiprocessors.
  int64_t tile = int64_t(warp) * gridDim.x + blockIdx.x;
  const int64_t step = int64_t(gridDim.x) * (blockDim.x / warp_lanes);
  memory.prefetch(tile < tiles ? state + tile * tile_state : nullptr, 0);
  auto next = Coordinate<S>::read(a, tile);
  units.pack();
  __syncthreads();

  for (int state_buffer = 0; tile < tiles; tile += step) {
    const auto now = next;
    next = Coordinate<S>::read(a, tile + step);
    const StageLane at(p, tile);
    write_features(a, units, at, now.grad, memory.x_buffer(0) + lane);
    const int64_t left = p.num_coordinates - tile * tile_lanes;
#pragma unroll 1
    for (int l = 0; l < L; ++l, state_buffer ^= 1) {
      const Store* after = l + 1 < L             ? state + tile * tile_state + (l + 1) * layer_state
                           : tile + step < tiles ? state + (tile + step) * tile_state
                                                 : nullptr;
      memory.prefetch(after, state_buffer ^ 1);
      copy_async_wait<1>();  // of this layer's state
      __syncwarp();          // every lane's copies and x have landed
      const Store* h = memory.state_buffer(state_buffer);
      Store* new_h = new_state + tile * tile_state + l * layer_state;
      units.layer(l, {memory.x_buffer(l & 1), h, h + H * Units::state_stride, memory.x_buffer((l & 1) ^ 1), new_h,
                      new_h + H * tile_lanes});
      __syncwarp();  // x is complete, the state's buffer may be filled again
    }
    const S* x = memory.x_buffer(L & 1) + lane;  // a column of this thread's own, where its next features go too
    const S param = apply_head(a, units, at, now, H, x);
    if (lane >= left)
      clear_lane(new_state + tile * tile_state + lane, L * 2 * H);
    else
      write_lane<S>(a.pointers.new_params, p.dtype, tile * tile_lanes + lane, param);
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
