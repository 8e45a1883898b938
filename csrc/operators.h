// The operators torch.ops.pytracker.*, for tensors of any device that has a back end.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace pytracker {

// The moments of each tensor and of all together: float64 [kTotals + T * kColumns], a row as in accumulator.h.
at::Tensor gradient_moments(at::TensorList gradients, const std::optional<at::Tensor>& grad_scale);

// Multiplies every gradient by `factor` (float64, one element, same device) in place; touches none where it is 1.
void scale_gradients_(at::TensorList gradients, const at::Tensor& factor);

// Feeds values[i], with weights[i], to the meter of row i of `state` (float64 [K, kMeterColumns]). Each is one element,
// on the state's device or on the CPU; a weight of 0 adds nothing.
void meter_update_(const at::Tensor& state, at::TensorList values, at::TensorList weights);

}  // namespace pytracker
