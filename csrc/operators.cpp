#include "operators.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include <map>
#include <mutex>

#include "errors.h"
#include "plan.h"

namespace pytracker {
namespace {

// An operator sees new tensors on each call and mostly the same shapes, so the plan of the last call with as many
// tensors is kept for each device, and with it the tables that lie on the device.
class PlanCache {
 public:
  template <typename F>
  auto with(at::TensorList tensors, F f) {
    const std::vector<at::Tensor> list(tensors.begin(), tensors.end());
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<Plan>& plan = plans_[{list[0].device().str(), list.size()}];
    if (plan == nullptr || !plan->rebind(list)) {
      std::vector<std::string> names;
      for (size_t i = 0; i < list.size(); ++i) names.push_back(c10::str("tensors[", i, "]"));
      plan = std::make_shared<Plan>(list, names, Source::kValue);
      if (plan->groups().size() != 1) {
        plan = nullptr;
        throw InvalidValueError("the tensors lie on several devices; call the operator once for each device");
      }
    }
    const Release release{*plan};
    return f(*plan);
  }

 private:
  struct Release {
    Plan& plan;
    ~Release() { plan.rebind({}); }
  };
  std::mutex mutex_;
  std::map<std::pair<std::string, size_t>, std::shared_ptr<Plan>> plans_;
};

PlanCache& cache() {
  static PlanCache* const plans = new PlanCache();  // never destroyed: the device may be gone before this would be
  return *plans;
}

}  // namespace

at::Tensor gradient_moments(at::TensorList gradients, const std::optional<at::Tensor>& grad_scale) {
  return cache().with(gradients, [&](Plan& plan) { return plan.reduce(grad_scale)[0]; });
}

void scale_gradients_(at::TensorList gradients, const at::Tensor& factor) {
  if (gradients.empty()) return;
  if (factor.scalar_type() != at::kDouble || factor.numel() != 1 || factor.device() != gradients[0].device())
    throw InvalidValueError(c10::str("scale_gradients_ needs a factor of one float64 element on ",
                                     gradients[0].device(), ", got shape ", factor.sizes(), ", ", factor.scalar_type(),
                                     ", on ", factor.device()));
  for (size_t i = 0; i < gradients.size(); ++i)
    if (!gradients[i].is_non_overlapping_and_dense() && gradients[i].layout() == at::kStrided &&
        at::has_internal_overlap(gradients[i]) == at::MemOverlap::Yes)
      throw InvalidValueError(
          c10::str("gradients[", i, "] is expanded: its elements share memory, and cannot be scaled in place"));
  cache().with(gradients, [&](Plan& plan) {
    plan.gather();
    plan.scale(factor);
  });
}

void meter_update_(const at::Tensor& state, at::TensorList values, at::TensorList weights) {
  const auto count = static_cast<int64_t>(values.size());
  if (state.scalar_type() != at::kDouble || state.dim() != 2 || state.size(1) != kMeterColumns ||
      !state.is_contiguous())
    throw InvalidValueError(c10::str("the state of meters is a contiguous float64 tensor of shape [K, ",
                                     int(kMeterColumns), "], got ", state.scalar_type(), " ", state.sizes()));
  if (count > state.size(0) || count > kMaxScalars || weights.size() != values.size())
    throw InvalidValueError(c10::str(count, " values with ", weights.size(), " weights for ", state.size(0),
                                     " meters; give one weight for each value, and at most ", kMaxScalars, " values"));
  std::vector<Scalar> scalars, weighted;
  std::vector<at::Tensor> kept;
  for (int64_t i = 0; i < count; ++i) {
    scalars.push_back(scalar_of(values[i], c10::str("values[", i, "]"), state.device(), kept));
    scalars.back().slot = static_cast<int32_t>(i);
    weighted.push_back(scalar_of(weights[i], c10::str("weights[", i, "]"), state.device(), kept));
  }
  static std::mutex mutex;
  static auto* const backends = new std::map<std::string, std::unique_ptr<Backend>>();
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Backend>& backend = (*backends)[state.device().str()];
  if (backend == nullptr) backend = make_backend(state.device());
  backend->update_meters(state.mutable_data_ptr<double>(), scalars.data(), weighted.data(), count);
}

}  // namespace pytracker
