// What each kernel is given: the host fills these, the driver copies them with the launch, the kernels read them.
#pragma once

#include "../device_types.h"
#include "work_split.h"

namespace pytracker::cuda {

// Where the kernels find the work split: the first part of every kernel's parameters that goes over gradients.
struct Work {
  const TensorEntry* tensors;
  const BlockEntry* blocks;
  const Strided* strided;
  int64_t share;         // vectors
  int32_t first_block;   // of this launch
  int32_t first_tensor;  // whose pointer is the first of this launch
};

struct Step {
  Work work;
  double* partials;  // [blocks, 2, kColumns] a block's part of the tensor that began before it, and of one that goes on
  double* totals;    // [n_totals, kTotals], and behind them, as the partials, [blocks, 2, kExtraColumns]
  uint32_t* tickets;  // [1 + blocks] of the row, and of the tensor that begins in a block and goes on
  int32_t n_tensors, n_totals, n_scalars;
  RowTarget row;
  Scalar grad_scale;
  Decision decision;
  Scalar scalars[kMaxScalars];
};

// Parameters cost launch time by their size, so each kernel over gradients comes in three: one whose parameters fit
// into 4 KB, which is also all that drivers before R530 take, one for most large models, and one with the most that a
// kernel can have.
constexpr int kFewPointers = (4096 - sizeof(Step)) / sizeof(void*);
constexpr int kSomePointers = 1024;
constexpr int kManyPointers = 3840;

template <int kPointers>
struct StepParameters {
  Step step;
  const void* gradients[kPointers];
};
static_assert(sizeof(StepParameters<kManyPointers>) <= 32764);

template <int kPointers>
struct ScaleParameters {
  Work work;
  const double* factors;
  int64_t stride;  // from one gradient's factor to the next; 0: all have the same
  void* gradients[kPointers];
};

struct DecideParameters {
  Decision decision;
  RowTarget row;
  int64_t n_tensors;
};

struct MeterParameters {
  double* state;
  int32_t count;
  Scalar values[kMaxScalars];
  Scalar weights[kMaxScalars];
};

}  // namespace pytracker::cuda
