// Chooses the kernels for this processor, once.
#include <ATen/Version.h>

#include "kernel.h"

namespace pytracker::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    // What ATen chose: it knows the processor, and heeds ATEN_CPU_CAPABILITY.
    [[maybe_unused]] const std::string isa = at::get_cpu_capability();
#if defined(PYTRACKER_HAVE_AVX512)
    if (isa == "AVX512") return kernels_AVX512;
#endif
#if defined(PYTRACKER_HAVE_AVX2)
    if (isa == "AVX512" || isa == "AVX2") return kernels_AVX2;
#endif
    return kernels_DEFAULT;
  }();
  return chosen;
}

}  // namespace pytracker::cpu
