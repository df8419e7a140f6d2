// Checks of an operator's arguments. Every message names the argument, the expected and the actual value.
//
// The kind of error determines the exception type, the same in Python, however an operator is called:
//   ValueError    a shape, a size, a count, the value of an option:     check_value, fail_value
//   TypeError     a dtype, a type:                                      check_type, fail_type
//   RuntimeError  mismatched devices, overlapping memory, missing hardware or software:  check, fail
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

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

// Throw exceptions that become ValueError, TypeError and RuntimeError in Python.
[[noreturn]] void throw_value_error(const std::string& message);
[[noreturn]] void throw_type_error(const std::string& message);
[[noreturn]] void throw_runtime_error(const std::string& message);

template <class... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail_value(const Parts&... parts) {
  throw_value_error(joined(parts...));
}
template <class... Parts>
[[noreturn]] void fail_type(const Parts&... parts) {
  throw_type_error(joined(parts...));
}
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw_runtime_error(joined(parts...));
}

// The parts are evaluated in every call; if one is expensive, write `if (!condition) fail(...)` instead.
template <class... Parts>
void check_value(bool condition, const Parts&... parts) {
  if (!condition) fail_value(parts...);
}
template <class... Parts>
void check_type(bool condition, const Parts&... parts) {
  if (!condition) fail_type(parts...);
}
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

// A name may be anything that can be written to an ostream; the message is built only if a check fails.
template <class Name>
void check_shape(const Tensor& t, const Name& name, std::initializer_list<int64_t> expected) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(expected.begin(), expected.size());
  if (!equal_shapes(t.sizes(), shape))
    fail_value(name, " must have shape ", shape_string(shape), ", got ", shape_string(t.sizes()));
}

// Weights of which every task or copy has its own have one more axis in front, of this size; `shared` stands for none.
constexpr int64_t shared = -1;

template <class Name>
void check_shape(const Tensor& t, const Name& name, std::initializer_list<int64_t> expected, int64_t copies) {
  if (copies == shared) return check_shape(t, name, expected);
  std::vector<int64_t> shape{copies};
  shape.insert(shape.end(), expected.begin(), expected.end());
  if (!equal_shapes(t.sizes(), shape))
    fail_value(name, " must have shape ", shape_string(shape), ", got ", shape_string(t.sizes()));
}

template <class Name>
void check_same_shape(const Tensor& t, const Name& name, const Tensor& other, const char* other_name) {
  if (!equal_shapes(t.sizes(), other.sizes()))
    fail_value(name, " must have the shape of ", other_name, ", ", shape_string(other.sizes()), ", got ",
               shape_string(t.sizes()));
}

// A dtype's name as Python prints it.
std::string dtype_name(ScalarType dtype);

template <class Name>
void check_dtype(const Tensor& t, const Name& name, ScalarType expected) {
  if (t.scalar_type() != expected)
    fail_type(name, " must be ", dtype_name(expected), ", got ", dtype_name(t.scalar_type()));
}

template <class Name>
void check_same_dtype(const Tensor& t, const Name& name, const Tensor& other, const char* other_name) {
  if (t.scalar_type() != other.scalar_type())
    fail_type(name, " must have the dtype of ", other_name, ", ", dtype_name(other.scalar_type()), ", got ",
              dtype_name(t.scalar_type()));
}

std::string device_name(const Tensor& t);

template <class Name>
void check_on_cpu(const Tensor& t, const Name& name) {
  if (!t.is_cpu()) fail(name, " must be on the CPU, got ", device_name(t));
}

template <class Name>
void check_same_device(const Tensor& t, const Name& name, const Tensor& other, const char* other_name) {
  if (t.is_cpu() != other.is_cpu() || t.is_cuda() != other.is_cuda() ||
      (!t.is_cpu() && t.get_device_index() != other.get_device_index()))
    fail(name, " must be on the device of ", other_name, ", ", device_name(other), ", got ", device_name(t));
}

inline void check_contiguous_in_place(const Tensor& t, const char* name) {
  if (!t.is_contiguous())
    fail_value(name, " must be contiguous to be updated in place, got strides ", shape_string(t.strides()));
}

// Checks that one operand has the shape, dtype and device of another.
template <class Name>
void check_like(const Tensor& t, const Name& name, const Tensor& other, const char* other_name) {
  check_same_shape(t, name, other, other_name);
  check_same_dtype(t, name, other, other_name);
  check_same_device(t, name, other, other_name);
}

// Name of a list's element in messages.
struct Element {
  const char* list;
  size_t index;
  const char* meaning = nullptr;

  friend std::ostream& operator<<(std::ostream& out, const Element& e) {
    out << e.list << '[' << e.index << ']';
    return e.meaning == nullptr ? out : out << " (" << e.meaning << ')';
  }
};

// `dtype` if it is one of the four supported ones.
std::optional<DType> float_dtype(ScalarType dtype);

// The dtype of a tensor, checked to be a supported one; `choices` lists these in the message.
template <class Name>
DType float_dtype(const Tensor& t, const Name& name, const char* choices = "float32, float64, bfloat16 or float16") {
  const std::optional<DType> found = float_dtype(t.scalar_type());
  if (!found) fail_type(name, " must be ", choices, ", got ", dtype_name(t.scalar_type()));
  return *found;
}

inline bool overlap(const Tensor& a, const Tensor& b) {
  const char* x = static_cast<const char*>(a.const_data_ptr());
  const char* y = static_cast<const char*>(b.const_data_ptr());
  return x < y + b.numel() * int64_t(b.element_size()) && y < x + a.numel() * int64_t(a.element_size());
}

// Asking first is cheaper than a call through the dispatcher.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace metakern
