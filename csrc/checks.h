// Checks of an operator's arguments. Every message names the argument, what was expected and what came.
//
// They guard memory: an operator that is called directly, past the Python function, must not read out of bounds. They
// raise RuntimeError; the Python functions check the same things first and raise ValueError or TypeError.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace metakern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Range>
std::string shape_string(const Range& shape) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << ']';
  return out.str();
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream out;
  (out << ... << parts);
  throw std::runtime_error(out.str());
}

inline void check_shape(const Tensor& t, const char* name, const std::vector<int64_t>& expected) {
  const auto sizes = t.sizes();
  bool equal = sizes.size() == expected.size();
  for (size_t i = 0; equal && i < expected.size(); ++i) equal = sizes[i] == expected[i];
  check(equal, name, " must have shape ", shape_string(expected), ", got ", shape_string(sizes));
}

inline void check_same_shape(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  const auto a = t.sizes(), b = other.sizes();
  bool equal = a.size() == b.size();
  for (size_t i = 0; equal && i < a.size(); ++i) equal = a[i] == b[i];
  check(equal, name, " must have the shape of ", other_name, ", ", shape_string(b), ", got ", shape_string(a));
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "another dtype";
  }
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType expected) {
  check(t.scalar_type() == expected, name, " must be ", dtype_name(expected), ", got ", dtype_name(t.scalar_type()));
}

inline void check_cpu(const Tensor& t, const char* name) {
  check(t.is_cpu(), name, " must be on the CPU like the other arguments");
}

}  // namespace metakern
