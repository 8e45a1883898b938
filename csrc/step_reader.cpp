#include "step_reader.h"

#include <torch/csrc/autograd/python_variable.h>

#include "errors.h"

namespace pytracker {
namespace {

// A dictionary in the module's __dict__ (`_modules`, `_parameters`), borrowed; null where there is none.
PyObject* dictionary(PyObject* module, PyObject* name) {
  PyObject* attributes = PyObject_GenericGetDict(module, nullptr);  // new reference
  if (attributes == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  PyObject* found = PyDict_GetItem(attributes, name);
  Py_DECREF(attributes);  // the module keeps it alive
  return found != nullptr && PyDict_Check(found) ? found : nullptr;
}

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

bool same_values(PyObject* dict, const std::vector<PyObject*>& expected) {
  if (dict == nullptr) return expected.empty();
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(expected.size())) return false;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (size_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i)
    if (value != expected[i]) return false;
  return true;
}

PyObject* const kModules = interned("_modules");
PyObject* const kParameters = interned("_parameters");
PyObject* const kParamGroups = interned("param_groups");
PyObject* const kLr = interned("lr");
PyObject* const kGradScale = interned("grad_scale");

}  // namespace

NamedValue named_value(int32_t slot, const std::string& name, PyObject* value) {
  if (PyFloat_Check(value)) return {slot, PyFloat_AS_DOUBLE(value), {}};
  if (THPVariable_Check(value)) return {slot, 0, THPVariable_Unpack(value)};
  const bool text = PyUnicode_Check(value) || PyBytes_Check(value);
  const double number = text ? -1 : PyFloat_AsDouble(value);
  if (text || (number == -1 && PyErr_Occurred() != nullptr)) {
    PyErr_Clear();
    const std::string shown = py::str(py::repr(value)).cast<std::string>().substr(0, 80);
    throw InvalidTypeError("'" + name + "' is " + shown + ", of type " + Py_TYPE(value)->tp_name +
                           "; a recorded value is a number or a tensor of one element");
  }
  return {slot, number, {}};
}

int32_t StepReader::slot_of(StepLog& log, PyObject* name) {
  for (const Key& key : keys_)
    if (key.name == name) return key.slot;
  if (PyUnicode_GET_LENGTH(name) == 0 || !py::handle(name).attr("isprintable")().cast<bool>())
    throw InvalidValueError("a recorded value has a printable name, got " + py::repr(name).cast<std::string>());
  const auto text = py::cast<std::string>(py::handle(name));
  if (reserved_.contains(name))
    throw InvalidValueError("'" + text + "' is recorded by pytracker itself; give your value another name");
  const int32_t slot = log.slot_of(text);
  if (slot >= 0 && PyUnicode_CHECK_INTERNED(name) != 0) {
    names_.push_back(py::reinterpret_borrow<py::object>(name));
    keys_.push_back({name, slot});
  }
  return slot;
}

bool StepReader::read(StepLog& log, const py::dict& scalars, std::vector<NamedValue>& values,
                      std::optional<NamedValue>& grad_scale) {
  values.clear();
  grad_scale.reset();
  if (!optimizer_.is_none() && !read_learning_rates(log, values)) return false;
  Py_ssize_t position = 0;
  PyObject *name = nullptr, *value = nullptr;
  while (PyDict_Next(scalars.ptr(), &position, &name, &value)) {
    if (value == Py_None) continue;
    if (PyUnicode_Compare(name, kGradScale) == 0) {
      grad_scale = named_value(-1, "grad_scale", value);
      if (!grad_scale->tensor.defined() && grad_scale->number == 0)
        throw InvalidValueError("'grad_scale' is 0; the statistics are divided by it");
      continue;
    }
    const int32_t slot = slot_of(log, name);
    if (slot < 0) return false;
    values.push_back(named_value(slot, log.scalar_names()[slot], value));
  }
  return true;
}

bool StepReader::read_learning_rates(StepLog& log, std::vector<NamedValue>& values) {
  const py::object groups = py::reinterpret_steal<py::object>(PyObject_GetAttr(optimizer_.ptr(), kParamGroups));
  if (!groups) throw py::error_already_set();
  if (!PyList_Check(groups.ptr()))
    throw InvalidTypeError(std::string("the optimizer's param_groups is of type ") + Py_TYPE(groups.ptr())->tp_name +
                           "; expected a list");
  const auto count = static_cast<size_t>(PyList_GET_SIZE(groups.ptr()));
  if (rate_slots_.size() != count) {
    std::vector<int32_t> slots;
    for (const py::handle name : name_groups_(groups).cast<py::list>()) {
      const int32_t slot = log.slot_of(name.cast<std::string>());
      if (slot < 0) return false;
      slots.push_back(slot);
      reserved_.add(name);
    }
    rate_slots_ = slots;
    keys_.clear();  // a keyword may now have the name of a new group
    names_.clear();
  }
  for (size_t i = 0; i < count; ++i) {
    PyObject* group = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(i));
    PyObject* rate = PyDict_Check(group) ? PyDict_GetItem(group, kLr) : nullptr;
    if (rate != nullptr && rate != Py_None)
      values.push_back(named_value(rate_slots_[i], log.scalar_names()[rate_slots_[i]], rate));
  }
  return true;
}

void StepReader::reset() {
  keys_.clear();
  names_.clear();
  rate_slots_.clear();
}

ModuleWatch::ModuleWatch(const py::object& root) { visit(root.ptr(), true); }

void ModuleWatch::visit(PyObject* module, bool is_root) {
  const size_t index = nodes_.size();
  nodes_.emplace_back();
  nodes_[index].module = is_root ? nullptr : module;
  std::vector<PyObject*> children;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  if (PyObject* parameters = dictionary(module, kParameters))
    while (PyDict_Next(parameters, &position, &key, &value)) {
      nodes_[index].parameters.push_back(value);
      nodes_[index].owned.push_back(py::reinterpret_borrow<py::object>(value));
    }
  position = 0;
  if (PyObject* modules = dictionary(module, kModules))
    while (PyDict_Next(modules, &position, &key, &value)) {
      nodes_[index].children.push_back(value);
      if (value != Py_None) children.push_back(value);
    }
  for (PyObject* child : children)
    if (seen_.insert(child).second) visit(child, false);
}

bool ModuleWatch::unchanged(const py::object& root) const {
  for (const Node& node : nodes_) {  // a parent before its children, which are alive where the parent still has them
    PyObject* module = node.module != nullptr ? node.module : root.ptr();
    if (!same_values(dictionary(module, kParameters), node.parameters) ||
        !same_values(dictionary(module, kModules), node.children))
      return false;
  }
  return true;
}

}  // namespace pytracker
