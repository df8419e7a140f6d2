// mlp_update_step_backward on the CPU. Compiled once per instruction set; problem.h has the axis legend.
//
// With y = x n the normalised features, n = (1e-5 + mean x^2)^-1/2, and dy their gradients from the network:
//   dx = n dy - x n^2 mean(dy y)
// The mean runs over the segment, so there are three passes: the network gives n dy and the sums; the second adds the
// term with the mean and finishes the moments m, v and with one axis V; the third adds what comes through the factors.
#include "../math/outer_products.h"
#include "cpu_factors_backward.h"
#include "cpu_network.h"
#include "cpu_segment.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

constexpr int batch_tiles = 8;  // tiles whose outer products are summed in the compute dtype before going to double

// Rows of a tile's arrays of the network, and where the weights lie in a flat copy of their gradients.
struct NetworkLayout {
  int width, layers;

  explicit NetworkLayout(const MlpUpdateProblem& p) : width(p.width), layers(p.hidden_layers) {}

  int x() const { return 0; }
  int hidden() const { return tensor_features; }
  int grad_hidden() const { return hidden() + layers * width; }
  int grad_out() const { return grad_hidden() + layers * width; }
  int rows() const { return grad_out() + network_outputs; }
  int inputs(int layer) const { return layer == 0 ? tensor_features : width; }
  int outputs(int layer) const { return layer == layers ? network_outputs : width; }
  int input_row(int layer) const { return layer == 0 ? x() : hidden() + (layer - 1) * width; }
  int gradient_row(int layer) const { return layer == layers ? grad_out() : grad_hidden() + layer * width; }
  int64_t flat(int layer) const {
    int64_t n = 0;
    for (int l = 0; l < layer; ++l) n += int64_t(outputs(l)) * (inputs(l) + 1);
    return n;
  }
  int64_t flat_time() const { return flat(layers + 1); }  // weights of the time features, [W, 11]
  int64_t flat_size() const { return flat_time() + int64_t(width) * time_features; }
};

template <class S>
int64_t scratch_bytes(const MlpUpdateProblem& p) {
  return int64_t(batch_tiles) * NetworkLayout(p).rows() * tile_size * sizeof(S);
}

int64_t flat_weights(const MlpUpdateProblem& p) { return NetworkLayout(p).flat_size(); }

template <class S>
void tables(const MlpUpdateCall& call, int64_t index) {
  const Segment<S> s(call, index);
  if (!s.shape.is_factored) return;
  const Table<S> rows = s.rows(), columns = s.columns();
  for (const Table<S>& t : {rows, columns})
    for (int64_t i = 0; i < 3 * t.entries; ++i) t.root[i] = inverse_root(S(t.now[i] + S(1e-8)));
  row_factors(s, rows);
  column_factors(columns);
}

// Gradients of a segment's grads and params between the passes.
template <class S>
struct KeptGradients {
  S *grads, *params;

  MK_INLINE explicit KeptGradients(const Segment<S>& s) {
    const MlpUpdateCall& call = s.call;
    if (call.kept_grads == nullptr) {
      grads = offset<S>(s.tensor.grad_grads, s.start);
      params = offset<S>(s.tensor.grad_params, s.start);
    } else {
      grads = offset<S>(call.kept_grads, s.place.coordinates);
      params = grads + call.coordinates;
    }
  }
};

// Gradients of a tile's coordinates: of what comes in, and of what goes out.
template <class S>
struct TileGradients {
  using V = vec_t<S>;
  alignas(64) S g[tile_size], p[tile_size], m[3][tile_size], v[tile_size], full[3][tile_size];
  // Of the factors (3), of r and c themselves (3), and g^2.
  alignas(64) S rows[backward_sums][tile_size], columns[backward_sums][tile_size];

  void read_moments(const Segment<S>& s, const TilePlace& tile, const void* m_, const void* v_, const void* r_) {
    const S* from_m = offset<S>(m_, 3 * s.start + tile.start);
    const S* from_r = offset<S>(r_, 3 * s.start + tile.start);
    for (int k = 0; k < 3; ++k) {
      copy_tile(from_m + k * s.n, tile.count, m[k]);
      if (!s.shape.is_factored) copy_tile(from_r + k * s.n, tile.count, full[k]);
    }
    copy_tile(offset<S>(v_, s.start + tile.start), tile.count, v);
  }

  void write_moments(const Segment<S>& s, const TilePlace& tile) const {
    S* to_m = offset<S>(s.tensor.grad_m, 3 * s.start + tile.start);
    S* to_r = offset<S>(s.tensor.grad_r, 3 * s.start + tile.start);
    for (int k = 0; k < 3; ++k) {
      store_tile(to_m + k * s.n, tile.count, m[k]);
      if (!s.shape.is_factored) store_tile(to_r + k * s.n, tile.count, full[k]);
    }
    store_tile(offset<S>(s.tensor.grad_v, s.start + tile.start), tile.count, v);
  }

  // Adds rows first to last of the sums to those of the block.
  void add_sums(const Segment<S>& s, const MlpBlock& b, const TilePlace& tile, int first, int last) const {
    const auto& x = s.shape.rows_are_x ? rows : columns;
    const auto& y = s.shape.rows_are_x ? columns : rows;
    S *to_x = s.block_sums_x(b), *to_y = s.block_sums_y(b, backward_sums);
    for (int k = first; k < last; ++k) {
      add_to_x(tile, x[k], s.shape.inner, to_x + k * b.x_size(s.shape));
      add_to_y(tile, y[k], to_y + k * b.y_size(s.shape));
    }
  }

  // What the coordinates of a vector add to the gradients of the factors.
  MK_INLINE void set_factors(const TileInputs<S>& inputs, const FeatureGradient<V>& d, int lane) {
    for (int k = 0; k < 3; ++k) {
      const V both = d.of_g[k] + d.of_m[k];
      store(rows[k] + lane, both * load<V>(inputs.column_factor[k] + lane));
      store(columns[k] + lane, both * load<V>(inputs.row_factor[k] + lane));
    }
  }
};

// ------------------------------------------------------------------------------------- first pass: the network

// Adds the weight gradients of a batch of tiles.
template <class S>
void add_weight_gradients(const NetworkLayout& at, const S* memory, int tiles, const double* time, double* sums) {
  using V = vec_t<S>;
  const int64_t stride = int64_t(at.rows()) * tile_size;
  double biases[largest_width];
  for (int l = 0; l <= at.layers; ++l) {
    const Rows<S> gradient{memory + at.gradient_row(l) * tile_size, stride};
    const Rows<S> input{memory + at.input_row(l) * tile_size, stride};
    double* out = sums + at.flat(l);
    outer_products<V, tile_size>(gradient, at.outputs(l), input, at.inputs(l), tiles, out);
    for (int unit = 0; unit < at.outputs(l); ++unit) biases[unit] = 0;
    row_sums<V, tile_size>(gradient, at.outputs(l), tiles, biases);
    for (int unit = 0; unit < at.outputs(l); ++unit) {
      out[at.outputs(l) * at.inputs(l) + unit] += biases[unit];
      if (l > 0) continue;
      for (int j = 0; j < time_features; ++j) sums[at.flat_time() + unit * time_features + j] += biases[unit] * time[j];
    }
  }
}

// The first pass over a block.
template <class S, bool IsFactored>
class NetworkPass {
 public:
  using V = vec_t<S>;
  static constexpr int C = tile_vectors<V>;

  NetworkPass(const Segment<S>& s, const MlpBlock& b, void* scratch, double* numbers, double* weight_sums)
      : s_(s),
        b_(b),
        network_(s.call, s.place.task),
        at_(s.problem),
        kept_(s),
        memory_(static_cast<S*>(scratch)),
        numbers_(numbers),
        weight_sums_(weight_sums),
        time_(s.call.time + s.place.task * time_features),
        rate_(static_cast<const S*>(s.problem.rates)[s.number()]),
        keep_(static_cast<const S*>(s.problem.keep)[s.number()]) {}

  void run() {
    for_tiles(s_.shape, b_, [&](const TilePlace& tile) {
      step(tile);
      if (++tiles_ == batch_tiles) flush();
    });
    flush();
  }

 private:
  MK_INLINE V* rows(int row) { return reinterpret_cast<V*>(memory_ + (tiles_ * at_.rows() + row) * tile_size); }

  void flush() {
    if (tiles_ > 0) add_weight_gradients(at_, memory_, tiles_, time_, weight_sums_);
    tiles_ = 0;
  }

  void step(const TilePlace& tile) {
    inputs_.read(s_, tile);
    if (IsFactored) {
      inputs_.read_factors(s_, tile);
      inputs_.read_tables(s_, tile);
    }
    gradients_.read_moments(s_, tile, s_.tensor.grad_new_m, s_.tensor.grad_new_v, s_.tensor.grad_new_r);
    read_tile(s_.tensor.grad_new_params, s_.problem.dtype, s_.start + tile.start, tile.count, gradients_.p);
    const int vectors = (tile.count + lanes<V> - 1) / lanes<V>;
    for (int j = 0; j < vectors; ++j) features(j);
    V out[network_outputs * C], grad_x[tensor_features * C];
    network_.forward(rows(at_.x()), rows(at_.hidden()), out, vectors);
    head(out, vectors);
    network_.backward(rows(at_.grad_out()), rows(at_.hidden()), rows(at_.grad_hidden()), grad_x, vectors);
    V totals[tensor_features];
    for (V& total : totals) total = broadcast<V>(0);
    for (int j = 0; j < vectors; ++j) coordinates(grad_x, j, totals);
    for (int f = 0; f < tensor_features; ++f) numbers_[f] += double(sum_lanes(totals[f]));
    for (int row = 0; vectors < C && row < at_.rows(); ++row)  // outer products read whole tiles
      for (int j = vectors; j < C; ++j) rows(row)[j] = broadcast<V>(0);
    if (IsFactored) gradients_.add_sums(s_, b_, tile, 0, 6);
    gradients_.write_moments(s_, tile);
    store_tile(kept_.grads + tile.start, tile.count, gradients_.g);
    store_tile(kept_.params + tile.start, tile.count, gradients_.p);
  }

  void features(int j) {
    const int lane = j * lanes<V>;
    const NewMoments<V> now = inputs_.moments(lane, s_.decays);
    const Factors<V> f = inputs_.template factors<IsFactored>(lane, s_.decays);
    V found[tensor_features], *x = rows(at_.x());
    own_features(load<V>(inputs_.g + lane), load<V>(inputs_.p + lane), now, f.of_g, f.of_m, found);
    table_features(f, found);
    const S* norms = s_.norms();
    for (int i = 0; i < tensor_features; ++i) x[i * C + j] = found[i] * norms[i];
  }

  // Gradients of the outputs, the rate and `keep`; that of the old params into gradients_.p.
  void head(const V* out, int vectors) {
    V *grad_out = rows(at_.grad_out()), rate_sum = broadcast<V>(0), keep_sum = broadcast<V>(0);
    for (int j = 0; j < vectors; ++j) {
      S* p = gradients_.p + j * lanes<V>;
      const V upstream = load<V>(p), scale = exponential<V>(out[C + j] * network_.exp_mult);
      const V direction = -(upstream * scale * rate_);
      grad_out[j] = direction;
      grad_out[C + j] = direction * out[j] * network_.exp_mult;
      rate_sum -= upstream * scale * out[j];
      keep_sum += upstream * load<V>(inputs_.p + j * lanes<V>);
      store(p, upstream * keep_);
    }
    numbers_[block_rate] += double(sum_lanes(rate_sum));
    numbers_[block_keep] += double(sum_lanes(keep_sum));
  }

  MK_INLINE void coordinates(const V* grad_x, int j, V* totals) {
    const int lane = j * lanes<V>;
    const S* norms = s_.norms();
    const V* x = rows(at_.x());
    V dx[tensor_features];
#pragma GCC unroll 28
    for (int i = 0; i < tensor_features; ++i) {
      const V dy = grad_x[i * C + j];
      totals[i] += dy * x[i * C + j];
      dx[i] = dy * norms[i];
    }
    const NewMoments<V> now = inputs_.moments(lane, s_.decays);
    const Factors<V> f = inputs_.template factors<IsFactored>(lane, s_.decays);
    const FeatureGradient<V> d = features_backward(load<V>(inputs_.g + lane), now, f, dx);
    store(gradients_.g + lane, d.g);
    store(gradients_.p + lane, load<V>(gradients_.p + lane) + d.p);
    store(gradients_.v + lane, load<V>(gradients_.v + lane) + d.v);
    for (int k = 0; k < 3; ++k) {
      store(gradients_.m[k] + lane, load<V>(gradients_.m[k] + lane) + d.m[k]);
      if (IsFactored) {
        store(gradients_.rows[3 + k] + lane, d.r[k]);
        store(gradients_.columns[3 + k] + lane, d.c[k]);
      } else {
        store(gradients_.full[k] + lane, load<V>(gradients_.full[k] + lane) + full_factor_backward(d, f, k));
      }
    }
    if (IsFactored) gradients_.set_factors(inputs_, d, lane);
  }

  const Segment<S>& s_;
  const MlpBlock& b_;
  const Network<S> network_;
  const NetworkLayout at_;
  const KeptGradients<S> kept_;
  S* memory_;  // [batch_tiles, rows, tile_size]
  double *numbers_, *weight_sums_;
  const double* time_;
  S rate_, keep_;
  int tiles_ = 0;
  TileInputs<S> inputs_;
  TileGradients<S> gradients_;
};

template <class S>
void network(const MlpUpdateCall& call, int64_t index, void* scratch, double* weight_sums) {
  const MlpBlock& b = call.blocks[index];
  const Segment<S> s(call, b.segment);
  double* numbers = call.block_sums + index * block_numbers;
  for (int i = 0; i < block_numbers; ++i) numbers[i] = 0;
  if (!s.shape.is_factored) return NetworkPass<S, false>(s, b, scratch, numbers, weight_sums).run();
  S* sums = s.block_sums_x(b);
  for (int64_t i = 0; i < backward_sums * (b.x_size(s.shape) + b.y_size(s.shape)); ++i) sums[i] = S(0);
  NetworkPass<S, true>(s, b, scratch, numbers, weight_sums).run();
}

// n^2 mean(dy y) of every feature, into segment_sums.
template <class S>
void means(const MlpUpdateCall& call, int64_t index) {
  const Segment<S> s(call, index);
  for (int f = 0; f < tensor_features; ++f) {
    const double norm = double(s.norms()[f]);
    call.segment_sums[index * tensor_features + f] = norm * norm * sum_of_blocks(s, f) / double(s.n);
  }
}

// ------------------------------------------------------------------------- second pass: what the moments' gradients
// are

template <class S, bool IsFactored>
void moments_of(const Segment<S>& s, const MlpBlock& b, double* decay_sums) {
  using V = vec_t<S>;
  const KeptGradients<S> kept(s);
  TileInputs<S> inputs;
  TileGradients<S> gradients;
  S slopes[tensor_features];
  for (int f = 0; f < tensor_features; ++f) slopes[f] = S(-s.call.segment_sums[s.index * tensor_features + f]);
  for_tiles(s.shape, b, [&](const TilePlace& tile) {
    inputs.read(s, tile);
    if (IsFactored) inputs.read_factors(s, tile);
    gradients.read_moments(s, tile, s.tensor.grad_m, s.tensor.grad_v, s.tensor.grad_r);
    copy_tile(kept.grads + tile.start, tile.count, gradients.g);
    copy_tile(kept.params + tile.start, tile.count, gradients.p);
    V totals[num_decays];
    for (V& total : totals) total = broadcast<V>(0);
    for (int lane = 0; lane < tile.count; lane += lanes<V>) {
      const V g = load<V>(inputs.g + lane);
      const NewMoments<V> now = inputs.moments(lane, s.decays);
      Factors<V> f;
      V dx[tensor_features];
      if constexpr (IsFactored) {
        for (int k = 0; k < 3; ++k) {  // the tables' own features are left to factors()
          f.of_g[k] = f.of_m[k] = load<V>(inputs.row_factor[k] + lane) * load<V>(inputs.column_factor[k] + lane);
          f.r[k] = f.c[k] = f.r_root[k] = f.c_root[k] = broadcast<V>(0);
        }
      } else {
        f = inputs.template factors<false>(lane, s.decays);
      }
      table_features(f, dx);
      own_features(g, load<V>(inputs.p + lane), now, f.of_g, f.of_m, dx);
#pragma GCC unroll 28
      for (int i = 0; i < tensor_features; ++i) dx[i] *= slopes[i];
      const FeatureGradient<V> d = features_backward(g, now, f, dx);
      V grad_g = load<V>(gradients.g + lane) + d.g;
      for (int k = 0; k < 3; ++k) {
        const V grad = load<V>(gradients.m[k] + lane) + d.m[k];
        totals[decay_m + k] += grad * (load<V>(inputs.m[k] + lane) - g);
        grad_g += grad * s.decays.add[decay_m + k];
        store(gradients.m[k] + lane, grad * s.decays.keep[decay_m + k]);
      }
      const V grad_v = load<V>(gradients.v + lane) + d.v;
      totals[decay_v] += grad_v * (load<V>(inputs.v + lane) - g * g);
      V grad_square = grad_v * s.decays.add[decay_v];
      store(gradients.v + lane, grad_v * s.decays.keep[decay_v]);
      if constexpr (IsFactored) {
        gradients.set_factors(inputs, d, lane);
        store(gradients.rows[6] + lane, g * g);
        store(gradients.columns[6] + lane, g * g);
      } else {
        for (int k = 0; k < 3; ++k) {
          const V grad = load<V>(gradients.full[k] + lane) + full_factor_backward(d, f, k);
          totals[decay_factors + k] += grad * (load<V>(inputs.r[k] + lane) - (g * g + S(1e-30)));
          grad_square += grad * s.decays.add[decay_factors + k];
          store(gradients.full[k] + lane, grad * s.decays.keep[decay_factors + k]);
        }
      }
      store(gradients.g + lane, grad_g + grad_square * g * S(2));
      store(gradients.p + lane, load<V>(gradients.p + lane) + d.p);
    }
    for (int k = 0; k < num_decays; ++k) decay_sums[k] += double(sum_lanes(totals[k]));
    if (IsFactored) {
      gradients.add_sums(s, b, tile, 0, 3);
      gradients.add_sums(s, b, tile, 6, 7);
      store_tile(kept.grads + tile.start, tile.count, gradients.g);
    } else {
      write_tile(s.tensor.grad_grads, s.problem.dtype, s.start + tile.start, tile.count, gradients.g);
    }
    write_tile(s.tensor.grad_params, s.problem.dtype, s.start + tile.start, tile.count, gradients.p);
    gradients.write_moments(s, tile);
  });
}

template <class S>
void moments(const MlpUpdateCall& call, int64_t index) {
  const MlpBlock& b = call.blocks[index];
  const Segment<S> s(call, b.segment);
  double* sums = call.decay_sums + index * num_decays;
  for (int k = 0; k < num_decays; ++k) sums[k] = 0;
  s.shape.is_factored ? moments_of<S, true>(s, b, sums) : moments_of<S, false>(s, b, sums);
}

// ----------------------------------------------------------------------------------- third pass: through r and c

template <class S>
void factors_backward(const MlpUpdateCall& call, int64_t index) {
  const Segment<S> s(call, index);
  double* decay_sums = call.decay_sums + (call.num_blocks + index) * num_decays;
  for (int k = 0; k < num_decays; ++k) decay_sums[k] = 0;
  if (!s.shape.is_factored) return;
  const bool is_x = s.shape.rows_are_x;
  const int64_t x_size = s.shape.x_size();
  const double* sums_x = add_blocks(s, backward_sums);
  const double* sums_y = sums_x + backward_sums * x_size;
  S *slopes_x = offset<S>(call.slopes, s.place.tables), *slopes_y = slopes_x + x_size;
  for (int64_t i = 0; i < x_size + s.shape.y_size(); ++i) slopes_x[i] = S(0);
  const Table<S> rows = s.rows(), columns = s.columns();
  const int64_t x_count = s.shape.x_count(), y_count = s.shape.y_count();
  const double* means = call.segment_sums + index * tensor_features;
  const int64_t row_at = 3 * rows.entries * s.place.task, column_at = 3 * columns.entries * s.place.task;
  const EntryGradient<S> of_rows{rows, is_x ? sums_x : sums_y, offset<S>(s.tensor.grad_new_r, row_at),
                                 is_x ? x_count : y_count, means + feature_r};
  const EntryGradient<S> of_columns{columns, is_x ? sums_y : sums_x, offset<S>(s.tensor.grad_new_c, column_at),
                                    is_x ? y_count : x_count, means + feature_c};
  rows_backward(s, of_rows, offset<S>(s.tensor.grad_r, row_at), is_x ? slopes_x : slopes_y, decay_sums);
  columns_backward(s, of_columns, offset<S>(s.tensor.grad_c, column_at), is_x ? slopes_y : slopes_x, decay_sums);
}

template <class S>
void grads(const MlpUpdateCall& call, int64_t index) {
  using V = vec_t<S>;
  const MlpBlock& b = call.blocks[index];
  const Segment<S> s(call, b.segment);
  if (!s.shape.is_factored) return;
  const KeptGradients<S> kept(s);
  const S *slopes_x = offset<S>(call.slopes, s.place.tables), *slopes_y = slopes_x + s.shape.x_size();
  alignas(64) S g[tile_size], grad[tile_size], x[tile_size], y[tile_size];
  for (int i = 0; i < tile_size; ++i) x[i] = y[i] = S(0);
  for_tiles(s.shape, b, [&](const TilePlace& tile) {
    read_tile(s.tensor.grads, s.problem.dtype, s.start + tile.start, tile.count, g);
    copy_tile(kept.grads + tile.start, tile.count, grad);
    expand_x(tile, slopes_x, s.shape.inner, x);
    expand_y(tile, slopes_y, y);
    for (int i = 0; i < tile_size; i += lanes<V>)
      store(grad + i, load<V>(grad + i) + load<V>(g + i) * (load<V>(x + i) + load<V>(y + i)));
    write_tile(s.tensor.grad_grads, s.problem.dtype, s.start + tile.start, tile.count, grad);
  });
}

// ------------------------------------------------------------------------------------ what the segments share

template <class S>
void write_weights(const MlpUpdateProblem& p, const double* sums, void* const* grad_weights) {
  const NetworkLayout at(p);
  for (int l = 0; l <= p.hidden_layers; ++l) {
    const double* from = sums + at.flat(l);
    S *weight = static_cast<S*>(grad_weights[2 * l]), *bias = static_cast<S*>(grad_weights[2 * l + 1]);
    const int inputs = at.inputs(l), row = l == 0 ? mlp_inputs : inputs;
    for (int unit = 0; unit < at.outputs(l); ++unit) {
      for (int i = 0; i < inputs; ++i) weight[unit * row + i] = S(from[unit * inputs + i]);
      for (int j = 0; l == 0 && j < time_features; ++j)
        weight[unit * row + inputs + j] = S(sums[at.flat_time() + unit * time_features + j]);
      bias[unit] = S(from[at.outputs(l) * inputs + unit]);
    }
  }
}

template <class S>
void reduce(const MlpUpdateCall& call, double* weight_sums, int64_t groups, void* const* grad_weights,
            void* grad_decays, void* grad_rates, void* grad_keep) {
  const MlpUpdateProblem& p = *call.problem;
  const int64_t flat = flat_weights(p);
  for (int64_t step = 1; step < groups; step *= 2)
    for (int64_t group = 0; group + step < groups; group += 2 * step)
      for (int64_t i = 0; i < flat; ++i) weight_sums[group * flat + i] += weight_sums[(group + step) * flat + i];
  write_weights<S>(p, weight_sums, grad_weights);
  double decays[num_decays] = {};
  for (int64_t i = 0; i < call.num_blocks + call.num_segments; ++i)
    for (int k = 0; k < num_decays; ++k) decays[k] += call.decay_sums[i * num_decays + k];
  for (int k = 0; k < num_decays; ++k) static_cast<S*>(grad_decays)[k] = S(decays[k]);
  for (int64_t i = 0; i < p.num_tensors * p.num_tasks; ++i)
    static_cast<S*>(grad_rates)[i] = static_cast<S*>(grad_keep)[i] = S(0);
  for (int64_t i = 0; i < call.num_segments; ++i) {
    const Segment<S> s(call, i);
    static_cast<S*>(grad_rates)[s.number()] = S(sum_of_blocks(s, block_rate));
    static_cast<S*>(grad_keep)[s.number()] = S(sum_of_blocks(s, block_keep));
  }
}

template <class S>
constexpr MlpUpdateBackwardKernels kernels{scratch_bytes<S>, flat_weights,        tables<S>, network<S>, means<S>,
                                           moments<S>,       factors_backward<S>, grads<S>,  reduce<S>};

}  // namespace
}  // namespace MK_CAPABILITY

template <>
const MlpUpdateBackwardKernels& mlp_update_backward_kernels<CpuCapability::MK_CAPABILITY>(bool is_double) {
  return is_double ? kernels<double> : kernels<float>;
}

}  // namespace metakern
