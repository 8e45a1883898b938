// From 16 bytes of a gradient to its moments: how each dtype unpacks, and how one thread accumulates.
//
// Price, in instructions of sm_90 for each element of a large gradient: 7.1 for fp32, 6.4 for bf16 and fp16, 21 for
// fp64; none of the first three is of fp64, which issues at a thirty-second of the rate of fp32 or less on many GPUs. A
// thread has 6 loads of 16 bytes in flight, so the 768 threads on an SM keep 72 KB coming: more than twice what it
// takes to cover the latency of HBM3.
//
// Maths: with u = 2^-24, the squares of a vector are summed in fp32 with at most three roundings, and those sums in two
// floats, which lose no more than 0.01 u over all that a thread has of a share. So sum_sq is within 3.01 u of exact and
// the norm within 1.51 u = 9e-8, whatever the values and however many. fp32 squares would overflow beyond 1.8e19 and
// lose bits below 1e-19: the sum of a tile tells, and that tile is read again in fp64, as is one with a NaN or an Inf.
// Zeros are counted only where the least magnitude is zero, which costs one more instruction for each two elements and
// saves two; a tile of zeros alone has not underflowed.
#pragma once

#include <limits>

#include "short_floats.cuh"
#include "work_split.h"

namespace pytracker::cuda {

// How a dtype is read. Raw: 16 bytes. Real: what a vector is summed in. see() takes the largest and the least magnitude
// of a vector; zeros() counts, and is only asked where the least is 0.
template <typename T, typename Vector>
struct RealFormat {
  using Raw = Vector;
  using Real = T;
  using Magnitude = T;
  static constexpr bool kComplex = false;
  static constexpr int kElements = kVectorBytes / sizeof(T);
  static __device__ __forceinline__ T above() { return std::numeric_limits<T>::infinity(); }  // every magnitude

  static __device__ __forceinline__ void unpack(const Raw& raw, Real (&x)[kElements]) { memcpy(x, &raw, sizeof(raw)); }
  static __device__ __forceinline__ Magnitude magnitude(T x) { return abs(x); }
  static __device__ __forceinline__ Magnitude larger(Magnitude a, Magnitude b) { return max(a, b); }  // drops NaN
  static __device__ __forceinline__ void see(const Raw& raw, Magnitude& largest, Magnitude& least) {
    Real x[kElements];
    unpack(raw, x);
#pragma unroll
    for (const Real value : x) {
      largest = max(largest, abs(value));
      least = min(least, abs(value));
    }
  }
  static __device__ __forceinline__ bool has_zero(Magnitude least) { return least == 0; }
  static __device__ __forceinline__ int zeros(const Raw& raw) {
    Real x[kElements];
    unpack(raw, x);
    int count = 0;
#pragma unroll
    for (const Real value : x) count += value == 0;
    return count;
  }
  static __device__ __forceinline__ double value(Magnitude largest) { return largest; }
};

// Two 16-bit values in each word, compared together: without their signs, the bits of both formats order like integers,
// and like bfloat16 numbers, for which there are instructions.
template <typename T>
struct Format;
template <typename T>
struct PairFormat {
  using Raw = uint4;
  using Real = float;
  using Magnitude = uint32_t;
  static constexpr bool kComplex = false;
  static constexpr int kElements = 8;
  static __device__ __forceinline__ Magnitude above() { return 0x7f807f80u; }

  static __device__ __forceinline__ void unpack(const Raw& raw, Real (&x)[kElements]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) Format<T>::split(words[w], x[2 * w], x[2 * w + 1]);
  }
  static __device__ __forceinline__ Magnitude magnitude(T x) {
    uint16_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits & 0x7fffu;
  }
  static __device__ __forceinline__ Magnitude larger(Magnitude a, Magnitude b) {
#if __CUDA_ARCH__ >= 800
    asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
#else
    return __vmaxu2(a, b);
#endif
  }
  static __device__ __forceinline__ Magnitude smaller(Magnitude a, Magnitude b) {
#if __CUDA_ARCH__ >= 800
    asm("min.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
#else
    return __vminu2(a, b);
#endif
  }
  static __device__ __forceinline__ void see(const Raw& raw, Magnitude& largest, Magnitude& least) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (const uint32_t word : words) {
      const Magnitude pair = word & 0x7fff7fffu;
      largest = larger(largest, pair);
      least = smaller(least, pair);
    }
  }
  static __device__ __forceinline__ bool has_zero(Magnitude least) {
    return (least & 0xffffu) == 0 || least >> 16 == 0;
  }
  static __device__ __forceinline__ int zeros(const Raw& raw) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    int count = 0;
#pragma unroll
    for (const uint32_t word : words) count += ((word & 0x7fffu) == 0) + ((word & 0x7fff0000u) == 0);
    return count;
  }
  static __device__ __forceinline__ double value(Magnitude largest) {
    float lower, upper;
    Format<T>::split(largest, lower, upper);
    return fmaxf(lower, upper);
  }
};

// Complex values are rare: one by one in fp64, without chains. Of two fp32 parts the square of the modulus is compared,
// as it can neither overflow nor underflow in fp64; of two fp64 parts only hypot() is safe, and costs 50 instructions.
template <typename Part>
struct ComplexFormat {
  using Raw = uint4;
  using Real = double;
  using Magnitude = double;
  static constexpr bool kComplex = true;
  static constexpr bool kSquares = sizeof(Part) == sizeof(float);
  static constexpr int kElements = kVectorBytes / (2 * sizeof(Part));

  static __device__ __forceinline__ Magnitude magnitude(double re, double im) {
    return kSquares ? re * re + im * im : hypot(re, im);
  }
  static __device__ __forceinline__ double value(Magnitude largest) { return kSquares ? sqrt(largest) : largest; }
};

template <>
struct Format<float> : RealFormat<float, float4> {};
template <>
struct Format<double> : RealFormat<double, double2> {};
template <>
struct Format<float2> : ComplexFormat<float> {};
template <>
struct Format<double2> : ComplexFormat<double> {};
// The two halves of a word go to fp32 in registers of that type, where C++ would add a move for each.
template <>
struct Format<BFloat16> : PairFormat<BFloat16> {
  static __device__ __forceinline__ void split(uint32_t word, float& lower, float& upper) {
    asm("shl.b32 %0, %1, 16;" : "=f"(lower) : "r"(word));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(upper) : "r"(word));
  }
};
template <>
struct Format<Half> : PairFormat<Half> {
  static __device__ __forceinline__ void split(uint32_t word, float& lower, float& upper) {
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(lower), "=f"(upper)
        : "r"(word));
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

// Adds their squares as a tree. Three roundings at most: of four fp32 values a product, the second product's addition
// and one more; of eight shorter ones, whose products are exact, an addition more.
template <typename Real, int kCount>
__device__ __forceinline__ Real add_squares(const Real (&x)[kCount]) {
  Real pairs[kCount / 2];
#pragma unroll
  for (int e = 0; e < kCount / 2; ++e) pairs[e] = fma(x[2 * e + 1], x[2 * e + 1], x[2 * e] * x[2 * e]);
  return add_up(pairs);
}

// A sum of many. In fp64 it is a number. In fp32 it is two, where `low` has what was lost as `high` was rounded: fp64
// is thirty or more times slower on many GPUs.
template <typename Real>
struct LongSum;
template <>
struct LongSum<double> {
  double high = 0;
  __device__ __forceinline__ void add(double x) { high += x; }
  __device__ __forceinline__ void add_square(double x) { high += x; }
  __device__ __forceinline__ void add_squares(const LongSum& other) { high += other.high; }
  __device__ __forceinline__ double value() const { return high; }
};
template <>
struct LongSum<float> {
  float high = 0, low = 0;

  // Knuth's TwoSum (The Art of Computer Programming 2, 4.2.2, theorem B): sum + lost is just high + x.
  __device__ __forceinline__ void add(float x) {
    const float sum = high + x, of_x = sum - high;
    low += (high - (sum - of_x)) + (x - of_x);
    high = sum;
  }
  // Of two that are not negative it is known which is larger, and Dekker's way has three operations in place of six.
  __device__ __forceinline__ void add_square(float x) {
    const float sum = high + x, larger = max(high, x), smaller = min(high, x);
    low += smaller - (sum - larger);
    high = sum;
  }
  __device__ __forceinline__ void add_squares(const LongSum& other) {
    add_square(other.high);
    low += other.low;
  }
  __device__ __forceinline__ double value() const { return double{high} + low; }
};

// What one thread has accumulated of a tensor of T.
template <typename T>
class Accumulator {
  using F = Format<T>;
  using Real = typename F::Real;

 public:
  using Raw = typename F::Raw;

  // One element, in fp64.
  __device__ __forceinline__ void add(T value) {
    if constexpr (F::kComplex) {
      const double re = value.x, im = value.y;
      const bool nan = re != re || im != im;
      exact_sum_ += re;
      exact_sum_sq_ += re * re + im * im;
      zeros_ += re == 0 && im == 0;
      nans_ += nan;
      infs_ += isinf(re) || isinf(im);
      if (!nan) largest_ = max(largest_, F::magnitude(re, im));
    } else {
      const Real narrow = widen(value);
      const double x = narrow;
      exact_sum_ += x;
      exact_sum_sq_ += x * x;
      zeros_ += narrow == 0;
      nans_ += narrow != narrow;
      infs_ += isinf(narrow);
      largest_ = F::larger(largest_, F::magnitude(value));
    }
  }

  // A tile: kVectors vectors at data[0], data[32], ...; the warp's other lanes have those between. Of a tile that is
  // not whole there are only those before data[left], and zeros stand for the others.
  template <int kVectors, bool kWhole>
  __device__ __forceinline__ void add_tile(const Raw* data, int left) {
    if constexpr (F::kComplex) {
#pragma unroll 1
      for (; left > 0; left -= kWarp, data += kWarp) {
        const Raw raw = *data;
        T x[F::kElements];
        memcpy(x, &raw, sizeof(raw));
#pragma unroll
        for (const T& value : x) add(value);
      }
    } else {
      Raw raw[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) raw[i] = kWhole || i * kWarp < left ? data[i * kWarp] : Raw{};

      Real sum;
      LongSum<Real> sum_sq;
      typename F::Magnitude least = F::above();
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        Real x[F::kElements];
        F::unpack(raw[i], x);
        if (i == 0) {
          sum = add_up(x);
          sum_sq.high = add_squares(x);
        } else {
          sum += add_up(x);
          sum_sq.add_square(add_squares(x));
        }
        F::see(raw[i], largest_, least);
      }
      int zeros = 0;
      if (F::has_zero(least)) {
#pragma unroll
        for (const Raw& vector : raw) zeros += F::zeros(vector);
      }

      if (in_range(sum_sq.high) || zeros == kVectors * F::kElements) {
        const int there = kWhole ? kVectors : min(kVectors, (left + kWarp - 1) / kWarp);
        sum_.add(sum);
        sum_sq_.add_squares(sum_sq);
        zeros_ += zeros - (kVectors - there) * F::kElements;
      } else {
        add_tile_exactly(data, left);
      }
    }
  }

  __device__ __forceinline__ void store(double (&columns)[kColumns]) const {
    columns[kSum] = exact_sum_ + sum_.value();
    columns[kSumSq] = exact_sum_sq_ + sum_sq_.value();
    columns[kAbsMax] = nans_ == 0 ? F::value(largest_) : std::numeric_limits<double>::quiet_NaN();
    columns[kZeros] = zeros_;
    columns[kNans] = nans_;
    columns[kInfs] = infs_;
  }

 private:
  // Whether a tile's sum of squares has lost nothing: not to overflow, nor to NaN or Inf, nor to underflow, which costs
  // it at most 48 x 2^-150. Nor may the tiles that a thread has of a share overflow together, which are 40 at most.
  static __device__ __forceinline__ bool in_range(float sum_sq) {
    constexpr uint32_t kLeast = (127u - 115) << 23, kMost = (127u + 120) << 23;  // 2^-115, 2^120
    return __float_as_uint(sum_sq) - kLeast < kMost - kLeast;
  }
  static __device__ __forceinline__ bool in_range(double sum_sq) { return sum_sq - sum_sq == 0; }

  // The rare path. It reads the tile again, and element by element, so that the common path pays no registers.
  __device__ __forceinline__ void add_tile_exactly(const Raw* data, int left) {
#pragma unroll 1
    for (; left > 0; left -= kWarp, data += kWarp) {
      const T* x = reinterpret_cast<const T*>(data);
#pragma unroll 1
      for (int e = 0; e < F::kElements; ++e) add(x[e]);
    }
  }

  double exact_sum_ = 0, exact_sum_sq_ = 0;  // of elements that were added one by one
  LongSum<Real> sum_, sum_sq_;               // of tiles
  typename F::Magnitude largest_ = 0;
  uint32_t zeros_ = 0, nans_ = 0, infs_ = 0;  // a share has fewer than 2^32 elements
};

}  // namespace pytracker::cuda
