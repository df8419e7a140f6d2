// csrc/inner_update/cuda_kernels.cu on the emulated device, behind a C interface for
// tests/cuda/inner_update_emulator.py.
#include "../../../csrc/inner_update/cuda_kernels.cu"

extern "C" {

int64_t workspace_bytes(const metakern::InnerUpdateProblem* p) {
  return metakern::cuda_inner_update_workspace_bytes(*p);
}

int update(const metakern::InnerUpdateProblem* p, void* workspace, const char** call) {
  const auto result = metakern::cuda_inner_update(*p, workspace, nullptr);
  *call = result.call;
  return result.error;
}

}  // extern "C"
