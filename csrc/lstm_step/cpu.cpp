// The CPU operators: check the arguments, allocate the results, hand ranges of tiles to the loops of the instruction
// set in use. Written against torch's stable C++ interface, so that one build serves every torch from 2.11 on.
#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <tuple>

#include "../core/capability.h"
#include "../core/parallel.h"
#include "../core/result_cache.h"
#include "arguments.h"

namespace metakern {

namespace {

const LstmStepKernels& kernels(const LstmStepProblem& p) {
  const bool is_double = p.dtype == DType::float64;
  return with_cpu_capability(
      [&](auto capability) -> const LstmStepKernels& { return lstm_step_kernels<capability.value>(is_double); });
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  void* p = nullptr;
  check(posix_memalign(&p, 64, size_t(bytes > 0 ? bytes : 64)) == 0, "out of memory: lstm_step could not allocate ",
        bytes, " bytes of working memory");
  return Buffer(p);
}

LstmStepProblem cpu_problem(const Tensor& params, const Tensor& state, const std::vector<Tensor>& weights,
                            int64_t preprocess, double preprocess_scale, double output_scale, int64_t precision,
                            const char* name = "grads") {
  const auto p = checked_problem(params, state, weights, preprocess, preprocess_scale, output_scale, precision, name);
  check(p.state_dtype != DType::bfloat16,
        "state must be torch.float32 on the CPU, whose kernels keep no bfloat16, got torch.bfloat16");
  return p;
}

// The weights in the order in which the loops read them.
Buffer pack(const LstmStepKernels& k, const LstmStepProblem& p, const std::vector<Tensor>& weights, bool for_backward) {
  std::vector<Tensor> contiguous;
  std::vector<const void*> pointers;
  for (const Tensor& w : weights) {
    contiguous.push_back(as_contiguous(w));
    pointers.push_back(contiguous.back().const_data_ptr());
  }
  Buffer packed = allocate(k.packed_bytes(p, for_backward));
  k.pack(p, pointers.data(), for_backward, packed.get());
  return packed;
}

constexpr int64_t grain_tiles = 8;

void run_forward(const LstmStepKernels& k, const LstmStepProblem& p, const LstmStepForward& args) {
  parallel_for(0, p.num_tiles(), grain_tiles, [&](int64_t first, int64_t last) { k.forward(p, args, first, last); });
}

std::tuple<Tensor, Tensor> lstm_step(const Tensor& params_, const Tensor& grads_, const Tensor& state_,
                                     const std::vector<Tensor>& weights, int64_t preprocess, double preprocess_scale,
                                     double output_scale, int64_t precision) {
  check_like(grads_, "grads", params_, "params");
  const LstmStepProblem p =
      cpu_problem(params_, state_, weights, preprocess, preprocess_scale, output_scale, precision, "params");
  const Tensor params = as_contiguous(params_), grads = as_contiguous(grads_);
  const Tensor state = as_contiguous(state_);
  const LstmStepKernels& k = kernels(p);  // looked up once: packing and loops belong together
  const Buffer packed = pack(k, p, weights, false);
  Tensor new_params = torch::stable::new_empty(params, params.sizes());
  Tensor new_state = empty_result(state);
  run_forward(k, p,
              {packed.get(), params.const_data_ptr(), grads.const_data_ptr(), state.const_data_ptr(),
               new_params.mutable_data_ptr(), new_state.mutable_data_ptr()});
  return {new_params, new_state};
}

void lstm_step_(Tensor params, const Tensor& grads_, Tensor state, const std::vector<Tensor>& weights,
                int64_t preprocess, double preprocess_scale, double output_scale, int64_t precision) {
  check_like(grads_, "grads", params, "params");
  const LstmStepProblem p =
      cpu_problem(params, state, weights, preprocess, preprocess_scale, output_scale, precision, "params");
  const Tensor grads = as_contiguous(grads_);
  check_in_place(params, grads, state);  // the weights are packed before: they may lie anywhere
  const LstmStepKernels& k = kernels(p);
  const Buffer packed = pack(k, p, weights, false);
  run_forward(k, p,
              {packed.get(), params.const_data_ptr(), grads.const_data_ptr(), state.const_data_ptr(),
               params.mutable_data_ptr(), state.mutable_data_ptr()});
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> lstm_step_backward(const Tensor& grad_new_params_,
                                                                   const Tensor& grad_new_state_, const Tensor& grads_,
                                                                   const Tensor& state_,
                                                                   const std::vector<Tensor>& weights,
                                                                   int64_t preprocess, double preprocess_scale,
                                                                   double output_scale, int64_t precision) {
  const LstmStepProblem p = cpu_problem(grads_, state_, weights, preprocess, preprocess_scale, output_scale, precision);
  check_like(grad_new_params_, "grad_new_params", grads_, "grads");
  check_like(grad_new_state_, "grad_new_state", state_, "state");
  const Tensor grad_new_params = as_contiguous(grad_new_params_);
  const Tensor grad_new_state = as_contiguous(grad_new_state_);
  const Tensor grads = as_contiguous(grads_), state = as_contiguous(state_);
  const LstmStepKernels& k = kernels(p);
  const Buffer packed = pack(k, p, weights, true);
  Tensor grad_grads = torch::stable::new_empty(grads, grads.sizes());
  Tensor grad_state = empty_result(state);
  std::vector<Tensor> grad_weights;
  std::vector<void*> pointers;
  for (const Tensor& w : weights) {
    grad_weights.push_back(torch::stable::new_empty(w, w.sizes()));
    pointers.push_back(grad_weights.back().mutable_data_ptr());
  }
  const Buffer partials = allocate(num_groups(p) * p.flat_weights() * int64_t(sizeof(double)));
  const LstmStepBackward args{packed.get(),
                              grads.const_data_ptr(),
                              state.const_data_ptr(),
                              grad_new_params.const_data_ptr(),
                              grad_new_state.const_data_ptr(),
                              grad_grads.mutable_data_ptr(),
                              grad_state.mutable_data_ptr(),
                              static_cast<double*>(partials.get())};
  parallel_for(0, num_groups(p), 1, [&](int64_t first, int64_t last) {
    const Buffer scratch = allocate(k.scratch_bytes(p));
    k.backward(p, args, scratch.get(), first, last);
  });
  k.reduce(p, args.partials, pointers.data());
  return {grad_grads, grad_state, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CPU, m) {
  m.impl("lstm_step", TORCH_BOX(&lstm_step));
  m.impl("lstm_step_", TORCH_BOX(&lstm_step_));
  m.impl("lstm_step_backward", TORCH_BOX(&lstm_step_backward));
}

}  // namespace metakern
