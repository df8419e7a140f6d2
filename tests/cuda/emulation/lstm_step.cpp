// csrc/lstm_step/cuda_kernels.cu on the emulated device, behind a C interface for ctypes (tests/cuda/emulator.py).
#include "../../../csrc/lstm_step/cuda_kernels.cu"

extern "C" {

int64_t workspace_bytes(const metakern::LstmStepProblem* p) { return metakern::cuda_lstm_step_workspace_bytes(*p); }

int forward(const metakern::LstmStepProblem* p, const metakern::CudaLstmStepForward* args, const char** call) {
  const auto result = metakern::cuda_lstm_step_forward(*p, *args, nullptr);
  *call = result.call;
  return result.error;
}

int backward(const metakern::LstmStepProblem* p, const metakern::CudaLstmStepBackward* args, const char** call) {
  const auto result = metakern::cuda_lstm_step_backward(*p, *args, nullptr);
  *call = result.call;
  return result.error;
}

}  // extern "C"
