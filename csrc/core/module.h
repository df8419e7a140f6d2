// An operator's additions to the Python module metakern._C.
#pragma once
#include <pybind11/pybind11.h>

namespace metakern {

// Define a static one in the operator's schema.cpp:
//
//   const ModulePart part([](pybind11::module_& m) { m.attr("max_layers") = max_layers; });
class ModulePart {
 public:
  using Define = void (*)(pybind11::module_&);

  explicit ModulePart(Define define) : define_(define), next_(first_) { first_ = this; }
  ModulePart(const ModulePart&) = delete;
  ModulePart& operator=(const ModulePart&) = delete;

  // Calls every part's function, when the module is imported.
  static void define_all(pybind11::module_& m) {
    for (const ModulePart* part = first_; part != nullptr; part = part->next_) part->define_(m);
  }

 private:
  Define define_;
  ModulePart* next_;
  inline static ModulePart* first_ = nullptr;  // initialised at compile time, thus before any part
};

}  // namespace metakern
