// From 16 bytes of a gradient to its moments: how each dtype unpacks, and how one thread accumulates.
//
// Price, in PTX instructions for each element of a large gradient: 7.4 for fp32, 5.9 for bf16, 6.4 for fp16. A thread
// has 6 or 8 loads of 16 bytes in flight, so 1,024 threads on an SM keep 96 KB coming: enough to cover the latency of
// HBM3 three times over.
//
// Maths: squares are summed in fp32 over a chain of a few elements, and each chain is promoted to fp64. With u = 2^-24,
// a chain has at most three roundings, so sum_sq is within 3 u of exact and the norm within 1.5 u = 9e-8, whatever the
// values and however many. fp32 squares would overflow beyond 1.8e19 and lose bits below 1e-19: the sum of a tile tells,
// and that tile is read again in fp64, as is one with a NaN or an Inf. A tile of zeros is told from one that underflowed
// by its count of zeros.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "table.h"

namespace pytracker::cuda {

// -1 where equal, so that subtracting it counts: one instruction where C++ makes two.
__device__ __forceinline__ uint32_t is_zero(float x) {
  uint32_t mask;
  asm("set.eq.u32.f32 %0, %1, 0f00000000;" : "=r"(mask) : "f"(x));
  return mask;
}
__device__ __forceinline__ uint32_t is_zero(double x) {
  uint32_t mask;
  asm("set.eq.u32.f64 %0, %1, 0d0000000000000000;" : "=r"(mask) : "d"(x));
  return mask;
}
// In each half of a word that holds two fp16 values; it serves bfloat16 as well, as both are zero when their bits are.
__device__ __forceinline__ uint32_t are_zero(uint32_t pair) {
  uint32_t mask;
  asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(pair), "r"(0));
  return mask;
}

// A value as the sums see it: up to fp32 for the short formats, so that products are exact.
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

// How a dtype is read. Raw: 16 bytes. Real: what chains are summed in. kVectors: loads in flight, in chains of kChain.
// see() takes the maximum and counts the zeros of a vector; largest() and count() read what it kept.
template <typename T, typename Vector, int kVectors_, int kChain_>
struct RealFormat {
  using Raw = Vector;
  using Real = T;
  using Max = T;
  static constexpr bool kComplex = false;
  static constexpr int kElements = kVectorBytes / sizeof(T);
  static constexpr int kVectors = kVectors_, kChain = kChain_;

  static __device__ __forceinline__ void unpack(const Raw& raw, Real (&x)[kElements]) { memcpy(x, &raw, sizeof(raw)); }
  static __device__ __forceinline__ void see(const Raw& raw, Max& max, uint32_t& zeros) {
    Real x[kElements];
    unpack(raw, x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      see(x[e], max);
      zeros -= is_zero(x[e]);
    }
  }
  static __device__ __forceinline__ void see(T x, Max& max) { max = ::max(max, abs(x)); }  // drops NaN
  static __device__ __forceinline__ double largest(Max max) { return max; }
  static __device__ __forceinline__ uint32_t count(uint32_t zeros) { return zeros; }
};

// Two 16-bit values in each word, compared together: without its sign, a value of either format orders like the
// integer of its bits, and is zero when its bits are.
template <typename T>
struct PairFormat {
  using Raw = uint4;
  using Real = float;
  using Max = uint32_t;
  static constexpr bool kComplex = false;
  static constexpr int kElements = 8;
  static constexpr int kVectors = 8, kChain = 4;  // products are exact, so the first of four does not round

  static __device__ __forceinline__ void see(const Raw& raw, Max& max, uint32_t& zeros) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (const uint32_t word : words) {
      max = max_of_pairs(max, word & 0x7fff7fffu);
      zeros -= are_zero(word);  // each -1 in the lower half borrows from the upper: count() makes up for it
    }
  }
  static __device__ __forceinline__ void see(T x, Max& max) {
    uint16_t bits;
    memcpy(&bits, &x, sizeof(bits));
    max = max_of_pairs(max, bits & 0x7fffu);
  }
  static __device__ __forceinline__ double largest(Max max) {
    const uint16_t halves[2] = {static_cast<uint16_t>(max), static_cast<uint16_t>(max >> 16)};
    T x[2];
    memcpy(x, halves, sizeof(x));
    return fmaxf(widen(x[0]), widen(x[1]));
  }
  static __device__ __forceinline__ uint32_t count(uint32_t zeros) {
    const uint32_t lower = zeros & 0xffff;
    return lower + (((zeros >> 16) + lower) & 0xffff);
  }

 private:
  static __device__ __forceinline__ uint32_t max_of_pairs(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 800
    uint32_t max;  // the order of bfloat16 is the order of the bits, for fp16's too
    asm("max.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
    return max;
#else
    return __vmaxu2(a, b);
#endif
  }
};

// Complex values are rare: one by one in fp64, without chains.
template <typename Part>
struct ComplexFormat {
  using Raw = uint4;
  using Real = double;
  using Max = double;
  static constexpr bool kComplex = true;
  static constexpr int kElements = kVectorBytes / (2 * sizeof(Part));
  static constexpr int kVectors = 4, kChain = 1;
  static __device__ __forceinline__ double largest(Max max) { return max; }
};

template <typename T>
struct Format;
template <>
struct Format<float> : RealFormat<float, float4, 6, 3> {};  // a product rounds, so chains of three have three roundings
template <>
struct Format<double> : RealFormat<double, double2, 6, 3> {};
template <>
struct Format<float2> : ComplexFormat<float> {};
template <>
struct Format<double2> : ComplexFormat<double> {};
template <>
struct Format<__nv_bfloat16> : PairFormat<__nv_bfloat16> {
  static __device__ __forceinline__ void unpack(const Raw& raw, float (&x)[kElements]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      x[2 * w] = __uint_as_float(words[w] << 16);
      x[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
    }
  }
};
template <>
struct Format<__half> : PairFormat<__half> {
  static __device__ __forceinline__ void unpack(const Raw& raw, float (&x)[kElements]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      __half2 pair;
      memcpy(&pair, &words[w], sizeof(pair));
      const float2 both = __half22float2(pair);
      x[2 * w] = both.x;
      x[2 * w + 1] = both.y;
    }
  }
};

// Adds a vector's elements as a tree.
template <typename Real, int kCount>
__device__ __forceinline__ Real add_up(const Real (&x)[kCount]) {
  Real sum[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) sum[e] = x[e];
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2)
#pragma unroll
    for (int e = 0; e < half; ++e) sum[e] += sum[e + half];
  return sum[0];
}

// What one thread has accumulated of a tensor of T.
template <typename T>
class Accumulator {
  using F = Format<T>;
  using Real = typename F::Real;

 public:
  using Raw = typename F::Raw;

  // One element, exactly.
  __device__ __forceinline__ void add(T value) {
    if constexpr (F::kComplex) {
      const double re = value.x, im = value.y;
      const bool nan = re != re || im != im;
      add_sums(re, re * re + im * im, re == 0 && im == 0, nan, isinf(re) || isinf(im));
      if (!nan) max_ = fmax(max_, hypot(re, im));
    } else {
      const double x = widen(value);
      add_sums(x, x * x, x == 0, x != x, isinf(x));
      F::see(value, max_);
    }
  }

  // kVectors vectors at data[0], data[32], ...: the warp's other lanes have those between. In a tile that is not full,
  // only those before data[left] are there.
  template <bool kFull>
  __device__ __forceinline__ void add_tile(const Raw* data, int left) {
    if constexpr (F::kComplex) {
      add_slowly<kFull>(data, left);
    } else {
      constexpr int kTile = F::kVectors * F::kElements;
      Raw raw[F::kVectors];
#pragma unroll
      for (int i = 0; i < F::kVectors; ++i)
        raw[i] = kFull || i * kWarp < left ? data[i * kWarp] : Raw{};

      Real sum = 0;
      double sum_sq = 0;
      uint32_t zeros = 0;
#pragma unroll
      for (int first = 0; first < F::kVectors; first += F::kChain) {
        Real chain[F::kElements];
#pragma unroll
        for (int i = first; i < first + F::kChain; ++i) {
          Real x[F::kElements];
          F::unpack(raw[i], x);
          sum += add_up(x);
#pragma unroll
          for (int e = 0; e < F::kElements; ++e) chain[e] = i == first ? x[e] * x[e] : fma(x[e], x[e], chain[e]);
          F::see(raw[i], max_, zeros);
        }
#pragma unroll
        for (int e = 0; e < F::kElements; ++e) sum_sq += static_cast<double>(chain[e]);
      }
      zeros = F::count(zeros);

      if (in_range(sum_sq) || zeros == kTile) {
        sum_ += static_cast<double>(sum);
        sum_sq_ += sum_sq;
        zeros_ += zeros;
        if (!kFull) zeros_ -= kTile - F::kElements * min(F::kVectors, (max(left, 0) + kWarp - 1) / kWarp);
      } else {
        add_slowly<kFull>(data, left);
      }
    }
  }

  __device__ __forceinline__ void store(double (&columns)[kColumns]) const {
    columns[kSum] = sum_;
    columns[kSumSq] = sum_sq_;
    columns[kAbsMax] = nans_ == 0 ? F::largest(max_) : std::numeric_limits<double>::quiet_NaN();
    columns[kZeros] = zeros_;
    columns[kNans] = nans_;
    columns[kInfs] = infs_;
  }

 private:
  // Whether a sum of squares has lost nothing: not to overflow, nor to NaN or Inf, nor to underflow, which costs it at
  // most 24 x 2^-150. One subtraction and one comparison of its upper word, as fp64 comparisons are slow on many GPUs.
  static __device__ __forceinline__ bool in_range(double sum_sq) {
    constexpr uint32_t kInf = 0x7ff00000u;
    constexpr uint32_t kLeast = sizeof(Real) == sizeof(double) ? 0 : (1023u - 115) << 20;  // 2^-115
    return static_cast<uint32_t>(__double2hiint(sum_sq)) - kLeast < kInf - kLeast;
  }

  // The rare path. It reads the tile again rather than keep it, so that the common path pays no registers.
  template <bool kFull>
  __device__ __forceinline__ void add_slowly(const Raw* data, int left) {
#pragma unroll 1
    for (int i = 0; i < F::kVectors && (kFull || i * kWarp < left); ++i) {
      const Raw raw = data[i * kWarp];
      T x[F::kElements];
      memcpy(x, &raw, sizeof(raw));
#pragma unroll
      for (int e = 0; e < F::kElements; ++e) add(x[e]);
    }
  }

  __device__ __forceinline__ void add_sums(double x, double square, bool zero, bool nan, bool inf) {
    sum_ += x;
    sum_sq_ += square;
    zeros_ += zero;
    nans_ += nan;
    infs_ += inf;
  }

  double sum_ = 0, sum_sq_ = 0;
  typename F::Max max_ = 0;
  uint32_t zeros_ = 0, nans_ = 0, infs_ = 0;  // a share has fewer than 2^32 elements
};

}  // namespace pytracker::cuda
