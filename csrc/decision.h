// From the total norm to what is done about it: the maths of a Decision, for host and device.
#pragma once

#include "device_types.h"

namespace pytracker {

// Decides for the row whose totals and scalars lie at these places; `max_norm` is the value of the one in `decision`.
PYTRACKER_HD void decide(const Decision& decision, double max_norm, const double* totals, double* scalars) {
  const double of_row = decision.order == Order::kInf ? totals[kAbsMax] : sqrt(totals[kSumSq]);
  const double norm = decision.norm != nullptr ? *decision.norm : of_row;
  const double ratio = max_norm / (norm + 1e-6);
  const double factor = ratio > 1 ? 1 : ratio;  // a NaN stays: it must not pass for a norm that needs no clipping
  const bool skip = decision.found_inf != nullptr && norm - norm != 0;  // not finite
  decision.outcome[0] = norm;
  decision.outcome[1] = factor;
  if (decision.short_norm != nullptr) *decision.short_norm = static_cast<float>(norm);
  if (decision.grad_scale != nullptr) *decision.grad_scale = skip ? 1.0F : static_cast<float>(1 / factor);
  if (decision.found_inf != nullptr) *decision.found_inf = skip ? 1.0F : 0.0F;
  if (decision.factor_slot >= 0) scalars[decision.factor_slot] = factor;
  if (decision.skipped_slot >= 0) scalars[decision.skipped_slot] = skip ? 1 : 0;
}

}  // namespace pytracker
