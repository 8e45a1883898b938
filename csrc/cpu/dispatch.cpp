// Chooses the kernels for this processor, once.
#include <ATen/native/DispatchStub.h>

#include "kernel.h"

namespace pytracker::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (at::native::get_cpu_capability()) {
#if defined(PYTRACKER_HAVE_AVX512)
      case at::native::CPUCapability::AVX512: return kernels_AVX512;
#endif
#if defined(PYTRACKER_HAVE_AVX2)
#if !defined(PYTRACKER_HAVE_AVX512)
      case at::native::CPUCapability::AVX512:
#endif
      case at::native::CPUCapability::AVX2: return kernels_AVX2;
#endif
#if defined(PYTRACKER_HAVE_SVE256)
      case at::native::CPUCapability::SVE256: return kernels_SVE256;
#endif
      default: return kernels_DEFAULT;
    }
  }();
  return chosen;
}

}  // namespace pytracker::cpu
