// The CPU operators task_conv2d, task_conv2d_input and task_conv2d_weight: check the arguments, lay out the tables of a
// product (cpu.h), allocate the results, hand ranges of items to the loops of the instruction set in use.
#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../core/capability.h"
#include "../core/parallel.h"
#include "../core/result_cache.h"
#include "arguments.h"

namespace metakern {

namespace {

using Pair = std::vector<int64_t>;

// Pixels of a group of samples at least, so that packed weights are read for many; elements of its images at most.
constexpr int64_t group_pixels = 512, group_elements = int64_t(1) << 17;

// Items of a call at least, if there are rows enough, and rows of a range at least: work for several threads.
constexpr int64_t min_items = 16, range_rows = 32;

const TaskConv2dKernels& kernels_for(const TaskConv2dProblem& p) {
  return with_cpu_capability(
      [&](auto capability) -> const TaskConv2dKernels& { return task_conv2d_kernels<capability.value>(p.is_double); });
}

ConvCut cut(const TaskConv2dProblem& p, const ConvImages& images, int64_t pixels, int64_t rows, bool groups_are_items) {
  ConvCut c{};
  c.num_tasks = p.num_tasks;
  c.num_samples = p.num_samples;
  const int64_t wanted = (group_pixels + pixels - 1) / std::max<int64_t>(pixels, 1);
  const int64_t held = group_elements / std::max<int64_t>(images.sample(), 1);
  c.group_samples = std::clamp<int64_t>(std::min(wanted, held), 1, std::max<int64_t>(p.num_samples, 1));
  c.num_groups = (p.num_samples + c.group_samples - 1) / c.group_samples;
  // Groups of sizes as equal as possible.
  if (c.num_groups > 0) c.group_samples = (p.num_samples + c.num_groups - 1) / c.num_groups;
  const int64_t units = std::max<int64_t>(p.num_tasks * (groups_are_items ? c.num_groups : 1), 1);
  c.num_ranges = std::clamp<int64_t>((min_items + units - 1) / units, 1, (rows + range_rows - 1) / range_rows);
  return c;
}

// The tables of a phase, which its pointers point into.
struct PhaseTables {
  std::vector<int64_t> offsets, elements, bases;
};

// Places of the pixels [rows, columns] of each sample of a group, which lie `step` apart in the source.
std::vector<int64_t> pixel_bases(const ConvCut& cut, const ConvImages& images, const int64_t (&size)[2],
                                 const int64_t (&step)[2]) {
  std::vector<int64_t> bases;
  bases.reserve(size_t(cut.group_samples * size[0] * size[1]));
  for (int64_t s = 0; s < cut.group_samples; ++s)
    for (int64_t i = 0; i < size[0]; ++i)
      for (int64_t j = 0; j < size[1]; ++j)
        bases.push_back(s * images.sample() + i * step[0] * images.padded[1] + j * step[1]);
  return bases;
}

// x with its borders, as y's pixels read it.
ConvImages images_of_x(const TaskConv2dProblem& p) {
  ConvImages images{};
  images.channels = p.in_channels;
  for (int axis = 0; axis < 2; ++axis) {
    images.size[axis] = p.size[axis];
    images.before[axis] = p.padding[axis];
    images.padded[axis] = p.size[axis] + 2 * p.padding[axis];
  }
  return images;
}

// Places of the terms (c, kh, kw) in x.
std::vector<int64_t> kernel_offsets(const TaskConv2dProblem& p, const ConvImages& images) {
  std::vector<int64_t> offsets;
  offsets.reserve(size_t(p.in_channels * p.taps()));
  for (int64_t c = 0; c < p.in_channels; ++c)
    for (int64_t i = 0; i < p.kernel[0]; ++i)
      for (int64_t j = 0; j < p.kernel[1]; ++j) offsets.push_back(c * images.plane() + i * images.padded[1] + j);
  return offsets;
}

// Runs the passes of y or of the gradient by x.
void run(const TaskConv2dProblem& p, ConvPass& pass) {
  const int64_t items = pass.cut.num_tasks * pass.cut.num_groups * pass.cut.num_ranges;
  if (items == 0) return;
  const TaskConv2dKernels& k = kernels_for(p);
  const int64_t bytes = p.is_double ? 8 : 4;
  const CachedMemory packed(std::max<int64_t>(pass.cut.num_tasks * k.packed_elements(pass) * bytes, 1));
  pass.packed = packed.data();
  parallel_for(0, pass.cut.num_tasks, 1, [&](int64_t first, int64_t last) { k.pack(pass, first, last); });
  const int64_t scratch_bytes = std::max<int64_t>(k.scratch_bytes(pass), 1);
  parallel_for(0, items, 1, [&](int64_t first, int64_t last) {
    const CachedMemory scratch(scratch_bytes);
    k.convolve(pass, scratch.data(), first, last);
  });
}

Tensor task_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Pair& stride,
                   const Pair& padding) {
  const TaskConv2dProblem p = checked_conv(x, weight, bias, stride, padding);
  const Tensor source = as_contiguous(x), kernel = as_contiguous(weight);
  const Tensor biases = bias ? as_contiguous(*bias) : source;
  Tensor y = empty_result(x, {p.num_tasks, p.num_samples, p.out_channels, p.out_size[0], p.out_size[1]});
  ConvPass pass{};
  pass.images = images_of_x(p);
  pass.cut = cut(p, pass.images, p.out_pixels(), p.out_channels, true);
  PhaseTables tables{kernel_offsets(p, pass.images), {}, pixel_bases(pass.cut, pass.images, p.out_size, p.stride)};
  pass.terms = p.in_channels * p.taps();
  for (int64_t k = 0; k < pass.terms; ++k) tables.elements.push_back(k);
  const ConvPhase phase{pass.terms,          0,      tables.offsets.data(),         tables.elements.data(),
                        tables.bases.data(), {0, 0}, {p.out_size[0], p.out_size[1]}};
  pass.phases = &phase;
  pass.num_phases = 1;
  pass.rows = p.out_channels;
  pass.weight_pitch = pass.terms;
  pass.weight_elements = p.out_channels * pass.terms;
  for (int axis = 0; axis < 2; ++axis) pass.out_size[axis] = p.out_size[axis], pass.step[axis] = 1;
  pass.source = source.const_data_ptr();
  pass.weight = kernel.const_data_ptr();
  pass.bias = bias ? biases.const_data_ptr() : nullptr;
  pass.out = y.mutable_data_ptr();
  run(p, pass);
  return y;
}

// Quotient rounded down, of a positive divisor.
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Of the pixels of x along one axis that leave a remainder by the stride: their number, and the taps that reach them,
// each with the step from a pixel's index to the pixel of y.
struct AxisPhase {
  int64_t first, count;
  std::vector<int64_t> taps, shifts;

  static AxisPhase of(const TaskConv2dProblem& p, int axis, int64_t remainder) {
    AxisPhase found{remainder, 0, {}, {}};
    const int64_t stride = p.stride[axis];
    if (remainder < p.size[axis]) found.count = (p.size[axis] - remainder - 1) / stride + 1;
    for (int64_t tap = 0; tap < p.kernel[axis]; ++tap) {
      const int64_t position = remainder + p.padding[axis] - tap, shift = floor_div(position, stride);
      if (shift * stride != position) continue;
      found.taps.push_back(tap);
      found.shifts.push_back(shift);
    }
    return found;
  }
};

// The phases of both axes; those without a pixel are left out.
std::vector<AxisPhase> axis_phases(const TaskConv2dProblem& p, int axis) {
  std::vector<AxisPhase> found;
  for (int64_t remainder = 0; remainder < std::min(p.stride[axis], p.size[axis]); ++remainder)
    found.push_back(AxisPhase::of(p, axis, remainder));
  return found;
}

// y's gradient with the borders that the phases reach.
ConvImages images_of_grad(const TaskConv2dProblem& p, const std::vector<AxisPhase> (&phases)[2]) {
  ConvImages images{};
  images.channels = p.out_channels;
  for (int axis = 0; axis < 2; ++axis) {
    int64_t before = 0, end = p.out_size[axis];
    for (const AxisPhase& phase : phases[axis])
      for (const int64_t shift : phase.shifts) {
        before = std::max(before, -shift);
        end = std::max(end, phase.count + shift);
      }
    images.size[axis] = p.out_size[axis];
    images.before[axis] = before;
    images.padded[axis] = before + end;
  }
  return images;
}

PhaseTables phase_tables(const TaskConv2dProblem& p, const ConvCut& cut, const ConvImages& images,
                         const AxisPhase& rows, const AxisPhase& columns) {
  PhaseTables tables;
  for (int64_t o = 0; o < p.out_channels; ++o)
    for (size_t i = 0; i < rows.taps.size(); ++i)
      for (size_t j = 0; j < columns.taps.size(); ++j) {
        tables.offsets.push_back(o * images.plane() + (rows.shifts[i] + images.before[0]) * images.padded[1] +
                                 columns.shifts[j] + images.before[1]);
        tables.elements.push_back(o * p.in_channels * p.taps() + rows.taps[i] * p.kernel[1] + columns.taps[j]);
      }
  tables.bases = pixel_bases(cut, images, {rows.count, columns.count}, {1, 1});
  return tables;
}

Tensor task_conv2d_input(const Tensor& grad, const Tensor& weight, const Pair& size, const Pair& stride,
                         const Pair& padding) {
  const TaskConv2dProblem p = checked_conv_input(grad, weight, size, stride, padding);
  const Tensor source = as_contiguous(grad), kernel = as_contiguous(weight);
  Tensor grad_x = empty_result(grad, {p.num_tasks, p.num_samples, p.in_channels, p.size[0], p.size[1]});
  const std::vector<AxisPhase> axes[2] = {axis_phases(p, 0), axis_phases(p, 1)};
  ConvPass pass{};
  pass.images = images_of_grad(p, axes);
  pass.cut = cut(p, pass.images, p.pixels(), p.in_channels, true);
  std::vector<PhaseTables> tables;
  std::vector<ConvPhase> phases;
  tables.reserve(axes[0].size() * axes[1].size());
  for (const AxisPhase& rows : axes[0])
    for (const AxisPhase& columns : axes[1]) {
      tables.push_back(phase_tables(p, pass.cut, pass.images, rows, columns));
      const PhaseTables& t = tables.back();
      const int64_t terms = int64_t(t.offsets.size());
      phases.push_back(ConvPhase{terms,
                                 pass.terms,
                                 t.offsets.data(),
                                 t.elements.data(),
                                 t.bases.data(),
                                 {rows.first, columns.first},
                                 {rows.count, columns.count}});
      pass.terms += terms;
    }
  pass.phases = phases.data();
  pass.num_phases = int64_t(phases.size());
  pass.rows = p.in_channels;
  pass.weight_pitch = p.taps();
  pass.weight_elements = p.out_channels * p.in_channels * p.taps();
  for (int axis = 0; axis < 2; ++axis) pass.out_size[axis] = p.size[axis], pass.step[axis] = p.stride[axis];
  pass.source = source.const_data_ptr();
  pass.weight = kernel.const_data_ptr();
  pass.out = grad_x.mutable_data_ptr();
  run(p, pass);
  return grad_x;
}

std::tuple<Tensor, Tensor> task_conv2d_weight(const Tensor& x, const Tensor& grad, const Pair& kernel,
                                              const Pair& stride, const Pair& padding) {
  const TaskConv2dProblem p = checked_conv_weight(x, grad, kernel, stride, padding);
  const Tensor source = as_contiguous(x), above = as_contiguous(grad);
  Tensor grad_weight = empty_result(x, {p.num_tasks, p.out_channels, p.in_channels, p.kernel[0], p.kernel[1]});
  Tensor grad_bias = empty_result(x, {p.num_tasks, p.out_channels});
  ConvWeightPass pass{};
  pass.images = images_of_x(p);
  pass.cut = cut(p, pass.images, p.out_pixels(), p.out_channels, false);
  const std::vector<int64_t> bases = kernel_offsets(p, pass.images);
  const std::vector<int64_t> offsets = pixel_bases(pass.cut, pass.images, p.out_size, p.stride);
  pass.rows = p.out_channels;
  pass.columns = p.in_channels * p.taps();
  pass.pixels = p.out_pixels();
  pass.bases = bases.data();
  pass.offsets = offsets.data();
  pass.source = source.const_data_ptr();
  pass.grad = above.const_data_ptr();
  pass.out = grad_weight.mutable_data_ptr();
  pass.out_bias = grad_bias.mutable_data_ptr();
  const TaskConv2dKernels& k = kernels_for(p);
  const int64_t scratch_bytes = std::max<int64_t>(k.weight_scratch_bytes(pass), 1);
  parallel_for(0, p.num_tasks * pass.cut.num_ranges, 1, [&](int64_t first, int64_t last) {
    const CachedMemory scratch(scratch_bytes);
    k.weigh(pass, scratch.data(), first, last);
  });
  return {grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) {
  m.impl("task_conv2d", TORCH_BOX(&task_conv2d));
  m.impl("task_conv2d_input", TORCH_BOX(&task_conv2d_input));
  m.impl("task_conv2d_weight", TORCH_BOX(&task_conv2d_weight));
}

}  // namespace metakern
