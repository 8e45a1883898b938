// How each dtype is read from 16 bytes of a gradient, and how its values are added.
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
  static __device__ __forceinline__ Magnitude bound(float power_of_two) { return power_of_two; }
  static __device__ __forceinline__ bool reaches(Magnitude value, Magnitude bound) { return value >= bound; }
  static __device__ __forceinline__ bool is_below(Magnitude value, Magnitude bound) { return value < bound; }
  static __device__ __forceinline__ int reaching(const Raw& raw, Magnitude bound) {
    Real x[kElements];
    unpack(raw, x);
    int count = 0;
#pragma unroll
    for (const Real value : x) count += abs(value) >= bound;
    return count;
  }
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
  static __device__ __forceinline__ Magnitude bound(float power_of_two) {
    return Format<T>::bits(power_of_two) * 0x10001u;
  }
  static __device__ __forceinline__ bool reaches(Magnitude pair, Magnitude bound) {
    return (pair & 0xffffu) >= (bound & 0xffffu) || pair >> 16 >= bound >> 16;
  }
  static __device__ __forceinline__ bool is_below(Magnitude pair, Magnitude bound) {
    return (pair & 0xffffu) < (bound & 0xffffu) || pair >> 16 < bound >> 16;
  }
  // Both halves of a word at once: with its sign's bit set, a half keeps it where its magnitude is no less than what is
  // taken from it, and borrows nothing from the other.
  static __device__ __forceinline__ int reaching(const Raw& raw, Magnitude bound) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    uint32_t counts = 0;
#pragma unroll
    for (const uint32_t word : words) counts += (((word | 0x80008000u) - bound) >> 15) & 0x00010001u;
    return static_cast<int>((counts & 0xffffu) + (counts >> 16));
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
  static __device__ __forceinline__ uint32_t bits(float power_of_two) { return __float_as_uint(power_of_two) >> 16; }
};
template <>
struct Format<Half> : PairFormat<Half> {
  static __device__ __forceinline__ void split(uint32_t word, float& lower, float& upper) {
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(lower), "=f"(upper)
        : "r"(word));
  }
  // Of what is below the range of fp16, its smallest number; of what is above, infinity.
  static __device__ __forceinline__ uint32_t bits(float power_of_two) {
    const int exponent = static_cast<int>(__float_as_uint(power_of_two) >> 23) - 127;
    return exponent < -14 ? 1 : exponent > 15 ? 0x7c00u : static_cast<uint32_t>(exponent + 15) << 10;
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
  __device__ __forceinline__ void add_positive(double x) { high += x; }
  __device__ __forceinline__ void add_positive(const LongSum& other) { high += other.high; }
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
  __device__ __forceinline__ void add_positive(float x) {
    const float sum = high + x, larger = max(high, x), smaller = min(high, x);
    low += smaller - (sum - larger);
    high = sum;
  }
  __device__ __forceinline__ void add_positive(const LongSum& other) {
    add_positive(other.high);
    low += other.low;
  }
  __device__ __forceinline__ double value() const { return double{high} + low; }
};

}  // namespace pytracker::cuda
