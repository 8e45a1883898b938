// The operators' schemas and the classes that Python sees.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/kernel.h"
#include "errors.h"
#include "module_watch.h"
#include "operators.h"
#include "plan.h"
#include "step_log.h"
#include "step_reader.h"

TORCH_LIBRARY(pytracker, m) {
  m.def("gradient_moments(Tensor[] gradients, Tensor? grad_scale=None) -> Tensor");
  m.def("scale_gradients_(Tensor(a!)[] gradients, Tensor factor) -> ()");
  m.def("meter_update_(Tensor(a!) state, Tensor[] values, Tensor[] weights) -> ()");
}

namespace {

void implement(torch::Library& library) {
  library.impl("gradient_moments", pytracker::gradient_moments);
  library.impl("scale_gradients_", pytracker::scale_gradients_);
  library.impl("meter_update_", pytracker::meter_update_);
}

}  // namespace

TORCH_LIBRARY_IMPL(pytracker, CPU, m) { implement(m); }

// Statistics are not differentiated: a loss that requires a gradient may be fed to a meter. And the kernels know lazy
// negations and the like: torch would copy those first, from memory that may be gone.
#define PYTRACKER_PASS_ON(key)                                         \
  TORCH_LIBRARY_IMPL(pytracker, key, m) {                              \
    m.impl("gradient_moments", torch::CppFunction::makeFallthrough()); \
    m.impl("scale_gradients_", torch::CppFunction::makeFallthrough()); \
    m.impl("meter_update_", torch::CppFunction::makeFallthrough());    \
  }
PYTRACKER_PASS_ON(Autograd)
PYTRACKER_PASS_ON(Negative)
PYTRACKER_PASS_ON(Conjugate)
PYTRACKER_PASS_ON(ZeroTensor)

namespace pytracker {
namespace {

constexpr int64_t kReleaseGil = 1 << 20;  // elements from which on other Python threads may run meanwhile

Source source_named(const std::string& name) {
  if (name == "gradient") return Source::kGradient;
  if (name == "value") return Source::kValue;
  if (name == "tensor") return Source::kTensor;
  throw InvalidValueError("source is '" + name + "'; choose 'gradient', 'value' or 'tensor'");
}

// The norms that a row's totals have: 2.0, and infinity.
Order order_of(double order) {
  if (order == 2) return Order::kL2;
  if (std::isinf(order)) return Order::kInf;
  throw InvalidValueError("a row has the norms of order 2 and inf, not of order " + std::to_string(order));
}

int64_t elements_on_cpu(Plan& plan) {
  int64_t elements = 0;
  for (const Group& group : plan.groups())
    if (group.device.is_cpu())
      for (const Layout& layout : group.layouts.tensors) elements += layout.numel;
  return elements;
}

// Whether the plan is for just these parameters, in this order. Then they are alive.
bool is_for(const Plan& plan, const py::sequence& parameters) {
  const std::vector<PyObject*>& known = plan.parameters().objects();
  if (py::len(parameters) != known.size()) return false;
  for (size_t i = 0; i < known.size(); ++i)
    if (py::object(parameters[i]).ptr() != known[i]) return false;
  return true;
}

// Takes hold of the parameters of a plan that has let go of them, where they are sure to be alive.
bool hold_for(Plan& plan, const py::sequence& parameters) {
  if (!is_for(plan, parameters)) return false;
  plan.parameters().hold();
  return true;
}

bool hold_of(Plan& plan, const ModuleWatch& watch, const py::object& root) {
  if (!watch.unchanged(root)) return false;
  plan.parameters().hold();
  return true;
}

// The norms of a module that is as it was when the plan was made, in one call; nothing where another way must be taken.
std::optional<std::pair<double, double>> norm_and_max_of(Plan& plan, const ModuleWatch& watch, const py::object& root) {
  if (plan.has_pieces() || !watch.unchanged(root)) return std::nullopt;
  plan.parameters().hold();
  const struct Release {
    Parameters& parameters;
    ~Release() { parameters.release(); }
  } at_end{plan.parameters()};
  return plan.norm_and_max();
}

// Codes that append() returns instead of the number of rows that wait to be drained.
constexpr int64_t kRenew = -1;     // nothing was recorded: too few slots, or the parameters moved to another device
constexpr int64_t kCaptured = -2;  // a graph is being captured: its replays will record

int64_t append(StepLog& log, StepReader& reader, int64_t step, const py::dict& scalars, const Clip* clip) {
  const std::optional<StepInput> input = reader.read(log, scalars);  // first: __float__ may do anything to a gradient
  if (!input || (clip != nullptr && !log.has_slots_for(*clip))) return kRenew;
  Plan& plan = log.plan();
  plan.gather();
  const Plan::Borrowed borrowed{plan};
  if (!log.current()) return kRenew;
  bool recorded = false;
  if (elements_on_cpu(plan) > kReleaseGil) {
    const std::vector<at::Tensor> kept = plan.sources();  // whatever other threads do to the parameters
    const py::gil_scoped_release others_may_run;
    recorded = log.append(step, *input, clip);
  } else {
    recorded = log.append(step, *input, clip);
  }
  return recorded ? log.written() - log.drained() : kCaptured;
}

void replayed(StepLog& log, StepReader& reader, int64_t step) {
  StepInput input;
  reader.read_rates(log, input.values, input.rates);
  log.replayed(step, input.rates);
}

// (steps, given, contexts, context of each row), a context being (elements, [(name, rate or None, slot or -1)]).
py::tuple notes(const StepLog& log, int64_t first, int64_t count) {
  py::list steps, given, contexts, which;
  std::shared_ptr<const Context> last;
  for (const RowNote& note : log.notes(first, count)) {
    steps.append(note.step);
    given.append(py::cast(note.given));
    if (note.context != last) {
      last = note.context;
      py::list rates;
      for (size_t i = 0; i < last->rates.values.size(); ++i) {
        const Rate& rate = last->rates.values[i];
        const py::object number = rate.slot == Rate::kOnHost ? py::object(py::float_(rate.number)) : py::none();
        rates.append(py::make_tuple((*last->rates.names)[i], number, std::max(rate.slot, -1)));
      }
      contexts.append(py::make_tuple(last->elements, rates));
    }
    which.append(py::len(contexts) - 1);
  }
  return py::make_tuple(steps, given, contexts, which);
}

// Takes the CUDA back end in, from the library in which it lies, and lets the operators use it.
void add_cuda(const py::capsule& factory) {
  register_backend(c10::DeviceType::CUDA, reinterpret_cast<BackendFactory>(factory.get_pointer()));
  static auto* const operators =  // never destroyed: torch may be gone before this would be
      new torch::Library(torch::Library::IMPL, "pytracker", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  implement(*operators);
}

template <typename Error>
void translate(const char* python_class) {
  static PyObject* type = nullptr;  // never released: the interpreter may be gone before this library
  type = py::object(py::module_::import("pytracker.errors").attr(python_class)).release().ptr();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Error& error) {
      PyErr_SetString(type, error.what());
    }
  });
}

}  // namespace
}  // namespace pytracker

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace pytracker;
  m.doc() = "The native core of pytracker; use it through the Python modules.";

  translate<ParameterError>("ParameterError");
  translate<InvalidValueError>("InvalidValueError");
  translate<InvalidTypeError>("InvalidTypeError");

  m.attr("COLUMNS") = std::vector<std::string>{"sum", "sum_sq", "abs_max", "zeros", "nans", "infs"};
  m.attr("EXTRAS") = std::vector<std::string>{
      "l1", "subnormal_bf16", "subnormal_fp16", "subnormal_e4m3", "near_max_bf16", "near_max_fp16", "near_max_e4m3"};
  m.attr("TOTALS") = int(kTotals);
  m.attr("METER_COLUMNS") = int(kMeterColumns);
  m.attr("MAX_SCALARS") = kMaxScalars;
  m.attr("RENEW") = kRenew;
  m.attr("CAPTURED") = kCaptured;
  m.def("isa", [] { return cpu::kernels().isa; }, "The instruction set that the CPU kernels use.");
  m.def("add_cuda", &add_cuda, py::arg("factory"));
  m.def("has_backend", [](const std::string& device) { return has_backend(c10::Device(device).type()); });

  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init([](const py::sequence& parameters, std::vector<std::string> names, const std::string& source,
                       const std::vector<std::pair<int64_t, int64_t>>& windows) {
             std::vector<PyObject*> objects;
             for (const py::handle parameter : parameters) {
               if (!THPVariable_Check(parameter.ptr()))
                 throw InvalidTypeError(std::string("a plan is made for tensors, got ") +
                                        Py_TYPE(parameter.ptr())->tp_name);
               objects.push_back(parameter.ptr());
             }
             std::vector<Window> read;
             for (const auto& [offset, length] : windows) read.push_back({offset, length});
             return std::make_shared<Plan>(Parameters::of_objects(std::move(objects)), std::move(names),
                                           source_named(source), read);
           }),
           py::arg("parameters"), py::arg("names"), py::arg("source") = "gradient", py::arg("windows") = py::list())
      .def_property_readonly("names", &Plan::names)
      .def_property_readonly("parameters",
                             [](const Plan& plan) {
                               if (!plan.parameters().held())
                                 throw InvalidValueError("the plan has let go of its parameters");
                               py::list parameters;
                               for (PyObject* object : plan.parameters().objects())
                                 parameters.append(py::reinterpret_borrow<py::object>(object));
                               return parameters;
                             })
      .def_property_readonly(
          "members",
          [](Plan& plan) {
            std::vector<std::vector<int64_t>> members;
            for (const Group& group : plan.groups()) members.push_back(group.members);
            return members;
          },
          "For each device the indices of its parameters, in the order of its rows.")
      .def_property_readonly("devices",
                             [](Plan& plan) {
                               py::list devices;
                               for (const Group& group : plan.groups()) devices.append(py::cast(group.device));
                               return devices;
                             })
      .def_property_readonly("generation", &Plan::generation)
      .def_property_readonly("has_pieces", &Plan::has_pieces)
      .def_property_readonly("elements", &Plan::elements, "Of each gradient as it was last found, float64 [T].")
      .def("hold_for", &hold_for, py::arg("parameters"))
      .def("hold_of", &hold_of, py::arg("watch"), py::arg("root"))
      .def("hold",
           [](Plan& plan) {
             if (!plan.parameters().held()) throw InvalidValueError("the plan has let go of its parameters");
             plan.parameters().hold();
           })
      .def("release",
           [](Plan& plan) {
             plan.give_back();
             plan.parameters().release();
           })
      .def("reduce", &Plan::reduce, py::arg("grad_scale") = py::none())
      .def(
          "reduce_and_clip",
          [](Plan& plan, double max_norm, double order) { return plan.reduce_and_clip(max_norm, order_of(order)); },
          py::arg("max_norm"), py::arg("order") = 2.0)
      .def("gather", &Plan::gather)
      .def("any_is_double", &Plan::any_is_double)
      .def("scale", &Plan::scale, py::arg("factors"))
      .def("select", &Plan::select, py::arg("parameters"))
      .def(
          "give",
          [](Plan& plan, const std::vector<std::optional<at::Tensor>>& gradients) {
            std::vector<at::Tensor> given;
            for (const auto& gradient : gradients) given.push_back(gradient.value_or(at::Tensor()));
            plan.give(std::move(given));
          },
          py::arg("gradients"))
      .def("norm_and_max", &Plan::norm_and_max)
      .def("norm_and_max_of", &norm_and_max_of, py::arg("watch"), py::arg("root"));

  py::class_<StepReader>(m, "StepReader")
      .def(py::init<py::object, py::function, py::set>(), py::arg("optimizer"), py::arg("name_groups"),
           py::arg("reserved"))
      .def_property_readonly("rate_names", &StepReader::rate_names)
      .def("reset", &StepReader::reset);

  py::class_<Clip>(m, "Clip")
      .def(py::init([](double order, std::variant<double, at::Tensor> max_norm, at::Tensor outcome,
                       const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
             return Clip(order_of(order), std::move(max_norm), std::move(outcome), grad_scale.value_or(at::Tensor()),
                         found_inf.value_or(at::Tensor()));
           }),
           py::arg("order"), py::arg("max_norm"), py::arg("outcome"), py::arg("grad_scale") = py::none(),
           py::arg("found_inf") = py::none())
      .def_property_readonly("outcome", &Clip::outcome);

  py::class_<StepLog>(m, "StepLog")
      .def(py::init<std::shared_ptr<Plan>, int64_t, int64_t, bool>(), py::arg("plan"), py::arg("capacity"),
           py::arg("slots"), py::arg("extras") = false)
      .def_property_readonly("written", &StepLog::written)
      .def_property_readonly("drained", &StepLog::drained)
      .def_property_readonly("capacity", &StepLog::capacity)
      .def_property_readonly("slots", &StepLog::slots)
      .def_property_readonly("rows", &StepLog::rows)
      .def_property_readonly("scalar_names", &StepLog::scalar_names)
      .def("slot_of", &StepLog::slot_of, py::arg("name"))
      .def("append", &append, py::arg("reader"), py::arg("step"), py::arg("scalars"), py::arg("clip") = py::none())
      .def(
          "decide",
          [](StepLog& log, const Clip& clip, const std::optional<at::Tensor>& norm) {
            return log.decide(clip, norm.value_or(at::Tensor()));
          },
          py::arg("clip"), py::arg("norm") = py::none())
      .def("latest", &StepLog::latest)
      .def("replayed", &replayed, py::arg("reader"), py::arg("step"))
      .def_property_readonly("capturing", &StepLog::capturing)
      .def_property_readonly("captures", &StepLog::captures)
      .def_property_readonly("cursor", &StepLog::cursor)
      .def_property_readonly("announced", &StepLog::announced)
      .def("await_rows", &StepLog::await_rows, py::arg("group"))
      .def("notes", &notes, py::arg("first"), py::arg("count"))
      .def("release", &StepLog::release, py::arg("end"));

  py::class_<ModuleWatch>(m, "ModuleWatch")
      .def(py::init<py::object>(), py::arg("root"))
      .def("unchanged", &ModuleWatch::unchanged, py::arg("root"))
      .def(
          "covers", [](const ModuleWatch& watch, const Plan& plan) { return watch.covers(plan.parameters()); },
          py::arg("plan"));
}
