// Feeds values to meters: the last value, the sum weighted by n, the count, and the NaNs, which are counted apart. A
// weight of 0 adds nothing, whatever the value.
//
// What it costs: one launch for up to kMaxScalars values and weights of any dtypes. The host learns nothing of them, so
// it needn't wait.
#include <algorithm>

#include "../accumulator.h"
#include "launch.h"
#include "scalars.cuh"

namespace pytracker::cuda {
namespace {

struct Parameters {
  double* state;
  int32_t count;
  Scalar values[kMaxScalars];
  Scalar weights[kMaxScalars];
};

__global__ void __launch_bounds__(kMaxScalars) update_meters_kernel(const __grid_constant__ Parameters parameters) {
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

}  // namespace

cudaError_t update_meters(double* state, const Scalar* values, const Scalar* weights, int64_t count,
                          cudaStream_t stream) {
  for (int64_t done = 0; done < count; done += kMaxScalars) {
    Parameters parameters;
    parameters.state = state;
    parameters.count = static_cast<int32_t>(std::min<int64_t>(count - done, kMaxScalars));
    std::copy_n(values + done, parameters.count, parameters.values);
    std::copy_n(weights + done, parameters.count, parameters.weights);
    update_meters_kernel<<<1, kMaxScalars, 0, stream>>>(parameters);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace pytracker::cuda
