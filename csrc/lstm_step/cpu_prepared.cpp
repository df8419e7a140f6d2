// Small steps without a graph: packed weights are kept between calls, and arguments are addresses, not tensors.
//
// The dispatcher, the checks of a dozen tensors and the packing take several times as long as the arithmetic of a few
// coordinates. Every call compares the weights byte by byte with a copy, so changes are always detected.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../core/module.h"
#include "cpu_run.h"
#include "stages.h"

namespace metakern {
namespace {

class PreparedLstmStep {
 public:
  PreparedLstmStep(int hidden_size, int num_layers, int preprocess, double preprocess_scale, int64_t copies)
      : copies_(copies) {
    if (copies < 1) throw pybind11::value_error("copies must be at least 1, got " + std::to_string(copies));
    problem_.num_coordinates = 0;
    problem_.hidden_size = hidden_size;
    problem_.num_layers = num_layers;
    problem_.features = preprocess;
    problem_.head = 0;  // adds, and has no weights of its own; nor have these features
    if (!with_stages<float>(problem_, [&](const auto& stages) { problem_.stages = stages.sizes(preprocess); }))
      throw pybind11::value_error("preprocess must be 0, 1 or 2, got " + std::to_string(preprocess));
    problem_.preprocess_scale = preprocess_scale;
    problem_.beta1 = problem_.beta2 = 0;
    problem_.output_scale = 0;  // a run says it
    problem_.precision = Precision::highest;
    problem_.dtype = problem_.state_dtype = DType::float32;
    const int64_t H = hidden_size;
    for (int l = 0; l < num_layers; ++l)
      for (const int64_t count : {4 * H * problem_.inputs(l), 4 * H * H, 4 * H, 4 * H}) sizes_.push_back(count);
    sizes_.push_back(H);
    sizes_.push_back(1);
    for (int64_t& size : sizes_) copy_.resize(copy_.size() + size_t(copies * (size *= int64_t(sizeof(float)))));
  }

  // Addresses of contiguous float32 weights, [C, *shape] with C copies, which are read at every run.
  void set_weights(std::vector<uintptr_t> weights) {
    if (weights.size() != sizes_.size())
      throw pybind11::value_error("weights must have " + std::to_string(sizes_.size()) + " addresses, got " +
                                  std::to_string(weights.size()));
    weights_ = std::move(weights);
  }

  // Addresses of contiguous float32 memory: params, grads, new_params [N], state and new_state. The new may be the old.
  // With several copies of the weights, each has an equal run of whole tiles.
  void run(int64_t num_coordinates, double output_scale, uintptr_t params, uintptr_t grads, uintptr_t state,
           uintptr_t new_params, uintptr_t new_state) {
    if (weights_.empty()) throw pybind11::value_error("weights must be set before a run");
    if (copies_ > 1 && num_coordinates % (copies_ * tile_lanes) != 0)
      throw pybind11::value_error("num_coordinates must be a multiple of " + std::to_string(copies_ * tile_lanes) +
                                  ", got " + std::to_string(num_coordinates));
    LstmStepProblem problem = problem_;
    problem.num_coordinates = num_coordinates;
    problem.output_scale = output_scale;
    const LstmStepKernels& k = kernels_for(problem);
    if (&k != kernels_ || !are_packed()) repack(k);
    const std::shared_ptr<PackedCopies> packed = packed_;  // another thread may pack others meanwhile
    LstmStepForward args{};
    args.packed = packed->of(0);
    args.params = reinterpret_cast<const void*>(params);
    args.grads = reinterpret_cast<const void*>(grads);
    args.state = reinterpret_cast<const void*>(state);
    args.new_params = reinterpret_cast<void*>(new_params);
    args.new_state = reinterpret_cast<void*>(new_state);
    if (problem.num_tiles() <= grain_tiles)
      return forward_copies(k, problem, args, *packed, copies_, 0, problem.num_tiles());
    const pybind11::gil_scoped_release others_run;
    run_forward_copies(k, problem, args, *packed, copies_);
  }

 private:
  bool are_packed() const {
    const char* at = copy_.data();
    for (size_t i = 0; i < weights_.size(); at += copies_ * sizes_[i++])
      if (std::memcmp(at, reinterpret_cast<const void*>(weights_[i]), size_t(copies_ * sizes_[i])) != 0) return false;
    return true;
  }

  void repack(const LstmStepKernels& k) {
    std::vector<const void*> copied;
    char* at = copy_.data();
    for (size_t i = 0; i < weights_.size(); at += copies_ * sizes_[i++]) {
      std::memcpy(at, reinterpret_cast<const void*>(weights_[i]), size_t(copies_ * sizes_[i]));
      copied.push_back(at);
    }
    packed_ = std::make_shared<PackedCopies>(pack_copies(k, problem_, copied, sizes_, copies_));
    kernels_ = &k;
  }

  LstmStepProblem problem_;
  std::vector<uintptr_t> weights_;  // addresses
  std::vector<int64_t> sizes_;      // bytes of one copy of each weight
  std::vector<char> copy_;          // of the weights that are packed
  std::shared_ptr<PackedCopies> packed_;
  int64_t copies_;
  const LstmStepKernels* kernels_ = nullptr;
};

const ModulePart part([](pybind11::module_& m) {
  pybind11::class_<PreparedLstmStep>(m, "PreparedLstmStep", "Forward steps of lstm_step with weights that stay packed.")
      .def(pybind11::init<int, int, int, double, int64_t>(), pybind11::arg("hidden_size"), pybind11::arg("num_layers"),
           pybind11::arg("preprocess"), pybind11::arg("preprocess_scale"), pybind11::arg("copies") = 1)
      .def("set_weights", &PreparedLstmStep::set_weights)
      .def("run", &PreparedLstmStep::run);
});

}  // namespace
}  // namespace metakern
