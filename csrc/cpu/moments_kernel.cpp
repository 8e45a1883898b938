// The six moments of a run of elements, and the further columns, on one core.
//
// Price: each byte is read once. A 64-byte line of fp32 costs about a dozen vector instructions with AVX-512, twice
// that with AVX2, so that a core waits for memory and not for arithmetic.
//
// Maths: every value is widened to float64 before it is added. The square of a 16- or 32-bit value is exact there and
// neither overflows nor underflows, so large and small gradients need no path of their own. NaN and Inf are looked for
// only in a block whose sums are not finite; that block, still in the cache, is read again.
//
// Order: element i goes to accumulator i % 16, and the sixteen are added as a tree, whatever the vector's width. The
// bits are the same for every instruction set (products are not contracted into FMAs: see setup.py).
//
// This file is compiled once for each instruction set, with CPU_CAPABILITY naming it. It includes nothing whose inline
// functions could be emitted for a newer processor and then be picked by the linker for all: at::vec, which keeps each
// instruction set in a namespace of its own, and plan.h.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "kernel.h"

namespace pytracker::cpu {
namespace {

using at::vec::Vectorized;
using VecFloat = Vectorized<float>;
using VecDouble = Vectorized<double>;

constexpr int kLanes = 16;
constexpr int kFloats = kLanes / VecFloat::size();    // vectors of float that hold the lanes
constexpr int kDoubles = kLanes / VecDouble::size();  // vectors of double that hold the lanes
constexpr int64_t kBlock = 2048;                      // elements between two looks for NaN and Inf: 8 KB of fp32, in L1
constexpr int64_t kPrefetch = 8192;                   // bytes ahead: the hardware's own prefetcher stops at each page,
                                                      // and 1 KB ahead is too late (30 GB/s a core; 8 KB: 46)

// at::vec converts float to double through memory; this keeps it in registers.
inline std::pair<VecDouble, VecDouble> widen(VecFloat x) {
#if defined(CPU_CAPABILITY_AVX512)
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
#elif defined(CPU_CAPABILITY_AVX2)
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
#else
  const auto both = at::vec::convert<double, 2, float, 1>(at::vec::VectorizedN<float, 1>(x));
  return {both[0], both[1]};
#endif
}

// Sixteen elements as they are compared: float where that is exact, so that maxima and zeros cost half as much.
template <typename T>
struct Lanes {
  using Value = float;
  using Vec = VecFloat;
  static constexpr int kVectors = kFloats;

  static void load(const T* p, Vec (&x)[kVectors]) {
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        x[i] = Vec::loadu(p + i * Vec::size());
      } else {
        at::vec::load_to_float<T>(p + i * Vec::size(), x[i]);
      }
    }
  }
  static void as_double(const Vec (&x)[kVectors], VecDouble (&d)[kDoubles]) {
    for (int i = 0; i < kVectors; ++i) std::tie(d[2 * i], d[2 * i + 1]) = widen(x[i]);
  }
  // The square is exact, so one rounding or two make the same bits.
  static VecDouble add_square(VecDouble x, VecDouble to) { return at::vec::fmadd(x, x, to); }
};

template <>
struct Lanes<double> {
  using Value = double;
  using Vec = VecDouble;
  static constexpr int kVectors = kDoubles;

  static void load(const double* p, Vec (&x)[kVectors]) {
    for (int i = 0; i < kVectors; ++i) x[i] = Vec::loadu(p + i * Vec::size());
  }
  static void as_double(const Vec (&x)[kVectors], VecDouble (&d)[kDoubles]) {
    for (int i = 0; i < kVectors; ++i) d[i] = x[i];
  }
  // Not fused: a processor without FMA must make the same bits.
  static VecDouble add_square(VecDouble x, VecDouble to) { return to + x * x; }
};

// Adds the sixteen lanes as a tree: i with i + 8, then i + 4, i + 2, i + 1.
template <typename Vec, int kVectors, typename Combine>
double fold(const Vec (&v)[kVectors], Combine combine) {
  typename Vec::value_type lanes[kLanes];
  for (int i = 0; i < kVectors; ++i) v[i].store(lanes + i * Vec::size());
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return static_cast<double>(lanes[0]);
}

// Calls f with sixteen elements at a time, the last ones padded with zeros; returns how many zeros that were. `ahead`
// is how far to prefetch, in bytes.
template <typename T, typename F>
int64_t for_each_lanes(const T* data, int64_t numel, int64_t ahead, F f) {
  typename Lanes<T>::Vec x[Lanes<T>::kVectors];
  int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(data + i) + ahead);
    Lanes<T>::load(data + i, x);
    f(x);
  }
  if (i == numel) return 0;
  T tail[kLanes] = {};
  std::memcpy(static_cast<void*>(tail), data + i, static_cast<size_t>(numel - i) * sizeof(T));
  Lanes<T>::load(tail, x);
  f(x);
  return kLanes - (numel - i);
}

constexpr auto kPlus = [](auto a, auto b) { return a + b; };
constexpr auto kMax = [](auto a, auto b) { return a > b ? a : b; };

// The moments of at most kBlock elements, but for NaN and Inf: the sums have them, the maximum may have lost them.
template <typename T>
Moments finite_moments(const T* data, int64_t numel, int64_t ahead) {
  using L = Lanes<T>;
  using Vec = typename L::Vec;
  VecDouble sum[kDoubles], sum_sq[kDoubles];
  Vec abs_max(0);
  std::fill(sum, sum + kDoubles, VecDouble(0));
  std::fill(sum_sq, sum_sq + kDoubles, VecDouble(0));
  int64_t zero_count = 0;

  const int64_t padding = for_each_lanes(data, numel, ahead, [&](const Vec(&x)[L::kVectors]) {
    VecDouble d[kDoubles];
    L::as_double(x, d);
    for (int i = 0; i < kDoubles; ++i) {
      sum[i] = sum[i] + d[i];
      sum_sq[i] = L::add_square(d[i], sum_sq[i]);
    }
    for (int i = 0; i < L::kVectors; ++i) {
      abs_max = at::vec::clamp_min(x[i].abs(), abs_max);
      zero_count += __builtin_popcount(static_cast<unsigned>(x[i].zero_mask()));
    }
  });

  Moments m;
  m.sum = fold(sum, kPlus);
  m.sum_sq = fold(sum_sq, kPlus);
  m.abs_max = at::vec::vec_reduce_all<typename L::Value>(
      [](const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); }, abs_max);
  m.zeros = zero_count - padding;
  return m;
}

// Counts NaN and Inf in a block whose sum of squares is not finite, and mends its maximum.
template <typename T>
void count_nonfinite(const T* data, int64_t numel, Moments& m) {
  using L = Lanes<T>;
  using Vec = typename L::Vec;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  Vec nans[L::kVectors], infs[L::kVectors];
  std::fill(nans, nans + L::kVectors, Vec(0));
  std::fill(infs, infs + L::kVectors, Vec(0));
  for_each_lanes(data, numel, 0, [&](const Vec(&x)[L::kVectors]) {
    for (int i = 0; i < L::kVectors; ++i) {
      nans[i] = nans[i] + x[i].ne(x[i]);
      infs[i] = infs[i] + x[i].abs().eq(Vec(kInf));
    }
  });
  m.nans = static_cast<int64_t>(fold(nans, kPlus));
  m.infs = static_cast<int64_t>(fold(infs, kPlus));
  if (m.nans > 0) {
    m.abs_max = std::numeric_limits<double>::quiet_NaN();
  } else if (m.infs > 0) {
    m.abs_max = kInf;
  }
}

template <typename T>
Moments real_moments(const void* data, int64_t numel) {
  const T* p = static_cast<const T*>(data);
  Moments total;
  for (int64_t i = 0; i < numel; i += kBlock) {
    const int64_t n = std::min(kBlock, numel - i);
    const bool more = (numel - i) * static_cast<int64_t>(sizeof(T)) > kPrefetch;
    Moments block = finite_moments(p + i, n, more ? kPrefetch : 0);
    if (!(block.sum_sq <= std::numeric_limits<double>::max())) count_nonfinite(p + i, n, block);
    total.merge(block);
  }
  return total;
}

// Complex gradients are rare and half as dense in information, so they go one by one, eight chains deep.
template <typename T>
Moments complex_moments(const void* data, int64_t numel) {
  constexpr int kChains = 8;
  const T* p = static_cast<const T*>(data);
  Moments chain[kChains];
  for (int64_t i = 0; i < numel; ++i) chain[i % kChains].add(p[2 * i], p[2 * i + 1]);
  for (int half = kChains / 2; half > 0; half /= 2)
    for (int c = 0; c < half; ++c) chain[c].merge(chain[c + half]);
  return chain[0];
}

Moments moments(Dtype dtype, const void* data, int64_t numel) {
  switch (dtype) {
    case Dtype::kFloat64: return real_moments<double>(data, numel);
    case Dtype::kFloat32: return real_moments<float>(data, numel);
    case Dtype::kFloat16: return real_moments<c10::Half>(data, numel);
    case Dtype::kBFloat16: return real_moments<c10::BFloat16>(data, numel);
    case Dtype::kComplex64: return complex_moments<float>(data, numel);
    case Dtype::kComplex128: return complex_moments<double>(data, numel);
  }
  return {};
}

// The further columns of at most kBlock elements. Padding is zeros, which are below every bound and no subnormals.
template <typename T>
Extras block_extras(const T* data, int64_t numel) {
  using L = Lanes<T>;
  using Vec = typename L::Vec;
  using Value = typename L::Value;
  VecDouble l1[kDoubles];
  Vec zeros[L::kVectors], below[kFormats][L::kVectors], near_max[kFormats][L::kVectors];
  std::fill(l1, l1 + kDoubles, VecDouble(0));
  std::fill(zeros, zeros + L::kVectors, Vec(0));
  for (int f = 0; f < kFormats; ++f) {
    std::fill(below[f], below[f] + L::kVectors, Vec(0));
    std::fill(near_max[f], near_max[f] + L::kVectors, Vec(0));
  }
  for_each_lanes(data, numel, 0, [&](const Vec(&x)[L::kVectors]) {
    Vec modulus[L::kVectors];
    for (int i = 0; i < L::kVectors; ++i) {
      modulus[i] = x[i].abs();
      zeros[i] = zeros[i] + modulus[i].eq(Vec(0));
      for (int f = 0; f < kFormats; ++f) {
        below[f][i] = below[f][i] + modulus[i].lt(Vec(static_cast<Value>(smallest_normal(f))));
        near_max[f][i] = near_max[f][i] + modulus[i].ge(Vec(static_cast<Value>(two_highest_binades(f))));
      }
    }
    VecDouble d[kDoubles];
    L::as_double(modulus, d);
    for (int i = 0; i < kDoubles; ++i) l1[i] = l1[i] + d[i];
  });
  Extras e;
  e.l1 = fold(l1, kPlus);
  const auto of_zero = static_cast<int64_t>(fold(zeros, kPlus));
  for (int f = 0; f < kFormats; ++f) {
    e.subnormal[f] = static_cast<int64_t>(fold(below[f], kPlus)) - of_zero;
    e.near_max[f] = static_cast<int64_t>(fold(near_max[f], kPlus));
  }
  return e;
}

template <typename T>
Extras real_extras(const void* data, int64_t numel) {
  Extras total;
  for (int64_t i = 0; i < numel; i += kBlock)
    total.merge(block_extras(static_cast<const T*>(data) + i, std::min(kBlock, numel - i)));
  return total;
}

template <typename T>
Extras complex_extras(const void* data, int64_t numel) {
  const T* p = static_cast<const T*>(data);
  Extras total;
  for (int64_t i = 0; i < numel; ++i) {
    const double re = p[2 * i], im = p[2 * i + 1];
    total.add(re != re || im != im ? std::numeric_limits<double>::quiet_NaN() : hypot(re, im));
  }
  return total;
}

Extras extras(Dtype dtype, const void* data, int64_t numel) {
  switch (dtype) {
    case Dtype::kFloat64: return real_extras<double>(data, numel);
    case Dtype::kFloat32: return real_extras<float>(data, numel);
    case Dtype::kFloat16: return real_extras<c10::Half>(data, numel);
    case Dtype::kBFloat16: return real_extras<c10::BFloat16>(data, numel);
    case Dtype::kComplex64: return complex_extras<float>(data, numel);
    case Dtype::kComplex128: return complex_extras<double>(data, numel);
  }
  return {};
}

// A gradient times a factor, rounded to the gradient's dtype as torch's mul_ rounds it: the factor is first rounded to
// the dtype that the product is computed in.
template <typename T, typename Factor>
void multiply(void* data, int64_t numel, double factor) {
  T* p = static_cast<T*>(data);
  const Factor f = static_cast<Factor>(factor);
  for (int64_t i = 0; i < numel; ++i) p[i] = static_cast<T>(static_cast<Factor>(p[i]) * f);
}

// The same of 16-bit values, which compilers leave to scalar instructions: so it would wait for these and not for
// memory.
template <typename T>
void multiply_short(void* data, int64_t numel, double factor) {
  using Vec = Vectorized<T>;
  T* p = static_cast<T*>(data);
  const VecFloat f(static_cast<float>(factor));
  int64_t i = 0;
  for (; i + Vec::size() <= numel; i += Vec::size()) {
    const auto [lower, upper] = at::vec::convert_to_float<T>(Vec::loadu(p + i));
    at::vec::convert_from_float<T>(lower * f, upper * f).store(p + i);
  }
  multiply<T, float>(p + i, numel - i, factor);
}

void scale(Dtype dtype, void* data, int64_t numel, double factor) {
  switch (dtype) {
    case Dtype::kFloat64: return multiply<double, double>(data, numel, factor);
    case Dtype::kFloat32: return multiply<float, float>(data, numel, factor);
    case Dtype::kFloat16: return multiply_short<c10::Half>(data, numel, factor);
    case Dtype::kBFloat16: return multiply_short<c10::BFloat16>(data, numel, factor);
    case Dtype::kComplex64: return multiply<float, float>(data, 2 * numel, factor);
    case Dtype::kComplex128: return multiply<double, double>(data, 2 * numel, factor);
  }
}

}  // namespace

#define PYTRACKER_STRING(x) #x
#define PYTRACKER_NAME(x) PYTRACKER_STRING(x)
#define PYTRACKER_JOIN(a, b) a##b
#define PYTRACKER_KERNELS(isa) PYTRACKER_JOIN(kernels_, isa)

extern const Kernels PYTRACKER_KERNELS(CPU_CAPABILITY);
const Kernels PYTRACKER_KERNELS(CPU_CAPABILITY) = {PYTRACKER_NAME(CPU_CAPABILITY), moments, extras, scale};

}  // namespace pytracker::cpu
