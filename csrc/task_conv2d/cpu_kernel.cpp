// task_conv2d and its companions on the CPU: packs weights or gradients, copies images into borders of zeros, runs the
// products of cpu_product.h. Compiled once per instruction set; problem.h and cpu.h have the axis legend.
#include "../math/transpose.h"
#include "cpu.h"
#include "cpu_product.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

MK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A range of blocks of rows, and how many vectors before and in it.
struct BlockRange {
  RowBlocks blocks;
  int64_t first, last;

  template <class S>
  static BlockRange of(int64_t rows, int64_t range, int64_t ranges) {
    const RowBlocks blocks = RowBlocks::of<S>(rows);
    return {blocks, blocks.range(range, ranges), blocks.range(range + 1, ranges)};
  }
  int64_t first_vector() const { return blocks.first(first); }
  int64_t vectors() const { return blocks.first(last) - blocks.first(first); }
};

// The most vectors of a range.
template <class S>
int64_t range_vectors(int64_t rows, int64_t ranges) {
  int64_t most = 0;
  for (int64_t range = 0; range < ranges; ++range) {
    const int64_t vectors = BlockRange::of<S>(rows, range, ranges).vectors();
    most = most < vectors ? vectors : most;
  }
  return most;
}

// ------------------------------------------------------------------------------------------------------------ images

// Copies samples into a buffer whose borders are zero already.
template <class S>
void copy_images(const ConvImages& images, const S* from, int64_t samples, S* to) {
  const int64_t height = images.size[0], width = images.size[1], pitch = images.padded[1];
  to += images.before[0] * pitch + images.before[1];
  for (int64_t plane = 0; plane < samples * images.channels; ++plane, to += images.plane())
    for (int64_t row = 0; row < height; ++row, from += width) {
      S* line = to + row * pitch;
      int64_t i = 0;
      for (; i + lanes<vec_t<S>> <= width; i += lanes<vec_t<S>>) store(line + i, load<vec_t<S>>(from + i));
      for (; i < width; ++i) line[i] = from[i];
    }
}

// The images of a group of samples with borders: a copy, or where they lie if they need none.
template <class S>
class Source {
 public:
  Source(const ConvCut& cut, const ConvImages& images, const void* data, S* buffer)
      : cut_(cut), images_(images), data_(static_cast<const S*>(data)), buffer_(buffer) {
    if (images.copied())
      for (int64_t i = 0; i < cut.group_samples * images.sample(); ++i) buffer[i] = S(0);
  }
  const S* operator()(int64_t task, int64_t group) {
    const int64_t sample = task * cut_.num_samples + cut_.first_sample(group);
    const S* from = data_ + sample * images_.sample_in_memory();
    if (!images_.copied()) return from;
    if (sample != held_) copy_images(images_, from, cut_.samples_of(group), buffer_);
    held_ = sample;
    return buffer_;
  }

  static int64_t elements(const ConvCut& cut, const ConvImages& images) {
    return images.copied() ? (cut.group_samples * images.sample() + 15) / 16 * 16 : 0;
  }

 private:
  const ConvCut& cut_;
  const ConvImages& images_;
  const S* data_;
  S* buffer_;
  int64_t held_ = -1;
};

// ------------------------------------------------------------------------------------------- y, and the gradient by x

template <class S>
int64_t packed_elements(const ConvPass& p) {
  return p.terms * RowBlocks::of<S>(p.rows).vectors * lanes<vec_t<S>>;
}

// Packs one block of a phase: [terms][rows of the block].
template <class S>
void pack_block(const ConvPass& p, const ConvPhase& phase, const S* weight, int64_t first, int64_t vectors, S* packed) {
  constexpr int n = lanes<vec_t<S>>;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t row = (first + v) * n, rows = smaller(n, p.rows - row);
    const S* from = weight + row * p.weight_pitch;
    S* to = packed + v * n;
    for (int64_t k = 0; k < phase.terms;) {  // by runs of neighbouring elements
      int64_t run = 1;
      while (k + run < phase.terms && phase.elements[k + run] == phase.elements[k] + run) ++run;
      pack_columns(from + phase.elements[k], p.weight_pitch, rows, run, to + k * vectors * n, vectors * n);
      k += run;
    }
  }
}

template <class S>
void pack(const ConvPass& p, int64_t first_task, int64_t last_task) {
  const RowBlocks blocks = RowBlocks::of<S>(p.rows);
  const int64_t width = blocks.vectors * lanes<vec_t<S>>;
  const int64_t weight_elements = p.weight_elements;
  for (int64_t task = first_task; task < last_task; ++task)
    for (int64_t f = 0; f < p.num_phases; ++f) {
      const ConvPhase& phase = p.phases[f];
      S* packed = static_cast<S*>(p.packed) + (task * p.terms + phase.first_term) * width;
      for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t first = blocks.first(b), vectors = blocks.first(b + 1) - first;
        pack_block(p, phase, static_cast<const S*>(p.weight) + task * weight_elements, first, vectors,
                   packed + first * lanes<vec_t<S>> * phase.terms);
      }
    }
}

template <class S>
int64_t sums_elements(const ConvPass& p) {
  int64_t pixels = 0;
  for (int64_t f = 0; f < p.num_phases; ++f)
    if (pixels < p.phases[f].pixels()) pixels = p.phases[f].pixels();
  return p.cut.group_samples * pixels * range_vectors<S>(p.rows, p.cut.num_ranges) * lanes<vec_t<S>>;
}

template <class S>
int64_t scratch_bytes(const ConvPass& p) {
  return (Source<S>::elements(p.cut, p.images) + sums_elements<S>(p)) * int64_t(sizeof(S));
}

// Writes a phase's pixels of one vector of channels and one sample; `pitch` is that of the columns of `sums`.
template <class S>
void write_pixels(const ConvPass& p, const ConvPhase& phase, const S* sums, int64_t pitch, vec_t<S> bias, int64_t rows,
                  S* out) {
  const int64_t plane = p.out_size[0] * p.out_size[1];
  out += phase.first[0] * p.out_size[1] + phase.first[1];
  if (p.num_phases == 1) return unpack_columns(sums, pitch, bias, rows, phase.pixels(), out, plane);
  for (int64_t i = 0; i < phase.size[0]; ++i)
    for (int64_t j = 0; j < phase.size[1]; ++j, sums += pitch) {
      const vec_t<S> x = load<vec_t<S>>(sums) + bias;
      S* to = out + i * p.step[0] * p.out_size[1] + j * p.step[1];
      for (int64_t row = 0; row < rows; ++row) to[row * plane] = x[row];
    }
}

// The sums of a phase for a range of blocks, [blocks][columns][rows of the block], and their place in the result.
template <class S>
void convolve_phase(const ConvPass& p, const ConvPhase& phase, const BlockRange& range, const S* source, int64_t task,
                    int64_t group, S* sums) {
  constexpr int n = lanes<vec_t<S>>;
  const int64_t samples = p.cut.samples_of(group), columns = samples * phase.pixels();
  const S* packed = static_cast<const S*>(p.packed) + (task * p.terms + phase.first_term) * range.blocks.vectors * n;
  if (columns == 0) return;
  for (int64_t first = 0; first == 0 || first < phase.terms; first += max_terms)
    for (int64_t b = range.first; b < range.last; ++b) {
      const int64_t vector = range.blocks.first(b), vectors = range.blocks.first(b + 1) - vector;
      product_block(vectors, packed + (vector * phase.terms + first * vectors) * n,
                    smaller(max_terms, phase.terms - first), phase.offsets + first, source, phase.bases, columns,
                    sums + (vector - range.first_vector()) * columns * n, first > 0);
    }
  const int64_t plane = p.out_size[0] * p.out_size[1];
  S* out = static_cast<S*>(p.out) + (task * p.cut.num_samples + p.cut.first_sample(group)) * p.rows * plane;
  for (int64_t b = range.first; b < range.last; ++b) {
    const int64_t vector = range.blocks.first(b), vectors = range.blocks.first(b + 1) - vector;
    const S* block = sums + (vector - range.first_vector()) * columns * n;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t row = (vector + v) * n, rows = smaller(n, p.rows - row);
      const vec_t<S> bias =
          p.bias ? load_first<vec_t<S>>(static_cast<const S*>(p.bias) + task * p.rows + row, rows) : vec_t<S>{};
      for (int64_t s = 0; s < samples; ++s)
        write_pixels(p, phase, block + (s * phase.pixels() * vectors + v) * n, vectors * n, bias, rows,
                     out + (s * p.rows + row) * plane);
    }
  }
}

template <class S>
void convolve(const ConvPass& p, void* scratch, int64_t first_item, int64_t last_item) {
  S* buffer = static_cast<S*>(scratch);
  S* sums = buffer + Source<S>::elements(p.cut, p.images);
  Source<S> source(p.cut, p.images, p.source, buffer);
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t unit = item / p.cut.num_ranges, task = unit / p.cut.num_groups, group = unit % p.cut.num_groups;
    const BlockRange range = BlockRange::of<S>(p.rows, item % p.cut.num_ranges, p.cut.num_ranges);
    if (range.first == range.last) continue;
    const S* images = source(task, group);
    for (int64_t f = 0; f < p.num_phases; ++f) convolve_phase(p, p.phases[f], range, images, task, group, sums);
  }
}

// ----------------------------------------------------------------------------------------- gradients by weight and
// bias

// Scratch of a range: images, packed gradients, sums of the weight, sums of the bias.
template <class S>
struct WeightScratch {
  S *images, *packed, *sums, *bias;
  int64_t elements;

  WeightScratch(const ConvWeightPass& p, S* data) {
    const int64_t width = range_vectors<S>(p.rows, p.cut.num_ranges) * lanes<vec_t<S>>;
    images = data;
    packed = images + Source<S>::elements(p.cut, p.images);
    sums = packed + p.cut.group_samples * p.pixels * width;
    bias = sums + p.columns * width;
    elements = bias + width - data;
  }
};

template <class S>
int64_t weight_scratch_bytes(const ConvWeightPass& p) {
  return WeightScratch<S>(p, nullptr).elements * int64_t(sizeof(S));
}

// Packs the gradients of a group's samples: [blocks][sample, pixel][rows of the block].
template <class S>
void pack_gradients(const ConvWeightPass& p, const BlockRange& range, const S* grad, int64_t samples, S* packed) {
  constexpr int n = lanes<vec_t<S>>;
  const int64_t terms = samples * p.pixels;
  for (int64_t b = range.first; b < range.last; ++b) {
    const int64_t vector = range.blocks.first(b), vectors = range.blocks.first(b + 1) - vector;
    S* block = packed + (vector - range.first_vector()) * terms * n;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t row = (vector + v) * n, rows = smaller(n, p.rows - row);
      for (int64_t s = 0; s < samples; ++s)
        pack_columns(grad + (s * p.rows + row) * p.pixels, p.pixels, rows, p.pixels,
                     block + (s * p.pixels * vectors + v) * n, vectors * n);
    }
  }
}

// Adds the terms of one block to the sums of its weight and bias.
template <class S>
void add_terms(const ConvWeightPass& p, int64_t vectors, const S* packed, int64_t terms, const int64_t* offsets,
               const S* source, S* sums, S* bias) {
  using V = vec_t<S>;
  constexpr int n = lanes<V>;
  product_block(vectors, packed, terms, offsets, source, p.bases, p.columns, sums, true);
  V totals[max_vectors] = {};
  for (int64_t k = 0; k < terms; ++k)
    for (int64_t v = 0; v < vectors; ++v) totals[v] += load<V>(packed + (k * vectors + v) * n);
  for (int64_t v = 0; v < vectors; ++v) store(bias + v * n, load<V>(bias + v * n) + totals[v]);
}

template <class S>
void write_gradients(const ConvWeightPass& p, const BlockRange& range, int64_t task, const WeightScratch<S>& scratch) {
  using V = vec_t<S>;
  constexpr int n = lanes<V>;
  for (int64_t b = range.first; b < range.last; ++b) {
    const int64_t vector = range.blocks.first(b), vectors = range.blocks.first(b + 1) - vector;
    const int64_t own = vector - range.first_vector();
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t row = (vector + v) * n, rows = smaller(n, p.rows - row);
      unpack_columns(scratch.sums + (own * p.columns + v) * n, vectors * n, V{}, rows, p.columns,
                     static_cast<S*>(p.out) + (task * p.rows + row) * p.columns, p.columns);
      store_first(static_cast<S*>(p.out_bias) + task * p.rows + row, load<V>(scratch.bias + (own + v) * n), rows);
    }
  }
}

template <class S>
void weigh(const ConvWeightPass& p, void* memory, int64_t first_item, int64_t last_item) {
  constexpr int n = lanes<vec_t<S>>;
  const WeightScratch<S> scratch(p, static_cast<S*>(memory));
  Source<S> source(p.cut, p.images, p.source, scratch.images);
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t task = item / p.cut.num_ranges;
    const BlockRange range = BlockRange::of<S>(p.rows, item % p.cut.num_ranges, p.cut.num_ranges);
    for (int64_t i = 0; i < range.vectors() * n * p.columns; ++i) scratch.sums[i] = S(0);
    for (int64_t i = 0; i < range.vectors() * n; ++i) scratch.bias[i] = S(0);
    for (int64_t group = 0; group < p.cut.num_groups && range.first < range.last; ++group) {
      const int64_t samples = p.cut.samples_of(group), terms = samples * p.pixels;
      const S* images = source(task, group);
      const S* grad =
          static_cast<const S*>(p.grad) + (task * p.cut.num_samples + p.cut.first_sample(group)) * p.rows * p.pixels;
      pack_gradients(p, range, grad, samples, scratch.packed);
      for (int64_t first = 0; first < terms; first += max_terms)
        for (int64_t b = range.first; b < range.last; ++b) {
          const int64_t vectors = range.blocks.first(b + 1) - range.blocks.first(b);
          const int64_t own = range.blocks.first(b) - range.first_vector();
          add_terms(p, vectors, scratch.packed + (own * terms + first * vectors) * n, smaller(max_terms, terms - first),
                    p.offsets + first, images, scratch.sums + own * p.columns * n, scratch.bias + own * n);
        }
    }
    write_gradients(p, range, task, scratch);
  }
}

template <class S>
constexpr TaskConv2dKernels kernels{packed_elements<S>,      pack<S>, scratch_bytes<S>, convolve<S>,
                                    weight_scratch_bytes<S>, weigh<S>};

}  // namespace
}  // namespace MK_CAPABILITY

template <>
const TaskConv2dKernels& task_conv2d_kernels<CpuCapability::MK_CAPABILITY>(bool is_double) {
  return is_double ? kernels<double> : kernels<float>;
}

}  // namespace metakern
