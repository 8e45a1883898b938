// Feeds values to meters: the last value, the sum weighted by n, the count, and the NaNs, which are counted apart. A
// weight of 0 adds nothing, whatever the value.
//
// What it costs: one launch for up to kMaxScalars values and weights of any dtypes. The host learns nothing of them, so
// it needn't wait.
#pragma once

#include "kernel_arguments.h"
#include "scalars.cuh"

namespace pytracker::cuda {

__device__ __forceinline__ void update_meter(const MeterParameters& parameters) {
  const int i = threadIdx.x;
  if (i >= parameters.count) return;
  const double value = read(parameters.values[i]), weight = read(parameters.weights[i]);
  const bool nan = value != value, counts = !nan && weight != 0;
  double* meter = parameters.state + int64_t{parameters.values[i].slot} * kMeterColumns;
  meter[kVal] = value;
  meter[kMeterSum] += counts ? value * weight : 0;
  meter[kCount] += counts ? weight : 0;
  meter[kMeterNans] += nan && weight != 0;
}

}  // namespace pytracker::cuda
