#include "tensor_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "errors.h"

namespace pytracker {
namespace {

// What torch.func wraps tensors by, as they are made.
constexpr c10::DispatchKeySet kTransforms({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                           c10::DispatchKey::FuncTorchDynamicLayerBackMode,
                                           c10::DispatchKey::FuncTorchVmapMode, c10::DispatchKey::Functionalize});

}  // namespace

const char* kind_of(const at::Tensor& tensor) {
  return c10::toString((tensor.key_set() - kPlainKeys).highestPriorityTypeId());
}

at::Tensor new_memory(at::IntArrayRef sizes, c10::Device device) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kTransforms);
  return at::empty(sizes, at::TensorOptions().dtype(at::kDouble).device(device));
}

at::Tensor new_result(at::IntArrayRef sizes, c10::Device device) {
  const at::Tensor result = at::empty(sizes, at::TensorOptions().dtype(at::kDouble).device(device));
  if (!is_plain(*result.unsafeGetTensorImpl()))
    throw InvalidValueError(
        std::string("gradients cannot be measured within a transform of torch.func (grad, jvp, functionalize), which "
                    "wraps the tensor of results, here as ") +
        kind_of(result) + "; measure them outside of it. Tracker.step and compute_gradient_stats work within");
  return result;
}

Memory memory_of(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return Memory::kThere;
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  const c10::Storage& storage = impl.unsafe_storage();
  const size_t bytes = storage ? storage.nbytes() : 0;
  if (bytes == 0) return Memory::kFreed;
  const size_t needed =
      at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), impl.itemsize(), tensor.storage_offset());
  return bytes >= needed ? Memory::kThere : Memory::kTooSmall;
}

}  // namespace pytracker
