// The few functions of the CUDA driver that load kernels and launch them, found in libcuda.so.1 when they are first
// needed. So the library is built without a toolkit, and loads on a machine without a driver, too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct CUctx_st;
struct CUmod_st;
struct CUfunc_st;
struct CUstream_st;

namespace pytracker::cuda {

using Result = int;  // CUresult
using Stream = CUstream_st*;
using Module = CUmod_st*;
using Function = CUfunc_st*;

constexpr Result kSuccess = 0;

struct Driver {
  Result (*cuInit)(unsigned);
  Result (*cuDriverGetVersion)(int* version);
  Result (*cuDeviceGet)(int* device, int ordinal);
  Result (*cuDevicePrimaryCtxRetain)(CUctx_st** context, int device);
  Result (*cuCtxGetCurrent)(CUctx_st** context);
  Result (*cuCtxSetCurrent)(CUctx_st* context);
  Result (*cuModuleLoadData)(Module* module, const void* image);
  Result (*cuModuleGetFunction)(Function* function, Module module, const char* name);
  Result (*cuLaunchKernel)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared, Stream stream, void** arguments,
                           void** extra);
  Result (*cuGetErrorString)(Result result, const char** words);
};

// Throws std::runtime_error where there is no driver, or one without these functions.
const Driver& driver();

// Throws std::runtime_error with the driver's words, and what was being done, where the result is no success.
void check(Result result, const char* doing);

// The kernels over gradients, for launches of so many: see kernel_arguments.h.
struct KernelsOfSize {
  Function gradients = nullptr, with_extras = nullptr, scale = nullptr;
};

// The kernels of one device. `some` and `many` are null where the driver does not know so large parameters.
struct Kernels {
  Function update_meters = nullptr, decide = nullptr;
  KernelsOfSize few, some, many;

  int32_t max_pointers() const;
};

// Loads kernels from machine code or PTX into a device's primary context, where they stay until the process ends:
// images for few, some and many pointers, or the first alone. Throws std::runtime_error where the driver refuses them.
Kernels load_kernels(int device, const std::vector<std::string>& images);

// Makes the device's primary context current where the thread has none yet: the driver, unlike the runtime, does not.
void ensure_context(int device);

}  // namespace pytracker::cuda
