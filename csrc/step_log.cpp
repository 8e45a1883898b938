#include "step_log.h"

#include <ATen/ops/index_select.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <c10/util/StringUtil.h>

#include <algorithm>

#include "errors.h"
#include "scalar.h"
#include "tensor_memory.h"

namespace pytracker {

StepLog::StepLog(std::shared_ptr<Plan> plan, int64_t capacity, int64_t slots, bool extras)
    : plan_(std::move(plan)), capacity_(capacity), slots_(slots), generation_(plan_->generation()), extras_(extras) {
  if (capacity < 1) throw InvalidValueError("a step log needs a capacity of at least one row");
  if (slots < 0 || slots > kMaxScalars)
    throw InvalidValueError("a step log records at most " + std::to_string(kMaxScalars) + " scalars a step");
  for (const Group& group : plan_->groups()) {
    const int64_t tensors = static_cast<int64_t>(group.members.size());
    const int64_t width = row_width(tensors, slots) + (extras ? tensors * kExtraColumns : 0) + kMarks;
    rows_.push_back(new_memory({capacity, width}, group.device));
    cursors_.push_back(at::zeros({}, at::kLong).to(group.device));
    owners_.push_back(std::make_shared<const std::pair<at::Tensor, at::Tensor>>(rows_.back(), cursors_.back()));
  }
  announced_ = at::zeros({capacity}, at::kLong).to(cursors_[0].device());
}

int32_t StepLog::slot_of(const std::string& name) {
  const auto found = slot_by_name_.find(name);
  if (found != slot_by_name_.end()) return found->second;
  if (static_cast<int64_t>(scalar_names_.size()) == slots_) return -1;
  const auto slot = static_cast<int32_t>(scalar_names_.size());
  scalar_names_.push_back(name);
  slot_by_name_.emplace(name, slot);
  return slot;
}

RowTarget StepLog::target(size_t group, int64_t asked_by) const {
  return {rows_[group].mutable_data_ptr<double>(), rows_[group].size(1), capacity_,
          cursors_[group].mutable_data_ptr<int64_t>(), asked_by};
}

// What goes with the first device's row, whose bits note that it has it.
Decision StepLog::decision(const Clip& clip, const at::Tensor& norm, uint64_t& given, std::vector<at::Tensor>& kept) {
  const int32_t factor = clip.has_factor() ? factor_slot() : -1, skipped = clip.may_skip() ? skipped_slot() : -1;
  for (const int32_t slot : {factor, skipped})
    if (slot >= 0) given |= uint64_t{1} << slot;
  return clip.decision(factor, skipped, norm, kept);
}

bool StepLog::append(int64_t step, const StepInput& input, const Clip* clip) {
  std::vector<Group>& groups = plan_->groups();
  std::vector<at::Tensor> kept;
  scalars_.resize(groups.size());
  for (auto& scalars : scalars_) scalars.clear();
  std::vector<uint64_t> given(groups.size(), 0);
  // All values are checked before anything is launched, so that a bad one leaves no half of a row behind.
  for (const NamedValue& value : input.values) {
    size_t home = 0;  // numbers go with the first device's row, a tensor with the row of the device where it lies
    Scalar scalar;
    scalar.value = value.number;
    if (value.tensor.defined()) {
      for (size_t g = 0; g < groups.size(); ++g)
        if (groups[g].device == value.tensor.device()) home = g;
      scalar = scalar_of(value.tensor, scalar_names_[value.slot], groups[home].device, kept);
    }
    scalar.slot = value.slot;
    scalars_[home].push_back(scalar);
    given[home] |= uint64_t{1} << value.slot;
  }
  const NamedValue* grad_scale = input.grad_scale ? &*input.grad_scale : nullptr;
  std::vector<Scalar> scales(groups.size(), Scalar{nullptr, grad_scale == nullptr ? 1.0 : grad_scale->number});
  for (size_t g = 0; g < groups.size() && grad_scale != nullptr && grad_scale->tensor.defined(); ++g) {
    const at::Tensor& scale = grad_scale->tensor;  // scaling is rare on a second device, and a copy does not wait
    const bool on_another = std::any_of(groups.begin(), groups.end(), [&](const Group& group) {
      return group.device == scale.device() && group.device != groups[g].device && !scale.is_cpu();
    });
    const at::Tensor near = on_another ? scale.to(groups[g].device, scale.scalar_type(), /*non_blocking=*/true) : scale;
    scales[g] = divisor_of(near, groups[g].device, kept);
  }
  const bool captured = capturing();
  if (captured && groups.size() > 1)
    throw InvalidValueError(
        c10::str("step() is captured in a CUDA graph, and the parameters are on ", groups.size(),
                 " devices, of which a graph replays one; track those of each device by a tracker of its own"));
  for (size_t g = 0; g < groups.size(); ++g) {
    StepRequest request;
    request.layouts = &groups[g].layouts;
    request.gradients = groups[g].data.data();
    request.row = target(g, captured ? -1 - static_cast<int64_t>(captures_.size()) : written_);
    request.extras = extras_;
    request.scalars = scalars_[g].data();
    request.n_scalars = static_cast<int64_t>(scalars_[g].size());
    request.grad_scale = scales[g];
    request.owner = owners_[g];
    if (clip != nullptr) request.decision = decision(*clip, at::Tensor(), given[0], kept);
    groups[g].backend->step(request);
  }
  captured_ = captured;
  if (captured)
    captures_.push_back(given[0]);
  else
    note(step, std::move(given), input.rates);
  return !captured;
}

bool StepLog::decide(const Clip& clip, const at::Tensor& norm) {
  const bool records = has_slots_for(clip) && (captured_ || drained_ < written_);
  std::vector<at::Tensor> kept;
  uint64_t none = 0;
  uint64_t& given = !records ? none : captured_ ? captures_.back() : notes_.back().given[0];
  const Decision made = records ? decision(clip, norm, given, kept) : clip.decision(-1, -1, norm, kept);
  const Group& group = plan_->groups()[0];
  group.backend->decide(group.layouts, made, target(0, 0), owners_[0]);
  return records;
}

std::vector<at::Tensor> StepLog::latest() const {
  std::vector<at::Tensor> latest;
  for (size_t g = 0; g < rows_.size(); ++g) {
    const at::Tensor index = at::remainder(at::sub(cursors_[g], 1), capacity_).reshape({1});
    latest.push_back(rows_[g].index_select(0, index).select(0, 0));
  }
  return latest;
}

bool StepLog::capturing() const {
  const std::vector<Group>& groups = plan_->groups();
  return std::any_of(groups.begin(), groups.end(), [](const Group& group) { return group.backend->capturing(); });
}

void StepLog::replayed(int64_t step, const Rates& rates) {
  plan_->groups()[0].backend->note_cursor(cursors_[0].const_data_ptr<int64_t>(),
                                          announced_.mutable_data_ptr<int64_t>() + written_ % capacity_);
  note(step, {}, rates);
}

void StepLog::note(int64_t step, std::vector<uint64_t> given, const Rates& rates) {
  const at::Tensor& elements = plan_->elements();
  if (!context_ || !context_->elements.is_same(elements) || !(context_->rates == rates))
    context_ = std::make_shared<const Context>(Context{elements, rates});
  notes_.push_back({step, std::move(given), context_});
  ++written_;
}

std::vector<RowNote> StepLog::notes(int64_t first, int64_t count) const {
  const int64_t begin = std::max(first - drained_, int64_t{0});
  const int64_t end = std::min(begin + std::max(count, int64_t{0}), static_cast<int64_t>(notes_.size()));
  return {notes_.begin() + std::min(begin, end), notes_.begin() + end};
}

void StepLog::release(int64_t end) {
  for (; drained_ < std::min(end, written_); ++drained_) notes_.pop_front();
}

}  // namespace pytracker
