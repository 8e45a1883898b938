// Multiplies gradients by factors that lie on the device, one for all or one each: the second half of clipping.
//
// What it costs: where a factor is exactly 1, one read of 8 bytes for each block, and the gradients are not touched.
// That is the common case in a healthy training, and where torch reads and writes every gradient all the same. Where
// the factor is not 1: each byte is read and written once.
//
// A product is rounded as torch's mul_ rounds it: the factor goes to the type that the product is computed in (fp32 for
// fp32 and shorter), the product to the gradient's own.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "kernel_arguments.h"
#include "share.cuh"

namespace pytracker::cuda {
template <typename T>
__device__ __forceinline__ T product(T x, double factor) {
  if constexpr (std::is_same_v<T, double>) {
    return x * factor;
  } else {
    return narrow<T>(widen(x) * static_cast<float>(factor));
  }
}

template <typename T>
__device__ __forceinline__ uint4 product(uint4 raw, double factor) {
  T x[kVectorBytes / sizeof(T)];
  memcpy(x, &raw, sizeof(x));
#pragma unroll
  for (T& value : x) value = product(value, factor);
  memcpy(&raw, x, sizeof(x));
  return raw;
}

// kParts: 2 for a complex T, whose parts are scaled alike.
template <typename T, int kParts = 1>
__device__ __forceinline__ void multiply(void* gradient, const Stretch& stretch, const Strided* strided, Team team,
                                         double factor) {
  T* data = static_cast<T*>(gradient);
  if (strided != nullptr) {
    for (int i = team.rank(); i < stretch.count; i += team.size()) {
      T* element = data + kParts * strided_offset(*strided, stretch.first + i);
#pragma unroll
      for (int part = 0; part < kParts; ++part) element[part] = product(element[part], factor);
    }
    return;
  }
  data += kParts * stretch.first;
  const int count = kParts * stretch.count;
  const Vectors<T> vectors(data, count);
  const auto multiply_one = [&](int i) { data[i] = product(data[i], factor); };
  if (team.rank() < vectors.head) multiply_one(team.rank());
  if (team.rank() < vectors.tail) multiply_one(count - 1 - team.rank());

  // Four loads before the first store, as the compiler may not move a load across a store to the same array.
  constexpr int kVectors = 4;
  uint4* body = reinterpret_cast<uint4*>(data + vectors.head);
  int at = team.rank();
  for (; at + (kVectors - 1) * team.size() < vectors.count; at += kVectors * team.size()) {
    uint4 raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) raw[i] = body[at + i * team.size()];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) body[at + i * team.size()] = product<T>(raw[i], factor);
  }
  for (; at < vectors.count; at += team.size()) body[at] = product<T>(body[at], factor);
}

// Gradient t by factors[t * stride].
__device__ __forceinline__ void scale_gradients(const Work& work, const double* factors, int64_t stride,
                                                void* const* gradients) {
  if (stride == 0 && *factors == 1) return;
  const int32_t b = work.first_block + blockIdx.x;
  const BlockEntry& block = work.blocks[b];
  for (int32_t t = block.first_tensor; t < block.end_tensor; ++t) {
    const TensorEntry& tensor = work.tensors[t];
    const Stretch stretch = stretch_of(tensor, work.share, b);
    const Team team{stretch.vectors > kWarpVectors};
    if (!team.block && (t - block.first_tensor) % kWarps != threadIdx.x / kWarp) continue;
    void* gradient = gradients[t - work.first_tensor];
    if (gradient == nullptr) continue;
    const double factor = factors[t * stride];
    if (factor == 1) continue;
    const Strided* gaps = tensor.strided < 0 ? nullptr : work.strided + tensor.strided;
    switch (tensor.dtype) {
      case Dtype::kFloat64: multiply<double>(gradient, stretch, gaps, team, factor); break;
      case Dtype::kFloat32: multiply<float>(gradient, stretch, gaps, team, factor); break;
      case Dtype::kFloat16: multiply<Half>(gradient, stretch, gaps, team, factor); break;
      case Dtype::kBFloat16: multiply<BFloat16>(gradient, stretch, gaps, team, factor); break;
      case Dtype::kComplex64: multiply<float, 2>(gradient, stretch, gaps, team, factor); break;
      case Dtype::kComplex128: multiply<double, 2>(gradient, stretch, gaps, team, factor); break;
    }
  }
}

}  // namespace pytracker::cuda
