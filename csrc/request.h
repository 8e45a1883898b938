// What is reduced: how each gradient lies in memory, which scalars go with the step, where the row is written.
//
// Plain data, free of torch, so that the kernels of every back end include this and nothing else. plan.h fills it from
// tensors, and is the one place that validates them.
#pragma once

#include <memory>
#include <vector>

#include "device_types.h"

namespace pytracker {

// How one gradient lies in memory. The order of its elements does not matter to a moment, so every gradient without
// gaps or overlaps (transposed, channels_last) is a run of `numel` elements. `element_count` is static for a parameter
// and not here: it belongs to the names.
struct Layout {
  int64_t numel = 0;           // elements stored, after folding what is expanded
  int64_t repeat = 1;          // elements that each stored one stands for (expanded gradients)
  int64_t implicit_zeros = 0;  // elements not stored (sparse gradients)
  int32_t strided = -1;        // index into Layouts::strided, or -1: `numel` elements without gaps
  Dtype dtype = Dtype::kFloat32;
};

// The gradients of one device, in the order of their rows.
struct Layouts {
  std::vector<Layout> tensors;
  std::vector<Strided> strided;
  uint64_t version = 0;  // grows with each change, so that a back end knows when its tables are old
};

// What is asked of a back end in one step.
struct StepRequest {
  const Layouts* layouts = nullptr;
  const void* const* gradients = nullptr;  // [tensors] in the back end's memory; null: no gradient
  RowTarget row;
  bool extras = false;  // the further columns too, into the end of the row
  const Scalar* scalars = nullptr;
  int64_t n_scalars = 0;
  Scalar grad_scale{nullptr, 1.0};  // divides the moments, not the gradients
  Decision decision;
  // Keeps the memory of the row and the cursor; where the step is captured in a graph, that holds it as long as it
  // lives.
  std::shared_ptr<const void> owner;
};

}  // namespace pytracker
