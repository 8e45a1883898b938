#include "tensor_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>

#include "errors.h"

namespace pytracker {

const char* kind_of(const at::Tensor& tensor) {
  return c10::toString((tensor.key_set() - kPlainKeys).highestPriorityTypeId());
}

at::Tensor new_memory(at::IntArrayRef sizes, c10::Device device) {
  at::Tensor memory = at::empty(sizes, at::TensorOptions().dtype(at::kDouble).device(device));
  if (!is_plain(*memory.unsafeGetTensorImpl()))
    throw InvalidValueError(
        std::string("gradients cannot be measured within a transform of torch.func (grad, jvp, functionalize), which "
                    "wraps what is made, here as ") +
        kind_of(memory) + "; measure them outside of it. Tracker.step works within");
  return memory;
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
