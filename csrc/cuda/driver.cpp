#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "kernel_arguments.h"

namespace pytracker::cuda {
namespace {

template <typename F>
void find(void* library, const char* name, F** function) {
  *function = reinterpret_cast<F*>(dlsym(library, name));
  if (*function == nullptr) throw std::runtime_error(std::string("the CUDA driver has no function ") + name);
}

Driver open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays open: kernels live as long as the process
  if (library == nullptr) throw std::runtime_error(std::string("there is no CUDA driver: ") + dlerror());
  Driver d;
  find(library, "cuInit", &d.cuInit);
  find(library, "cuDriverGetVersion", &d.cuDriverGetVersion);
  find(library, "cuDeviceGet", &d.cuDeviceGet);
  find(library, "cuDevicePrimaryCtxRetain", &d.cuDevicePrimaryCtxRetain);
  find(library, "cuCtxGetCurrent", &d.cuCtxGetCurrent);
  find(library, "cuCtxSetCurrent", &d.cuCtxSetCurrent);
  find(library, "cuModuleLoadData", &d.cuModuleLoadData);
  find(library, "cuModuleGetFunction", &d.cuModuleGetFunction);
  find(library, "cuLaunchKernel", &d.cuLaunchKernel);
  find(library, "cuGetErrorString", &d.cuGetErrorString);
  if (const Result result = d.cuInit(0); result != kSuccess)
    throw std::runtime_error("the CUDA driver does not start (error " + std::to_string(result) + ")");
  return d;
}

Function function_of(Module module, const char* name) {
  Function function = nullptr;
  check(driver().cuModuleGetFunction(&function, module, name), name);
  return function;
}

}  // namespace

const Driver& driver() {
  static const Driver opened = open_driver();
  return opened;
}

void check(Result result, const char* doing) {
  if (result == kSuccess) return;
  const char* words = nullptr;
  driver().cuGetErrorString(result, &words);
  throw std::runtime_error(std::string(doing) + ": " + (words == nullptr ? "unknown error" : words) + " (CUDA error " +
                           std::to_string(result) + ")");
}

int32_t Kernels::max_pointers() const { return many.gradients == nullptr ? kFewPointers : kManyPointers; }

Kernels load_kernels(int device, const std::vector<std::string>& images) {
  ensure_context(device);
  Kernels kernels;
  KernelsOfSize* const sizes[] = {&kernels.few, &kernels.some, &kernels.many};
  for (size_t i = 0; i < images.size(); ++i) {
    Module module = nullptr;
    check(driver().cuModuleLoadData(&module, images[i].c_str()), "loading kernels");
    sizes[i]->gradients = function_of(module, "gradients_kernel");
    sizes[i]->with_extras = function_of(module, "gradients_and_extras_kernel");
    sizes[i]->scale = function_of(module, "scale_kernel");
    if (i > 0) continue;  // these two are the same in all
    kernels.update_meters = function_of(module, "update_meters_kernel");
    kernels.decide = function_of(module, "decide_kernel");
  }
  return kernels;
}

void ensure_context(int device) {
  CUctx_st* context = nullptr;
  check(driver().cuCtxGetCurrent(&context), "looking for a context");
  if (context != nullptr) return;
  int handle = 0;
  check(driver().cuDeviceGet(&handle, device), "looking for the device");
  check(driver().cuDevicePrimaryCtxRetain(&context, handle), "taking the device's context");
  check(driver().cuCtxSetCurrent(context), "entering the device's context");
}

}  // namespace pytracker::cuda
