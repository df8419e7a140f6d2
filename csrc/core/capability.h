// Which of the instruction sets that the CPU kernels were compiled for serves this process.
#pragma once
#include <string>
#include <type_traits>
#include <vector>

#include "instruction_sets.h"

namespace metakern {

// All that this library holds kernels for, slowest first.
std::vector<std::string> compiled_cpu_capabilities();

// Those of them that this processor supports, slowest first.
std::vector<std::string> available_cpu_capabilities();

// The fastest available one, or METAKERN_CPU_CAPABILITY, or what set_cpu_capability said last.
CpuCapability cpu_capability();
std::string cpu_capability_name();

// Throws std::invalid_argument for a name that is unknown or not available here.
void set_cpu_capability(const std::string& name);

// f(a constant of type CpuCapability), for the one in use: its `value` may be a template's argument.
template <class F>
decltype(auto) with_cpu_capability(const F& f) {
  switch (cpu_capability()) {
#define MK_CASE(name, ...) \
  case CpuCapability::name: return f(std::integral_constant<CpuCapability, CpuCapability::name>());
    MK_INSTRUCTION_SETS(MK_CASE, )
#undef MK_CASE
  }
  return f(std::integral_constant<CpuCapability, CpuCapability::baseline>());  // no other value is ever set
}

}  // namespace metakern
