// Decides by a row that is written already: one thread, for a clip that is asked for after the step, or whose norm is
// that of several ranks or devices.
#pragma once

#include "../decision.h"
#include "kernel_arguments.h"
#include "scalars.cuh"

namespace pytracker::cuda {

__device__ __forceinline__ void decide_by_row(const DecideParameters& parameters) {
  const RowTarget& target = parameters.row;
  const int64_t index = target.cursor == nullptr ? 0 : (*target.cursor - 1) % target.capacity;
  double* row = target.rows + index * target.stride;
  decide(parameters.decision, read(parameters.decision.max_norm), row, row + tensor_offset(parameters.n_tensors));
}

}  // namespace pytracker::cuda
