// How a tensor lies in memory, in the fewest dimensions: what a kernel must know to read it.
#pragma once

#include <ATen/core/Tensor.h>

#include "request.h"

namespace pytracker {

// Folds dimensions: the order of elements does not matter, so those that lie contiguously become one, and those of
// stride 0 (expanded) become a factor. False where too many remain.
bool fold(const at::Tensor& tensor, Layout& layout, Strided& strided);

// Whether `a`, one of `layouts`, says the same as `b` with `strided`.
bool same(const Layout& a, const Layout& b, const Layouts& layouts, const Strided& strided);

}  // namespace pytracker
