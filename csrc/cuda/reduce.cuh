// From the columns of each thread to those of a warp, of a block, and of all blocks.
#pragma once

#include "work_split.h"

namespace pytracker::cuda {

__device__ __forceinline__ bool is_maximum(int column) { return column == kAbsMax || column == kMaxSumSq; }

// Moments are merged by adding or, for two of the columns, by the maximum. No column is negative before it is a
// maximum, so zero is neutral for all of them. The further columns are sums, all of them.
template <bool kSums = false>
__device__ __forceinline__ double combine(int column, double a, double b) {
  return !kSums && is_maximum(column) ? max_keep_nan(a, b) : a + b;
}

// Shared memory for the reductions of a block.
struct Scratch {
  // Row after row begins 8 banks further, so that the reads below meet no bank twice.
  double columns[kWarps][kTotals][kWarp + 4];
  double merged[kWarps][kTotals];
};
static_assert(kTotals >= kColumns && kTotals >= kExtraColumns);

// Reduces the columns of a warp into merged[warp]; the whole warp may read it afterwards.
//
// The obvious way, five shuffles for each column, costs 200 instructions a thread, as each 64-bit value takes two. Here
// the columns are turned by a trip through shared memory: four lanes take a column, each adds eight values, two
// shuffles remain. About 50 instructions, which matters as small tensors are reduced by one warp each.
template <bool kSums = false, int kCount>
__device__ __forceinline__ void reduce_warp(const double (&mine)[kCount], Scratch& scratch) {
  static_assert(kCount * 4 <= kWarp);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = lane / 4, part = lane % 4;
  auto& columns = scratch.columns[warp];
#pragma unroll
  for (int c = 0; c < kCount; ++c) columns[c][lane] = mine[c];
  __syncwarp();

  double value = 0;
  if (column < kCount) {
    const double* values = &columns[column][part];
    if (!kSums && is_maximum(column)) {
#pragma unroll
      for (int i = 0; i < kWarp; i += 4) value = max_keep_nan(value, values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWarp; i += 4) value += values[i];
    }
  }
  value = combine<kSums>(column, value, __shfl_xor_sync(~0u, value, 1));
  value = combine<kSums>(column, value, __shfl_xor_sync(~0u, value, 2));
  if (column < kCount && part == 0) scratch.merged[warp][column] = value;
  __syncwarp();
}

// Reduces the columns of a block into merged[0]; only thread 0 may read it afterwards.
template <bool kSums = false, int kCount>
__device__ __forceinline__ void reduce_block(const double (&mine)[kCount], Scratch& scratch) {
  __syncthreads();  // merged[] may still be read from the time before
  reduce_warp<kSums>(mine, scratch);
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp)
      for (int c = 0; c < kCount; ++c)
        scratch.merged[0][c] = combine<kSums>(c, scratch.merged[0][c], scratch.merged[warp][c]);
}

// Adds to *at in the memory of the device, and returns what was there.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* at, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(at)), "r"(value)
               : "memory");
  return before;
}

// Adds `arriving` to a ticket that expects `expected`; true, for the whole block, in the block that completes it, which
// then sees what all others wrote before they arrived. The ticket is left at zero for the next launch.
//
// Thread 0 speaks for the block: what its other threads wrote must lie behind a barrier that it took part in. The
// ticket releases that, and acquires what was released by those before: one fence where __threadfence() on both sides
// would be two, and of the cheaper kind, on a path on which every block waits twice.
__device__ __forceinline__ bool last_to_arrive(uint32_t* ticket, uint32_t arriving, uint32_t expected) {
  bool last = false;
  if (threadIdx.x == 0) {
    last = add_acquire_release(ticket, arriving) + arriving == expected;
    if (last) *ticket = 0;
  }
  return __syncthreads_or(last);
}

}  // namespace pytracker::cuda
