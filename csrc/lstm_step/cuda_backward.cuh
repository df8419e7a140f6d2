// lstm_step's backward kernels.
//
// A warp takes a tile: it recomputes the hidden states of all layers but the top one (that one too if the head's
// backward reads the cells' outputs), then goes down from there. A layer's activations are recomputed in registers and
// become the gradients of its pre-activations, which go to shared memory; transposed products make of them the
// gradients of the layer's inputs and of the old h. Then all threads of the block add up the outer products over the
// block's tiles: those are the weight gradients.
//
// These sums have a fixed order. The tiles are split into chunks, whose number depends on the problem alone; a block
// sums one chunk after another in double precision in the chunk's own memory, and a second kernel sums the chunks. The
// number of tiles added before a sum is converted to double depends on the device's shared memory.
#pragma once
#include "cuda_reduce.cuh"
#include "cuda_stages.cuh"

namespace metakern {
inline namespace MK_CAPABILITY {

constexpr int max_backward_warps = 8;  // 255 registers a thread

constexpr int64_t cache_line = 128;

// Enough chunks for several per multiprocessor, unless their partial sums would take too much memory. A chunk is large
// enough for all warps of a block, unless there would be too few chunks for all multiprocessors.
constexpr int64_t max_chunks = 512, few_chunks = 128, max_partial_bytes = int64_t(128) << 20;
constexpr int small_chunk_tiles = 4;

inline int64_t chunk_tiles(const LstmStepProblem& p) {
  if (p.num_tiles() <= few_chunks * small_chunk_tiles) return small_chunk_tiles;
  const int64_t affordable = max_partial_bytes / (p.flat_weights() * int64_t(sizeof(double)));
  const int64_t chunks = affordable < max_chunks ? affordable : max_chunks;
  const int64_t tiles = (p.num_tiles() + chunks - 1) / chunks;
  return (tiles + max_backward_warps - 1) / max_backward_warps * max_backward_warps;
}
inline int64_t num_chunks(const LstmStepProblem& p) { return (p.num_tiles() + chunk_tiles(p) - 1) / chunk_tiles(p); }

template <class Stages>
struct BackwardArguments {
  LstmStepProblem problem;
  CudaLstmStepBackward pointers;
  Stages stages;
  int64_t chunk_tiles, chunks;
  bool pack_weights;
};

// Shared memory of one warp, in rows of 32 coordinates. 16 bytes of padding spread the rows over the banks.
template <class Stages>
struct TileMemory {
  using S = stage_scalar<Stages>;
  static constexpr int stride = tile_lanes + 16 / int(sizeof(S));
  static constexpr int feature_rows = Sizes<Stages, 0>::feature_rows, outputs = Stages::Head::outputs;
  static constexpr int grad_rows = Stages::Head::additive ? 0 : 1, own_weights = Stages::weights;
  static constexpr int stage_rows = feature_rows + outputs + grad_rows + own_weights;

  S* base;
  int hidden_size, layers;

  static MK_INLINE int input_rows(int hidden) { return hidden < feature_rows ? feature_rows : hidden; }
  static MK_INLINE int rows(int hidden, int layers) {
    return stage_rows + layers * hidden + hidden + input_rows(hidden) + 4 * hidden;
  }
  static MK_INLINE int bytes(int hidden, int layers) { return rows(hidden, layers) * stride * int(sizeof(S)); }
  MK_INLINE int elements() const { return rows(hidden_size, layers) * stride; }

  MK_INLINE S* row(int i) const { return base + i * stride; }
  MK_INLINE S* features() const { return base; }
  MK_INLINE S* grad_out() const { return row(feature_rows); }             // [R], of the head's outputs
  MK_INLINE S* grad_grad() const { return row(feature_rows + outputs); }  // a head's gradient of g, unless additive
  MK_INLINE S* grad_own(int weight) const { return row(stage_rows - own_weights + weight); }  // a coordinate's share
  MK_INLINE S* hidden(int layer) const { return row(stage_rows + layer * hidden_size); }      // [H], h'
  MK_INLINE S* old_h() const { return hidden(layers); }                                       // [H], of one layer
  MK_INLINE S* grad_x() const { return old_h() + hidden_size * stride; }                      // [H or features]
  MK_INLINE S* grad_gates() const { return grad_x() + input_rows(hidden_size) * stride; }     // [4][H]
  MK_INLINE S* input(int layer) const { return layer == 0 ? features() : hidden(layer - 1); }
};

// One tile, by one warp.
template <class Stages, class Store, int FixedH>
struct TileBackward {
  using S = stage_scalar<Stages>;
  using Size = Sizes<Stages, FixedH>;
  using Memory = TileMemory<Stages>;
  using Features = typename Stages::Features;
  using Head = typename Stages::Head;
  static constexpr int J = Size::J, stride = Memory::stride;

  const BackwardArguments<Stages>& a;
  const Weights<S, Size>& weights;
  Memory memory;
  int64_t tile;
  int lane, first, used;  // first: this thread's first coordinate of four

  __device__ __forceinline__ TileBackward(const BackwardArguments<Stages>& args, const Weights<S, Size>& w,
                                          const Memory& m, int64_t t)
      : a(args), weights(w), memory(m), tile(t), lane(threadIdx.x % warp_lanes), first(lane % 8 * 4) {
    const int64_t left = args.problem.num_coordinates - t * tile_lanes;
    used = left < tile_lanes ? int(left) : tile_lanes;
  }
  __device__ __forceinline__ int H() const { return weights.sizes.hidden(); }
  // This thread's coordinates of row `unit` of h (kind 0) or c (kind 1) of a state-shaped array.
  __device__ __forceinline__ int64_t at(int layer, int kind, int unit) const {
    return ((tile * weights.layers + layer) * 2 + kind) * H() * tile_lanes + unit * tile_lanes + first;
  }
  // Reads zero after the last coordinate, whatever is stored there.
  __device__ __forceinline__ Vec4<S> read(const void* data, int64_t i) const {
    Vec4<S> x = load4(static_cast<const Store*>(data) + i);
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = first + q < used ? x[q] : S(0);
    return x;
  }

  __device__ void stage_old_h(int layer) const {
    for (int unit = lane / 8; unit < H(); unit += unit_groups)
      store4(memory.old_h() + unit * stride + first, read(a.pointers.state, at(layer, 0, unit)));
    __syncwarp();
  }

  // Prefetches the state of this warp's next tile.
  __device__ void prefetch(int64_t next) const {
    const int64_t bytes = int64_t(weights.layers) * 2 * H() * tile_lanes * int64_t(sizeof(Store));
    for (int64_t i = lane * cache_line; i < bytes; i += warp_lanes * cache_line) {
      prefetch_l2(static_cast<const char*>(a.pointers.state) + next * bytes + i);
      prefetch_l2(static_cast<const char*>(a.pointers.grad_new_state) + next * bytes + i);
    }
  }

  // The features and h' of all layers below the top one, or of all; then the gradients of the head.
  __device__ void recompute() const {
    features_forward();
    if constexpr (!Head::reads_outputs) head_backward();
#pragma unroll 1
    for (int l = 0; l + (Head::reads_outputs ? 0 : 1) < weights.layers; ++l) {
      stage_old_h(l);
      each_unit(weights.layer(l), l, [&](const S(&acc)[4][4], int unit) { recompute_unit(acc, l, unit); });
      __syncwarp();
    }
    if constexpr (Head::reads_outputs) head_backward();
  }
  __device__ void features_forward() const {
    using Part = FeaturesPart<Stages>;
    const Part part(StageLane(a.problem, tile), a.pointers.stages, weights);
    S x[Features::max_inputs], new_state[at_least_one(Part::states)];
    a.stages.features.template forward<S>(grad(), part.state, part.input, part.weights, x, new_state);
#pragma unroll
    for (int k = 0; k < Features::max_inputs; ++k) memory.features()[k * stride + lane] = x[k];
  }
  // The head's outputs for this thread's coordinate, from the top layer's h'.
  __device__ __forceinline__ void head_outputs(S (&o)[Head::outputs]) const {
    const S* h = memory.hidden(weights.layers - 1) + lane;
    for (int r = 0; r < Head::outputs; ++r) o[r] = weights.head_bias(r);
    for (int j = 0; j < H(); ++j)
      for (int r = 0; r < Head::outputs; ++r) o[r] += h[j * stride] * weights.head(r, j);
  }
  __device__ void head_backward() const {
    using Part = HeadPart<Stages>;
    const StageLane at(a.problem, tile);
    const Part part(at, a.pointers.stages, weights);
    S o[Head::outputs] = {}, grad_new_state[at_least_one(Part::states)];
    if constexpr (Head::reads_outputs) head_outputs(o);
    at.template read_states<Part::states, Stages::states>(a.pointers.grad_new_stage_state, Part::first_state,
                                                          grad_new_state);
    const S param = Head::additive ? S(0) : value(a.pointers.params), grad_g = Head::additive ? S(0) : grad();
    HeadGradient<S, Head> out;
    a.stages.head.template backward<S>(o, param, grad_g, part.state, part.input, part.weights,
                                       value(a.pointers.grad_new_params), grad_new_state, &out);
#pragma unroll
    for (int r = 0; r < Head::outputs; ++r) memory.grad_out()[r * stride + lane] = out.outputs[r];
#pragma unroll
    for (int i = 0; i < Head::weights; ++i) memory.grad_own(Features::weights + i)[lane] = out.weights[i];
    Part::write_states(at, out.states, a.pointers.grad_stage_state);
    Part::write_inputs(at, out.coordinate_inputs, a.pointers.grad_inputs);
    if constexpr (!Head::additive) {
      memory.grad_grad()[lane] = out.grad;
      if (lane < used) write_lane<S>(a.pointers.grad_params, a.problem.dtype, tile * tile_lanes + lane, out.param);
    }
  }
  // use(pre-activations [gate][coordinate], unit) for this thread's units of a layer whose old h is staged.
  template <class Layer, class Use>
  __device__ __forceinline__ void each_unit(const Layer& w, int l, Use use) const {
    for (int unit = lane / 8; unit < weights.sizes.padded(); unit += Size::pass_units) {
      S acc[J][4][4];
      preactivations(acc, w, unit, memory.input(l) + first, stride, memory.old_h() + first, stride);
#pragma unroll
      for (int j = 0; j < J; ++j)
        if (Size::exact || unit + j * unit_groups < H()) use(acc[j], unit + j * unit_groups);
    }
  }
  // This thread's coordinate of an array [N]; zero after the last one.
  __device__ __forceinline__ S value(const void* data) const {
    return lane < used ? read_lane<S>(data, a.problem.dtype, tile * tile_lanes + lane) : S(0);
  }
  __device__ __forceinline__ S grad() const { return value(a.pointers.grads); }
  __device__ __forceinline__ void recompute_unit(const S (&acc)[4][4], int layer, int unit) const {
    const Vec4<S> c = read(a.pointers.state, at(layer, 1, unit));
    Vec4<S> h;
#pragma unroll
    for (int q = 0; q < 4; ++q) h[q] = lstm_unit<S>({acc[0][q], acc[1][q], acc[2][q], acc[3][q]}, c[q]).h;
    store4(memory.hidden(layer) + unit * stride + first, h);
  }

  // One layer, given the gradient of its h' in grad_x (the top layer's: grad_out).
  __device__ void layer(int l) const {
    stage_old_h(l);
    const auto w = weights.layer(l);
    each_unit(w, l, [&](const S(&acc)[4][4], int unit) { unit_backward(acc, l, unit); });
    __syncwarp();
    for (int unit = lane / 8; unit < weights.sizes.padded(); unit += Size::pass_units) {
      if (l == 0)
        transposed_products<false>(w, unit, l);
      else
        transposed_products<true>(w, unit, l);
    }
    if (l == 0) feature_gradients(w);
  }

  // Not masked: results after the last coordinate are dropped.
  __device__ __forceinline__ Vec4<S> grad_new_state(int l, int kind, int unit) const {
    return load4(static_cast<const Store*>(a.pointers.grad_new_state) + at(l, kind, unit));
  }

  __device__ __forceinline__ void unit_backward(const S (&acc)[4][4], int l, int unit) const {
    const bool top = l + 1 == weights.layers;
    const Vec4<S> c = read(a.pointers.state, at(l, 1, unit));
    const Vec4<S> grad_h = grad_new_state(l, 0, unit), grad_c = grad_new_state(l, 1, unit);
    const Vec4<S> above = load4((top ? memory.grad_out() : memory.grad_x() + unit * stride) + first);
    const S factor = top ? weights.head(0, unit) : S(1);
    Vec4<S> reaching;
#pragma unroll
    for (int q = 0; q < 4; ++q) reaching[q] = grad_h[q] + above[q] * factor;
#pragma unroll
    for (int r = 1; r < Head::outputs; ++r) {
      if (!top) continue;
      const Vec4<S> grad_out = load4(memory.grad_out() + r * stride + first);
      const S head = weights.head(r, unit);
#pragma unroll
      for (int q = 0; q < 4; ++q) reaching[q] += grad_out[q] * head;
    }
    Vec4<S> d[4], new_h, grad_old_c;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const auto u = lstm_unit_activations<S>({acc[0][q], acc[1][q], acc[2][q], acc[3][q]}, c[q]);
      const auto g = lstm_unit_backward<S>(u.gates, u.tanh_c, c[q], reaching[q], grad_c[q]);
      const bool real = first + q < used;
      new_h[q] = u.h;
      d[0][q] = real ? g.preactivation.i : S(0);
      d[1][q] = real ? g.preactivation.f : S(0);
      d[2][q] = real ? g.preactivation.g : S(0);
      d[3][q] = real ? g.preactivation.o : S(0);
      grad_old_c[q] = real ? g.c : S(0);
    }
    store4_global(static_cast<Store*>(a.pointers.grad_state) + at(l, 1, unit), grad_old_c);
    if (top && !Head::reads_outputs) store4(memory.hidden(l) + unit * stride + first, new_h);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) store4(memory.grad_gates() + (gate * H() + unit) * stride + first, d[gate]);
  }

  // Gradients of old h and, if WithInputs, of the layer's inputs, for the units of one pass.
  template <bool WithInputs>
  __device__ __forceinline__ void transposed_products(const LayerWeights<S, Size>& w, int first_unit, int l) const {
    S grad_h[J][4] = {}, grad_x[J][4] = {};
    const S* d_row = memory.grad_gates() + first;
#pragma unroll 1
    for (int unit = 0; unit < H(); ++unit, d_row += stride) {
      Vec4<S> d[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) d[gate] = load4(d_row + gate * H() * stride);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const int k = valid_unit(first_unit + j * unit_groups);
        add_gates(grad_h[j], w.at(1 + w.inputs + k, unit), d);
        if (WithInputs) add_gates(grad_x[j], w.at(1 + k, unit), d);
      }
    }
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const int k = first_unit + j * unit_groups;
      if (!Size::exact && k >= H()) continue;
      store4_global(static_cast<Store*>(a.pointers.grad_state) + at(l, 0, k),
                    Vec4<S>{{grad_h[j][0], grad_h[j][1], grad_h[j][2], grad_h[j][3]}});
      if (WithInputs)
        store4(memory.grad_x() + k * stride + first, Vec4<S>{{grad_x[j][0], grad_x[j][1], grad_x[j][2], grad_x[j][3]}});
    }
  }
  // Threads beyond the last unit compute the last one again and drop the result.
  __device__ __forceinline__ int valid_unit(int unit) const { return Size::exact || unit < H() ? unit : H() - 1; }
  __device__ __forceinline__ static void add_gates(S (&sum)[4], const Vec4<S>& w, const Vec4<S> (&d)[4]) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
#pragma unroll
      for (int q = 0; q < 4; ++q) sum[q] += w[gate] * d[gate][q];
  }

  __device__ void feature_gradients(const LayerWeights<S, Size>& w) const {
    feature_products(w);
    __syncwarp();
    using Part = FeaturesPart<Stages>;
    const StageLane at(a.problem, tile);
    const Part part(at, a.pointers.stages, weights);
    S grad_x[Features::max_inputs], grad_new_state[at_least_one(Part::states)];
#pragma unroll
    for (int k = 0; k < Features::max_inputs; ++k) grad_x[k] = memory.grad_x()[k * stride + lane];
    at.template read_states<Part::states, Stages::states>(a.pointers.grad_new_stage_state, Part::first_state,
                                                          grad_new_state);
    FeaturesGradient<S, Features> out;
    a.stages.features.template backward<S>(grad(), part.state, part.input, part.weights, grad_x, grad_new_state, &out);
#pragma unroll
    for (int i = 0; i < Features::weights; ++i) memory.grad_own(i)[lane] = out.weights[i];
    Part::write_states(at, out.states, a.pointers.grad_stage_state);
    Part::write_inputs(at, out.coordinate_inputs, a.pointers.grad_inputs);
    if constexpr (!Head::additive) out.grad += memory.grad_grad()[lane];
    if (lane < used) write_lane<S>(a.pointers.grad_grads, a.problem.dtype, tile * tile_lanes + lane, out.grad);
  }
  // The gradients of the features' rows, into grad_x.
  __device__ __forceinline__ void feature_products(const LayerWeights<S, Size>& w) const {
    constexpr int rows = Size::feature_rows, M = (rows + unit_groups - 1) / unit_groups;
    const int k = lane / 8;
    if (M == 1 && k >= rows) return;
    // Threads beyond the last row compute the last one again.
    const auto row = [&](int m) { return M == 1 || k + m * unit_groups < rows ? k + m * unit_groups : rows - 1; };
    S sum[M][4] = {};
    for (int unit = 0; unit < H(); ++unit) {
      Vec4<S> d[4];
      for (int gate = 0; gate < 4; ++gate) d[gate] = load4(memory.grad_gates() + (gate * H() + unit) * stride + first);
#pragma unroll
      for (int m = 0; m < M; ++m) add_gates(sum[m], w.at(1 + row(m), unit), d);
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
      store4(memory.grad_x() + row(m) * stride + first, Vec4<S>{{sum[m][0], sum[m][1], sum[m][2], sum[m][3]}});
  }
};

// Adds a layer's weight gradients over the block's first `tiles` tiles to `partial`, or sets it. A thread owns patches
// of one unit's four gates and four columns.
template <class Stages, int FixedH>
struct OuterProducts {
  using S = stage_scalar<Stages>;
  static constexpr int stride = TileMemory<Stages>::stride, patch_columns = 4, R = Stages::Head::outputs;

  const LstmStepProblem& p;
  TileMemory<Stages> memory;  // of the first warp
  const S* ones;              // a row
  double* partial;
  int tiles;
  bool set;

  __device__ __forceinline__ int H() const { return FixedH > 0 ? FixedH : p.hidden_size; }
  __device__ void layer(int l) const {
    const int groups = (p.inputs(l) + H() + patch_columns) / patch_columns;
    const int patches = groups * H(), head = l + 1 == p.num_layers ? R * (H() + 1) : 0;
    const int own = l == 0 ? Stages::weights : 0;
    for (int i = threadIdx.x; i < patches + head + own; i += blockDim.x) {
      if (i < patches)
        add_patch(l, i % H(), i / H() * patch_columns);
      else if (own == 0 || i < patches + head)
        add_head(i - patches);
      else
        add_own(i - patches - head);
    }
  }
  __device__ __forceinline__ void write(int64_t i, S sum) const {
    partial[i] = set ? double(sum) : partial[i] + double(sum);
  }

  __device__ __forceinline__ void add_patch(int l, int unit, int column) const {
    const PartialLayer layout(p, l);
    const int inputs = p.inputs(l), elements = memory.elements();
    const S* x[patch_columns];
    int step[patch_columns];
#pragma unroll
    for (int i = 0; i < patch_columns; ++i) {
      const int k = column + i;
      x[i] = k < inputs         ? memory.input(l) + k * stride
             : k < inputs + H() ? memory.old_h() + (k - inputs) * stride
                                : ones;
      step[i] = k < inputs + H() ? elements : 0;
    }
    const S* d = memory.grad_gates() + unit * stride;
    S sum[4][patch_columns] = {};
    for (int t = 0; t < tiles; ++t) {
#pragma unroll 2
      for (int n = 0; n < tile_lanes; n += 4) {
        Vec4<S> rows[4], columns[patch_columns];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) rows[gate] = load4(d + gate * H() * stride + n);
#pragma unroll
        for (int i = 0; i < patch_columns; ++i) columns[i] = load4(x[i] + n);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
#pragma unroll
          for (int i = 0; i < patch_columns; ++i)
#pragma unroll
            for (int q = 0; q < 4; ++q) sum[gate][i] += rows[gate][q] * columns[i][q];
      }
      d += elements;
#pragma unroll
      for (int i = 0; i < patch_columns; ++i) x[i] += step[i];
    }
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
#pragma unroll
      for (int i = 0; i < patch_columns; ++i)
        if (column + i < layout.columns)
          write(layout.offset + (column + i) * 4 * H() + gate * H() + unit, sum[gate][i]);
  }

  // An element of the head's weight [R, H] or, after those, of its bias [R].
  __device__ __forceinline__ void add_head(int i) const {
    const bool bias = i >= R * H();
    const int output = R == 1 ? 0 : bias ? i - R * H() : i / H(), unit = i - output * H();
    const S* d = memory.grad_out() + output * stride;
    const S* x = bias ? ones : memory.hidden(p.num_layers - 1) + unit * stride;
    S sum = 0;
    for (int t = 0; t < tiles; ++t) {
      for (int n = 0; n < tile_lanes; ++n) sum += d[n] * x[n];
      d += memory.elements();
      x += bias ? 0 : memory.elements();
    }
    write(p.flat_weights() - p.flat_head() + i, sum);
  }

  // One of the stages' own weights.
  __device__ __forceinline__ void add_own(int i) const {
    const S* d = memory.grad_own(i);
    S sum = 0;
    for (int t = 0; t < tiles; ++t, d += memory.elements())
      for (int n = 0; n < tile_lanes; ++n) sum += d[n];
    write(p.flat_weights() - Stages::weights + i, sum);
  }
};

template <class Stages, class Store, int FixedH>
__global__ void __launch_bounds__(max_backward_warps* warp_lanes, 1)
    backward_kernel(const __grid_constant__ BackwardArguments<Stages> a) {
  using S = stage_scalar<Stages>;
  using Size = Sizes<Stages, FixedH>;
  using Memory = TileMemory<Stages>;
  const LstmStepProblem& p = a.problem;
  const int H = FixedH > 0 ? FixedH : p.hidden_size, L = p.num_layers;
  const int warp = threadIdx.x / warp_lanes, warps = blockDim.x / warp_lanes;
  const bool packs = FixedH > 0 || a.pack_weights;
  S* ones = reinterpret_cast<S*>(dynamic_shared());
  S* packed = ones + Memory::stride;
  S* tiles = packed + (packs ? Size{H}.packed_elements(L) : 0);
  const Weights<S, Size> weights{{H}, packs ? packed : nullptr, a.pointers.weights, L, p.stages.inputs};
  const Memory first_memory{tiles, H, L};
  const Memory memory{tiles + warp * first_memory.elements(), H, L};
  for (int i = threadIdx.x; i < tile_lanes; i += blockDim.x) ones[i] = S(1);
  if (packs) weights.pack(packed);
  __syncthreads();

  for (int64_t chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x) {
    double* partial = static_cast<double*>(a.pointers.workspace) + chunk * p.flat_weights();
    const int64_t first = chunk * a.chunk_tiles, all = p.num_tiles();
    const int64_t last = first + a.chunk_tiles < all ? first + a.chunk_tiles : all;
    for (int64_t base = first; base < last; base += warps) {
      const int active = last - base < warps ? int(last - base) : warps;
      const TileBackward<Stages, Store, FixedH> tile(a, weights, memory, base + warp);
      const OuterProducts<Stages, FixedH> outer{p, first_memory, ones, partial, active, base == first};
      if (base + warps + warp < last) tile.prefetch(base + warps + warp);
      if (warp < active) tile.recompute();
#pragma unroll 1
      for (int l = L - 1; l >= 0; --l) {
        if (warp < active) tile.layer(l);
        __syncthreads();
        outer.layer(l);
        __syncthreads();
      }
    }
  }
}

}  // namespace MK_CAPABILITY
}  // namespace metakern
