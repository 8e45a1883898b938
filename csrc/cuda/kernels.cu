// The translation unit of all kernels. It includes nothing but sources of this folder, so any CUDA compiler makes it,
// and its code serves every version of torch: `make kernels` compiles it for each architecture, and
// pytracker/core/nvrtc.py does so at run time where none of these fits.
//
// PYTRACKER_POINTERS says how many gradients a launch takes along (kernel_arguments.h); a module for each size is
// loaded by itself, as an old driver refuses all of a module in which one kernel has more than 4 KB of parameters.
#include "decide.cuh"
#include "gradient_moments.cuh"
#include "meter_update.cuh"
#include "scale.cuh"

namespace pytracker::cuda {

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gradients_kernel(const __grid_constant__ StepParameters<PYTRACKER_POINTERS> parameters) {
  reduce_gradients<NoExtras>(parameters.step, parameters.gradients);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSmWithExtras)
    gradients_and_extras_kernel(const __grid_constant__ StepParameters<PYTRACKER_POINTERS> parameters) {
  reduce_gradients<AllExtras>(parameters.step, parameters.gradients);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    scale_kernel(const __grid_constant__ ScaleParameters<PYTRACKER_POINTERS> parameters) {
  scale_gradients(parameters.work, parameters.factors, parameters.stride, parameters.gradients);
}

extern "C" __global__ void __launch_bounds__(1) decide_kernel(const __grid_constant__ DecideParameters parameters) {
  decide_by_row(parameters);
}

extern "C" __global__ void __launch_bounds__(kMaxScalars)
    update_meters_kernel(const __grid_constant__ MeterParameters parameters) {
  update_meter(parameters);
}

}  // namespace pytracker::cuda
