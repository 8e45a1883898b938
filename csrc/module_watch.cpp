#include "module_watch.h"

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

bool same_values(PyObject* dict, const std::vector<PyObject*>& expected) {
  if (dict == nullptr) return expected.empty();
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(expected.size())) return false;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (size_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i)
    if (value != expected[i]) return false;
  return true;
}

PyObject* const kModules = PyUnicode_InternFromString("_modules");
PyObject* const kParameters = PyUnicode_InternFromString("_parameters");

}  // namespace

ModuleWatch::ModuleWatch(const py::object& root) { visit(root.ptr(), true); }

void ModuleWatch::visit(PyObject* module, bool is_root) {
  const size_t index = nodes_.size();
  nodes_.emplace_back();
  nodes_[index].module = is_root ? nullptr : module;
  std::vector<PyObject*> children;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  if (PyObject* parameters = dictionary(module, kParameters))
    while (PyDict_Next(parameters, &position, &key, &value)) nodes_[index].parameters.push_back(value);
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

bool ModuleWatch::covers(const Parameters& parameters) const {
  std::unordered_set<PyObject*> all;
  for (const Node& node : nodes_) all.insert(node.parameters.begin(), node.parameters.end());
  for (PyObject* object : parameters.objects())
    if (all.count(object) == 0) return false;
  return true;
}

}  // namespace pytracker
