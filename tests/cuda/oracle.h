// Gradients of known values on the device, and what their moments must be: the kernels' tests without torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace pytracker {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL: %s: %s\n", what, cudaGetErrorName(error));
  std::exit(1);
}
#define CHECK(call) ::pytracker::check(call, #call)

using Half = _Float16;

// bfloat16 as the compiler's own is not everywhere yet.
struct BFloat16 {
  uint16_t bits = 0;
  BFloat16() = default;
  explicit BFloat16(float x) {  // rounds to nearest, ties to even; a NaN stays one
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof(wide));
    bits = x != x ? 0x7fff : static_cast<uint16_t>((wide + 0x7fffu + (wide >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    return x;
  }
};

inline bool is_complex(Dtype dtype) { return dtype == Dtype::kComplex64 || dtype == Dtype::kComplex128; }

enum class Values { kNormal, kSparse, kZero, kHuge, kTiny, kConstant, kNan, kInf, kBoth, kWorst, kWide };

// Memory of the device, as large as asked for and no larger, so that an access out of bounds is seen.
class Buffer {
 public:
  explicit Buffer(size_t bytes) { CHECK(cudaMalloc(&data_, bytes > 0 ? bytes : 1)); }
  Buffer(const void* host, size_t bytes) : Buffer(bytes) { CHECK(cudaMemcpy(data_, host, bytes, cudaMemcpyDefault)); }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { cudaFree(data_); }
  template <typename T = std::byte>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// What a row must be, in extended precision. `magnitude` is the sum of |x|: the scale of the error of a sum.
struct Expected {
  long double sum = 0, sum_sq = 0, magnitude = 0, l1 = 0;
  double abs_max = 0, zeros = 0, nans = 0, infs = 0;
  double subnormal[kFormats] = {}, near_max[kFormats] = {};

  void add(double re, double im, bool complex) {
    const double size = complex ? std::hypot(re, im) : std::fabs(re);
    const bool nan = std::isnan(re) || std::isnan(im);
    sum += re;
    sum_sq += static_cast<long double>(re) * re + static_cast<long double>(im) * im;
    magnitude += std::fabs(re);
    abs_max = max_keep_nan(abs_max, nan ? NAN : size);
    zeros += re == 0 && im == 0;
    nans += nan;
    infs += std::isinf(re) || std::isinf(im);
    l1 += nan ? NAN : size;
    for (int f = 0; f < kFormats; ++f) {
      const int lowest[] = {-126, -14, -6}, high[] = {126, 14, 7};
      subnormal[f] += !nan && size > 0 && size < std::ldexp(1.0, lowest[f]);
      near_max[f] += !nan && size >= std::ldexp(1.0, high[f]);
    }
  }
  void merge(const Expected& other, double repeat = 1) {
    sum += repeat * other.sum;
    sum_sq += repeat * other.sum_sq;
    magnitude += repeat * other.magnitude;
    abs_max = max_keep_nan(abs_max, other.abs_max);
    zeros += repeat * other.zeros;
    nans += repeat * other.nans;
    infs += repeat * other.infs;
    l1 += repeat * other.l1;
    for (int f = 0; f < kFormats; ++f) {
      subnormal[f] += repeat * other.subnormal[f];
      near_max[f] += repeat * other.near_max[f];
    }
  }
};

template <typename T>
T load(const std::byte* p) {
  T x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// The real value, or part of a complex one, that lies at p.
inline double get(Dtype dtype, const std::byte* p) {
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kComplex128: return load<double>(p);
    case Dtype::kFloat32:
    case Dtype::kComplex64: return load<float>(p);
    case Dtype::kFloat16: return static_cast<float>(load<Half>(p));
    case Dtype::kBFloat16: return load<BFloat16>(p);
  }
  return 0;
}

// Stores a value at p, rounded to the dtype; returns what was stored.
inline double put(Dtype dtype, std::byte* p, double x) {
  const auto store = [p](auto rounded) { std::memcpy(p, &rounded, sizeof(rounded)); };
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kComplex128: store(x); break;
    case Dtype::kFloat32:
    case Dtype::kComplex64: store(static_cast<float>(x)); break;
    case Dtype::kFloat16: store(static_cast<Half>(static_cast<float>(x))); break;
    case Dtype::kBFloat16: store(BFloat16(static_cast<float>(x))); break;
  }
  return get(dtype, p);
}

inline double value_of(Values values, int64_t i, std::mt19937_64& random) {
  const double normal = std::normal_distribution<double>()(random);
  const uint64_t die = random() % 1000;
  switch (values) {
    case Values::kNormal: return normal;
    case Values::kSparse: return die < 900 ? 0.0 : normal;
    case Values::kZero: return i % 2 ? -0.0 : 0.0;
    case Values::kHuge: return normal * 1e30;
    case Values::kTiny: return normal * 1e-40;
    case Values::kConstant: return 0.1;
    case Values::kNan: return die < 3 ? NAN : normal;
    case Values::kInf: return die < 3 ? (normal < 0 ? -INFINITY : INFINITY) : normal;
    case Values::kBoth: return die < 3 ? NAN : die < 6 ? INFINITY : normal;
    // Of three vectors that lie 128 fp32 elements apart, squares that their sum rounds the wrong way each time.
    case Values::kWorst: return i % 384 < 128 ? 1 + 0x1p-12 : 0x1.ffcp-13;
    // Most exponents of fp32, and the bounds of the further columns themselves.
    case Values::kWide: return std::ldexp(die < 900 ? normal : 1.0, static_cast<int>(random() % 36) * 7 - 126);
  }
  return 0;
}

// One gradient on the device: `lead` elements past the start of its allocation, in `layout`.
struct Gradient {
  Layout layout;
  Expected expected;  // after repeat and implicit zeros
  int64_t lead = 0;
  bool missing = false;
  std::vector<std::byte> host;  // as uploaded, with the lead
  Buffer device{0};

  void* data() const { return missing ? nullptr : device.as() + lead * item_size(layout.dtype); }
};

inline Gradient make_gradient(Dtype dtype, int64_t numel, Values values, int64_t lead = 0, uint64_t seed = 1) {
  std::mt19937_64 random(seed * 7919 + static_cast<uint64_t>(numel));
  const int64_t item = item_size(dtype);
  Gradient g;
  g.layout.dtype = dtype;
  g.layout.numel = numel;
  g.lead = lead;
  g.host.resize((lead + numel) * item);
  for (int64_t i = 0; i < numel; ++i) {
    std::byte* p = g.host.data() + (lead + i) * item;
    const double re = put(dtype, p, value_of(values, i, random));
    const double im = is_complex(dtype) ? put(dtype, p + item / 2, value_of(values, i, random)) : 0;
    g.expected.add(re, im, is_complex(dtype));
  }
  g.device = Buffer(g.host.data(), g.host.size());
  return g;
}

// A gradient with gaps: the elements at the multiples of `strides` in a larger piece of memory.
inline Gradient make_strided(Dtype dtype, const Strided& strided, int32_t index) {
  int64_t numel = 1, extent = 1;
  for (int d = 0; d < strided.ndim; ++d) {
    numel *= strided.sizes[d];
    extent += (strided.sizes[d] - 1) * strided.strides[d];
  }
  Gradient g = make_gradient(dtype, extent, Values::kNormal);
  g.layout.numel = numel;
  g.layout.strided = index;
  g.expected = {};
  const int64_t item = item_size(dtype);
  for (int64_t i = 0; i < numel; ++i) {
    int64_t offset = 0, rest = i;
    for (int d = static_cast<int>(strided.ndim) - 1; d >= 0; --d) {
      offset += rest % strided.sizes[d] * strided.strides[d];
      rest /= strided.sizes[d];
    }
    const std::byte* p = g.host.data() + offset * item;
    const double re = get(dtype, p), im = is_complex(dtype) ? get(dtype, p + item / 2) : 0;
    g.expected.add(re, im, is_complex(dtype));
  }
  return g;
}

inline bool near(double got, long double want, long double error) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= error;
}

// Compares a row of columns with what it must be; `tolerance` is that of the norm.
inline bool same(const double* row, const Expected& want, double tolerance, const std::string& name) {
  const long double sum_error = (tolerance < 1e-10 ? 1e-14L : 1e-6L) * want.magnitude;
  const bool ok = near(row[kSum], want.sum, sum_error) && near(row[kSumSq], want.sum_sq, 2 * tolerance * want.sum_sq) &&
                  near(row[kAbsMax], want.abs_max, 1e-15L * want.abs_max) && row[kZeros] == want.zeros &&
                  row[kNans] == want.nans && row[kInfs] == want.infs;
  if (!ok)
    std::printf("FAIL %s: got %.9g %.17g %.9g %g %g %g, want %.9Lg %.17Lg %.9g %g %g %g\n", name.c_str(), row[0],
                row[1], row[2], row[3], row[4], row[5], want.sum, want.sum_sq, want.abs_max, want.zeros, want.nans,
                want.infs);
  return ok;
}

// The same of the further columns.
inline bool same_extras(const double* row, const Expected& want, double tolerance, const std::string& name) {
  bool ok = near(row[kL1], want.l1, 2 * tolerance * want.l1);
  for (int f = 0; f < kFormats; ++f)
    ok = ok && row[kSubnormal + f] == want.subnormal[f] && row[kNearMax + f] == want.near_max[f];
  if (!ok)
    std::printf("FAIL %s: got %.17g %g %g %g %g %g %g, want %.17Lg %g %g %g %g %g %g\n", name.c_str(), row[0], row[1],
                row[2], row[3], row[4], row[5], row[6], want.l1, want.subnormal[0], want.subnormal[1],
                want.subnormal[2], want.near_max[0], want.near_max[1], want.near_max[2]);
  return ok;
}

inline double tolerance_of(Dtype dtype) { return dtype == Dtype::kFloat64 || is_complex(dtype) ? 1e-14 : 1e-7; }

}  // namespace pytracker
