// What the CUDA back end offers to the host: no torch, only launchers. Every function enqueues on the given stream, in
// the current context, and returns; none waits, allocates or copies. Each throws std::runtime_error where the driver
// refuses.
#pragma once

#include <cstddef>
#include <vector>

#include "../request.h"
#include "driver.h"
#include "work_split.h"

namespace pytracker::cuda {

// Built when Layouts::version changes.
struct Table {
  std::vector<std::byte> bytes;  // to be copied to the device, 16-byte aligned there
  size_t workspace_bytes = 0;    // device memory, 16-byte aligned
  size_t tickets_bytes = 0;      // the same, zeroed once; every step leaves it so
  std::vector<Launch> launches;  // one up to max_pointers tensors

  int64_t share = 0;  // vectors for each block
  int32_t n_blocks = 0, n_totals = 0;
  size_t blocks_offset = 0, strided_offset = 0;  // in `bytes`; the tensors come first
  size_t totals_offset = 0;                      // in the workspace; the partial rows come first
};

// Launches a kernel that does nothing, so that a device for which its code is not made is noticed here.
void probe(const Kernels& kernels, Stream stream);

// max_pointers: how many tensors a launch can take along, as the kernels say.
Table build_table(const Layouts& layouts, int32_t max_pointers);

// All moments of all gradients, the totals and the scalars, into one row, and what is decided; advances the cursor.
void gradients(const Kernels& kernels, const StepRequest& request, const Table& table, const void* device_table,
               void* workspace, void* tickets, Stream stream);

// Decides by the latest row, of so many tensors.
void decide(const Kernels& kernels, const Decision& decision, const RowTarget& row, int64_t n_tensors, Stream stream);

// Multiplies gradient t by factors[t * stride] (float64 on the device). Touches nothing where that is exactly 1.
void scale(const Kernels& kernels, const Table& table, const void* device_table, void* const* gradients,
           const double* factors, int64_t stride, Stream stream);

// Feeds `count` values, each with its weight, to the meters that they name by slot, each slot at most once. state:
// [meters, kMeterColumns].
void update_meters(const Kernels& kernels, double* state, const Scalar* values, const Scalar* weights, int64_t count,
                   Stream stream);

}  // namespace pytracker::cuda
