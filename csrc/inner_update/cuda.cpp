// inner_update's CUDA operator: check the arguments, allocate the results, launch on the current stream of the tensors'
// device.
#include "cuda.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../core/torch_device.h"
#include "arguments.h"

namespace metakern {
namespace {

std::vector<Tensor> inner_update(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                 const std::vector<Tensor>& lr, double rate, int64_t step,
                                 std::optional<double> clip_norm, std::optional<Tensor> active) {
  check_value(!params.empty(), "params must hold a tensor");
  const OnDevice on(params[0]);
  InnerUpdateArguments args = checked_inner_update(params, grads, lr, rate, step, clip_norm, active);
  std::vector<Tensor> updated;
  for (size_t i = 0; i < params.size(); ++i) {
    updated.push_back(empty_like("the new parameters", args.params[i]));
    args.tensors[i].updated = updated[i].mutable_data_ptr();
  }
  args.problem.tensors = args.tensors.data();
  const int64_t workspace_bytes = cuda_inner_update_workspace_bytes(args.problem);
  const Tensor workspace = allocated("sums of squared gradients", workspace_bytes, [&] {
    return torch::stable::new_empty(params[0], {workspace_bytes}, ScalarType::Byte);
  });
  check_cuda(cuda_inner_update(args.problem, workspace.mutable_data_ptr(), on.stream()));
  return updated;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakern, CUDA, m) { m.impl("inner_update", TORCH_BOX(&inner_update)); }

}  // namespace metakern
