// The CPU operators: check the arguments, allocate the results, hand ranges of tiles to the loops of the instruction
// set in use. Written against torch's stable C++ interface, so that one build serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "../checks.h"
#include "../math/preprocess.h"
#include "capability.h"
#include "lstm_step.h"
#include "result_cache.h"

namespace metakern {

const LstmStepKernels& lstm_step_kernels_baseline(bool is_double);
#ifdef METAKERN_X86_CAPABILITIES
const LstmStepKernels& lstm_step_kernels_avx2(bool is_double);
const LstmStepKernels& lstm_step_kernels_avx512(bool is_double);
#endif

namespace {

const LstmStepKernels& kernels(const LstmStepProblem& p) {
  const bool is_double = p.dtype == DType::float64;
#ifdef METAKERN_X86_CAPABILITIES
  switch (cpu_capability()) {
    case CpuCapability::avx512: return lstm_step_kernels_avx512(is_double);
    case CpuCapability::avx2: return lstm_step_kernels_avx2(is_double);
    default: break;
  }
#endif
  return lstm_step_kernels_baseline(is_double);
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

DType param_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: break;
  }
  check(false, name, " must be float32, float64, bfloat16 or float16");
  return DType::float32;
}

void check_weights(const LstmStepProblem& p, const std::vector<Tensor>& weights, ScalarType dtype) {
  const int64_t H = p.hidden_size;
  for (int l = 0; l < p.num_layers; ++l) {
    check_shape(weights[l * 4], "weights[weight_ih]", {4 * H, p.inputs(l)});
    check_shape(weights[l * 4 + 1], "weights[weight_hh]", {4 * H, H});
    check_shape(weights[l * 4 + 2], "weights[bias_ih]", {4 * H});
    check_shape(weights[l * 4 + 3], "weights[bias_hh]", {4 * H});
  }
  check_shape(weights[p.num_layers * 4], "weights[head.weight]", {1, H});
  check_shape(weights[p.num_layers * 4 + 1], "weights[head.bias]", {1});
  for (const Tensor& w : weights) {
    check_dtype(w, "weights", dtype);
    check_cpu(w, "weights");
  }
}

LstmStepProblem checked_problem(const Tensor& grads, const Tensor& state, const std::vector<Tensor>& weights,
                                int64_t preprocess, double preprocess_scale, double output_scale) {
  check(preprocess >= 0 && preprocess <= 2, "preprocess must be 0, 1 or 2, got ", preprocess);
  check(preprocess_scale > 0 && std::isfinite(preprocess_scale), "preprocess_scale must be positive and finite, got ",
        preprocess_scale);
  check(std::isfinite(output_scale), "output_scale must be finite, got ", output_scale);
  if (state.dim() != 5)
    fail("state must have 5 axes [tiles, L, 2, H, ", tile_lanes, "], got ", shape_string(state.sizes()));
  const int64_t L = state.size(1), H = state.size(3);
  check(L >= 1 && L <= max_layers, "state must have 1 to ", max_layers, " layers, got ", L);
  check(H >= 1 && H <= max_hidden, "state must have 1 to ", max_hidden, " hidden units, got ", H);
  LstmStepProblem p;
  p.num_coordinates = grads.numel();
  p.hidden_size = int(H);
  p.num_layers = int(L);
  p.preprocess = int(preprocess);
  p.num_features = num_features(Preprocess(preprocess));
  p.preprocess_scale = preprocess_scale;
  p.output_scale = output_scale;
  p.dtype = param_dtype(grads, "grads");
  check(weights.size() == size_t(p.num_weights()), "weights must hold 4 tensors a layer and 2 of the head, ",
        p.num_weights(), " for ", L, " layers, got ", weights.size());
  const ScalarType dtype = p.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  check_shape(state, "state", {p.num_tiles(), L, 2, H, tile_lanes});
  check_dtype(state, "state", dtype);
  check_cpu(grads, "grads");
  check_cpu(state, "state");
  check_weights(p, weights, dtype);
  return p;
}

// Asking first is cheaper than the dispatcher.
Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

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
  torch::stable::parallel_for(0, p.num_tiles(), grain_tiles,
                              [&](int64_t first, int64_t last) { k.forward(p, args, first, last); });
}

std::tuple<Tensor, Tensor> lstm_step(const Tensor& params_, const Tensor& grads_, const Tensor& state_,
                                     const std::vector<Tensor>& weights, int64_t preprocess, double preprocess_scale,
                                     double output_scale) {
  const LstmStepProblem p = checked_problem(grads_, state_, weights, preprocess, preprocess_scale, output_scale);
  check_same_shape(params_, "params", grads_, "grads");
  check_dtype(params_, "params", grads_.scalar_type());
  check_cpu(params_, "params");
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

bool overlap(const Tensor& a, const Tensor& b) {
  const char* x = static_cast<const char*>(a.const_data_ptr());
  const char* y = static_cast<const char*>(b.const_data_ptr());
  return x < y + b.numel() * int64_t(b.element_size()) && y < x + a.numel() * int64_t(a.element_size());
}

void lstm_step_(Tensor params, const Tensor& grads_, Tensor state, const std::vector<Tensor>& weights,
                int64_t preprocess, double preprocess_scale, double output_scale) {
  const LstmStepProblem p = checked_problem(grads_, state, weights, preprocess, preprocess_scale, output_scale);
  check_same_shape(params, "params", grads_, "grads");
  check_dtype(params, "params", grads_.scalar_type());
  check_cpu(params, "params");
  check(params.is_contiguous(), "params must be contiguous to be updated in place");
  check(state.is_contiguous(), "state must be contiguous to be updated in place");
  const Tensor grads = as_contiguous(grads_);
  // Tiles are read while others are written. (The weights are packed before: they may lie anywhere.)
  check(!overlap(params, state) && !overlap(grads, state), "params, grads and state must not share memory");
  check(!overlap(params, grads) || params.const_data_ptr() == grads.const_data_ptr(),
        "grads must not share a part of params' memory");
  const LstmStepKernels& k = kernels(p);
  const Buffer packed = pack(k, p, weights, false);
  run_forward(k, p,
              {packed.get(), params.const_data_ptr(), grads.const_data_ptr(), state.const_data_ptr(),
               params.mutable_data_ptr(), state.mutable_data_ptr()});
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> lstm_step_backward(
    const Tensor& grad_new_params_, const Tensor& grad_new_state_, const Tensor& grads_, const Tensor& state_,
    const std::vector<Tensor>& weights, int64_t preprocess, double preprocess_scale, double output_scale) {
  const LstmStepProblem p = checked_problem(grads_, state_, weights, preprocess, preprocess_scale, output_scale);
  check_same_shape(grad_new_params_, "grad_new_params", grads_, "grads");
  check_same_shape(grad_new_state_, "grad_new_state", state_, "state");
  check_dtype(grad_new_params_, "grad_new_params", grads_.scalar_type());
  check_dtype(grad_new_state_, "grad_new_state", state_.scalar_type());
  check_cpu(grad_new_params_, "grad_new_params");
  check_cpu(grad_new_state_, "grad_new_state");
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
  const Buffer partials = allocate(p.num_groups() * p.flat_weights() * int64_t(sizeof(double)));
  const LstmStepBackward args{packed.get(),
                              grads.const_data_ptr(),
                              state.const_data_ptr(),
                              grad_new_params.const_data_ptr(),
                              grad_new_state.const_data_ptr(),
                              grad_grads.mutable_data_ptr(),
                              grad_state.mutable_data_ptr(),
                              static_cast<double*>(partials.get())};
  torch::stable::parallel_for(0, p.num_groups(), 1, [&](int64_t first, int64_t last) {
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
