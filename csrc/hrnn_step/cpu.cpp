// The CPU operators hrnn_step and hrnn_step_backward: check the arguments, allocate the results, hand ranges of tiles
// and segments to the loops of the instruction set in use.
#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../core/capability.h"
#include "../core/parallel.h"
#include "../core/result_cache.h"
#include "arguments.h"

namespace metakern {

namespace {

using TensorList = std::vector<Tensor>;

const HrnnStepKernels& kernels_for(const HrnnStepProblem& p) {
  const bool is_double = p.dtype == DType::float64;
  return with_cpu_capability(
      [&](auto capability) -> const HrnnStepKernels& { return hrnn_step_kernels<capability.value>(is_double); });
}

// Tensors that a call reads, made contiguous and kept alive.
class Contiguous {
 public:
  const void* operator()(const Tensor& t) {
    kept_.push_back(as_contiguous(t));
    return kept_.back().const_data_ptr();
  }

 private:
  TensorList kept_;
};

// The tensors' sizes, and the totals behind the last. `grads` have the shapes of params.
std::vector<HrnnTensor> sized_tensors(const HrnnStepProblem& p, const TensorList& grads) {
  std::vector<HrnnTensor> tensors(grads.size() + 1);
  int64_t tile = 0, piece = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    HrnnTensor& t = tensors[i];
    t.first_tile = tile;
    t.first_piece = piece;
    if (i == grads.size()) break;
    t.coordinates = segment_size(grads[i]);
    t.tiles = (t.coordinates + tile_lanes - 1) / tile_lanes;
    t.pieces = (t.tiles + piece_tiles - 1) / piece_tiles;
    tile += t.tiles * p.num_tasks;
    piece += t.pieces * p.num_tasks;
  }
  return tensors;
}

// Sets what forward and backward read.
void set_operands(const HrnnStepOperands& operands, Contiguous& kept, std::vector<HrnnTensor>& tensors,
                  HrnnStepArguments& args) {
  for (size_t i = 0; i < operands.grads.size(); ++i) {
    tensors[i].grads = kept(operands.grads[i]);
    tensors[i].state = kept(operands.states[i]);
  }
  const TensorList& w = operands.weights;
  args.weights = {{kept(w[0]), kept(w[1]), kept(w[2]), kept(w[3]), kept(w[4])}};
  args.biases = kept(operands.biases);
  args.mean_rate = kept(operands.mean_rate);
  args.tensors = tensors.data();
}

constexpr int64_t grain_segments = 64;

void over_tiles(const HrnnStepProblem& p, const HrnnStepArguments& args, decltype(HrnnStepKernels::forward) pass) {
  parallel_for(0, args.num_tiles(p), piece_tiles, [&](int64_t first, int64_t last) { pass(p, args, first, last); });
}
void over_segments(const HrnnStepProblem& p, const HrnnStepArguments& args, decltype(HrnnStepKernels::forward) pass) {
  parallel_for(0, p.num_segments(), grain_segments, [&](int64_t first, int64_t last) { pass(p, args, first, last); });
}

// The weights of every task, from tensors [T, *shape] whose first elements `first` points to.
std::vector<HrnnWeights> weights_by_task(const HrnnStepProblem& p, const HrnnWeights& first,
                                         const TensorList& weights) {
  std::vector<HrnnWeights> found(size_t(p.num_tasks), first);
  for (int64_t task = 0; task < p.num_tasks; ++task)
    for (int i = 0; i < hrnn_weights; ++i)
      found[task].data[i] = static_cast<const char*>(first.data[i]) +
                            task * (weights[i].numel() / p.num_tasks * int64_t(weights[i].element_size()));
  return found;
}

using Step = std::tuple<TensorList, TensorList, Tensor, TensorList, TensorList, Tensor>;

Step forward_step(const TensorList& params, const TensorList& grads, const TensorList& states, const Tensor& biases,
                  const Tensor& mean_rate, const TensorList& weights, bool stacked) {
  const HrnnStepOperands operands{grads, states, biases, mean_rate, weights};
  const HrnnStepProblem p = checked_hrnn_step(params, "params", operands, stacked);
  Contiguous kept;
  std::vector<HrnnTensor> tensors = sized_tensors(p, grads);
  HrnnStepArguments args{};
  set_operands(operands, kept, tensors, args);
  std::vector<HrnnWeights> of_tasks;
  if (stacked) {
    of_tasks = weights_by_task(p, args.weights, weights);
    args.task_weights = of_tasks.data();
  }
  TensorList new_params, new_states, attended, steps;
  for (size_t i = 0; i < params.size(); ++i) {
    HrnnTensor& t = tensors[i];
    t.params = kept(params[i]);
    new_params.push_back(empty_result(params[i]));
    new_states.push_back(empty_result(states[i]));
    steps.push_back(empty_result(states[i], {p.num_tasks, p.directions(), t.coordinates}));
    t.new_params = new_params[i].mutable_data_ptr();
    t.new_state = new_states[i].mutable_data_ptr();
    t.steps = steps[i].mutable_data_ptr();
    if (!p.attention) continue;
    attended.push_back(empty_result(params[i]));
    t.attended = attended[i].mutable_data_ptr();
  }
  Tensor means = torch::stable::new_empty(biases, {p.num_tensors, p.num_tasks, hrnn_means});
  Tensor rms = torch::stable::new_empty(biases, {p.num_tensors, p.num_tasks, p.directions()});
  args.means = means.mutable_data_ptr();
  args.rms = rms.mutable_data_ptr();
  const CachedMemory sums(args.num_pieces(p) * forward_sums * int64_t(sizeof(double)));
  args.sums = static_cast<double*>(sums.data());
  const HrnnStepKernels& k = kernels_for(p);
  over_tiles(p, args, k.forward);
  over_segments(p, args, k.finish_forward);
  over_tiles(p, args, k.apply);
  return {new_params, new_states, means, attended, steps, rms};
}

Step hrnn_step(const TensorList& params, const TensorList& grads, const TensorList& states, const Tensor& biases,
               const Tensor& mean_rate, const TensorList& weights) {
  return forward_step(params, grads, states, biases, mean_rate, weights, false);
}

// Each task has weights of its own: they have one more axis in front, of T.
std::tuple<TensorList, TensorList, Tensor, TensorList> hrnn_step_stacked(const TensorList& params,
                                                                         const TensorList& grads,
                                                                         const TensorList& states, const Tensor& biases,
                                                                         const Tensor& mean_rate,
                                                                         const TensorList& weights) {
  auto [new_params, new_states, means, attended, steps, rms] =
      forward_step(params, grads, states, biases, mean_rate, weights, true);
  return {new_params, new_states, means, attended};
}

// Checks of what only backward takes.
void check_incoming(const HrnnStepProblem& p, const TensorList& grad_new_params, const TensorList& grad_new_states,
                    const Tensor& grad_means, const TensorList& grad_attended, const TensorList& steps,
                    const Tensor& rms, const HrnnStepOperands& operands) {
  const size_t count = operands.grads.size();
  check_count(grad_new_params, "grad_new_params", count, "grads");
  check_count(grad_new_states, "grad_new_states", count, "grads");
  check_count(steps, "steps", count, "grads");
  const size_t attended = p.attention ? count : 0;
  check_value(grad_attended.size() == attended, "grad_attended must hold ", attended, " tensors, got ",
              grad_attended.size());
  for (size_t i = 0; i < count; ++i) {
    check_like(grad_new_params[i], Element{"grad_new_params", i}, operands.grads[i], "grads");
    check_like(grad_new_states[i], Element{"grad_new_states", i}, operands.states[i], "states");
    check_operand(steps[i], Element{"steps", i}, {p.num_tasks, p.directions(), segment_size(operands.grads[i])},
                  operands.biases);
    if (p.attention) check_like(grad_attended[i], Element{"grad_attended", i}, operands.grads[i], "grads");
  }
  check_operand(grad_means, "grad_means", {p.num_tensors, p.num_tasks, hrnn_means}, operands.biases);
  check_operand(rms, "rms", {p.num_tensors, p.num_tasks, p.directions()}, operands.biases);
}

// Runs the passes of backward, with working memory.
void run_backward(const HrnnStepProblem& p, HrnnStepArguments& args) {
  const HrnnStepKernels& k = kernels_for(p);
  const int64_t doubles = args.num_pieces(p) * (backward_sums > dot_sums ? backward_sums : dot_sums) +
                          args.num_groups(p) * flat_weights + p.num_segments() * 3;
  const CachedMemory memory(doubles * int64_t(sizeof(double)));
  args.sums = static_cast<double*>(memory.data());
  args.partials = args.sums + args.num_pieces(p) * backward_sums;
  args.factors = args.partials + args.num_groups(p) * flat_weights;
  args.grad_rates = args.factors + p.num_segments() * 2;
  over_tiles(p, args, k.dots);
  over_segments(p, args, k.finish_dots);
  parallel_for(0, args.num_groups(p), 1, [&](int64_t first, int64_t last) {
    const CachedMemory scratch(k.scratch_bytes);
    k.backward(p, args, scratch.data(), first, last);
  });
  over_segments(p, args, k.finish_backward);
  k.reduce(p, args);
}

std::tuple<TensorList, TensorList, Tensor, Tensor, TensorList> hrnn_step_backward(
    const TensorList& grad_new_params, const TensorList& grad_new_states, const Tensor& grad_means,
    const TensorList& grad_attended, const TensorList& grads, const TensorList& states, const TensorList& steps,
    const Tensor& rms, const Tensor& biases, const Tensor& mean_rate, const TensorList& weights) {
  const HrnnStepOperands operands{grads, states, biases, mean_rate, weights};
  const HrnnStepProblem p = checked_hrnn_step(grads, "grads", operands);
  check_incoming(p, grad_new_params, grad_new_states, grad_means, grad_attended, steps, rms, operands);
  Contiguous kept;
  std::vector<HrnnTensor> tensors = sized_tensors(p, grads);
  HrnnStepArguments args{};
  set_operands(operands, kept, tensors, args);
  TensorList grad_grads, grad_states, grad_weights;
  for (size_t i = 0; i < grads.size(); ++i) {
    HrnnTensor& t = tensors[i];
    t.grad_new_params = kept(grad_new_params[i]);
    t.grad_new_state = kept(grad_new_states[i]);
    t.saved_steps = kept(steps[i]);
    if (p.attention) t.grad_attended = kept(grad_attended[i]);
    grad_grads.push_back(empty_result(grads[i]));
    grad_states.push_back(empty_result(states[i]));
    t.grad_grads = grad_grads[i].mutable_data_ptr();
    t.grad_state = grad_states[i].mutable_data_ptr();
  }
  for (int i = 0; i < hrnn_weights; ++i) {
    grad_weights.push_back(torch::stable::new_empty(weights[i], weights[i].sizes()));
    args.grad_weights[i] = grad_weights[i].mutable_data_ptr();
  }
  Tensor grad_biases = torch::stable::new_empty(biases, biases.sizes());
  Tensor grad_mean_rate = torch::stable::new_empty(mean_rate, mean_rate.sizes());
  args.grad_biases = grad_biases.mutable_data_ptr();
  args.grad_mean_rate = grad_mean_rate.mutable_data_ptr();
  args.grad_means = kept(grad_means);
  args.saved_rms = kept(rms);
  run_backward(p, args);
  return {grad_grads, grad_states, grad_biases, grad_mean_rate, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) {
  m.impl("hrnn_step", TORCH_BOX(&hrnn_step));
  m.impl("hrnn_step_stacked", TORCH_BOX(&hrnn_step_stacked));
  m.impl("hrnn_step_backward", TORCH_BOX(&hrnn_step_backward));
}

}  // namespace metakern
