// How the gradients are dealt to thread blocks: computed on the host when the layouts change, read by every kernel.
//
// The gradients are laid one after another in 16-byte vectors, each followed by a gap that stands for what a tensor
// costs besides its bytes, and the line is cut into equal shares, one for each block. The number of blocks depends on
// the gradients alone and never on the device, so a sum is grouped in the same way, and has the same bits, on every
// GPU.
#pragma once

#include "../device_types.h"

namespace pytracker::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 128;  // of a block
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocksPerSm = 5;  // what these compile to needs a few registers more
#else
constexpr int kBlocksPerSm = 6;  // leaves 80 registers to a thread: no spills, and 72 KB of loads in flight on an SM
#endif
constexpr int kBlocksPerSmWithExtras = kBlocksPerSm - 1;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 6;  // that a thread loads before it uses the first

// All in vectors. A share is a whole number of tiles for each warp.
constexpr int64_t kShareUnit = kTileVectors * kThreads;
constexpr int64_t kMaxShare = 10 * kShareUnit;  // 120 KB: enough to hide what a block costs, small enough to balance
constexpr int64_t kBlocksWanted = 768;          // of shares below that: 6 blocks for each of 128 SMs
constexpr int64_t kTensorCost = 128;            // what could be read in the time that a small tensor takes a warp
constexpr int64_t kWarpVectors = 384;           // a longer stretch is worth a whole block

// What a kernel knows of one tensor, besides its pointer.
struct TensorEntry {
  int64_t begin;    // where it starts in the line of vectors
  int64_t vectors;  // how many; a gradient with gaps counts an element as one, as it costs a sector of memory
  int64_t numel, repeat, implicit_zeros;
  int32_t per_vector;             // elements
  int32_t strided;                // as in Layout
  int32_t first_block, n_blocks;  // those whose share has some of it
  int32_t total;                  // where its row goes among the totals; -1: into the total of its only block
  Dtype dtype;
};

struct BlockEntry {
  int32_t first_tensor, end_tensor;
  int32_t total;  // where the rows of the tensors that lie in this block alone are merged; -1: there are none
  int32_t unused;
  TensorEntry first[kWarps];  // of its first tensors, so that one load brings all that most blocks need to know
};

// A launch covers some blocks, and carries the pointers of the tensors in their shares.
struct Launch {
  int32_t first_block, n_blocks;
  int32_t first_tensor, n_tensors;
};

}  // namespace pytracker::cuda
