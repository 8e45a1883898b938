// Whether a tensor is memory that a kernel can read. Every data pointer in this library is asked for here first.
#pragma once

#include <ATen/core/Tensor.h>

namespace pytracker {

// A tensor that Python defines, such as a DTensor.
inline bool is_subclass(const at::Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Python); }

// What may be set on a tensor that is simply memory with strides. Whatever else a tensor can be (a subclass, a lazy
// negation, a zero tensor, sparse, nested, quantized, mkldnn, functional, batched by vmap) sets a key that is not
// here, and so does whatever torch will add. A conjugate has the moments of its memory but for imaginary parts, which
// nothing records.
inline constexpr c10::DispatchKeySet kPlainKeys =
    c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
    c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::Conjugate}) |
    c10::DispatchKeySet(c10::DispatchKeySet::RAW, c10::full_backend_mask);

inline bool is_plain(const c10::TensorImpl& impl) { return kPlainKeys.has_all(impl.key_set()); }

// What makes a tensor no plain memory, for messages: "Sparse", "FuncTorchBatched", ...
const char* kind_of(const at::Tensor& tensor);

// The address of the elements of a plain tensor that has no gaps. Null where it has fewer bytes than elements, as after
// untyped_storage().resize_(0).
inline const void* dense_data(const c10::TensorImpl& impl) {
  const auto end = static_cast<size_t>((impl.storage_offset() + impl.numel()) * static_cast<int64_t>(impl.itemsize()));
  const c10::Storage& storage = impl.unsafe_storage();
  return storage && storage.nbytes() >= end ? impl.data() : nullptr;
}

// Memory for statistics on a device, of float64: a plain tensor, also within a transform of torch.func, which wraps
// what others make.
at::Tensor new_memory(at::IntArrayRef sizes, c10::Device device);

// The same for what the caller gets, who could not use a plain one there. Throws InvalidValueError within a transform
// that wraps.
at::Tensor new_result(at::IntArrayRef sizes, c10::Device device);

enum class Memory { kThere, kFreed, kTooSmall };

// The state of the memory of a plain tensor, of any strides.
Memory memory_of(const at::Tensor& tensor);

}  // namespace pytracker
