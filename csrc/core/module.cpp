// The Python module metakern._C: build information, shared functions, and the operators' own parts.
#include "module.h"

#include <pybind11/stl.h>

#include "capability.h"
#include "dtypes.h"
#include "result_cache.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of metakern; importing it registers the operators torch.ops.metakern.*";
  m.attr("compiler") = METAKERN_COMPILER;
  m.attr("torch_version") = METAKERN_TORCH_VERSION;
#ifdef METAKERN_CUDA_ARCHITECTURES
  m.attr("cuda_architectures") = METAKERN_CUDA_ARCHITECTURES;
  m.attr("nvcc") = METAKERN_NVCC;
#else
  m.attr("cuda_architectures") = "";
  m.attr("nvcc") = "";
#endif
  m.attr("tile_lanes") = metakern::tile_lanes;
  m.def("compiled_cpu_capabilities", &metakern::compiled_cpu_capabilities,
        "Instruction sets that are compiled in, slowest first.");
  m.def("available_cpu_capabilities", &metakern::available_cpu_capabilities,
        "Instruction sets that are compiled in and supported by this processor, slowest first.");
  m.def("cpu_capability", &metakern::cpu_capability_name,
        "The instruction set in use; ValueError if METAKERN_CPU_CAPABILITY names one that is not available.");
  m.def("set_cpu_capability", &metakern::set_cpu_capability, pybind11::arg("name"),
        "Use another of the available instruction sets from now on.");
  m.def("empty_cache", &metakern::empty_cache, "Free the memory that is kept for large results.");
  m.def("cached_bytes", &metakern::cached_bytes, "Bytes that are kept for large results.");
  metakern::ModulePart::define_all(m);
}
