#include "checks.h"

#include <pybind11/pybind11.h>

#include <stdexcept>

namespace metakern {

// pybind11, through which torch calls operators from Python, translates these exception types.
void throw_value_error(const std::string& message) { throw std::invalid_argument(message); }
void throw_type_error(const std::string& message) { throw pybind11::type_error(message); }
void throw_runtime_error(const std::string& message) { throw std::runtime_error(message); }

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::ComplexHalf: return "torch.complex32";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    default: return "another dtype";
  }
}

std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another kind of device";
}

std::optional<DType> float_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: return std::nullopt;
  }
}

}  // namespace metakern
