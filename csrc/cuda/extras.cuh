// The further columns of one thread: the sum of magnitudes, and for each format how many elements are subnormal in it
// and how many lie in its two highest binades or past them.
//
// Price, in PTX instructions for each element of a large gradient: 23 for fp32 and 19 for bf16, in the place of 9.7 and
// 7.1 without them; an H100 could issue twice as many, or a fifth more, in the time that its memory takes. What is
// counted always is what divides most gradients: the smallest normal numbers of fp16 and e4m3. The other bounds are
// asked for only where the least or the largest magnitude that a thread has seen is past them.
//
// Maths: sums as in elements.cuh, with two roundings of a vector's magnitudes, or three of shorter values, so l1 is
// within 3.01 u of exact. No sum of a tile overflows whose sum of squares is in range.
#pragma once

#include "formats.cuh"

namespace pytracker::cuda {

// Where they are not asked for.
template <typename T>
struct NoExtras {
  static constexpr bool kAny = false;
  __device__ __forceinline__ void add(T /*value*/) {}
  template <typename Raw, typename Magnitude>
  __device__ __forceinline__ void add_tile(const Raw*, int, int, Magnitude, Magnitude) {}
  __device__ __forceinline__ void store(double (&)[kExtraColumns]) const {}
};

template <typename T>
class AllExtras {
  using F = Format<T>;
  using Real = typename F::Real;
  using Raw = typename F::Raw;
  using Magnitude = typename F::Magnitude;

 public:
  static constexpr bool kAny = true;

  // One element, in fp64.
  __device__ __forceinline__ void add(T value) {
    Real modulus;
    if constexpr (F::kComplex) {
      const double re = value.x, im = value.y;
      const bool nan = re != re || im != im;
      modulus = nan ? std::numeric_limits<double>::quiet_NaN() : F::value(F::magnitude(re, im));
    } else {
      modulus = abs(widen(value));
    }
    exact_l1_ += modulus;
#pragma unroll
    for (int f = 0; f < kFormats; ++f) {
      counts_[f] += modulus > 0 && modulus < smallest_normal(f);
      counts_[kFormats + f] += modulus >= two_highest_binades(f);
    }
  }

  // A tile of finite values, of which so many are zero. It is read again, from the cache that it has just come into, so
  // that the six vectors and these counts never take registers together. The largest and the least magnitude are those
  // of the tile, or of more: bounds that neither is past are not asked about.
  __device__ __forceinline__ void add_tile(const Raw* data, int left, int zeros, Magnitude largest, Magnitude least) {
    const bool has_rare = F::is_below(least, F::bound(smallest_normal(0))) || F::reaches(largest, F::bound(kLeastHigh));
#pragma unroll 1
    for (; left > 0; left -= kWarp, data += kWarp) {
      const Raw raw = *data;
      Real x[F::kElements];
      F::unpack(raw, x);
#pragma unroll
      for (Real& value : x) value = abs(value);
      l1_.add_positive(add_up(x));
#pragma unroll
      for (int f = 0; f < kFormats; ++f)
        if (f > 0 || has_rare) counts_[f] += F::kElements - F::reaching(raw, F::bound(smallest_normal(f)));
      if (!has_rare) continue;
#pragma unroll
      for (int f = 0; f < kFormats; ++f) counts_[kFormats + f] += F::reaching(raw, F::bound(two_highest_binades(f)));
    }
#pragma unroll
    for (int f = 0; f < kFormats; ++f)
      if (f > 0 || has_rare) counts_[f] -= zeros;
  }

  __device__ __forceinline__ void store(double (&columns)[kExtraColumns]) const {
    columns[kL1] = exact_l1_ + l1_.value();
#pragma unroll
    for (int k = 0; k < 2 * kFormats; ++k) columns[kSubnormal + k] = counts_[k];
  }

 private:
  static constexpr float kLeastHigh = two_highest_binades(kFormats - 1);

  double exact_l1_ = 0;                 // of elements that were added one by one
  LongSum<Real> l1_;                    // of tiles
  uint32_t counts_[2 * kFormats] = {};  // in the order of the columns; a share has fewer than 2^32 elements
};

}  // namespace pytracker::cuda
