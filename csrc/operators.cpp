#include "operators.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include <list>
#include <map>
#include <mutex>

#include "errors.h"
#include "plan.h"
#include "scalar.h"
#include "tensor_memory.h"

namespace pytracker {
namespace {

// An operator sees new tensors on each call and mostly the same shapes, so the plans of the latest calls are kept, and
// with them the tables that lie on the device: one for each device and number of tensors.
class PlanCache {
 public:
  template <typename F>
  auto with(at::TensorList tensors, F f) {
    std::vector<at::Tensor> list(tensors.begin(), tensors.end());
    const std::lock_guard<std::mutex> lock(mutex_);
    Plan& plan = plan_for(list);
    const Release release{plan};
    return f(plan);
  }

 private:
  static constexpr size_t kKept = 16;

  struct Release {
    Plan& plan;
    ~Release() { plan.rebind({}); }
  };

  Plan& plan_for(const std::vector<at::Tensor>& list) {
    for (auto plan = plans_.begin(); plan != plans_.end(); ++plan) {
      if (!(*plan)->rebind(list)) continue;
      plans_.splice(plans_.begin(), plans_, plan);  // the latest first
      return *plans_.front();
    }
    std::vector<std::string> names;
    for (size_t i = 0; i < list.size(); ++i) names.push_back(c10::str("tensors[", i, "]"));
    auto made = std::make_unique<Plan>(Parameters(list), names, Source::kTensor);
    if (made->groups().size() != 1)
      throw InvalidValueError("the tensors lie on several devices; call the operator once for each device");
    plans_.push_front(std::move(made));
    if (plans_.size() > kKept) plans_.pop_back();
    return *plans_.front();
  }

  std::mutex mutex_;
  std::list<std::unique_ptr<Plan>> plans_;
};

PlanCache& cache() {
  static PlanCache* const plans = new PlanCache();  // never destroyed: the device may be gone before this would be
  return *plans;
}

// Whether a tensor is float64 that lies on `device` without gaps, where its memory says it is.
bool is_float64_on(const at::Tensor& tensor, c10::Device device) {
  return tensor.defined() && tensor.scalar_type() == at::kDouble && tensor.device() == device &&
         is_plain(*tensor.unsafeGetTensorImpl()) && tensor.is_contiguous() && memory_of(tensor) == Memory::kThere;
}

void check_not_empty(const char* operation, at::TensorList tensors) {
  if (tensors.empty()) throw InvalidValueError(c10::str(operation, " was called with no tensors; give at least one"));
  for (size_t i = 0; i < tensors.size(); ++i)
    if (!tensors[i].defined()) throw InvalidValueError(c10::str(operation, ": tensors[", i, "] is undefined"));
}

}  // namespace

at::Tensor gradient_moments(at::TensorList gradients, const std::optional<at::Tensor>& grad_scale) {
  check_not_empty("gradient_moments", gradients);
  return cache().with(gradients, [&](Plan& plan) { return plan.reduce(grad_scale)[0]; });
}

void scale_gradients_(at::TensorList gradients, const at::Tensor& given_factor) {
  if (gradients.empty()) return;
  check_not_empty("scale_gradients_", gradients);
  const bool is_negated = given_factor.is_neg() && memory_of(given_factor) == Memory::kThere;
  const at::Tensor factor = is_negated ? given_factor.resolve_neg() : given_factor;
  if (factor.numel() != 1 || !is_float64_on(factor, gradients[0].device()))
    throw InvalidValueError(c10::str("scale_gradients_ needs a factor of one float64 element on ",
                                     gradients[0].device(), ", got shape ", factor.sizes(), ", ", factor.scalar_type(),
                                     ", on ", factor.device()));
  for (size_t i = 0; i < gradients.size(); ++i)
    if (gradients[i].layout() == at::kStrided && !gradients[i].is_non_overlapping_and_dense() &&
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
  if (state.dim() != 2 || state.size(1) != kMeterColumns || !is_float64_on(state, state.device()))
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
