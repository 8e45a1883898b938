// Feeds values to meters: the last value, the sum weighted by n, the count, and the NaNs, which are counted apart.
//
// What it costs: one launch for up to about a thousand values of any dtype. The host learns nothing of the values, so
// it needn't wait for them.
#include <algorithm>

#include "../accumulator.h"
#include "launch.h"
#include "scalars.cuh"

namespace pytracker::cuda {
namespace {

template <int kValues>
struct Parameters {
  double* state;
  int32_t count;
  Scalar values[kValues];
  double weights[kValues];
};
constexpr int kFewValues = 100;  // parameters below 4 KB, which cost less to launch with
constexpr int kManyValues = 1000;

template <int kValues>
__global__ void update_meters_kernel(const __grid_constant__ Parameters<kValues> parameters) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= parameters.count) return;
  const double value = read(parameters.values[i]), weight = parameters.weights[i];
  const bool nan = value != value;
  double* meter = parameters.state + int64_t{parameters.values[i].slot} * kMeterColumns;
  meter[kVal] = value;
  meter[kMeterSum] += nan ? 0 : value * weight;
  meter[kCount] += nan ? 0 : weight;
  meter[kMeterNans] += nan;
}

template <int kValues>
cudaError_t launch(double* state, const Scalar* values, const double* weights, int32_t count, cudaStream_t stream) {
  Parameters<kValues> parameters;
  parameters.state = state;
  parameters.count = count;
  std::copy_n(values, count, parameters.values);
  std::copy_n(weights, count, parameters.weights);
  const int threads = 128;
  update_meters_kernel<kValues><<<(count + threads - 1) / threads, threads, 0, stream>>>(parameters);
  return cudaGetLastError();
}

}  // namespace

cudaError_t update_meters(double* state, const Scalar* values, const double* weights, int64_t count,
                          cudaStream_t stream) {
  for (int64_t done = 0; done < count; done += kManyValues) {
    const int32_t part = static_cast<int32_t>(std::min<int64_t>(count - done, kManyValues));
    const auto launcher = part <= kFewValues ? launch<kFewValues> : launch<kManyValues>;
    if (const cudaError_t error = launcher(state, values + done, weights + done, part, stream); error != cudaSuccess)
      return error;
  }
  return cudaSuccess;
}

}  // namespace pytracker::cuda
