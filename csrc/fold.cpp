#include "fold.h"

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

namespace pytracker {

bool fold(const at::Tensor& tensor, Layout& layout, Strided& strided) {
  layout.repeat = 1;
  layout.numel = 1;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 0) {
      layout.numel = 0;
      return true;
    }
    if (size == 1) continue;
    if (stride == 0) {
      layout.repeat *= size;
    } else {
      layout.numel *= size;
      dims.emplace_back(stride, size);
    }
  }
  std::sort(dims.begin(), dims.end(), std::greater<>());
  std::vector<std::pair<int64_t, int64_t>> folded;
  for (const auto& [stride, size] : dims) {
    if (!folded.empty() && folded.back().first == stride * size) {
      folded.back() = {stride, folded.back().second * size};
    } else {
      folded.emplace_back(stride, size);
    }
  }
  if (folded.size() > kMaxDims) return false;
  if (folded.empty() || (folded.size() == 1 && folded[0].first == 1)) return true;
  strided.ndim = static_cast<int64_t>(folded.size());
  for (size_t d = 0; d < folded.size(); ++d) {
    strided.strides[d] = folded[d].first;
    strided.sizes[d] = folded[d].second;
  }
  return true;
}

bool same(const Layout& a, const Layout& b, const Layouts& layouts, const Strided& strided) {
  if (a.numel != b.numel || a.repeat != b.repeat || a.implicit_zeros != b.implicit_zeros || a.dtype != b.dtype)
    return false;
  if (a.strided < 0) return strided.ndim == 0;
  return layouts.strided[a.strided] == strided;
}

}  // namespace pytracker
