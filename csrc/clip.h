// What Python asks of the total norm, kept from step to step: a Decision, and the tensors that it is about.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <variant>
#include <vector>

#include "device_types.h"

namespace pytracker {

class Clip {
 public:
  // outcome: float64 [2]; grad_scale, found_inf: float32 of one element, or undefined; all where the first device of a
  // plan is. A max_norm that is a tensor lies there too, and is read when the decision is made. Throws
  // InvalidValueError where they do not.
  Clip(Order order, std::variant<double, at::Tensor> max_norm, at::Tensor outcome, at::Tensor grad_scale,
       at::Tensor found_inf);

  // norm: undefined, or the norm of all ranks and devices, float64. `kept` receives what must outlive the launch.
  Decision decision(int32_t factor_slot, int32_t skipped_slot, const at::Tensor& norm,
                    std::vector<at::Tensor>& kept) const;

  const at::Tensor& outcome() const { return outcome_; }
  // A limit of infinity is none, and its factor says nothing.
  bool has_factor() const {
    const auto* number = std::get_if<double>(&max_norm_);
    return number == nullptr || !std::isinf(*number);
  }
  bool may_skip() const { return found_inf_.defined(); }

 private:
  Order order_;
  std::variant<double, at::Tensor> max_norm_;
  at::Tensor outcome_, grad_scale_, found_inf_;
};

}  // namespace pytracker
