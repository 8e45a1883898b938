// What Python hands over on a step, read without running Python code: keyword values, learning rates, and whether a
// module still has the parameters that it had.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <unordered_set>
#include <vector>

#include "step_log.h"

namespace pytracker {

namespace py = pybind11;

// One recorded value: a number (bool, int, float, NumPy scalar) or a tensor. Throws InvalidTypeError, naming `name`.
NamedValue named_value(int32_t slot, const std::string& name, PyObject* value);

// Gives each keyword of tracker.step(**scalars) its slot, and each parameter group its learning rate.
class StepReader {
 public:
  // name_groups(param_groups) -> list of one series name for each group; called when their number changes. A scalar may
  // not have one of the `reserved` names, nor that of a learning rate.
  StepReader(py::object optimizer, py::function name_groups, py::set reserved)
      : optimizer_(std::move(optimizer)), name_groups_(std::move(name_groups)), reserved_(std::move(reserved)) {}

  // Fills `values`, and `grad_scale` from the keyword of that name, which is not recorded. False where the log has too
  // few slots and must be made anew.
  bool read(StepLog& log, const py::dict& scalars, std::vector<NamedValue>& values,
            std::optional<NamedValue>& grad_scale);

  // Forgets the slots, which belong to a log that is gone.
  void reset();

 private:
  struct Key {
    PyObject* name;  // interned, as keywords are, so that comparing addresses is enough; owned by names_
    int32_t slot;
  };
  int32_t slot_of(StepLog& log, PyObject* name);
  bool read_learning_rates(StepLog& log, std::vector<NamedValue>& values);

  py::object optimizer_;
  py::function name_groups_;
  py::set reserved_;
  std::vector<Key> keys_;
  std::vector<py::object> names_;
  std::vector<int32_t> rate_slots_;
};

// Remembers which modules and parameters a module tree was made of, and tells at the price of a walk over its
// dictionaries whether it still is.
class ModuleWatch {
 public:
  explicit ModuleWatch(const py::object& root);
  bool unchanged(const py::object& root) const;

 private:
  struct Node {
    PyObject*
        module;  // null for the root; not owned, since a child may lead back to the root, which must be free to die
    std::vector<PyObject*> children, parameters;
    std::vector<py::object> owned;  // the parameters, so that no other takes the address of one
  };
  void visit(PyObject* module, bool is_root);
  std::vector<Node> nodes_;
  std::unordered_set<PyObject*> seen_;
};

}  // namespace pytracker
