// Every statistic of every gradient, in one launch: sum, sum of squares, largest magnitude, zeros, NaNs and Infs of
// each tensor, and of all together, into one row of a log. And, where they are asked for, the further columns of each
// (extras.cuh).
//
// What it costs: each byte is read once. About 7 instructions for each fp32 element and 6 for a bf16 one
// (elements.cuh), a fifth of what an SM can issue in the time that its share of an H100's memory takes. Each block adds
// about 190 instructions a thread, one atomic, and one more for each of its tensors that lies in other blocks too.
//
//   block      reads its share of the gradients (work_split.h): small tensors one warp each, longer stretches all
//   together
//              a tensor that lies in one block: its row is written at once
//              a tensor that lies in several:   each leaves a partial row, the last to arrive merges them in order
//   last block merges the totals, writes the scalars and what is decided, advances the log's cursor
//
// No sum depends on which block comes last: partial rows have fixed places and are merged in a fixed order. So the same
// gradients give the same bits on any GPU, however its blocks are scheduled.
//
// The pointers of the gradients change from step to step, so they travel in the parameters of the kernel: no copy to
// the device, and a CUDA graph replays them as they were captured.
#pragma once

#include "../decision.h"
#include "elements.cuh"
#include "kernel_arguments.h"
#include "reduce.cuh"
#include "scalars.cuh"
#include "share.cuh"

namespace pytracker::cuda {
__device__ __forceinline__ double* row_of(const RowTarget& target) {
  return target.cursor == nullptr ? target.rows : target.rows + *target.cursor % target.capacity * target.stride;
}

// ---------------------------------------------------------------------------------------------------------------------
// One thread's columns of a stretch

template <template <typename> class OfThread, typename T>
__device__ __forceinline__ void accumulate(const void* gradient, const Stretch& stretch, const Strided* strided,
                                           Team team, double (&columns)[kColumns], double (&extras)[kExtraColumns]) {
  Accumulator<T, OfThread> accumulator;
  const T* data = static_cast<const T*>(gradient);
  if (strided != nullptr) {
    for (int i = team.rank(); i < stretch.count; i += team.size())
      accumulator.add(data[strided_offset(*strided, stretch.first + i)]);
  } else {
    data += stretch.first;
    const Vectors<T> vectors(data, stretch.count);
    if (team.rank() < vectors.head) accumulator.add(data[team.rank()]);
    if (team.rank() < vectors.tail) accumulator.add(data[stretch.count - 1 - team.rank()]);

    // Tile after tile for each warp; what is left is less than a tile and goes to the warp whose turn it is.
    constexpr int kTile = kTileVectors * kWarp;
    using Raw = typename Accumulator<T, OfThread>::Raw;
    const Raw* body = reinterpret_cast<const Raw*>(data + vectors.head) + team.warp() * kTile + team.lane();
    int left = vectors.count - team.warp() * kTile;
    for (; left >= kTile; left -= team.warps() * kTile, body += team.warps() * kTile)
      accumulator.template add_tile<kTileVectors, true>(body, kTile);
    if (left > kWarp)
      accumulator.template add_tile<kTileVectors, false>(body, left - team.lane());
    else if (left > 0)
      accumulator.template add_tile<1, false>(body, left - team.lane());
  }
  accumulator.store(columns, extras);
}

template <template <typename> class OfThread>
__device__ __forceinline__ void accumulate(const void* gradient, const TensorEntry& tensor, const Stretch& stretch,
                                           const Strided* strided, Team team, double (&columns)[kColumns],
                                           double (&extras)[kExtraColumns]) {
  const Strided* gaps = tensor.strided < 0 ? nullptr : strided + tensor.strided;
  switch (tensor.dtype) {
    case Dtype::kFloat64: return accumulate<OfThread, double>(gradient, stretch, gaps, team, columns, extras);
    case Dtype::kFloat32: return accumulate<OfThread, float>(gradient, stretch, gaps, team, columns, extras);
    case Dtype::kFloat16: return accumulate<OfThread, Half>(gradient, stretch, gaps, team, columns, extras);
    case Dtype::kBFloat16: return accumulate<OfThread, BFloat16>(gradient, stretch, gaps, team, columns, extras);
    case Dtype::kComplex64: return accumulate<OfThread, float2>(gradient, stretch, gaps, team, columns, extras);
    case Dtype::kComplex128: return accumulate<OfThread, double2>(gradient, stretch, gaps, team, columns, extras);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows, written by one thread each

// The row of a tensor whose elements have all been merged; adds it to a total.
__device__ __forceinline__ void finish_tensor(const Step& step, int32_t t, const TensorEntry& tensor,
                                              const double* columns, double* total) {
  Moments moments;
  moments.sum = columns[kSum];
  moments.sum_sq = columns[kSumSq];
  moments.abs_max = columns[kAbsMax];
  moments.zeros = static_cast<int64_t>(columns[kZeros]);
  moments.nans = static_cast<int64_t>(columns[kNans]);
  moments.infs = static_cast<int64_t>(columns[kInfs]);
  moments.extend(tensor.repeat, tensor.implicit_zeros);
  const double scale = read(step.grad_scale);
  if (scale != 1) moments.divide(scale);

  double row[kTotals];
  moments.store(row);
  row[kMaxSumSq] = row[kSumSq];
  double* out = row_of(step.row) + tensor_offset(t);
  for (int c = 0; c < kColumns; ++c) out[c] = row[c];
  for (int c = 0; c < kTotals; ++c) total[c] = combine(c, total[c], row[c]);
}

__device__ __forceinline__ double* extras_of(const Step& step, int32_t t) {
  return row_of(step.row) + extras_offset(step.row.stride, step.n_tensors, t);
}

// The further columns of a tensor whose elements have all been merged.
__device__ __forceinline__ void finish_extras(const Step& step, int32_t t, const TensorEntry& tensor,
                                              const double* columns) {
  Extras extras;
  extras.l1 = columns[kL1];
  for (int f = 0; f < kFormats; ++f) {
    extras.subnormal[f] = static_cast<int64_t>(columns[kSubnormal + f]);
    extras.near_max[f] = static_cast<int64_t>(columns[kNearMax + f]);
  }
  extras.store(extras_of(step, t), tensor.repeat, read(step.grad_scale));
}

// The totals, and what a step asks for besides; the last thing that a launch writes.
__device__ __forceinline__ void finish_row(const Step& step, Scratch& scratch) {
  double mine[kTotals] = {};
#pragma unroll 4  // as above
  for (int i = threadIdx.x; i < step.n_totals; i += kThreads)
    for (int c = 0; c < kTotals; ++c) mine[c] = combine(c, mine[c], step.totals[i * kTotals + c]);
  reduce_block(mine, scratch);

  double* row = row_of(step.row);
  if (threadIdx.x < step.n_scalars) {
    const Scalar& scalar = step.scalars[threadIdx.x];
    row[tensor_offset(step.n_tensors) + scalar.slot] = read(scalar);
  }
  __syncthreads();  // every thread has read the cursor
  if (threadIdx.x != 0) return;
  const double* totals = scratch.merged[0];
  for (int c = 0; c < kTotals; ++c) row[c] = totals[c];
  if (step.decision.order != Order::kNone)
    decide(step.decision, read(step.decision.max_norm), totals, row + tensor_offset(step.n_tensors));
  if (step.row.cursor == nullptr) return;
  double* marks = row + step.row.stride - kMarks;
  marks[kNumber] = static_cast<double>(*step.row.cursor);
  marks[kAskedBy] = static_cast<double>(step.row.asked_by);
  ++*step.row.cursor;
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernel

// gradients: the pointers of this launch, which lie behind `step` among the kernel's parameters.
template <template <typename> class OfThread>
__device__ __forceinline__ void reduce_gradients(const Step& step, const void* const* gradients) {
  __shared__ Scratch scratch;
  __shared__ double totals[kWarps][kTotals];  // of the tensors that a warp has finished
  __shared__ BlockEntry block;
  __shared__ TensorEntry tensor_entries[kWarps];
  const Work& work = step.work;
  const int32_t b = work.first_block + blockIdx.x;
  copy_entry<kThreads>(&work.blocks[b], block, threadIdx.x);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto gradient_of = [&](int32_t t) { return gradients[t - work.first_tensor]; };
  const auto entry_of = [&](int32_t t) -> const TensorEntry& { return fetch(work.tensors, block, t, tensor_entries); };
  const auto partial_of = [&](int32_t block, bool begins) {
    return step.partials + (2 * int64_t{block} + begins) * kColumns;
  };
  constexpr bool kExtras = OfThread<float>::kAny;
  const auto partial_extras_of = [&](int32_t block, bool begins) {
    return step.totals + int64_t{step.n_totals} * kTotals + (2 * int64_t{block} + begins) * kExtraColumns;
  };
  if (lane < kTotals) totals[warp][lane] = 0;
  __syncthreads();

  // First each warp takes every fourth of the short stretches, then the block takes the long ones together.
  int turn = 0;
  if (kExtras) asm volatile("" : "+r"(turn));  // hidden from the compiler, which would make code for each turn
#pragma unroll 1
  for (; turn < 2; ++turn) {
    const bool together = turn == 1;
    const Team team{together};
    const int32_t first = block.first_tensor + (together ? 0 : warp);
    for (int32_t t = first; t < block.end_tensor; t += together ? 1 : kWarps) {
      const TensorEntry& tensor = entry_of(t);
      const Stretch stretch = stretch_of(tensor, work.share, b);
      if ((stretch.vectors > kWarpVectors) != together) continue;
      const void* gradient = gradient_of(t);
      if (gradient == nullptr) {
        if (team.rank() == 0 && tensor.first_block == b) {
          store_missing(row_of(step.row) + tensor_offset(t));
          if (kExtras) store_missing(extras_of(step, t), kExtraColumns);
        }
        continue;
      }
      double columns[kColumns], extras[kExtraColumns];
      accumulate<OfThread>(gradient, tensor, stretch, work.strided, team, columns, extras);
      together ? reduce_block(columns, scratch) : reduce_warp(columns, scratch);
      if (!kExtras && team.rank() != 0) continue;
      const double* merged = scratch.merged[together ? 0 : warp];
      if (team.rank() == 0 && tensor.n_blocks == 1) {
        finish_tensor(step, t, tensor, merged, totals[warp]);
      } else if (team.rank() == 0) {
        double* partial = partial_of(b, tensor.first_block == b);
        for (int c = 0; c < kColumns; ++c) partial[c] = merged[c];
      }
      if constexpr (kExtras) {
        together ? reduce_block<true>(extras, scratch) : reduce_warp<true>(extras, scratch);
        if (team.rank() == 0 && tensor.n_blocks == 1) {
          finish_extras(step, t, tensor, merged);
        } else if (team.rank() == 0) {
          double* partial = partial_extras_of(b, tensor.first_block == b);
          for (int c = 0; c < kExtraColumns; ++c) partial[c] = merged[c];
        }
      }
    }
  }
  __syncthreads();

  // Which totals are now complete?
  uint32_t complete = 0;
  if (block.total >= 0) {
    ++complete;
    if (threadIdx.x < kTotals) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total = combine(threadIdx.x, total, totals[w][threadIdx.x]);
      step.totals[block.total * kTotals + threadIdx.x] = total;
    }
  }
  // The first and the last tensor of the block may lie in others too.
  for (int32_t t = block.first_tensor; t < block.end_tensor; t += max(block.end_tensor - 1 - block.first_tensor, 1)) {
    const TensorEntry& tensor = entry_of(t);
    if (tensor.n_blocks == 1) continue;
    double* total = step.totals + tensor.total * kTotals;
    if (gradient_of(t) == nullptr) {
      if (tensor.first_block != b) continue;
      if (threadIdx.x < kTotals) total[threadIdx.x] = 0;
      ++complete;
    } else if (last_to_arrive(&step.tickets[1 + tensor.first_block], 1, tensor.n_blocks)) {
      double mine[kColumns] = {};
#pragma unroll 4  // so that the reads of four partial rows are under way together
      for (int i = threadIdx.x; i < tensor.n_blocks; i += kThreads) {
        const double* partial = partial_of(tensor.first_block + i, i == 0);
        for (int c = 0; c < kColumns; ++c) mine[c] = combine(c, mine[c], partial[c]);
      }
      reduce_block(mine, scratch);
      if (threadIdx.x == 0) {
        double merged[kTotals] = {};
        finish_tensor(step, t, tensor, scratch.merged[0], merged);
        for (int c = 0; c < kTotals; ++c) total[c] = merged[c];
      }
      if constexpr (kExtras) {
        double extras[kExtraColumns] = {};
        for (int i = threadIdx.x; i < tensor.n_blocks; i += kThreads) {
          const double* partial = partial_extras_of(tensor.first_block + i, i == 0);
          for (int c = 0; c < kExtraColumns; ++c) extras[c] += partial[c];
        }
        reduce_block<true>(extras, scratch);
        if (threadIdx.x == 0) finish_extras(step, t, tensor, scratch.merged[0]);
      }
      ++complete;
    }
  }
  if (complete == 0) return;
  __syncwarp();  // totals are written by the first warp alone
  if (last_to_arrive(&step.tickets[0], complete, step.n_totals)) finish_row(step, scratch);
}

}  // namespace pytracker::cuda
