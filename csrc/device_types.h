// The plain data that kernels read: dtypes, gaps in memory, scalars, where a row goes. No standard library beyond
// <cstdint>, since a run-time compiler (NVRTC) has none.
#pragma once

#include <cstdint>

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

// A value that is recorded with a step or fed to a meter: one element on the device, or a number on the host.
struct Scalar {
  const void* data = nullptr;  // one element of `dtype` in the back end's memory; null: `value`
  double value = 0;
  int32_t slot = 0;  // which scalar of the row (a meter: which accumulator)
  Dtype dtype = Dtype::kFloat64;
  bool is_integer = false;  // `data` is int64 (the count of correct answers, say), and dtype is not looked at
};
constexpr int kMaxScalars = 64;

// Which norm of all gradients together: the root of the sum of squares, or the largest magnitude.
enum class Order : int32_t { kNone, kL2, kInf };

// What follows from the total norm: the factor that the gradients are to be scaled by, and whether the step can be
// taken at all. It is written where the scaling and a fused optimizer read it, and into the step's row.
struct Decision {
  Order order = Order::kNone;    // none: nothing is decided
  Scalar max_norm;               // the largest norm allowed
  const double* norm = nullptr;  // of all ranks and devices; null: that of the row
  double* outcome = nullptr;     // [2] the norm, and the factor min(1, max_norm / (norm + 1e-6)), torch's formula
  float* short_norm = nullptr;   // null, or the norm in float32
  float* grad_scale = nullptr;   // null, or what a fused optimizer divides by: 1 / factor
  float* found_inf = nullptr;    // null, or 1 where it is to skip the step: the norm is not finite
  int32_t factor_slot = -1;      // scalars of the row that are written; -1: it has none
  int32_t skipped_slot = -1;
};

// Where a step's row goes: row `*cursor % capacity` of a log, after which the cursor is advanced; without a cursor,
// the first row, without marks.
struct RowTarget {
  double* rows = nullptr;
  int64_t stride = 0;  // float64 values from one row to the next
  int64_t capacity = 1;
  int64_t* cursor = nullptr;
  int64_t asked_by = 0;  // a mark of the row, by which the host knows it again
};

}  // namespace pytracker
