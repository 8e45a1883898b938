#include "dtensor.h"

#include <c10/util/StringUtil.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "tensor_memory.h"

namespace pytracker {
namespace {

namespace py = pybind11;

py::object wrapped(const at::Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); }

PyObject* const kLocalTensor = PyUnicode_InternFromString("_local_tensor");
PyObject* const kWait = PyUnicode_InternFromString("wait");
PyObject* const kSpec = PyUnicode_InternFromString("_spec");
PyObject* const kPlacements = PyUnicode_InternFromString("placements");

// An attribute, or null where there is none.
py::object attribute(const py::object& object, PyObject* name) {
  py::object found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name));
  PyErr_Clear();
  return found;
}

// Lets go of a reference wherever that happens, but not after the interpreter has ended.
void release(PyObject* object) {
  if (!Py_IsInitialized()) return;
  const py::gil_scoped_acquire gil;
  Py_DECREF(object);
}

}  // namespace

std::optional<at::Tensor> local_piece(const at::Tensor& tensor) {
  const py::gil_scoped_acquire gil;
  py::object local = wrapped(tensor);
  if (py::object piece = attribute(local, kLocalTensor)) local = piece;
  if (!THPVariable_Check(local.ptr())) return std::nullopt;
  if (is_subclass(THPVariable_Unpack(local.ptr()))) {
    const py::object wait = attribute(local, kWait);
    if (!wait) return std::nullopt;
    local = wait();  // of a collective that has not been waited for
    if (!THPVariable_Check(local.ptr()) || is_subclass(THPVariable_Unpack(local.ptr()))) return std::nullopt;
  }
  return THPVariable_Unpack(local.ptr());
}

std::string type_name(const at::Tensor& tensor) {
  const py::gil_scoped_acquire gil;
  return Py_TYPE(wrapped(tensor).ptr())->tp_name;
}

at::Tensor whole_value(const at::Tensor& tensor, const std::string& name) {
  const py::gil_scoped_acquire gil;
  const py::module_ dtensor = py::module_::import("pytracker.reference.dtensor");
  return dtensor.attr("whole_value")(tensor, name).cast<at::Tensor>();
}

bool Placement::is_that_of(const at::Tensor& parameter, const at::Tensor& gradient) {
  const py::gil_scoped_acquire gil;
  py::object spec = attribute(wrapped(gradient), kSpec);
  if (!spec || spec.ptr() == known_.get()) return true;
  const py::object own = attribute(wrapped(parameter), kSpec);
  if (!own) return true;  // a plain parameter: its gradient's own local piece is all there is
  if (own.ptr() != spec.ptr()) {
    const py::object expected = attribute(own, kPlacements), found = attribute(spec, kPlacements);
    if (expected && found && expected.ptr() != found.ptr() && !expected.equal(found)) return false;
  }
  // Kept is the first one alone: where each gradient has a new one, to let go of the last is to free it here.
  if (known_ == nullptr) known_ = std::shared_ptr<PyObject>(spec.release().ptr(), release);
  return true;
}

std::vector<at::Tensor> redistributed(const std::vector<at::Tensor>& parameters,
                                      const std::vector<at::Tensor>& gradients) {
  const py::gil_scoped_acquire gil;
  const py::module_ layouts = py::module_::import("pytracker.reference.dtensor");
  return layouts.attr("redistributed")(parameters, gradients).cast<std::vector<at::Tensor>>();
}

}  // namespace pytracker
