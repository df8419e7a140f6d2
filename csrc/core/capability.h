// Which of the instruction sets that the CPU kernels were compiled for serves this process.
#pragma once
#include <string>
#include <vector>

namespace metakern {

enum class CpuCapability : int { baseline = 0, avx2 = 1, avx512 = 2 };

// Compiled into this library and supported by this processor, slowest first.
std::vector<std::string> available_cpu_capabilities();

// The fastest available one, or METAKERN_CPU_CAPABILITY, or what set_cpu_capability said last.
CpuCapability cpu_capability();
std::string cpu_capability_name();

// Throws std::invalid_argument for a name that is unknown or not available here.
void set_cpu_capability(const std::string& name);

}  // namespace metakern
