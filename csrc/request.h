// What is reduced: how each gradient lies in memory, which scalars go with the step, where the row is written.
//
// Plain data, free of torch, so that the kernels of every back end include this and nothing else. gather.h fills it
// from tensors, and is the one place that validates them.
#pragma once

#include <cstdint>
#include <vector>

#include "accumulator.h"

namespace pytracker {

enum class Dtype : uint8_t { kFloat64, kFloat32, kFloat16, kBFloat16, kComplex64, kComplex128 };

constexpr int64_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
    case Dtype::kBFloat16: return 2;
    case Dtype::kFloat32: return 4;
    case Dtype::kFloat64:
    case Dtype::kComplex64: return 8;
    case Dtype::kComplex128: return 16;
  }
  return 0;
}

// A gradient whose elements leave gaps in memory, outermost dimension first, in elements; dimensions that lie
// contiguously are folded together, so few remain.
constexpr int kMaxDims = 8;
struct Strided {
  int64_t ndim = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
  bool operator==(const Strided& other) const {
    if (ndim != other.ndim) return false;
    for (int64_t d = 0; d < ndim; ++d)
      if (sizes[d] != other.sizes[d] || strides[d] != other.strides[d]) return false;
    return true;
  }
};

// How one gradient lies in memory. The order of its elements does not matter to a moment, so every gradient without
// gaps or overlaps (transposed, channels_last) is a run of `numel` elements. `element_count` is static for a parameter
// and not here: it belongs to the names.
struct Layout {
  int64_t numel = 0;           // elements stored, after folding what is expanded
  int64_t repeat = 1;          // elements that each stored one stands for (expanded gradients)
  int64_t implicit_zeros = 0;  // elements not stored (sparse gradients)
  int32_t strided = -1;        // index into Layouts::strided, or -1: `numel` elements without gaps
  Dtype dtype = Dtype::kFloat32;
};

// The gradients of one device, in the order of their rows.
struct Layouts {
  std::vector<Layout> tensors;
  std::vector<Strided> strided;
  uint64_t version = 0;  // grows with each change, so that a back end knows when its tables are old
};

// A value that is recorded with a step or fed to a meter: one element on the device, or a number on the host.
struct Scalar {
  const void* data = nullptr;  // one element of `dtype` in the back end's memory; null: `value`
  double value = 0;
  int32_t slot = 0;  // which scalar of the row (a meter: which accumulator)
  Dtype dtype = Dtype::kFloat64;
  bool is_integer = false;  // `data` is int64 (the count of correct answers, say), and dtype is not looked at
};
constexpr int kMaxScalars = 64;

// Where a step's row goes: row `*cursor % capacity` of a log, after which the cursor is advanced; without a cursor,
// the first row.
struct RowTarget {
  double* rows = nullptr;
  int64_t stride = 0;  // float64 values from one row to the next
  int64_t capacity = 1;
  int64_t* cursor = nullptr;
};

// What is asked of a back end in one step.
struct StepRequest {
  const Layouts* layouts = nullptr;
  const void* const* gradients = nullptr;  // [tensors] in the back end's memory; null: no gradient
  RowTarget row;
  const Scalar* scalars = nullptr;
  int64_t n_scalars = 0;
  Scalar grad_scale{nullptr, 1.0};  // divides the moments, not the gradients
  // With a positive max_norm: clip[0] = total norm, clip[1] = min(1, max_norm / (norm + 1e-6)), torch's formula; in the
  // back end's memory.
  double max_norm = 0;
  double* clip = nullptr;
};

}  // namespace pytracker
