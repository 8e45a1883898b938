// A scalar that goes with a step, read on the device.
#pragma once

#include "../device_types.h"
#include "short_floats.cuh"

namespace pytracker::cuda {

__device__ __forceinline__ double read(const Scalar& scalar) {
  if (scalar.data == nullptr) return scalar.value;
  if (scalar.is_integer) return static_cast<double>(*static_cast<const int64_t*>(scalar.data));
  switch (scalar.dtype) {
    case Dtype::kFloat64: return *static_cast<const double*>(scalar.data);
    case Dtype::kFloat32: return *static_cast<const float*>(scalar.data);
    case Dtype::kFloat16: return widen(*static_cast<const Half*>(scalar.data));
    case Dtype::kBFloat16: return widen(*static_cast<const BFloat16*>(scalar.data));
    default: return std::numeric_limits<double>::quiet_NaN();
  }
}

}  // namespace pytracker::cuda
