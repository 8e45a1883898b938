#include "plan.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

#include "dtensor.h"
#include "dtypes.h"
#include "errors.h"
#include "fold.h"
#include "parallel.h"
#include "scalar.h"
#include "tensor_memory.h"

namespace pytracker {
namespace {

// An address for gradients without elements, whose own may be null, which means no gradient.
const char kNothing = 0;

}  // namespace

Plan::Plan(Parameters parameters, std::vector<std::string> names, Source source, std::vector<Window> windows)
    : parameters_(std::move(parameters)), names_(std::move(names)), source_(source), windows_(std::move(windows)) {
  if (parameters_.size() != names_.size())
    throw InvalidValueError(
        c10::str("there are ", parameters_.size(), " parameters and ", names_.size(), " names; give one for each"));
  if (!windows_.empty() && windows_.size() != names_.size())
    throw InvalidValueError(
        c10::str("there are ", windows_.size(), " windows and ", names_.size(), " names; give one for each"));
  has_pieces_ = !windows_.empty();
  for (size_t i = 0; i < parameters_.size(); ++i) has_pieces_ = has_pieces_ || is_subclass(parameters_[i]);
  placements_.resize(names_.size());
  pieces_.resize(names_.size());
  group_by_device();
}

// The device with whose tensors a parameter is grouped: its own, or the first one's where nothing of it is ever read,
// as of a frozen one on the meta device.
c10::Device Plan::home_of(size_t parameter) const {
  const at::Tensor& p = parameters_[parameter];
  if (has_backend(p.device().type())) return p.device();
  const bool never_read = source_ == Source::kValue || (source_ == Source::kGradient && !p.requires_grad());
  if (!p.is_meta() || !never_read)
    throw ParameterError(c10::str("parameter '", names_[parameter], "' is on ", p.device(),
                                  ", for which this build of pytracker has no back end; see `pytracker doctor`"));
  for (size_t i = 0; i < parameters_.size(); ++i)
    if (!parameters_[i].is_meta()) return parameters_[i].device();
  return c10::kCPU;
}

// Where a parameter cannot be grouped, the groups stay as they were, so that rows already recorded can be read.
void Plan::group_by_device() {
  std::vector<Group> groups;
  std::vector<Slot> slots;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& p = parameters_[i];
    const c10::Device device = home_of(i);
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.device == device; });
    if (group == groups.end()) {
      groups.emplace_back(device);
      group = groups.end() - 1;
      group->backend = make_backend(device);
    }
    const auto dtype = dtype_of(p.scalar_type());
    Layout layout;
    const bool readable = dtype && !p.is_meta() && is_plain(*p.unsafeGetTensorImpl()) && windows_.empty();
    layout.numel = readable ? p.numel() : 0;
    layout.dtype = dtype.value_or(Dtype::kFloat32);
    Slot slot = {layout.numel, static_cast<int32_t>(group - groups.begin()),
                 static_cast<int32_t>(group->members.size()), p.scalar_type(), layout.numel > 0};
    slot.elements = layout.numel;
    slots.push_back(slot);
    group->members.push_back(static_cast<int64_t>(i));
    group->layouts.tensors.push_back(layout);
  }
  if (groups.empty()) {  // an empty model still has steps and scalars to record
    groups.emplace_back(c10::Device(c10::kCPU));
    groups.back().backend = make_backend(groups.back().device);
  }
  for (Group& group : groups) {
    group.data.assign(group.members.size(), nullptr);
    group.kept.resize(group.members.size());
    group.layouts.version = 1;
  }
  groups_ = std::move(groups);
  slots_ = std::move(slots);
  elements_.reset();
  ++generation_;
}

bool Plan::rebind(std::vector<at::Tensor> tensors) {
  if (tensors.empty()) {
    for (Group& group : groups_) group.kept.assign(group.members.size(), at::Tensor());
  } else {
    if (tensors.size() != slots_.size()) return false;
    for (size_t i = 0; i < tensors.size(); ++i)
      if (!tensors[i].defined() || tensors[i].device() != groups_[slots_[i].group].device) return false;
  }
  parameters_.rebind(std::move(tensors));
  return true;
}

void Plan::select(const std::vector<int64_t>& parameters) {
  left_out_.assign(parameters.empty() ? 0 : slots_.size(), 1);
  for (const int64_t i : parameters) left_out_.at(static_cast<size_t>(i)) = 0;
}

void Plan::give(std::vector<at::Tensor> gradients) {
  if (!gradients.empty() && gradients.size() != slots_.size())
    throw InvalidValueError(c10::str("there are ", gradients.size(), " gradients for ", slots_.size(),
                                     " parameters; give one for each, in their order, and None where there is none"));
  given_ = std::move(gradients);
}

const at::Tensor& Plan::source_of(int64_t parameter) const {
  if (!given_.empty()) return given_[parameter];
  const at::Tensor& tensor = parameters_[parameter];
  return source_ == Source::kGradient ? tensor.unsafeGetTensorImpl()->grad() : tensor;
}

// The address of a gradient, or of what lies on this rank of one, that is as the layout says; null where that cannot be
// told at once.
const void* Plan::plain_data(const Slot& slot, const c10::TensorImpl* impl) const {
  if (!slot.plain || !is_plain(*impl) || impl->numel() != slot.numel ||
      c10::typeMetaToScalarType(impl->dtype()) != slot.dtype || !impl->is_non_overlapping_and_dense() ||
      impl->device() != groups_[slot.group].device)
    return nullptr;
  return dense_data(*impl);
}

void Plan::gather() {
  if (!parameters_.held()) throw InvalidValueError("the plan has let go of its parameters; make a new one");
  constexpr int64_t kGrain = 2048;  // parameters; reading one costs tens of nanoseconds, mostly cache misses
  const int64_t n = static_cast<int64_t>(slots_.size());
  parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Slot& slot = slots_[i];
      const at::Tensor& tensor = source_of(i);
      groups_[slot.group].data[slot.position] =
          tensor.defined() && !is_left_out(i) ? plain_data(slot, tensor.unsafeGetTensorImpl()) : nullptr;
    }
  });
  borrowed_.clear();
  irregular_.clear();
  for (int64_t i = 0; i < n; ++i) {
    const Slot& slot = slots_[i];
    if (groups_[slot.group].data[slot.position] == nullptr && !is_left_out(i)) irregular_.push_back(i);
  }
  take_pieces();
  for (const int64_t i : irregular_) {
    if (describe(i)) continue;
    group_by_device();
    return gather();
  }
}

// Takes what lies on this rank of each DTensor. Those that lie otherwise than their parameters, partial sums for
// instance, are brought into the same layout, all at once.
void Plan::take_pieces() {
  std::vector<int64_t> misplaced;
  std::vector<at::Tensor> parameters, gradients;
  std::vector<bool> asked;             // of each parameter, whether its gradient is a subclass; empty where none is
  const auto taken = [&](int64_t i) {  // whether nothing more is to be found out about it
    const at::Tensor tensor = source_of(i);
    if (!tensor.defined() || !is_subclass(tensor)) return false;
    asked.resize(slots_.size());
    asked[i] = true;
    if (placements_[i].is_that_of(parameters_[i], tensor)) return take_piece(i, tensor);
    misplaced.push_back(i);
    parameters.push_back(parameters_[i]);
    gradients.push_back(tensor);
    return false;
  };
  irregular_.erase(std::remove_if(irregular_.begin(), irregular_.end(), taken), irregular_.end());
  if (!misplaced.empty()) {
    std::vector<at::Tensor> pieces = redistributed(parameters, gradients);
    for (size_t k = 0; k < misplaced.size(); ++k) pieces_[misplaced[k]] = {std::move(pieces[k]), true};
  }
  if (!asked.empty()) read_again(asked);
}

// Subclasses ran Python, their own or another thread's, which may have done anything to the gradients read before.
void Plan::read_again(const std::vector<bool>& but) {
  for (int64_t i = 0; i < static_cast<int64_t>(slots_.size()); ++i) {
    if (but[i]) continue;
    const Slot& slot = slots_[i];
    const void*& data = groups_[slot.group].data[slot.position];
    if (data == nullptr) continue;  // it is irregular already
    const at::Tensor& tensor = source_of(i);
    data = tensor.defined() ? plain_data(slot, tensor.unsafeGetTensorImpl()) : nullptr;
    if (data == nullptr) irregular_.push_back(i);
  }
}

// Takes the local piece of one DTensor; true where it lies as the last one did, or is missing.
bool Plan::take_piece(int64_t parameter, const at::Tensor& tensor) {
  Slot& slot = slots_[parameter];
  Group& group = groups_[slot.group];
  std::optional<at::Tensor> piece = local_piece(tensor);
  if (!piece && source_ == Source::kValue) return true;
  if (!piece)
    throw ParameterError(c10::str(subject(parameter), " is a ", type_name(tensor),
                                  ", a tensor subclass without a local tensor that could be read; track the plain "
                                  "parameters instead"));
  group.data[slot.position] = plain_data(slot, piece->unsafeGetTensorImpl());
  if (group.data[slot.position] == nullptr) {
    pieces_[parameter] = {std::move(*piece), false};
    return false;
  }
  group.kept[slot.position].reset();
  borrowed_.push_back(std::move(*piece));
  slot.copied = false;
  return true;
}

// The elements of a flat gradient, a rank's shard of several parameters in a row, that belong to one of them.
at::Tensor Plan::in_window(const at::Tensor& flat, int64_t parameter) const {
  const Window& window = windows_[parameter];
  if (window.length < 0) return flat;
  if (flat.numel() != parameters_[parameter].numel())
    throw ParameterError(c10::str("the gradient of '", names_[parameter], "' lies in ", flat.numel(),
                                  " elements where the rank's shard has ", parameters_[parameter].numel(),
                                  ": it is not reduced yet. Record it after a backward outside of no_sync()"));
  return flat.flatten().narrow(0, window.offset, window.length);
}

std::string Plan::subject(int64_t parameter) const {
  return c10::str(source_ == Source::kGradient ? "the gradient of '" : "parameter '", names_[parameter], "'");
}

// The slow path for one parameter: no gradient, or one that is new in some way. False where it is on another device.
bool Plan::describe(int64_t parameter) {
  Slot& slot = slots_[parameter];
  Group& group = groups_[slot.group];
  group.data[slot.position] = nullptr;
  group.kept[slot.position].reset();
  Local local = std::exchange(pieces_[parameter], {});
  if (!local.piece.defined()) local.piece = source_of(parameter);
  if (!local.piece.defined()) return true;
  if (source_ == Source::kValue && local.piece.is_meta()) return true;
  if (local.piece.device() != group.device) {
    if (home_of(parameter) != group.device) return false;
    throw ParameterError(c10::str(subject(parameter), " is on ", local.piece.device(), " and the parameter on ",
                                  parameters_[parameter].device(), "; move them to one device"));
  }
  try {
    lay_out(parameter, find(parameter, local), local);
  } catch (const ParameterError&) {
    if (source_ != Source::kValue) throw;  // a weight that cannot be read is missing
  }
  return true;
}

// Brings a gradient into the form of memory with strides, or says why that cannot be.
Plan::Found Plan::find(int64_t parameter, const Local& local) const {
  const at::NoGradGuard not_differentiated;  // what is kept would hold on to autograd's graph
  at::Tensor tensor = local.piece;
  if (!dtype_of(tensor.scalar_type()))
    throw ParameterError(c10::str(subject(parameter), " has dtype ", tensor.scalar_type(),
                                  "; pytracker reads float64, float32, float16, bfloat16, complex64 and complex128"));
  if (tensor.layout() != c10::kStrided && tensor.layout() != c10::kSparse)
    throw ParameterError(c10::str(subject(parameter), " has layout ", tensor.layout(),
                                  "; pytracker reads strided and sparse COO tensors"));
  if (!windows_.empty()) tensor = in_window(tensor, parameter);
  Found found = {{}, local.copied, false, tensor.numel()};
  if (tensor._is_zerotensor()) {
    found.all_zeros = true;
    return found;
  }
  if (tensor.layout() == c10::kSparse) {
    if (memory_of(tensor._values()) != Memory::kThere || memory_of(tensor._indices()) != Memory::kThere) return found;
    found.copied |= !tensor.is_coalesced();
    tensor = tensor.coalesce()._values();
  }
  const bool is_negated = tensor.is_neg();
  if (is_negated) tensor = tensor._neg_view();  // the memory as it is
  if (!is_plain(*tensor.unsafeGetTensorImpl()))
    throw ParameterError(c10::str(subject(parameter), " is no plain tensor but one of kind ", kind_of(tensor),
                                  ", whose memory cannot be read; record it outside of the transform that made it"));
  switch (memory_of(tensor)) {
    case Memory::kFreed: return found;
    case Memory::kTooSmall:
      throw ParameterError(c10::str(subject(parameter), " has ", tensor.numel(), " elements in a memory of ",
                                    tensor.storage().nbytes(), " bytes: its storage was resized"));
    case Memory::kThere: break;
  }
  if (is_negated) {
    tensor = tensor.neg();
    found.copied = true;
  }
  found.tensor = std::move(tensor);
  return found;
}

// Notes where the elements are, and how they lie, if that has changed.
void Plan::lay_out(int64_t parameter, Found found, const Local& local) {
  if (!found.tensor.defined() && !found.all_zeros) return;
  Slot& slot = slots_[parameter];
  Group& group = groups_[slot.group];
  Layout layout;
  Strided strided;
  layout.dtype = group.layouts.tensors[slot.position].dtype;
  if (found.tensor.defined()) {
    layout.dtype = *dtype_of(found.tensor.scalar_type());
    if (!fold(found.tensor, layout, strided)) {
      found.tensor = found.tensor.contiguous();
      found.copied = true;
      layout.numel = found.tensor.numel();
      layout.repeat = 1;
    }
  }
  layout.implicit_zeros = found.elements - layout.numel * layout.repeat;

  Layout& known = group.layouts.tensors[slot.position];
  if (!same(known, layout, group.layouts, strided)) {
    if (strided.ndim > 0) {
      if (slot.strided < 0) {
        slot.strided = static_cast<int32_t>(group.layouts.strided.size());
        group.layouts.strided.emplace_back();
      }
      layout.strided = slot.strided;
      group.layouts.strided[layout.strided] = strided;
    }
    known = layout;
    ++group.layouts.version;
  }
  if (slot.elements != found.elements) {
    slot.elements = found.elements;
    elements_.reset();
  }
  const bool is_piece = found.tensor.is_same(local.piece);
  slot.copied = found.copied;
  slot.numel = layout.numel;
  slot.plain = is_piece && strided.ndim == 0 && layout.repeat == 1;
  if (found.tensor.defined()) slot.dtype = found.tensor.scalar_type();
  group.data[slot.position] = layout.numel == 0 ? &kNothing : found.tensor.const_data_ptr();
  if (local.copied || !is_piece)
    group.kept[slot.position] = std::move(found.tensor);
  else
    borrowed_.push_back(std::move(found.tensor));
}

std::vector<at::Tensor> Plan::sources() const {
  std::vector<at::Tensor> tensors;
  tensors.reserve(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) tensors.push_back(source_of(static_cast<int64_t>(i)));
  return tensors;
}

bool Plan::any_is_double() const {
  const auto is_double = [](const Slot& slot) { return slot.dtype == at::kDouble || slot.dtype == at::kComplexDouble; };
  return std::any_of(slots_.begin(), slots_.end(), is_double);
}

const at::Tensor& Plan::elements() {
  if (!elements_.defined()) {
    // Not by the dispatcher, which may be within a transform that would wrap it.
    elements_ = at::detail::empty_cpu({static_cast<int64_t>(slots_.size())}, at::kDouble);
    double* counts = elements_.mutable_data_ptr<double>();
    for (const Slot& slot : slots_) *counts++ = static_cast<double>(slot.elements);
  }
  return elements_;
}

std::vector<at::Tensor> Plan::reduce(const std::optional<at::Tensor>& given_scale) {
  std::optional<at::Tensor> grad_scale = given_scale;  // first: what a subclass runs may do anything to a gradient
  if (grad_scale && grad_scale->defined() && is_subclass(*grad_scale))
    grad_scale = whole_value(*grad_scale, "grad_scale");
  gather();
  const Borrowed borrowed{*this};
  std::vector<at::Tensor> rows;
  std::vector<at::Tensor> kept;
  for (Group& group : groups_) {
    const int64_t width = row_width(static_cast<int64_t>(group.members.size()), 0);
    rows.push_back(new_result({width}, group.device));
    Scalar scale{nullptr, 1.0};
    if (grad_scale) scale = divisor_of(*grad_scale, group.device, kept);
    reduce_into(group, rows.back(), scale);
  }
  return rows;
}

void Plan::reduce_into(Group& group, const at::Tensor& row, const Scalar& grad_scale) {
  StepRequest request;
  request.layouts = &group.layouts;
  request.gradients = group.data.data();
  request.row.rows = row.mutable_data_ptr<double>();
  request.row.stride = row.numel();
  request.grad_scale = grad_scale;
  group.backend->step(request);
}

std::pair<double, double> Plan::norm_and_max() {
  gather();
  const Borrowed borrowed{*this};
  for (Group& group : groups_) {
    if (!group.scratch.defined())
      group.scratch = new_memory({row_width(static_cast<int64_t>(group.members.size()), 0)}, group.device);
    reduce_into(group, group.scratch, Scalar{nullptr, 1.0});
  }
  double sum_sq = 0, max_sum_sq = 0;
  for (const Group& group : groups_) {
    const at::Tensor totals = group.device.is_cpu() ? group.scratch : group.scratch.narrow(0, 0, kTotals).cpu();
    const double* values = totals.const_data_ptr<double>();
    sum_sq += values[kSumSq];
    max_sum_sq = max_keep_nan(max_sum_sq, values[kMaxSumSq]);
  }
  return {std::sqrt(sum_sq), std::sqrt(max_sum_sq)};
}

std::array<at::Tensor, 3> Plan::reduce_and_clip(double max_norm, Order order) {
  gather();
  TORCH_INTERNAL_ASSERT(groups_.size() == 1);
  Group& group = groups_[0];
  const int64_t width = row_width(static_cast<int64_t>(group.members.size()), 0);
  const at::Tensor row = new_memory({width}, group.device);
  const at::Tensor outcome = new_result({3}, group.device);  // of its own, since callers keep the norm
  const at::Tensor short_norm = outcome.view(at::kFloat).select(0, 4);
  StepRequest request;
  request.layouts = &group.layouts;
  request.gradients = group.data.data();
  request.row.rows = row.mutable_data_ptr<double>();
  request.row.stride = width;
  request.decision.order = order;
  request.decision.max_norm.value = max_norm;
  request.decision.outcome = outcome.mutable_data_ptr<double>();
  request.decision.short_norm = short_norm.mutable_data_ptr<float>();
  group.backend->step(request);
  return {outcome.select(0, 0), short_norm, outcome.narrow(0, 1, 1)};
}

void Plan::scale(const at::Tensor& factors) {
  const bool one = factors.numel() == 1;
  if (factors.scalar_type() != at::kDouble || !(one || factors.numel() == static_cast<int64_t>(slots_.size())))
    throw InvalidValueError(c10::str("gradients are scaled by one float64 factor or one each, got ", factors.sizes(),
                                     " of ", factors.scalar_type()));
  if (one && factors.is_cpu() && *factors.const_data_ptr<double>() == 1) return;
  const Borrowed borrowed{*this};
  const at::NoGradGuard not_differentiated;
  for (Group& group : groups_) {
    at::Tensor near = factors.to(group.device, /*non_blocking=*/true).reshape({-1}).contiguous();
    if (!one && groups_.size() > 1)
      near = near.index_select(0, at::tensor(group.members, near.options().dtype(at::kLong)));
    std::vector<at::Tensor> held;
    std::vector<void*> gradients(group.data.size());
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (group.data[i] == nullptr || group.layouts.tensors[i].numel == 0) continue;
      const int64_t parameter = group.members[i];
      const at::Tensor gradient = source_of(parameter);
      std::optional<at::Tensor> piece = gradient;
      if (gradient.defined() && is_subclass(gradient)) piece = local_piece(gradient);
      at::Tensor memory = piece ? *piece : at::Tensor();
      if (memory.defined() && memory.is_sparse()) memory = memory._values();
      if (memory.defined() && slots_[parameter].copied) {
        memory.mul_(near[one ? 0 : static_cast<int64_t>(i)]);
      } else if (!memory.defined() || !is_plain(*memory.unsafeGetTensorImpl()) ||
                 memory.const_data_ptr() != group.data[i] || piece->numel() != slots_[parameter].elements) {
        // A subclass may give another one each time it is asked.
        throw ParameterError(c10::str(subject(parameter), " is not where it was when it was read; it is not scaled"));
      } else {
        gradients[i] = memory.unsafeGetTensorImpl()->mutable_data();  // a lazy clone gets memory of its own first
        held.push_back(std::move(memory));
        if (!gradient.is_inference()) gradient.unsafeGetTensorImpl()->bump_version();
      }
    }
    group.backend->scale(group.layouts, gradients.data(), near.const_data_ptr<double>(), one ? 0 : 1);
  }
}

}  // namespace pytracker
