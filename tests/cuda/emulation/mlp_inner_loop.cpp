// csrc/mlp_inner_loop/cuda_kernels.cu on the emulated device, behind a C interface for
// tests/cuda/mlp_inner_loop_emulator.py.
#include "../../../csrc/mlp_inner_loop/cuda_kernels.cu"

extern "C" {

int64_t shared_bytes(const metakern::MlpInnerLoopProblem* p, int placement) {
  return metakern::mlp_layout(*p, metakern::MlpPlacement(placement)).elements * metakern::element_bytes(*p);
}

int plan(const metakern::MlpInnerLoopProblem* p, int mode, bool with_grads, metakern::MlpCudaPlan* out,
         const char** call) {
  const auto result = metakern::cuda_mlp_plan(*p, metakern::MlpMode(mode), with_grads, out);
  *call = result.call;
  return result.error;
}

int inner_loop(const metakern::MlpInnerLoopProblem* p, const metakern::MlpCudaCall* arguments,
               const metakern::MlpCudaPlan* plan, const char** call) {
  const auto result = metakern::cuda_mlp_inner_loop(*p, *arguments, *plan, nullptr);
  *call = result.call;
  return result.error;
}

int reduce(const metakern::MlpCudaReduction* r, const char** call) {
  const auto result = metakern::cuda_mlp_reduce(*r, nullptr);
  *call = result.call;
  return result.error;
}

}  // extern "C"
