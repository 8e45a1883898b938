// From 16 bytes of a gradient to its moments: how one thread accumulates.
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

#include "extras.cuh"
#include "formats.cuh"

namespace pytracker::cuda {

// What one thread has accumulated of a tensor of T.
template <typename T, template <typename> class OfThread>
class Accumulator {
  using F = Format<T>;
  using Real = typename F::Real;

 public:
  using Raw = typename F::Raw;

  // One element, in fp64.
  __device__ __forceinline__ void add(T value) {
    extras_.add(value);
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
          sum_sq.add_positive(add_squares(x));
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
        sum_sq_.add_positive(sum_sq);
        zeros -= (kVectors - there) * F::kElements;
        zeros_ += zeros;
        extras_.add_tile(data, left, zeros, largest_, least);
      } else {
        add_tile_exactly(data, left);
      }
    }
  }

  __device__ __forceinline__ void store(double (&columns)[kColumns], double (&extras)[kExtraColumns]) const {
    extras_.store(extras);
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
  OfThread<T> extras_;
  typename F::Magnitude largest_ = 0;
  uint32_t zeros_ = 0, nans_ = 0, infs_ = 0;  // a share has fewer than 2^32 elements
};

}  // namespace pytracker::cuda
