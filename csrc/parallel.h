// at::parallel_for, but for the child of a fork: OpenMP's threads are not there, and its pool would wait for them.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace pytracker {

// Whether this process is the child of a fork, and runs no program of its own since.
bool is_forked();

// Calls f(from, to) for parts of [begin, end) of at least `grain`. No result depends on how it is cut.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (is_forked()) {
    if (begin < end) f(begin, end);
  } else {
    at::parallel_for(begin, end, grain, f);
  }
}

}  // namespace pytracker
