#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace metakern {
namespace {

const char* const names[] = {"baseline", "avx2", "avx512"};

bool supported(CpuCapability capability) {
#ifdef METAKERN_X86_CAPABILITIES
  __builtin_cpu_init();
  switch (capability) {
    case CpuCapability::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    case CpuCapability::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default: return true;
  }
#else
  return capability == CpuCapability::baseline;
#endif
}

CpuCapability parse(const std::string& name, const char* source) {
  std::string available;
  for (int i = 0; i < 3; ++i) {
    if (!supported(CpuCapability(i))) continue;
    if (name == names[i]) return CpuCapability(i);
    available += std::string(available.empty() ? "" : ", ") + names[i];
  }
  throw std::invalid_argument(std::string(source) + " must be one of those available here (" + available + "), got '" +
                              name + "'");
}

CpuCapability initial() {
  if (const char* name = std::getenv("METAKERN_CPU_CAPABILITY"); name && *name)
    return parse(name, "METAKERN_CPU_CAPABILITY");
  for (int i = 2; i > 0; --i)
    if (supported(CpuCapability(i))) return CpuCapability(i);
  return CpuCapability::baseline;
}

constexpr int unknown = -1;

// Found out by the first call. Without a lock, which a fork could leave locked: two threads find the same.
std::atomic<int> current{unknown};

}  // namespace

std::vector<std::string> available_cpu_capabilities() {
  std::vector<std::string> found;
  for (int i = 0; i < 3; ++i)
    if (supported(CpuCapability(i))) found.push_back(names[i]);
  return found;
}

CpuCapability cpu_capability() {
  int value = current;
  if (value == unknown) {
    value = int(initial());
    int expected = unknown;  // another thread may have set one in between
    if (!current.compare_exchange_strong(expected, value)) value = expected;
  }
  return CpuCapability(value);
}
std::string cpu_capability_name() { return names[int(cpu_capability())]; }
void set_cpu_capability(const std::string& name) { current = int(parse(name, "CPU capability")); }

}  // namespace metakern
