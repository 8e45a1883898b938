#include "parameters.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace pytracker {

Parameters Parameters::of_objects(std::vector<PyObject*> objects) {
  Parameters parameters{std::vector<at::Tensor>()};
  parameters.objects_ = std::move(objects);
  parameters.holds_ = 0;
  parameters.hold();
  return parameters;
}

Parameters::Parameters(Parameters&& other) noexcept
    : objects_(std::move(other.objects_)), tensors_(std::move(other.tensors_)), holds_(std::exchange(other.holds_, 0)) {
  other.objects_.clear();
}

Parameters::~Parameters() {
  if (objects_.empty() || holds_ == 0 || !Py_IsInitialized()) return;
  holds_ = 1;
  release();
}

const at::Tensor& Parameters::operator[](size_t i) const {
  return objects_.empty() ? tensors_[i] : THPVariable_Unpack(objects_[i]);
}

void Parameters::hold() {
  if (holds_++ > 0) return;
  const pybind11::gil_scoped_acquire gil;
  for (PyObject* object : objects_) Py_INCREF(object);
}

void Parameters::release() {
  if (holds_ == 0 || --holds_ > 0) return;
  const pybind11::gil_scoped_acquire gil;
  for (PyObject* object : objects_) Py_DECREF(object);
}

}  // namespace pytracker
