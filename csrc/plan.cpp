#include "plan.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

#include "dtensor.h"
#include "errors.h"
#include "fold.h"

namespace pytracker {
namespace {

std::optional<Dtype> dtype_of(c10::ScalarType type) {
  switch (type) {
    case c10::kDouble: return Dtype::kFloat64;
    case c10::kFloat: return Dtype::kFloat32;
    case c10::kHalf: return Dtype::kFloat16;
    case c10::kBFloat16: return Dtype::kBFloat16;
    case c10::kComplexFloat: return Dtype::kComplex64;
    case c10::kComplexDouble: return Dtype::kComplex128;
    default: return std::nullopt;
  }
}

// Anything that is not simply memory with strides: a Python subclass (DTensor), a lazy negation, a sparse layout.
const c10::DispatchKeySet kIrregular({c10::DispatchKey::Python, c10::DispatchKey::Negative, c10::DispatchKey::Sparse,
                                      c10::DispatchKey::SparseCsr, c10::DispatchKey::NestedTensor,
                                      c10::DispatchKey::Quantized});

// A tensor that Python defines, such as a DTensor.
bool is_subclass(const at::Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Python); }

// An address for gradients without elements, whose own may be null, which means no gradient.
const char kNothing = 0;

}  // namespace

Plan::Plan(std::vector<at::Tensor> parameters, std::vector<std::string> names, Source source,
           std::vector<Window> windows)
    : parameters_(std::move(parameters)), names_(std::move(names)), source_(source), windows_(std::move(windows)) {
  if (parameters_.size() != names_.size())
    throw InvalidValueError(
        c10::str("there are ", parameters_.size(), " parameters and ", names_.size(), " names; give one for each"));
  if (!windows_.empty() && windows_.size() != names_.size())
    throw InvalidValueError(
        c10::str("there are ", windows_.size(), " windows and ", names_.size(), " names; give one for each"));
  has_pieces_ = !windows_.empty() || std::any_of(parameters_.begin(), parameters_.end(), is_subclass);
  placements_.resize(names_.size());
  pieces_.resize(names_.size());
  group_by_device();
}

// Where a parameter cannot be grouped, the groups stay as they were, so that rows already recorded can be read.
void Plan::group_by_device() {
  std::vector<Group> groups;
  std::vector<Slot> slots;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& p = parameters_[i];
    const c10::Device device = p.device();
    if (!has_backend(device.type()))
      throw ParameterError(c10::str("parameter '", names_[i], "' is on ", device,
                                    ", for which this build of pytracker has no back end; see `pytracker doctor`"));
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.device == device; });
    if (group == groups.end()) {
      groups.emplace_back(device);
      group = groups.end() - 1;
      group->backend = make_backend(device);
    }
    const auto dtype = dtype_of(p.scalar_type());
    Layout layout;
    const bool readable = dtype && !p.key_set().has_any(kIrregular) && windows_.empty();
    layout.numel = readable ? p.numel() : 0;
    layout.dtype = dtype.value_or(Dtype::kFloat32);
    slots.push_back({p.unsafeGetTensorImpl(), layout.numel, static_cast<int32_t>(group - groups.begin()),
                     static_cast<int32_t>(group->members.size()), p.scalar_type(), layout.numel > 0});
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
  ++generation_;
}

bool Plan::rebind(const std::vector<at::Tensor>& tensors) {
  if (tensors.empty()) {
    parameters_.assign(slots_.size(), at::Tensor());
    for (Group& group : groups_) group.kept.assign(group.members.size(), at::Tensor());
    return true;
  }
  if (tensors.size() != slots_.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].device() != groups_[slots_[i].group].device) return false;
  parameters_ = tensors;
  for (size_t i = 0; i < tensors.size(); ++i) slots_[i].impl = tensors[i].unsafeGetTensorImpl();
  return true;
}

at::Tensor Plan::source_of(int64_t parameter) const {
  return source_ == Source::kGradient ? slots_[parameter].impl->grad() : parameters_[parameter];
}

// The address of a gradient, or of what lies on this rank of one, that is as the layout says; null where that cannot be
// told at once.
const void* Plan::plain_data(const Slot& slot, const c10::TensorImpl* impl) const {
  if (!slot.plain || impl->key_set().has_any(kIrregular) || impl->numel() != slot.numel ||
      c10::typeMetaToScalarType(impl->dtype()) != slot.dtype || !impl->is_non_overlapping_and_dense() ||
      impl->device() != groups_[slot.group].device)
    return nullptr;
  return impl->data();
}

void Plan::gather() {
  constexpr int64_t kGrain = 2048;  // parameters; reading one costs tens of nanoseconds, mostly cache misses
  const int64_t n = static_cast<int64_t>(slots_.size());
  at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Slot& slot = slots_[i];
      const c10::TensorImpl* impl = slot.impl;
      if (source_ == Source::kGradient) impl = slot.impl->grad().unsafeGetTensorImpl();
      const bool there = impl != at::UndefinedTensorImpl::singleton();
      groups_[slot.group].data[slot.position] = there ? plain_data(slot, impl) : nullptr;
    }
  });
  irregular_.clear();
  for (int64_t i = 0; i < n; ++i) {
    const Slot& slot = slots_[i];
    if (groups_[slot.group].data[slot.position] == nullptr) irregular_.push_back(i);
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
  const auto taken = [&](int64_t i) {  // whether nothing more is to be found out about it
    const at::Tensor tensor = source_of(i);
    if (!tensor.defined() || !is_subclass(tensor)) return false;
    if (!placements_[i].is_that_of(parameters_[i], tensor)) {
      misplaced.push_back(i);
      parameters.push_back(parameters_[i]);
      gradients.push_back(tensor);
      return false;
    }
    at::Tensor piece = local_piece(tensor, names_[i]);
    Slot& slot = slots_[i];
    Group& group = groups_[slot.group];
    group.data[slot.position] = plain_data(slot, piece.unsafeGetTensorImpl());
    if (group.data[slot.position] == nullptr) {
      pieces_[i] = {std::move(piece), false};
      return false;
    }
    group.kept[slot.position].reset();
    slot.copied = false;
    return true;
  };
  irregular_.erase(std::remove_if(irregular_.begin(), irregular_.end(), taken), irregular_.end());
  if (misplaced.empty()) return;
  std::vector<at::Tensor> pieces = redistributed(parameters, gradients);
  for (size_t k = 0; k < misplaced.size(); ++k) pieces_[misplaced[k]] = {std::move(pieces[k]), true};
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

// The slow path for one parameter: no gradient, or one that is new in some way. False where it is on another device.
bool Plan::describe(int64_t parameter) {
  Slot& slot = slots_[parameter];
  Group& group = groups_[slot.group];
  at::Tensor tensor = source_of(parameter);
  group.data[slot.position] = nullptr;
  group.kept[slot.position] = at::Tensor();
  if (!tensor.defined()) return true;

  const std::string& name = names_[parameter];
  const auto subject = [&] {
    return c10::str(source_ == Source::kGradient ? "the gradient of '" : "parameter '", name, "'");
  };
  const Local local = std::exchange(pieces_[parameter], {});
  if (local.piece.defined()) tensor = local.piece;
  if (tensor.device() != group.device) {
    if (parameters_[parameter].device() != group.device) return false;
    throw ParameterError(c10::str(subject(), " is on ", tensor.device(), " and the parameter on ", group.device,
                                  "; move them to one device"));
  }
  const auto dtype = dtype_of(tensor.scalar_type());
  if (!dtype)
    throw ParameterError(c10::str(subject(), " has dtype ", tensor.scalar_type(),
                                  "; pytracker reads float64, float32, float16, bfloat16, complex64 and complex128"));
  const at::Tensor found = tensor;
  if (!windows_.empty()) tensor = in_window(tensor, parameter);
  const int64_t numel = tensor.numel();
  slot.copied = local.copied || tensor.is_neg();
  if (tensor.layout() == c10::kSparse) {
    slot.copied |= !tensor.is_coalesced();
    tensor = tensor.coalesce()._values();
  } else if (tensor.layout() != c10::kStrided) {
    throw ParameterError(
        c10::str(subject(), " has layout ", tensor.layout(), "; pytracker reads strided and sparse COO tensors"));
  }
  if (tensor.is_neg()) tensor = tensor.resolve_neg();

  Layout layout;
  Strided strided;
  layout.dtype = *dtype;
  if (!fold(tensor, layout, strided)) {
    tensor = tensor.contiguous();
    slot.copied = true;
    layout.numel = tensor.numel();
    layout.repeat = 1;
  }
  layout.implicit_zeros = numel - layout.numel * layout.repeat;

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
  slot.numel = layout.numel;
  slot.dtype = tensor.scalar_type();
  slot.plain = strided.ndim == 0 && layout.repeat == 1 && tensor.is_same(found);
  group.data[slot.position] = layout.numel == 0 ? &kNothing : tensor.const_data_ptr();
  if (local.copied || !tensor.is_same(found)) group.kept[slot.position] = std::move(tensor);
  return true;
}

std::vector<at::Tensor> Plan::reduce(const std::optional<at::Tensor>& grad_scale) {
  gather();
  std::vector<at::Tensor> rows;
  std::vector<at::Tensor> kept;
  for (Group& group : groups_) {
    const int64_t width = row_width(static_cast<int64_t>(group.members.size()), 0);
    rows.push_back(at::empty({width}, at::TensorOptions().dtype(at::kDouble).device(group.device)));
    Scalar scale{nullptr, 1.0};
    if (grad_scale) scale = scalar_of(*grad_scale, "grad_scale", group.device, kept);
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
  for (Group& group : groups_) {
    if (!group.scratch.defined())
      group.scratch = at::empty({row_width(static_cast<int64_t>(group.members.size()), 0)},
                                at::TensorOptions().dtype(at::kDouble).device(group.device));
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

at::Tensor Plan::reduce_and_clip(double max_norm) {
  gather();
  TORCH_INTERNAL_ASSERT(groups_.size() == 1);
  Group& group = groups_[0];
  const int64_t width = row_width(static_cast<int64_t>(group.members.size()), 0);
  const at::Tensor memory = at::empty({width + 2}, at::TensorOptions().dtype(at::kDouble).device(group.device));
  StepRequest request;
  request.layouts = &group.layouts;
  request.gradients = group.data.data();
  request.row.rows = memory.mutable_data_ptr<double>();
  request.row.stride = width;
  request.max_norm = max_norm;
  request.clip = request.row.rows + width;
  group.backend->step(request);
  return memory.narrow(0, width, 2);
}

void Plan::scale(const at::Tensor& factor) {
  if (factor.is_cpu() && *factor.const_data_ptr<double>() == 1) return;
  const at::NoGradGuard not_differentiated;
  for (Group& group : groups_) {
    std::vector<void*> gradients(group.data.size());
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (group.data[i] == nullptr) continue;
      at::Tensor gradient = source_of(group.members[i]);
      if (slots_[group.members[i]].copied) {
        if (is_subclass(gradient)) gradient = local_piece(gradient, names_[group.members[i]]);
        if (gradient.is_sparse()) gradient = gradient._values();
        gradient.mul_(factor.reshape({}));
      } else {
        gradients[i] = const_cast<void*>(group.data[i]);
        if (!gradient.is_inference()) gradient.unsafeGetTensorImpl()->bump_version();
      }
    }
    group.backend->scale(group.layouts, gradients.data(), factor.const_data_ptr<double>());
  }
}

Scalar scalar_of(const at::Tensor& value, const std::string& name, c10::Device device, std::vector<at::Tensor>& kept) {
  at::Tensor tensor = value;
  if (is_subclass(tensor)) tensor = local_piece(tensor, name);
  if (tensor.numel() != 1)
    throw InvalidValueError(c10::str("'", name, "' is a tensor of shape ", value.sizes(), " with ", value.numel(),
                                     " elements; a recorded value has one: reduce it first, e.g. with .mean()"));
  if (tensor.is_complex())
    throw InvalidValueError(
        c10::str("'", name, "' is complex (", tensor.scalar_type(), "); record .real, .imag or .abs()"));
  Scalar scalar;
  if (tensor.is_cpu()) {  // the value is here already: reading it waits for nothing
    switch (tensor.scalar_type()) {
      case c10::kFloat: scalar.value = *tensor.const_data_ptr<float>(); break;
      case c10::kDouble: scalar.value = *tensor.const_data_ptr<double>(); break;
      default: scalar.value = tensor.item().toDouble();
    }
    return scalar;
  }
  if (tensor.device() != device)
    throw InvalidValueError(c10::str("'", name, "' is on ", tensor.device(),
                                     ", where the model has no parameter; it is recorded on ", device,
                                     ": move it there with .to('", device, "', non_blocking=True)"));
  const auto dtype = dtype_of(tensor.scalar_type());
  scalar.is_integer = tensor.scalar_type() == c10::kLong;
  if (!dtype && !scalar.is_integer) tensor = tensor.to(at::kDouble);
  scalar.dtype = dtype.value_or(Dtype::kFloat64);
  scalar.data = tensor.const_data_ptr();
  kept.push_back(std::move(tensor));
  return scalar;
}

}  // namespace pytracker
