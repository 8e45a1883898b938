// Whether a module still has the modules and parameters that it had.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_set>
#include <vector>

#include "parameters.h"

namespace pytracker {

namespace py = pybind11;

// Remembers which modules and parameters a module tree was made of, and finds out at the price of a walk over its
// dictionaries, without running Python code, whether it still is. It holds none of them: an object that has taken the
// address of another counts as the same, which does no harm where all else is read from the object each time.
class ModuleWatch {
 public:
  explicit ModuleWatch(const py::object& root);
  bool unchanged(const py::object& root) const;

  // Whether all of these are parameters of the tree, and so alive where it is unchanged.
  bool covers(const Parameters& parameters) const;

 private:
  struct Node {
    PyObject* module;  // null for the root
    std::vector<PyObject*> children, parameters;
  };
  void visit(PyObject* module, bool is_root);
  std::vector<Node> nodes_;
  std::unordered_set<PyObject*> seen_;
};

}  // namespace pytracker
