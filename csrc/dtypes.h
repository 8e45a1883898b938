// torch's dtypes as the kernels know them.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>

#include "request.h"

namespace pytracker {

inline std::optional<Dtype> dtype_of(c10::ScalarType type) {
  switch (type) {
    case c10::kDouble: return Dtype::kFloat64;
    case c10::kFloat: return Dtype::kFloat32;
    case c10::kHalf: return Dtype::kFloat16;
    case c10::kBFloat16: return Dtype::kBFloat16;
    case c10::kComplexFloat: return Dtype::kComplex64;
    case c10::kComplexDouble: return Dtype::kComplex128;
    default: return std::nullopt;
  }
}

}  // namespace pytracker
