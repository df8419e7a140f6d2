// task_norm_act_pool's loops: a channel of a task at a time, twice over its values (once for the statistics or sums,
// once for the result), by chunks of rows that fit into the first cache with what is computed of them.
//
// Sums over a chunk are taken in the dtype's vectors, those over chunks in float64, both in a fixed order.
#include "../math/pooling.h"
#include "cpu_runs.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Elements of a chunk at most, if its two rows have no more.
constexpr int64_t chunk_elements = 2048;

// An index byte: the place of the winner in its window, and whether the activation has slope 1 there.
constexpr int place_bits = 3, passed_bit = 4;

// ------------------------------------------------------------------------------------------------------------- chunks

int64_t chunk_rows(const TaskNormActPoolProblem& p) {
  const int64_t rows = chunk_elements / (p.size[1] > 0 ? p.size[1] : 1) / 2 * 2;
  return rows < 2 ? 2 : rows < p.size[0] ? rows : (p.size[0] + 1) / 2 * 2;
}

// Small images go several at a time: a row is then stored long before it is loaded with the next one, and sums are
// taken over many.
int64_t chunk_images(const TaskNormActPoolProblem& p) {
  const int64_t images = p.pixels() > 0 ? chunk_elements / p.pixels() : 1;
  return images < 1 ? 1 : images < p.num_samples ? images : p.num_samples;
}

// Some rows of one image, or several whole images: where they begin in x and in y, the elements of one image, and the
// step to the next.
struct Chunk {
  int64_t at, elements, out_at, outs, rows, images, step, out_step;

  MK_INLINE int64_t image(int64_t q) const { return at + q * step; }
  MK_INLINE int64_t out_image(int64_t q) const { return out_at + q * out_step; }
};

// Calls f for the chunks of a channel.
template <class F>
void each_chunk(const TaskNormActPoolProblem& p, int64_t item, const F& f) {
  const int64_t task = item / p.channels, channel = item % p.channels, shrink = p.pool ? 2 : 1;
  const int64_t most = chunk_rows(p), images = chunk_images(p);
  for (int64_t s = 0; s < p.num_samples; s += images) {
    const int64_t plane = (task * p.num_samples + s) * p.channels + channel;
    for (int64_t row = 0; row < p.size[0]; row += most) {
      const int64_t rows = p.size[0] - row < most ? p.size[0] - row : most;
      f(Chunk{plane * p.pixels() + row * p.size[1], rows * p.size[1],
              plane * p.out_pixels() + row / shrink * p.out_size[1], rows / shrink * p.out_size[1], rows,
              p.num_samples - s < images ? p.num_samples - s : images, p.channels * p.pixels(),
              p.channels * p.out_pixels()});
    }
  }
}

// Working memory: a chunk's pixels, and its windows' values and winners, image by image without gaps.
template <class S>
struct Scratch {
  S *pixels, *values;
  int_t<S>* which;
  int64_t bytes;

  Scratch(const TaskNormActPoolProblem& p, void* memory) {
    const int64_t elements = chunk_images(p) * chunk_rows(p) * p.size[1] + pooling_slack<vec_t<S>>;
    pixels = static_cast<S*>(memory);
    values = pixels + elements;
    which = reinterpret_cast<int_t<S>*>(values + elements);
    bytes = 3 * elements * int64_t(sizeof(S));
    if (memory != nullptr)  // also defines what whole vectors read behind a chunk
      for (int64_t i = 0; i < elements; ++i) pixels[i] = values[i] = S(which[i] = 0);
  }
};

template <class S>
int64_t scratch_bytes(const TaskNormActPoolProblem& p) {
  return Scratch<S>(p, nullptr).bytes;
}

// -------------------------------------------------------------------------------------------------- a channel's
// numbers

template <class S>
S number(const void* data, int64_t item, S otherwise) {
  return data == nullptr ? otherwise : static_cast<const S*>(data)[item];
}

template <class S>
void set(void* data, int64_t item, double value) {
  static_cast<S*>(data)[item] = S(value);
}

// What x̂ = (x - mean) · rstd takes.
template <class S>
struct Norm {
  S mean;
  double rstd;

  static Norm of(const TaskNormActPoolProblem& p, S mean, S var) {
    if (p.statistics == NormStatistics::none) return {S(0), 1.0};
    return {mean, 1 / square_root(double(var) + p.eps)};
  }
};

// Mean and sum of squared deviations of the values so far, joined by Chan's formula.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void join(double other_count, double other_mean, double other_squares) {
    const double total = count + other_count, step = other_mean - mean;
    mean += step * (other_count / total);
    squares += other_squares + step * step * (count * other_count / total);
    count = total;
  }
};

template <class S>
Moments moments_of(const TaskNormActPoolProblem& p, const S* x, int64_t item) {
  Moments moments;
  each_chunk(p, item, [&](const Chunk& c) {
    if (c.elements == 0) return;
    Sum<S> sum, rest, squares;
    for (int64_t q = 0; q < c.images; ++q)
      each_vector<S, 4>(c.elements, [&](int64_t i, auto v, int k) { sum.add(v.load_values(x + c.image(q) + i), k); });
    const double n = double(c.images * c.elements);
    const S centre = S(sum.total() / n);
    for (int64_t q = 0; q < c.images; ++q)
      each_vector<S, 4>(c.elements, [&](int64_t i, auto v, int k) {
        const vec_t<S> d = v.keep(v.load_values(x + c.image(q) + i) - centre);
        rest.add(d, k);
        squares.add(d * d, k);
      });
    const double offset = rest.total();  // from the rounding of `centre`
    moments.join(n, double(centre) + offset / n, squares.total() - offset * offset / n);
  });
  return moments;
}

// Sets the statistics that a channel is normalised with.
template <class S>
Norm<S> statistics(const NormForward& pass, int64_t item) {
  double mean = 0, var = 1;
  if (pass.problem.statistics == NormStatistics::given) {
    mean = number(pass.running_mean, item, S(0));
    var = number(pass.running_var, item, S(1));
  } else if (pass.problem.statistics == NormStatistics::batch) {
    const Moments moments = moments_of(pass.problem, static_cast<const S*>(pass.x), item);
    mean = moments.mean;
    var = moments.count > 0 ? moments.squares / moments.count : 0;
  }
  set<S>(pass.mean, item, mean);
  set<S>(pass.var, item, var);
  return Norm<S>::of(pass.problem, S(mean), S(var));
}

// ------------------------------------------------------------------------------------------------------------ forward

// The maxima of a chunk's windows.
template <class S>
void pool(const TaskNormActPoolProblem& p, const Chunk& c, const Scratch<S>& scratch) {
  const int64_t width = p.size[1], windows = p.out_size[1];
  for (int64_t q = 0; q < c.images; ++q)
    for (int64_t i = 0; i < c.rows / 2; ++i) {
      const S* above = scratch.pixels + q * c.elements + 2 * i * width;
      const int64_t at = q * c.outs + i * windows;
      pool_row(above, above + width, windows, scratch.values + at, scratch.which + at);
    }
}

// y and the index of a chunk. Of ReLU's negative pixels any may win: the gradient of all is zero.
template <class S>
void activate(const NormForward& pass, const Chunk& c, const S* values, const int_t<S>* which) {
  using V = vec_t<S>;
  using I = int_t<V>;
  const bool relu = pass.problem.activation == NormActivation::relu;
  const I of_nan = I{} - int(relu), always = I{} - int(pass.problem.activation == NormActivation::identity);
  for (int64_t q = 0; q < c.images; ++q, values += c.outs, which += c.outs) {
    S* y = static_cast<S*>(pass.y) + c.out_image(q);
    uint8_t* index = pass.index + c.out_image(q);
    each_vector<S>(c.outs, [&](int64_t i, auto v, int) {
      const V value = load<V>(values + i);
      const I passed = (value > V{}) | ((value != value) & of_nan) | always;
      v.store_values(y + i, relu ? (passed ? value : V{}) : value);
      I place;
      __builtin_memcpy(&place, which + i, sizeof(I));
      v.store_bytes(index + i, place | (passed & passed_bit));
    });
  }
}

template <class S>
void forward(const NormForward& pass, void* memory, int64_t first_item, int64_t last_item) {
  using V = vec_t<S>;
  const TaskNormActPoolProblem& p = pass.problem;
  const Scratch<S> scratch(p, memory);
  const bool leaky = p.activation == NormActivation::leaky_relu;
  const S slope = S(p.slope);
  for (int64_t item = first_item; item < last_item; ++item) {
    const Norm<S> norm = statistics<S>(pass, item);
    const S scale = S(norm.rstd * double(number(pass.gamma, item, S(1)))), shift = number(pass.beta, item, S(0));
    each_chunk(p, item, [&](const Chunk& c) {
      for (int64_t q = 0; q < c.images; ++q) {
        const S* x = static_cast<const S*>(pass.x) + c.image(q);
        S* pixels = scratch.pixels + q * c.elements;
        each_vector<S>(c.elements, [&](int64_t i, auto v, int) {
          const V z = (v.load_values(x + i) - norm.mean) * scale + shift;
          store(pixels + i, leaky ? (z > V{} ? z : z * slope) : z);
        });
      }
      if (p.pool) pool(p, c, scratch);
      activate(pass, c, p.pool ? scratch.values : scratch.pixels, scratch.which);
    });
  }
}

// ----------------------------------------------------------------------------------------------------------- backward

// The gradient gz of γ x̂ + β for a chunk, in scratch memory; adds it to `sum`.
template <class S>
S* spread(const NormSaved& saved, const Chunk& c, const Scratch<S>& scratch, Sum<S>& sum) {
  using V = vec_t<S>;
  using I = int_t<V>;
  const TaskNormActPoolProblem& p = saved.problem;
  const S slope = S(p.activation == NormActivation::leaky_relu ? p.slope : 0);
  const I kept = I{} - int(p.activation == NormActivation::leaky_relu);  // a product with 0 would keep NaN
  for (int64_t q = 0; q < c.images; ++q) {
    const S* grad = static_cast<const S*>(saved.grad_y) + c.out_image(q);
    const uint8_t* index = saved.index + c.out_image(q);
    S* values = scratch.values + q * c.outs;
    int_t<S>* which = scratch.which + q * c.outs;
    each_vector<S, 2>(c.outs, [&](int64_t i, auto v, int k) {
      const I bits = v.load_bytes(index + i);
      const V g = v.load_values(grad + i), value = (bits & passed_bit) != 0 ? g : V(I(g * slope) & kept);
      sum.add(value, k);
      store(values + i, value);
      const I place = bits & place_bits;
      __builtin_memcpy(which + i, &place, sizeof(I));
    });
  }
  if (!p.pool) return scratch.values;
  const int64_t width = p.size[1], windows = p.out_size[1];
  for (int64_t q = 0; q < c.images; ++q)
    for (int64_t row = 0; row < c.rows; ++row) {
      S* pixels = scratch.pixels + q * c.elements + row * width;
      const int64_t own = row / 2 * windows, at = q * c.outs + own;
      if (own < c.outs) spread_row(scratch.values + at, scratch.which + at, windows, int(row % 2), pixels);
      for (int64_t i = own < c.outs ? 2 * windows : 0; i < width; ++i) pixels[i] = S(0);
    }
  return scratch.pixels;
}

template <class S>
void backward(const NormBackward& pass, void* memory, int64_t first_item, int64_t last_item) {
  using V = vec_t<S>;
  const NormSaved& saved = pass.saved;
  const TaskNormActPoolProblem& p = saved.problem;
  const Scratch<S> scratch(p, memory);
  const double n = double(p.values());
  for (int64_t item = first_item; item < last_item; ++item) {
    const Norm<S> norm = Norm<S>::of(p, number(saved.mean, item, S(0)), number(saved.var, item, S(0)));
    double grad_beta = 0, product = 0;
    each_chunk(p, item, [&](const Chunk& c) {
      Sum<S> sum, of_product;
      const S* gz = spread(saved, c, scratch, sum);
      for (int64_t q = 0; q < c.images; ++q, gz += c.elements) {
        const S* x = static_cast<const S*>(saved.x) + c.image(q);
        each_vector<S, 4>(c.elements, [&](int64_t i, auto v, int k) {
          of_product.add(v.load_values(gz + i) * (v.load_values(x + i) - norm.mean), k);
        });
      }
      grad_beta += sum.total();
      product += of_product.total();
    });
    const double grad_gamma = product * norm.rstd, scale = norm.rstd * double(number(saved.gamma, item, S(1)));
    set<S>(pass.grad_gamma, item, grad_gamma);
    set<S>(pass.grad_beta, item, grad_beta);
    const bool batch = p.statistics == NormStatistics::batch;
    const S of_gz = S(scale), of_x = S(-scale * norm.rstd * grad_gamma / n), rest = S(-scale * grad_beta / n);
    each_chunk(p, item, [&](const Chunk& c) {
      Sum<S> unused;
      const S* gz = spread(saved, c, scratch, unused);
      for (int64_t q = 0; q < c.images; ++q, gz += c.elements) {
        const S* x = static_cast<const S*>(saved.x) + c.image(q);
        S* grad_x = static_cast<S*>(pass.grad_x) + c.image(q);
        each_vector<S>(c.elements, [&](int64_t i, auto v, int) {
          V grad = of_gz * load<V>(gz + i);
          if (batch) grad += of_x * (v.load_values(x + i) - norm.mean) + rest;
          v.store_values(grad_x + i, grad);
        });
      }
    });
  }
}

// ---------------------------------------------------------------------------------------------------- second
// derivative

// Sums over a channel, with d = x - mean and v the gradient by grad_x.
struct SecondSums {
  double gz = 0, gz_d = 0, v = 0, v_d = 0, v_gz = 0;
};

// Coefficients of gz, v, d and 1 in the gradients by x and by gz, and the gradient by gamma.
template <class S>
struct SecondCoefficients {
  S x_gz, x_v, x_d, x_rest;
  S gz_v, gz_d, gz_rest;
  double of_gamma;

  SecondCoefficients(const NormSecond& pass, const Norm<S>& norm, const SecondSums& sums, int64_t item) {
    const double r = norm.rstd, n = double(pass.saved.problem.values());
    const double gamma = number(pass.saved.gamma, item, S(1)), scale = gamma * r;
    const double by_gamma = number(pass.grad_gamma, item, S(0)), by_beta = number(pass.grad_beta, item, S(0));
    if (pass.saved.problem.statistics != NormStatistics::batch) {
      x_gz = S(by_gamma * r), x_v = x_d = x_rest = S(0);
      gz_v = S(scale), gz_d = S(by_gamma * r), gz_rest = S(by_beta);
      of_gamma = r * sums.v_gz;
      return;
    }
    // Means, of products with x̂ too.
    const double g = sums.gz / n, gx = sums.gz_d * r / n, v = sums.v / n, vx = sums.v_d * r / n;
    const double va = sums.v_gz / n - v * g - vx * gx, square = scale * r;
    x_gz = S(by_gamma * r - square * vx);
    x_v = S(-square * gx);
    x_d = S(-(square * (va - 2 * gx * vx) + by_gamma * r * gx) * r);
    x_rest = S(square * (gx * v + vx * g) - by_gamma * r * g);
    gz_v = S(scale);
    gz_d = S((by_gamma - scale * vx) * r);
    gz_rest = S(by_beta - scale * v);
    of_gamma = r * n * va;
  }
};

template <class S>
SecondSums second_sums(const NormSecond& pass, const Norm<S>& norm, const Scratch<S>& scratch, int64_t item) {
  using V = vec_t<S>;
  SecondSums sums;
  each_chunk(pass.saved.problem, item, [&](const Chunk& c) {
    Sum<S> gz, gz_d, v, v_d, v_gz;
    const S* spreaded = spread(pass.saved, c, scratch, gz);
    for (int64_t q = 0; q < c.images; ++q, spreaded += c.elements) {
      const S* x = static_cast<const S*>(pass.saved.x) + c.image(q);
      const S* by_x = static_cast<const S*>(pass.grad_x) + c.image(q);
      each_vector<S, 2>(c.elements, [&](int64_t i, auto part, int k) {
        const V d = part.load_values(x + i) - norm.mean, a = part.load_values(by_x + i);
        const V g = part.load_values(spreaded + i);
        gz_d.add(g * d, k);
        v.add(a, k);
        v_d.add(a * d, k);
        v_gz.add(a * g, k);
      });
    }
    sums.gz += gz.total();
    sums.gz_d += gz_d.total();
    sums.v += v.total();
    sums.v_d += v_d.total();
    sums.v_gz += v_gz.total();
  });
  return sums;
}

// The gradient by grad_y of a chunk from that by gz, which lies at `pixels`.
template <class S>
void pick(const NormSecond& pass, const Chunk& c, S* pixels, const Scratch<S>& scratch) {
  using V = vec_t<S>;
  using I = int_t<V>;
  const TaskNormActPoolProblem& p = pass.saved.problem;
  for (int64_t q = 0; p.pool && q < c.images; ++q)
    for (int64_t i = 0; i < c.rows / 2; ++i) {
      const int64_t at = q * c.outs + i * p.out_size[1];
      const S* above = pixels + q * c.elements + 2 * i * p.size[1];
      pick_row(above, above + p.size[1], scratch.which + at, p.out_size[1], scratch.values + at);
    }
  const S slope = S(p.activation == NormActivation::leaky_relu ? p.slope : 0);
  const I kept = I{} - int(p.activation == NormActivation::leaky_relu);
  for (int64_t q = 0; q < c.images; ++q) {
    const uint8_t* index = pass.saved.index + c.out_image(q);
    const S* values = scratch.values + q * c.outs;
    S* out = static_cast<S*>(pass.of_grad_y) + c.out_image(q);
    each_vector<S>(c.outs, [&](int64_t i, auto part, int) {
      const V g = load<V>(values + i);
      const I passed = part.load_bytes(index + i) & passed_bit;
      part.store_values(out + i, passed != 0 ? g : V(I(g * slope) & kept));
    });
  }
}

template <class S>
void second(const NormSecond& pass, void* memory, int64_t first_item, int64_t last_item) {
  using V = vec_t<S>;
  const NormSaved& saved = pass.saved;
  const TaskNormActPoolProblem& p = saved.problem;
  const Scratch<S> scratch(p, memory);
  for (int64_t item = first_item; item < last_item; ++item) {
    const Norm<S> norm = Norm<S>::of(p, number(saved.mean, item, S(0)), number(saved.var, item, S(0)));
    const SecondCoefficients<S> of(pass, norm, second_sums(pass, norm, scratch, item), item);
    set<S>(pass.of_gamma, item, of.of_gamma);
    const bool batch = p.statistics == NormStatistics::batch;
    each_chunk(p, item, [&](const Chunk& c) {
      Sum<S> unused;
      S* spreaded = spread(saved, c, scratch, unused);
      for (int64_t q = 0; q < c.images; ++q) {
        S* gz = spreaded + q * c.elements;
        const S* x = static_cast<const S*>(saved.x) + c.image(q);
        const S* by_x = static_cast<const S*>(pass.grad_x) + c.image(q);
        S* of_x = static_cast<S*>(pass.of_x) + c.image(q);
        each_vector<S>(c.elements, [&](int64_t i, auto part, int) {
          const V d = part.load_values(x + i) - norm.mean, v = part.load_values(by_x + i), g = load<V>(gz + i);
          V grad = of.x_gz * g;
          if (batch) grad += of.x_v * v + of.x_d * d + of.x_rest;
          part.store_values(of_x + i, grad);
          part.store_values(gz + i, of.gz_v * v + of.gz_d * d + of.gz_rest);
        });
      }
      pick(pass, c, spreaded, scratch);
    });
  }
}

template <class S>
constexpr TaskNormActPoolKernels kernels{scratch_bytes<S>, forward<S>, backward<S>, second<S>};

}  // namespace
}  // namespace MK_CAPABILITY

template <>
const TaskNormActPoolKernels& task_norm_act_pool_kernels<CpuCapability::MK_CAPABILITY>(bool is_double) {
  return is_double ? kernels<double> : kernels<float>;
}

}  // namespace metakern
