// Table of the instruction sets that CPU kernels are compiled for; setup.py reads it too.
//
// An operator's csrc/<op>/cpu_kernel*.cpp is compiled once for each; core/capability.h selects one at run time. No
// torch header and no standard library: both would be compiled once per instruction set.
#pragma once

#if defined(__x86_64__)
#define MK_ON_X86(...) __VA_ARGS__
#else
#define MK_ON_X86(...)
#endif

// X(name, whether this processor has it, further options of the compiler, context), slowest first. setup.py compiles
// with -m<feature> for each MK_HAS("<feature>"). GCC before 13 takes its own AVX-512 headers for uninitialized (GCC bug
// 105593); Clang knows the options against that too.
// clang-format off
#define MK_INSTRUCTION_SETS(X, ...)                                                                                    \
  X(baseline, true, "", __VA_ARGS__)                                                                                   \
  MK_ON_X86(X(avx2, MK_HAS("avx2") && MK_HAS("fma"), "", __VA_ARGS__))                                                 \
  MK_ON_X86(X(avx512,                                                                                                  \
              MK_HAS("avx512f") && MK_HAS("avx512dq") && MK_HAS("avx512bw") && MK_HAS("avx512vl") && MK_HAS("fma"),    \
              "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option", __VA_ARGS__))
// clang-format on

namespace metakern {

#define MK_ENUMERATOR(name, ...) name,
enum class CpuCapability : int { MK_INSTRUCTION_SETS(MK_ENUMERATOR, ) };
#undef MK_ENUMERATOR

// In an operator's cpu.h: declares `const Table& function<CpuCapability::name>(arguments)` for every instruction set.
// Each compilation of cpu_kernel.cpp defines its own, `function<CpuCapability::MK_CAPABILITY>`.
#define MK_DECLARE_KERNELS(Table, function, ...) \
  template <CpuCapability>                       \
  const Table& function(__VA_ARGS__);            \
  MK_INSTRUCTION_SETS(MK_DECLARE_KERNELS_OF, Table, function, __VA_ARGS__)
#define MK_DECLARE_KERNELS_OF(name, has, options, Table, function, ...) \
  template <>                                                           \
  const Table& function<CpuCapability::name>(__VA_ARGS__);

}  // namespace metakern
