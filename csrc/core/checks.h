// Checks of an operator's arguments. Every message names the argument, what was expected and what came.
//
// They guard memory: an operator that is called directly, past the Python function, must not read out of bounds. They
// raise RuntimeError; the Python functions check the same things first and raise ValueError or TypeError.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtypes.h"

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
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  throw std::runtime_error(out.str());
}

// The parts are evaluated in every call: where one of them costs something, write `if (!condition) fail(...)`.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

template <class A, class B>
bool equal_shapes(const A& a, const B& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(expected.begin(), expected.size());
  if (!equal_shapes(t.sizes(), shape))
    fail(name, " must have shape ", shape_string(shape), ", got ", shape_string(t.sizes()));
}

inline void check_same_shape(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  if (!equal_shapes(t.sizes(), other.sizes()))
    fail(name, " must have the shape of ", other_name, ", ", shape_string(other.sizes()), ", got ",
         shape_string(t.sizes()));
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

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another kind of device";
}

inline void check_on_cpu(const Tensor& t, const char* name) {
  if (!t.is_cpu()) fail(name, " must be on the CPU, got ", device_name(t));
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  if (t.is_cpu() != other.is_cpu() || t.is_cuda() != other.is_cuda() ||
      (!t.is_cpu() && t.get_device_index() != other.get_device_index()))
    fail(name, " must be on the device of ", other_name, ", ", device_name(other), ", got ", device_name(t));
}

inline DType float_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: break;
  }
  check(false, name, " must be float32, float64, bfloat16 or float16");
  return DType::float32;
}

// An operand of the shape, dtype and device of another.
inline void check_like(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  check_same_shape(t, name, other, other_name);
  check_dtype(t, name, other.scalar_type());
  check_same_device(t, name, other, other_name);
}

inline bool overlap(const Tensor& a, const Tensor& b) {
  const char* x = static_cast<const char*>(a.const_data_ptr());
  const char* y = static_cast<const char*>(b.const_data_ptr());
  return x < y + b.numel() * int64_t(b.element_size()) && y < x + a.numel() * int64_t(a.element_size());
}

// Asking first is cheaper than the dispatcher.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace metakern
