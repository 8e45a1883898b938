#include "step_reader.h"

#include <torch/csrc/autograd/python_variable.h>

#include "dtensor.h"
#include "errors.h"
#include "scalar.h"
#include "tensor_memory.h"

namespace pytracker {
namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

PyObject* const kParamGroups = interned("param_groups");
PyObject* const kLr = interned("lr");
PyObject* const kGradScale = interned("grad_scale");

// How many slots learning rates may take that are different tensors on a device; the others are the user's.
constexpr int64_t kMaxDeviceRates = kMaxScalars / 2;

bool is_complex(PyObject* value) {
  if (PyComplex_Check(value)) return true;
  const py::object dtype = py::getattr(value, "dtype", py::none());  // float(numpy.complex64(1j)) is 0.0
  return !dtype.is_none() && py::getattr(dtype, "kind", py::none()).equal(py::str("c"));
}

// One recorded value: a number (bool, int, float, NumPy scalar) or a tensor. Throws InvalidTypeError, naming `name`.
NamedValue named_value(int32_t slot, const std::string& name, PyObject* value) {
  if (PyFloat_Check(value)) return {slot, PyFloat_AS_DOUBLE(value), {}};
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    return {slot, 0, is_subclass(tensor) ? whole_value(tensor, name) : tensor};
  }
  const bool no_number = PyUnicode_Check(value) || PyBytes_Check(value) || is_complex(value);
  const double number = no_number ? -1 : PyFloat_AsDouble(value);
  if (no_number || (number == -1 && PyErr_Occurred() != nullptr)) {
    PyErr_Clear();
    const py::object shown = py::module_::import("pytracker._checks").attr("shown");  // whatever the value's repr does
    throw InvalidTypeError("'" + name + "' is " + shown(py::handle(value)).cast<std::string>() + ", of type " +
                           Py_TYPE(value)->tp_name + "; a recorded value is a number or a tensor of one element");
  }
  return {slot, number, {}};
}

}  // namespace

int32_t StepReader::slot_of(StepLog& log, PyObject* name) {
  for (const Key& key : keys_)
    if (key.name == name) return key.slot;
  if (PyUnicode_GET_LENGTH(name) == 0 || !py::handle(name).attr("isprintable")().cast<bool>())
    throw InvalidValueError("a recorded value has a printable name, got " + py::repr(name).cast<std::string>());
  const auto text = py::cast<std::string>(py::handle(name));
  if (reserved_.contains(name))
    throw InvalidValueError("'" + text +
                            "' is recorded by pytracker itself, or by log() or epoch(); give this value another name");
  const int32_t slot = log.slot_of(text);
  if (slot >= 0 && PyUnicode_CHECK_INTERNED(name) != 0) {
    names_.push_back(py::reinterpret_borrow<py::object>(name));
    keys_.push_back({name, slot});
  }
  return slot;
}

std::optional<StepInput> StepReader::read(StepLog& log, const py::dict& scalars) {
  StepInput input;
  if (!read_rates(log, input.values, input.rates)) return std::nullopt;
  Py_ssize_t position = 0;
  PyObject *name = nullptr, *value = nullptr;
  while (PyDict_Next(scalars.ptr(), &position, &name, &value)) {
    if (value == Py_None) continue;
    if (PyUnicode_Compare(name, kGradScale) == 0) {
      input.grad_scale = named_value(-1, "grad_scale", value);
      if (!input.grad_scale->tensor.defined()) check_divisor(input.grad_scale->number);
      continue;
    }
    const int32_t slot = slot_of(log, name);
    if (slot < 0) return std::nullopt;
    input.values.push_back(named_value(slot, log.scalar_names()[slot], value));
  }
  return input;
}

bool StepReader::read_rates(StepLog& log, std::vector<NamedValue>& values, Rates& rates) {
  if (optimizer_.is_none()) return true;
  const py::object groups = py::reinterpret_steal<py::object>(PyObject_GetAttr(optimizer_.ptr(), kParamGroups));
  if (!groups) throw py::error_already_set();
  if (!PyList_Check(groups.ptr()))
    throw InvalidTypeError(std::string("the optimizer's param_groups is of type ") + Py_TYPE(groups.ptr())->tp_name +
                           "; expected a list");
  const auto count = static_cast<size_t>(PyList_GET_SIZE(groups.ptr()));
  if (!rate_names_ || rate_names_->size() != count) {
    std::vector<std::string> names;
    for (const py::handle name : name_groups_(groups).cast<py::list>()) {
      names.push_back(name.cast<std::string>());
      reserved_.add(name);
    }
    rate_names_ = std::make_shared<const std::vector<std::string>>(std::move(names));
    keys_.clear();  // a keyword may now have the name of a new group
    names_.clear();
  }
  rates.names = rate_names_;
  rates.values.resize(rate_names_->size());
  for (size_t i = 0; i < rates.values.size() && i < count; ++i) {
    PyObject* group = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(i));
    PyObject* rate = PyDict_Check(group) ? PyDict_GetItem(group, kLr) : nullptr;
    if (rate == nullptr || rate == Py_None) continue;
    const NamedValue value = named_value(-1, (*rate_names_)[i], rate);
    std::vector<at::Tensor> kept;
    if (!value.tensor.defined()) {
      rates.values[i] = {value.number, Rate::kOnHost};
    } else if (value.tensor.is_cpu()) {
      rates.values[i] = {scalar_of(value.tensor, (*rate_names_)[i], at::kCPU, kept).value, Rate::kOnHost};
    } else if (!read_device_rate(log, i, value.tensor, values, rates)) {
      return false;
    }
  }
  return true;
}

// A rate that is a tensor on a device is a scalar of the row; groups that share the tensor share the scalar.
bool StepReader::read_device_rate(StepLog& log, size_t group, const at::Tensor& tensor, std::vector<NamedValue>& values,
                                  Rates& rates) {
  int32_t slot = Rate::kNone;
  for (const NamedValue& known : values)
    if (known.tensor.is_same(tensor)) slot = known.slot;
  if (slot == Rate::kNone && static_cast<int64_t>(values.size()) < kMaxDeviceRates) {
    slot = log.slot_of((*rate_names_)[group]);
    if (slot < 0 && log.slots() < kMaxScalars) return false;
    if (slot >= 0) values.push_back({slot, 0, tensor});
  }
  if (slot < 0 && !warned_) {
    warned_ = true;
    const std::string message = "the learning rate '" + (*rate_names_)[group] + "' is not recorded: more than " +
                                std::to_string(kMaxDeviceRates) +
                                " are different tensors on a device; use numbers, or tensors on the CPU";
    if (PyErr_WarnEx(PyExc_RuntimeWarning, message.c_str(), 1) < 0) throw py::error_already_set();
  }
  rates.values[group] = {0, slot < 0 ? Rate::kNone : slot};
  return true;
}

void StepReader::reset() {
  keys_.clear();
  names_.clear();
}

}  // namespace pytracker
