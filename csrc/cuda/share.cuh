// A block's share of the gradients: which stretch of which tensor, and how its threads go through it.
#pragma once

#include "work_split.h"

namespace pytracker::cuda {

// Copies an entry of a table to shared memory by one load of `kCount` threads, of which this is number `thread`: if
// each read each field for itself, the tables of a block would be as many bytes as a tenth of its share.
template <int kCount, typename Entry>
__device__ __forceinline__ void copy_entry(const Entry* from, Entry& to, int thread) {
  constexpr int kWords = sizeof(Entry) / sizeof(uint32_t);
  static_assert(kWords <= kCount);
  if (thread < kWords) reinterpret_cast<uint32_t*>(&to)[thread] = reinterpret_cast<const uint32_t*>(from)[thread];
}

// Tensor t, of a block: among what came with the block's entry, or brought by the warp, to a place of its own.
__device__ __forceinline__ const TensorEntry& fetch(const TensorEntry* tensors, const BlockEntry& block, int32_t t,
                                                    TensorEntry (&of_warps)[kWarps]) {
  const int32_t place = t - block.first_tensor;
  if (place < kWarps) return block.first[place];
  TensorEntry& own = of_warps[threadIdx.x / kWarp];
  __syncwarp();  // the entry before this one may still be read
  copy_entry<kWarp>(&tensors[t], own, threadIdx.x % kWarp);
  __syncwarp();
  return own;
}

// The elements of a tensor that lie in a block's share. 32 bits are enough for these: a share is 120 KB.
struct Stretch {
  int64_t first;
  int32_t count;
  int32_t vectors;
};

__device__ __forceinline__ Stretch stretch_of(const TensorEntry& tensor, int64_t share, int32_t block) {
  const int64_t from = max(block * share - tensor.begin, int64_t{0});
  const int64_t to = min((block + 1) * share - tensor.begin, tensor.vectors);
  const int64_t first = from * tensor.per_vector;
  const int64_t end = min(to * tensor.per_vector, tensor.numel);
  return {first, static_cast<int32_t>(end - first), static_cast<int32_t>(to - from)};
}

// Threads that share a stretch: one warp, or all of the block.
struct Team {
  bool block;
  __device__ int rank() const { return block ? threadIdx.x : lane(); }
  __device__ int warps() const { return block ? kWarps : 1; }
  __device__ int size() const { return warps() * kWarp; }
  __device__ int warp() const { return block ? threadIdx.x / kWarp : 0; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
};

// Where element `index` of a gradient with gaps lies, in elements.
__device__ __forceinline__ int64_t strided_offset(const Strided& strided, int64_t index) {
  int64_t offset = 0;
  for (int d = static_cast<int>(strided.ndim) - 1; d >= 0; --d) {
    offset += index % strided.sizes[d] * strided.strides[d];
    index /= strided.sizes[d];
  }
  return offset;
}

// A run of elements without gaps as 16-byte vectors, with what lies before the first and after the last aligned one.
template <typename T>
struct Vectors {
  int head, count, tail;  // elements, vectors, elements

  __device__ __forceinline__ Vectors(const T* data, int elements) {
    constexpr int kElements = kVectorBytes / sizeof(T);
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(data) % kVectorBytes);
    head = min(elements, (kVectorBytes - past) % kVectorBytes / static_cast<int>(sizeof(T)));
    count = (elements - head) / kElements;
    tail = (elements - head) % kElements;
  }
};

}  // namespace pytracker::cuda
