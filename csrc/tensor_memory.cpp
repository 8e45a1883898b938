#include "tensor_memory.h"

#include <ATen/EmptyTensor.h>

namespace pytracker {

const char* kind_of(const at::Tensor& tensor) {
  return c10::toString((tensor.key_set() - kPlainKeys).highestPriorityTypeId());
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
