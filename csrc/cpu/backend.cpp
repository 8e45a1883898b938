// The CPU back end: the gradients are cut into chunks of a fixed size, the chunks are spread over ATen's threads by
// cost, and what they give is merged in the order of the chunks. Neither the chunks nor the order depend on the number
// of threads, so neither do the bits.
#include "../backend.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>

#include "../decision.h"
#include "../parallel.h"
#include "kernel.h"

namespace pytracker::cpu {
namespace {

constexpr int64_t kChunk = 1 << 16;       // elements; large enough that merging chunks costs nothing
constexpr int64_t kTensorCost = 256;      // bytes that could be read in the time that a tensor costs besides its bytes
constexpr int64_t kThreadCost = 1 << 19;  // bytes below which waking a second thread costs more than it saves
constexpr int64_t kGather = 2048;         // elements copied together from a gradient with gaps (a kernel's block)

struct Chunk {
  int32_t tensor;
  int64_t begin, end;  // elements
};

double read(const Scalar& scalar) {
  if (scalar.data == nullptr) return scalar.value;
  if (scalar.is_integer) return static_cast<double>(*static_cast<const int64_t*>(scalar.data));
  switch (scalar.dtype) {
    case Dtype::kFloat64: return *static_cast<const double*>(scalar.data);
    case Dtype::kFloat32: return *static_cast<const float*>(scalar.data);
    case Dtype::kFloat16: return *static_cast<const c10::Half*>(scalar.data);
    case Dtype::kBFloat16: return *static_cast<const c10::BFloat16*>(scalar.data);
    default: return std::numeric_limits<double>::quiet_NaN();
  }
}

// Calls f(offset in elements, run) for `count` elements of a strided gradient, from element `begin` on in row-major
// order; a run lies contiguously.
template <typename F>
void for_each_run(const Strided& s, int64_t begin, int64_t count, F f) {
  const int64_t last = s.ndim - 1;
  int64_t index[kMaxDims];
  for (int64_t d = last, rest = begin; d >= 0; --d) {
    index[d] = rest % s.sizes[d];
    rest /= s.sizes[d];
  }
  while (count > 0) {
    int64_t offset = 0;
    for (int64_t d = 0; d <= last; ++d) offset += index[d] * s.strides[d];
    const int64_t run = s.strides[last] == 1 ? std::min(count, s.sizes[last] - index[last]) : 1;
    f(offset, run);
    count -= run;
    index[last] += run;
    for (int64_t d = last; d > 0 && index[d] == s.sizes[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

class CpuBackend final : public Backend {
 public:
  void step(const StepRequest& request) override {
    prepare(*request.layouts);
    if (request.extras) extra_partials_.resize(chunks_.size());
    const int64_t tensors = static_cast<int64_t>(request.layouts->tensors.size());
    const int64_t index = request.row.cursor == nullptr ? 0 : (*request.row.cursor)++ % request.row.capacity;
    double* row = request.row.rows + index * request.row.stride;
    const double scale = read(request.grad_scale);

    for_each_chunk([&](int64_t c) {
      const Chunk& chunk = chunks_[c];
      const void* data = request.gradients[chunk.tensor];
      if (data != nullptr) partials_[c] = reduced(*request.layouts, chunk, data, kernels().moments);
      if (data != nullptr && request.extras)  // the chunk is in the cache still
        extra_partials_[c] = reduced(*request.layouts, chunk, data, kernels().extras);
      const bool whole = first_chunk_[chunk.tensor + 1] - first_chunk_[chunk.tensor] == 1;
      if (whole) finish(request, chunk.tensor, scale, row);
    });
    for (int64_t t = 0; t < tensors; ++t)
      if (first_chunk_[t + 1] - first_chunk_[t] != 1) finish(request, t, scale, row);

    write_totals(row, tensors);
    double* scalars = row + tensor_offset(tensors);
    for (int64_t i = 0; i < request.n_scalars; ++i) scalars[request.scalars[i].slot] = read(request.scalars[i]);
    const Decision& decision = request.decision;
    if (decision.order != Order::kNone) pytracker::decide(decision, read(decision.max_norm), row, scalars);
  }

  void decide(const Layouts& layouts, const Decision& decision, const RowTarget& target,
              const std::shared_ptr<const void>&) override {
    const int64_t n_tensors = static_cast<int64_t>(layouts.tensors.size());
    const int64_t index = target.cursor == nullptr ? 0 : (*target.cursor - 1) % target.capacity;
    double* row = target.rows + index * target.stride;
    pytracker::decide(decision, read(decision.max_norm), row, row + tensor_offset(n_tensors));
  }

  void scale(const Layouts& layouts, void* const* gradients, const double* factors, int64_t stride) override {
    if (stride == 0 && *factors == 1) return;
    prepare(layouts);
    for_each_chunk([&](int64_t c) {
      const Chunk& chunk = chunks_[c];
      const Layout& layout = layouts.tensors[chunk.tensor];
      char* data = static_cast<char*>(gradients[chunk.tensor]);
      const double factor = factors[chunk.tensor * stride];
      if (data == nullptr || factor == 1) return;
      const auto multiply = [&](int64_t offset, int64_t run) {
        kernels().scale(layout.dtype, data + offset * item_size(layout.dtype), run, factor);
      };
      if (layout.strided < 0) {
        multiply(chunk.begin, chunk.end - chunk.begin);
      } else {
        for_each_run(layouts.strided[layout.strided], chunk.begin, chunk.end - chunk.begin, multiply);
      }
    });
  }

  void update_meters(double* state, const Scalar* values, const Scalar* weights, int64_t count) override {
    for (int64_t i = 0; i < count; ++i) {
      double* meter = state + values[i].slot * kMeterColumns;
      const double value = read(values[i]), weight = read(weights[i]);
      meter[kVal] = value;
      if (weight == 0) continue;  // adds nothing: 0 * inf would be NaN
      if (value != value) {
        meter[kMeterNans] += 1;
      } else {
        meter[kMeterSum] += value * weight;
        meter[kCount] += weight;
      }
    }
  }

 private:
  // Cuts the gradients into chunks, when they have changed.
  void prepare(const Layouts& layouts) {
    if (layouts.version == version_ && first_chunk_.size() == layouts.tensors.size() + 1) return;
    chunks_.clear();
    cost_.assign(1, 0);
    first_chunk_.clear();
    for (size_t t = 0; t < layouts.tensors.size(); ++t) {
      const Layout& layout = layouts.tensors[t];
      first_chunk_.push_back(static_cast<int64_t>(chunks_.size()));
      for (int64_t begin = 0; begin < layout.numel; begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, layout.numel);
        chunks_.push_back({static_cast<int32_t>(t), begin, end});
        cost_.push_back(cost_.back() + (end - begin) * item_size(layout.dtype) + kTensorCost);
      }
    }
    first_chunk_.push_back(static_cast<int64_t>(chunks_.size()));
    partials_.resize(chunks_.size());
    version_ = layouts.version;
  }

  // Spreads the chunks over the threads: each takes those that start in its equal part of the cost.
  template <typename F>
  void for_each_chunk(F f) {
    parallel_for(0, cost_.back(), kThreadCost, [&](int64_t from, int64_t to) {
      const auto starts_from = cost_.begin(), starts_to = cost_.end() - 1;
      int64_t c = std::lower_bound(starts_from, starts_to, from) - starts_from;
      const int64_t end = std::lower_bound(starts_from, starts_to, to) - starts_from;
      for (; c < end; ++c) f(c);
    });
  }

  // What a kernel makes of a chunk: moments, or the further columns.
  template <typename Part>
  static Part reduced(const Layouts& layouts, const Chunk& chunk, const void* data,
                      Part (*kernel)(Dtype dtype, const void* data, int64_t numel)) {
    const Layout& layout = layouts.tensors[chunk.tensor];
    const int64_t item = item_size(layout.dtype);
    const char* bytes = static_cast<const char*>(data);
    if (layout.strided < 0) return kernel(layout.dtype, bytes + chunk.begin * item, chunk.end - chunk.begin);

    alignas(64) char gathered[kGather * 16];
    Part total;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kGather) {
      const int64_t count = std::min(kGather, chunk.end - begin);
      char* out = gathered;
      for_each_run(layouts.strided[layout.strided], begin, count, [&](int64_t offset, int64_t run) {
        std::memcpy(out, bytes + offset * item, static_cast<size_t>(run * item));
        out += run * item;
      });
      total.merge(kernel(layout.dtype, gathered, count));
    }
    return total;
  }

  // Merges a tensor's chunks, as a tree, so that the rounding of 1e8 elements grows with the logarithm.
  template <typename Part>
  static Part merged(const std::vector<Part>& partials, int64_t first, int64_t last) {
    if (first == last) return {};
    if (last - first == 1) return partials[first];
    const int64_t middle = first + (last - first) / 2;
    Part left = merged(partials, first, middle);
    left.merge(merged(partials, middle, last));
    return left;
  }

  void finish(const StepRequest& request, int64_t tensor, double scale, double* row) const {
    double* columns = row + tensor_offset(tensor);
    const int64_t tensors = static_cast<int64_t>(request.layouts->tensors.size());
    double* extras = request.extras ? row + extras_offset(request.row.stride, tensors, tensor) : nullptr;
    if (request.gradients[tensor] == nullptr) {
      if (extras != nullptr) store_missing(extras, kExtraColumns);
      return store_missing(columns);
    }
    const Layout& layout = request.layouts->tensors[tensor];
    const int64_t first = first_chunk_[tensor], last = first_chunk_[tensor + 1];
    if (extras != nullptr) merged(extra_partials_, first, last).store(extras, layout.repeat, scale);
    Moments m = merged(partials_, first, last);
    m.extend(layout.repeat, layout.implicit_zeros);
    if (scale != 1) m.divide(scale);
    m.store(columns);
  }

  // The tensors' rows merged in their order, 64 at a time and then the blocks of 64.
  static void write_totals(double* row, int64_t tensors) {
    constexpr int64_t kBlock = 64;
    double total[kTotals] = {};
    for (int64_t begin = 0; begin < tensors; begin += kBlock) {
      double block[kTotals] = {};
      for (int64_t t = begin; t < std::min(begin + kBlock, tensors); ++t) {
        const double* columns = row + tensor_offset(t);
        if (columns[kZeros] != columns[kZeros]) continue;  // missing
        merge(block, columns, columns[kSumSq]);
      }
      merge(total, block, block[kMaxSumSq]);
    }
    std::copy(total, total + kTotals, row);
  }

  static void merge(double* into, const double* columns, double max_sum_sq) {
    const double abs_max = max_keep_nan(into[kAbsMax], columns[kAbsMax]);
    for (int c = 0; c < kColumns; ++c) into[c] += columns[c];
    into[kAbsMax] = abs_max;
    into[kMaxSumSq] = max_keep_nan(into[kMaxSumSq], max_sum_sq);
  }

  uint64_t version_ = ~uint64_t{0};
  std::vector<Chunk> chunks_;
  std::vector<int64_t> cost_;           // [chunks + 1] cost before each chunk, in bytes
  std::vector<int64_t> first_chunk_;    // [tensors + 1]
  std::vector<Moments> partials_;       // [chunks]
  std::vector<Extras> extra_partials_;  // [chunks], where they are asked for
};

std::unique_ptr<Backend> make(c10::Device) { return std::make_unique<CpuBackend>(); }

const bool registered = register_backend(c10::DeviceType::CPU, make);

}  // namespace
}  // namespace pytracker::cpu
