#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace metakern {
namespace {

struct InstructionSet {
  const char* name;
  bool (*is_supported)();
};

#if defined(__x86_64__)
#define MK_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#endif
#define MK_ROW(name, has, ...) {#name, [] { return bool(has); }},
constexpr InstructionSet table[] = {MK_INSTRUCTION_SETS(MK_ROW, )};
#undef MK_ROW

constexpr int count = sizeof(table) / sizeof(table[0]);

bool supported(int index) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  return table[index].is_supported();
}

CpuCapability parse(const std::string& name, const char* source) {
  std::string available;
  for (int i = 0; i < count; ++i) {
    if (!supported(i)) continue;
    if (name == table[i].name) return CpuCapability(i);
    available += std::string(available.empty() ? "" : ", ") + table[i].name;
  }
  throw std::invalid_argument(std::string(source) + " must be one of those available here (" + available + "), got '" +
                              name + "'");
}

CpuCapability initial() {
  if (const char* name = std::getenv("METAKERN_CPU_CAPABILITY"); name && *name)
    return parse(name, "METAKERN_CPU_CAPABILITY");
  for (int i = count - 1; i > 0; --i)
    if (supported(i)) return CpuCapability(i);
  return CpuCapability::baseline;
}

constexpr int unknown = -1;

// Detected by the first call. No lock, which a fork could leave locked: concurrent threads detect the same value.
std::atomic<int> current{unknown};

}  // namespace

std::vector<std::string> compiled_cpu_capabilities() {
  std::vector<std::string> names;
  for (const InstructionSet& row : table) names.push_back(row.name);
  return names;
}

std::vector<std::string> available_cpu_capabilities() {
  std::vector<std::string> found;
  for (int i = 0; i < count; ++i)
    if (supported(i)) found.push_back(table[i].name);
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
std::string cpu_capability_name() { return table[int(cpu_capability())].name; }
void set_cpu_capability(const std::string& name) { current = int(parse(name, "CPU capability")); }

}  // namespace metakern
