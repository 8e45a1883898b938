#include "scalar.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/StringUtil.h>

#include <cmath>

#include "dtensor.h"
#include "dtypes.h"
#include "errors.h"
#include "tensor_memory.h"

namespace pytracker {
namespace {

// Whatever reads a tensor's memory, torch included, ends the process where that was freed.
void check_memory(const at::Tensor& tensor, const std::string& name) {
  if (tensor.layout() == c10::kSparse) {
    check_memory(tensor._values(), name);
    return check_memory(tensor._indices(), name);
  }
  const bool has_memory =
      tensor.layout() == c10::kStrided && !tensor._is_zerotensor() && tensor.unsafeGetTensorImpl()->unsafe_storage();
  if (has_memory && memory_of(tensor) != Memory::kThere)
    throw InvalidValueError(c10::str("'", name, "' is a tensor whose memory was freed (untyped_storage().resize_)"));
}

// Reading a value on the host waits for nothing, so torch may do it where the tensor is more than memory.
double value_on_host(at::Tensor tensor, const std::string& name) {
  check_memory(tensor, name);
  if (is_plain(*tensor.unsafeGetTensorImpl())) {
    if (tensor.scalar_type() == c10::kFloat) return *tensor.const_data_ptr<float>();
    if (tensor.scalar_type() == c10::kDouble) return *tensor.const_data_ptr<double>();
  }
  if (tensor.layout() != c10::kStrided) tensor = tensor.to_dense();
  return tensor.item().toDouble();
}

Scalar checked_scalar(const at::Tensor& value, const std::string& name, c10::Device device,
                      std::vector<at::Tensor>& kept) {
  at::Tensor tensor = is_subclass(value) ? whole_value(value, name) : value;
  if (tensor.numel() != 1)
    throw InvalidValueError(c10::str("'", name, "' is a tensor of shape ", value.sizes(), " with ", value.numel(),
                                     " elements; a recorded value has one: reduce it first, e.g. with .mean()"));
  if (tensor.is_complex())
    throw InvalidValueError(
        c10::str("'", name, "' is complex (", tensor.scalar_type(), "); record .real, .imag or .abs()"));
  Scalar scalar;
  if (tensor.is_cpu()) {
    scalar.value = value_on_host(std::move(tensor), name);
    return scalar;
  }
  if (tensor.device() != device)
    throw InvalidValueError(c10::str("'", name, "' is on ", tensor.device(),
                                     ", where the model has no parameter; it is recorded on ", device,
                                     ": move it there with .to('", device, "', non_blocking=True)"));
  if (tensor._is_zerotensor()) return scalar;
  check_memory(tensor, name);
  if (tensor.is_neg()) tensor = tensor.resolve_neg();
  if (!is_plain(*tensor.unsafeGetTensorImpl()))
    throw InvalidValueError(c10::str("'", name, "' is no plain tensor but one of kind ", kind_of(tensor), " on ",
                                     tensor.device(), "; record a strided tensor of one element"));
  const auto dtype = dtype_of(tensor.scalar_type());
  scalar.is_integer = tensor.scalar_type() == c10::kLong;
  if (!dtype && !scalar.is_integer) tensor = tensor.to(at::kDouble);
  scalar.dtype = dtype.value_or(Dtype::kFloat64);
  scalar.data = tensor.const_data_ptr();
  kept.push_back(std::move(tensor));
  return scalar;
}

}  // namespace

Scalar scalar_of(const at::Tensor& value, const std::string& name, c10::Device device, std::vector<at::Tensor>& kept) {
  if (!value.defined()) throw InvalidValueError(c10::str("'", name, "' is an undefined tensor"));
  const at::NoGradGuard not_differentiated;
  try {
    return checked_scalar(value, name, device, kept);
  } catch (const c10::Error& error) {  // torch cannot read it either: within vmap, say
    throw InvalidValueError(
        c10::str("'", name, "' is a tensor whose value cannot be read: ", error.what_without_backtrace()));
  }
}

void check_divisor(double value) {
  if (!std::isfinite(value) || value <= 0)
    throw InvalidValueError(
        c10::str("'grad_scale' is ", value, "; the statistics are divided by it, so it must be finite and above 0"));
}

Scalar divisor_of(const at::Tensor& value, c10::Device device, std::vector<at::Tensor>& kept) {
  Scalar divisor = scalar_of(value, "grad_scale", device, kept);
  if (divisor.data == nullptr) check_divisor(divisor.value);
  return divisor;
}

}  // namespace pytracker
