// What Python hands over on a step, read without running Python code: keyword values and learning rates.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "step_log.h"

namespace pytracker {

namespace py = pybind11;

// Gives each keyword of tracker.step(**scalars) its slot, and reads the learning rate of each parameter group.
class StepReader {
 public:
  // name_groups(param_groups) -> list of one series name for each group; called when their number changes. A scalar may
  // not have one of the `reserved` names, nor that of a learning rate.
  StepReader(py::object optimizer, py::function name_groups, py::set reserved)
      : optimizer_(std::move(optimizer)), name_groups_(std::move(name_groups)), reserved_(std::move(reserved)) {}

  // What is to be recorded; `grad_scale` is the keyword of that name, which is not. Nothing where the log has too few
  // slots and must be made anew.
  std::optional<StepInput> read(StepLog& log, const py::dict& scalars);

  // The learning rates as they are; those that are tensors on a device become `values`. False as above.
  bool read_rates(StepLog& log, std::vector<NamedValue>& values, Rates& rates);

  // The series of the learning rates, in the order of the groups.
  std::vector<std::string> rate_names() const { return rate_names_ ? *rate_names_ : std::vector<std::string>(); }

  // Forgets the slots, which belong to a log that is gone.
  void reset();

 private:
  struct Key {
    PyObject* name;  // interned, as keywords are, so that comparing addresses is enough; owned by names_
    int32_t slot;
  };
  int32_t slot_of(StepLog& log, PyObject* name);
  bool read_device_rate(StepLog& log, size_t group, const at::Tensor& tensor, std::vector<NamedValue>& values,
                        Rates& rates);

  py::object optimizer_;
  py::function name_groups_;
  py::set reserved_;
  std::vector<Key> keys_;
  std::vector<py::object> names_;
  std::shared_ptr<const std::vector<std::string>> rate_names_;
  bool warned_ = false;
};

}  // namespace pytracker
