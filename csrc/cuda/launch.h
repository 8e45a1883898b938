// What the CUDA back end offers to the host: no torch, no kernels, only launchers. Every function enqueues on the given
// stream and returns; none waits, allocates or copies.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

#include "../request.h"
#include "work_split.h"

namespace pytracker::cuda {

// Built when Layouts::version changes.
struct Table {
  std::vector<std::byte> bytes;  // to be copied to the device, 16-byte aligned there
  size_t workspace_bytes = 0;    // device memory, 16-byte aligned, zeroed once; every step leaves it ready for the next
  std::vector<Launch> launches;  // one up to kMaxPointers tensors

  int64_t share = 0;  // vectors for each block
  int32_t n_blocks = 0, n_totals = 0;
  size_t blocks_offset = 0, strided_offset = 0;  // in `bytes`; the tensors come first
  size_t totals_offset = 0, tickets_offset = 0;  // in the workspace; the partial rows come first
};

Table build_table(const Layouts& layouts);

// All moments of all gradients, the totals, the scalars and the clip factor, into one row; advances the cursor.
cudaError_t gradients(const StepRequest& request, const Table& table, const void* device_table, void* workspace,
                      cudaStream_t stream);

// Multiplies every gradient by *factor (float64 on the device). Touches nothing where it is exactly 1.
cudaError_t scale(const Table& table, const void* device_table, void* const* gradients, const double* factor,
                  cudaStream_t stream);

// Feeds `count` values to the meters that they name by slot, each slot at most once. state: [meters, kMeterColumns].
cudaError_t update_meters(double* state, const Scalar* values, const Scalar* weights, int64_t count,
                          cudaStream_t stream);

}  // namespace pytracker::cuda
