// What moments_kernel.cpp offers, once for each instruction set that it is compiled for.
#pragma once

#include "../request.h"

namespace pytracker::cpu {

struct Kernels {
  const char* isa;
  // The moments of `numel` elements without gaps.
  Moments (*moments)(Dtype dtype, const void* data, int64_t numel);
  // The further columns of the same.
  Extras (*extras)(Dtype dtype, const void* data, int64_t numel);
  // Multiplies `numel` elements without gaps.
  void (*scale)(Dtype dtype, void* data, int64_t numel, double factor);
};

// Defined by moments_kernel.cpp under the name of its instruction set; dispatch.cpp chooses among them.
extern const Kernels kernels_DEFAULT, kernels_AVX2, kernels_AVX512;

// The best kernels for this processor, or those that the environment variable ATEN_CPU_CAPABILITY asks for, as in ATen.
const Kernels& kernels();

}  // namespace pytracker::cpu
