#include "clip.h"

#include <utility>

#include "errors.h"
#include "scalar.h"

namespace pytracker {
namespace {

void check(const at::Tensor& tensor, const char* name, at::ScalarType dtype, int64_t numel, c10::Device device) {
  if (tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous() && tensor.device() == device)
    return;
  throw InvalidValueError(c10::str(name, " of a clip is ", tensor.scalar_type(), " ", tensor.sizes(), " on ",
                                   tensor.device(), "; expected ", numel, " contiguous elements of ", dtype, " on ",
                                   device));
}

}  // namespace

Clip::Clip(Order order, std::variant<double, at::Tensor> max_norm, at::Tensor outcome, at::Tensor grad_scale,
           at::Tensor found_inf)
    : order_(order),
      max_norm_(std::move(max_norm)),
      outcome_(std::move(outcome)),
      grad_scale_(std::move(grad_scale)),
      found_inf_(std::move(found_inf)) {
  const c10::Device device = outcome_.device();
  check(outcome_, "the outcome", at::kDouble, 2, device);
  if (grad_scale_.defined()) check(grad_scale_, "grad_scale", at::kFloat, 1, device);
  if (found_inf_.defined()) check(found_inf_, "found_inf", at::kFloat, 1, device);
  if (const auto* tensor = std::get_if<at::Tensor>(&max_norm_)) check(*tensor, "max_norm", at::kDouble, 1, device);
}

Decision Clip::decision(int32_t factor_slot, int32_t skipped_slot, const at::Tensor& norm,
                        std::vector<at::Tensor>& kept) const {
  Decision decision;
  decision.order = order_;
  if (const auto* tensor = std::get_if<at::Tensor>(&max_norm_)) {
    decision.max_norm.data = tensor->const_data_ptr<double>();
    kept.push_back(*tensor);
  } else {
    decision.max_norm.value = std::get<double>(max_norm_);
  }
  if (norm.defined()) {
    check(norm, "the norm", at::kDouble, 1, outcome_.device());
    decision.norm = norm.const_data_ptr<double>();
    kept.push_back(norm);
  }
  decision.outcome = outcome_.mutable_data_ptr<double>();
  if (grad_scale_.defined()) decision.grad_scale = grad_scale_.mutable_data_ptr<float>();
  if (found_inf_.defined()) decision.found_inf = found_inf_.mutable_data_ptr<float>();
  decision.factor_slot = factor_slot;
  decision.skipped_slot = skipped_slot;
  return decision;
}

}  // namespace pytracker
