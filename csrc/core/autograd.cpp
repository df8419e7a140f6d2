// The Python module metakern._autograd: calls of operators that autograd records as nodes of C++.
//
// A node of Python, an autograd.Function, costs as much as a small inner loop. This library uses torch's C++ interface
// of autograd, which changes from version to version, so it is apart from metakern._C: Python loads it only with the
// torch that it was built with, and records calls by an autograd.Function otherwise.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace metakern {
namespace {

using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Stack = std::vector<IValue>;

// Kinds of arguments and results, by their types in the schema.
enum class Kind {
  tensor,
  optional_tensor,
  tensors,
  integer,
  floating,
  optional_floating,
  boolean,
  integers,
  floatings
};

Kind kind_of(const c10::Type& type) {
  const std::string name = type.str();
  if (name == "Tensor") return Kind::tensor;
  if (name == "Tensor?") return Kind::optional_tensor;
  if (name == "Tensor[]") return Kind::tensors;
  if (name == "int") return Kind::integer;
  if (name == "float") return Kind::floating;
  if (name == "float?") return Kind::optional_floating;
  if (name == "bool") return Kind::boolean;
  if (name == "int[]" || name.rfind("int[", 0) == 0) return Kind::integers;
  if (name == "float[]") return Kind::floatings;
  throw std::invalid_argument("no argument of an operator is " + name);
}

bool holds_tensors(Kind kind) { return kind <= Kind::tensors; }

// Where the backward operator's arguments come from.
enum class Source { gradient, result, argument };

// An operator and its backward operator, whose arguments and results are matched by position. Plans are never freed, as
// nodes hold their addresses; there is one for an operator.
struct Plan {
  c10::OperatorHandle forward, backward;
  std::vector<Kind> arguments, results;
  std::vector<size_t> differentiable;                // arguments that get gradients
  std::vector<size_t> others;                        // other arguments that hold tensors
  std::vector<std::pair<Source, size_t>> gradients;  // of `differentiable`: a backward result, or a result's gradient
  std::vector<size_t> saved_arguments;               // that backward reads; their versions are checked
  std::vector<bool> holds;                           // whether backward reads an argument that is not saved
  std::vector<size_t> saved_results;                 // that backward reads
  std::vector<size_t> visible;                       // results that callers get
  std::vector<std::pair<Source, size_t>> sources;    // of the backward operator's arguments
  std::string no_second;                             // the error of a second derivative
};

// The tensors in a value, one by one.
template <class Use>
void each_tensor(const IValue& value, const Use& use) {
  if (value.isTensor()) {
    use(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorVector()) use(t);
  }
}

variable_list tensors_of(const Stack& values, const std::vector<size_t>& places) {
  variable_list found;
  for (const size_t at : places) each_tensor(values[at], [&](const at::Tensor& t) { found.push_back(t); });
  return found;
}

// The results of an operator, below autograd. It gets copies of lists, as stable kernels take the elements out of them.
Stack called(const c10::OperatorHandle& op, const Stack& arguments) {
  Stack stack;
  stack.reserve(arguments.size());
  for (const IValue& value : arguments)
    stack.push_back(value.isTensorList() ? IValue(value.toTensorList().copy()) : value);
  const at::AutoDispatchBelowAutograd below;
  op.callBoxed(stack);
  return stack;
}

// Gradients that raise an error when they are differentiated.
struct NotDifferentiable : torch::autograd::Function<NotDifferentiable> {
  static variable_list forward(AutogradContext* ctx, at::TensorList /*of*/, const variable_list* gradients,
                               const std::string& error) {
    ctx->saved_data["error"] = error;
    return *gradients;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& /*gradients*/) {
    throw std::runtime_error(ctx->saved_data["error"].toStringRef());
  }
};

// Stands for tensors that a node does not hold, or holds as saved ones: their number.
int64_t count_of(const IValue& value) {
  return value.isTensorList() ? int64_t(value.toTensorList().size()) : int64_t(value.isTensor());
}

// A value of this kind made of the next `count` tensors.
IValue gathered(Kind kind, int64_t count, variable_list::const_iterator& next) {
  if (kind != Kind::tensors) return count == 0 ? IValue() : IValue(*next++);
  c10::List<at::Tensor> list;
  list.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) list.push_back(*next++);
  return list;
}

// What a node needs, in the form that torch's compiled autograd takes: a list with the address of the plan, then for
// each argument and each result its value, or the number of its tensors; and the tensors beside it, one by one.
struct Recorded : torch::autograd::Function<Recorded> {
  static variable_list forward(AutogradContext* ctx, at::TensorList /*differentiable*/, const Plan& plan,
                               const Stack& arguments, Stack& results) {
    results = called(plan.forward, arguments);
    variable_list saved = tensors_of(arguments, plan.saved_arguments);
    for (at::Tensor& t : tensors_of(results, plan.saved_results)) saved.push_back(std::move(t));
    ctx->save_for_backward(std::move(saved));
    c10::impl::GenericList held(c10::AnyType::get());
    held.reserve(1 + arguments.size() + results.size());
    held.push_back(reinterpret_cast<int64_t>(&plan));
    variable_list tensors;
    for (size_t i = 0; i < arguments.size(); ++i) {
      const bool of_tensors = holds_tensors(plan.arguments[i]);
      held.push_back(plan.holds[i] && !of_tensors ? arguments[i] : IValue(count_of(arguments[i])));
      if (plan.holds[i]) each_tensor(arguments[i], [&](const at::Tensor& t) { tensors.push_back(t); });
    }
    for (size_t i = 0; i < tensors.size(); ++i) ctx->saved_data[std::to_string(i)] = tensors[i];
    for (const IValue& result : results) held.push_back(count_of(result));
    ctx->saved_data[key] = std::move(held);
    return tensors_of(results, plan.visible);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const c10::impl::GenericList held = ctx->saved_data[key].toList();
    const Plan& plan = *reinterpret_cast<const Plan*>(held.get(0).toInt());
    const size_t num_arguments = plan.arguments.size();
    Stack arguments(num_arguments), results(plan.results.size()), grads(plan.results.size());
    const auto argument_count = [&](size_t i) { return held.get(1 + i).toInt(); };
    const auto result_count = [&](size_t i) { return held.get(1 + num_arguments + i).toInt(); };
    variable_list tensors;
    for (size_t i = 0; i + 1 < ctx->saved_data.size(); ++i)
      tensors.push_back(ctx->saved_data[std::to_string(i)].toTensor());
    auto next = tensors.cbegin();
    for (size_t i = 0; i < num_arguments; ++i) {
      if (!plan.holds[i]) continue;
      const bool of_tensors = holds_tensors(plan.arguments[i]);
      arguments[i] = of_tensors ? gathered(plan.arguments[i], argument_count(i), next) : held.get(1 + i);
    }
    const variable_list saved = ctx->get_saved_variables();
    next = saved.cbegin();
    for (const size_t i : plan.saved_arguments) arguments[i] = gathered(plan.arguments[i], argument_count(i), next);
    for (const size_t i : plan.saved_results) results[i] = gathered(plan.results[i], result_count(i), next);
    next = gradients.cbegin();
    for (const size_t i : plan.visible) grads[i] = gathered(plan.results[i], result_count(i), next);
    Stack stack;
    stack.reserve(plan.sources.size());
    for (const auto& [source, i] : plan.sources)
      stack.push_back(source == Source::gradient ? grads[i] : source == Source::result ? results[i] : arguments[i]);
    const Stack found = called(plan.backward, stack);
    variable_list own, out;
    for (const auto& [source, i] : plan.gradients)
      if (source == Source::result) each_tensor(found[i], [&](const at::Tensor& t) { own.push_back(t); });
    own = differentiated_once(plan, stack, std::move(own));
    next = own.cbegin();
    for (const auto& [source, i] : plan.gradients) {
      if (source == Source::gradient)
        each_tensor(grads[i], [&](const at::Tensor& t) { out.push_back(t); });
      else
        each_tensor(found[i], [&](const at::Tensor&) { out.push_back(*next++); });
    }
    out.resize(out.size() + 3);  // forward's last arguments have no gradients
    return out;
  }

 private:
  static constexpr const char* key = "call";

  static variable_list differentiated_once(const Plan& plan, const Stack& inputs, variable_list gradients) {
    if (!at::GradMode::is_enabled()) return gradients;
    variable_list of, defined;
    const auto add = [](variable_list& list) {
      return [&list](const at::Tensor& t) {
        if (t.defined()) list.push_back(t);
      };
    };
    for (const IValue& input : inputs) each_tensor(input, add(of));
    for (const at::Tensor& t : gradients) add(defined)(t);
    defined = NotDifferentiable::apply(at::TensorList(of), &defined, plan.no_second);
    auto next = defined.begin();
    for (at::Tensor& t : gradients)
      if (t.defined()) t = *next++;
    return gradients;
  }
};

// --------------------------------------------------------------------------------------------------------- Python

// Whether nothing but autograd surrounds the call: no mode, no tracing, no transform of torch.func.
bool is_plain_context() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet others{DispatchKey::Python,
                                       DispatchKey::PythonTLSSnapshot,
                                       DispatchKey::PythonDispatcher,
                                       DispatchKey::PreDispatch,
                                       DispatchKey::Functionalize,
                                       DispatchKey::Tracer,
                                       DispatchKey::FuncTorchVmapMode,
                                       DispatchKey::FuncTorchDynamicLayerFrontMode,
                                       DispatchKey::FuncTorchDynamicLayerBackMode};
  return !at::impl::torch_function_mode_enabled() && !c10::impl::tls_local_dispatch_key_set().included_.has_any(others);
}

// Reads a strided tensor of torch.Tensor or nn.Parameter on a CPU or a GPU; false for any other object.
bool read_tensor(PyObject* object, at::Tensor& out) {
  if (!THPVariable_CheckExact(object)) return false;
  out = THPVariable_Unpack(object);
  return out.layout() == at::kStrided && (out.is_cpu() || out.is_cuda()) &&
         !out.key_set().has(c10::DispatchKey::Python);
}

// Reads the elements of a list or tuple by `read_one(PyObject*)`; false if there is one that it does not take.
template <class Read>
bool read_all(PyObject* object, const Read& read_one) {
  if (!PyList_CheckExact(object) && !PyTuple_CheckExact(object)) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i)
    if (!read_one(PySequence_Fast_GET_ITEM(object, i))) return false;
  return true;
}

bool read_integer(PyObject* object, int64_t& out) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool read_floating(PyObject* object, double& out) {
  if (!PyFloat_CheckExact(object)) return false;
  out = PyFloat_AS_DOUBLE(object);
  return true;
}

// Reads an argument of exactly the kind's own type; false for any other, which torch converts or refuses.
bool read(PyObject* object, Kind kind, IValue& out) {
  at::Tensor tensor;
  int64_t integer = 0;
  double floating = 0;
  if (object == Py_None && (kind == Kind::optional_tensor || kind == Kind::optional_floating)) return true;
  switch (kind) {
    case Kind::tensor:
    case Kind::optional_tensor:
      if (!read_tensor(object, tensor)) return false;
      out = std::move(tensor);
      return true;
    case Kind::tensors: {
      c10::List<at::Tensor> list;
      const bool fits = read_all(object, [&](PyObject* item) {
        if (!read_tensor(item, tensor)) return false;
        list.push_back(std::move(tensor));
        return true;
      });
      out = std::move(list);
      return fits;
    }
    case Kind::integer:
      if (!read_integer(object, integer)) return false;
      out = integer;
      return true;
    case Kind::floating:
    case Kind::optional_floating:
      if (!read_floating(object, floating)) return false;
      out = floating;
      return true;
    case Kind::boolean:
      if (!PyBool_Check(object)) return false;
      out = object == Py_True;
      return true;
    case Kind::integers: {
      c10::List<int64_t> list;
      const bool fits = read_all(object, [&](PyObject* item) {
        const bool is_integer = read_integer(item, integer);
        if (is_integer) list.push_back(integer);
        return is_integer;
      });
      out = std::move(list);
      return fits;
    }
    case Kind::floatings: {
      c10::List<double> list;
      const bool fits = read_all(object, [&](PyObject* item) {
        const bool is_floating = read_floating(item, floating);
        if (is_floating) list.push_back(floating);
        return is_floating;
      });
      out = std::move(list);
      return fits;
    }
  }
  return false;
}

// The results in the form of torch.ops: a tensor, a list, or a tuple of those; `next()` gives the tensors in order.
template <class Next>
py::object as_python(const Stack& results, const std::vector<size_t>& visible, const Next& next) {
  const auto wrapped = [&] { return py::reinterpret_steal<py::object>(THPVariable_Wrap(next())); };
  const auto one = [&](const IValue& value) -> py::object {
    if (value.isTensor()) return wrapped();
    py::list list(value.toTensorList().size());
    for (size_t i = 0; i < list.size(); ++i) list[i] = wrapped();
    return list;
  };
  if (visible.size() == 1) return one(results[visible[0]]);
  py::tuple all(visible.size());
  for (size_t i = 0; i < visible.size(); ++i) all[i] = one(results[visible[i]]);
  return all;
}

// Calls an operator outside of all transforms, and lets autograd record the call. Where other things are around the
// call, or its arguments are of unusual types, or a tensor without a gradient requires one, it returns None and has
// done nothing.
class Recorder {
 public:
  explicit Recorder(const Plan& plan) : plan_(plan) {}

  py::object operator()(const py::tuple& arguments) const {
    if (arguments.size() != plan_.arguments.size() || !is_plain_context()) return py::none();
    Stack stack(arguments.size());
    for (size_t i = 0; i < stack.size(); ++i)
      if (!read(PyTuple_GET_ITEM(arguments.ptr(), Py_ssize_t(i)), plan_.arguments[i], stack[i])) return py::none();
    const variable_list differentiable = tensors_of(stack, plan_.differentiable);
    if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(differentiable)) return py::none();
    if (torch::autograd::any_variable_requires_grad(tensors_of(stack, plan_.others))) return py::none();
    Stack results;
    variable_list found;
    {
      const py::gil_scoped_release released;
      found = Recorded::apply(at::TensorList(differentiable), plan_, stack, results);
    }
    auto next = found.begin();
    return as_python(results, plan_.visible, [&]() -> const at::Tensor& { return *next++; });
  }

 private:
  const Plan& plan_;
};

c10::OperatorHandle operator_named(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("metakern::" + name).c_str(), "");
}

}  // namespace
}  // namespace metakern

PYBIND11_MODULE(_autograd, m) {
  using namespace metakern;
  m.doc() = "Records calls of metakern's operators as nodes of C++ in autograd's graph.";
  py::enum_<Source>(m, "Source", "Where an argument of the backward operator comes from.")
      .value("gradient", Source::gradient)
      .value("result", Source::result)
      .value("argument", Source::argument);
  py::class_<Recorder>(m, "Recorder", "Calls an operator and lets autograd record the call.")
      .def(py::init([](const std::string& forward, const std::string& backward, std::vector<size_t> differentiable,
                       std::vector<size_t> others, std::vector<std::pair<Source, size_t>> gradients,
                       std::vector<size_t> saved_arguments, std::vector<bool> holds, std::vector<size_t> saved_results,
                       std::vector<size_t> visible, std::vector<std::pair<Source, size_t>> sources,
                       std::string no_second) {
             std::vector<Kind> arguments, results;
             const c10::OperatorHandle op = operator_named(forward);
             for (const auto& argument : op.schema().arguments()) arguments.push_back(kind_of(*argument.type()));
             for (const auto& result : op.schema().returns()) results.push_back(kind_of(*result.type()));
             return new Recorder(*new Plan{op, operator_named(backward), std::move(arguments), std::move(results),
                                           std::move(differentiable), std::move(others), std::move(gradients),
                                           std::move(saved_arguments), std::move(holds), std::move(saved_results),
                                           std::move(visible), std::move(sources), std::move(no_second)});
           }),
           py::kw_only(), py::arg("forward"), py::arg("backward"), py::arg("differentiable"), py::arg("others"),
           py::arg("gradients"), py::arg("saved_arguments"), py::arg("holds"), py::arg("saved_results"),
           py::arg("visible"), py::arg("sources"), py::arg("no_second"))
      .def("__call__", &Recorder::operator(),
           "Public results of the operator's arguments, a tuple; None where the call must be recorded otherwise.");
}
