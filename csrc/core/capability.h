// Selection of the CPU kernels' instruction set at run time.
#pragma once
#include <string>
#include <type_traits>
#include <vector>

#include "instruction_sets.h"

namespace metakern {

// Instruction sets that this library has kernels for, slowest first.
std::vector<std::string> compiled_cpu_capabilities();

// Compiled instruction sets that this processor supports, slowest first.
std::vector<std::string> available_cpu_capabilities();

// The instruction set in use: the last one set by set_cpu_capability, else METAKERN_CPU_CAPABILITY, else the fastest.
CpuCapability cpu_capability();
std::string cpu_capability_name();

// Throws std::invalid_argument for a name that is unknown or not available here.
void set_cpu_capability(const std::string& name);

// Calls f with the instruction set in use as an integral constant, whose `value` may be a template argument.
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
