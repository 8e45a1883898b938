// The moments of one gradient: what is accumulated, how two are merged, in which order they are written.
//
// Everything here is shared by the host and the device, knows nothing of torch, and is the only place where the maths
// of a column is said. A moment can be merged (sums are added, maxima compared); roots, means and ratios are taken
// later, from merged moments.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define PYTRACKER_HD __host__ __device__ __forceinline__
#else
#define PYTRACKER_HD inline
#endif

namespace pytracker {

// The columns of a tensor's row, all float64. pytracker/columns.py holds the same order and compares it at load.
enum Column : int { kSum, kSumSq, kAbsMax, kZeros, kNans, kInfs, kColumns };

// The further columns of a tensor, on request, all float64 and all sums: the sum of the moduli, and for each format how
// many elements are subnormal in it and how many lie in its two highest binades or past them.
constexpr int kFormats = 3;
enum ExtraColumn : int { kL1, kSubnormal, kNearMax = kSubnormal + kFormats, kExtraColumns = kNearMax + kFormats };

// The formats are bf16, whose exponents fp32 has too; fp16, whose exponents e5m2 of fp8 has too; and e4m3 of fp8 (OCP
// 8-bit Floating Point Specification, 2023, table 1): the smallest normal number, and where the two highest binades
// begin.
PYTRACKER_HD constexpr float smallest_normal(int f) { return f == 0 ? 0x1p-126F : f == 1 ? 0x1p-14F : 0x1p-6F; }
PYTRACKER_HD constexpr float two_highest_binades(int f) { return f == 0 ? 0x1p126F : f == 1 ? 0x1p14F : 0x1p7F; }

// The totals row: the columns merged over all tensors, and the largest sum_sq of one tensor, whose root is the
// largest norm of one parameter.
enum Total : int { kMaxSumSq = kColumns, kTotals };

// The columns of a meter's state, all float64. A NaN value is counted and otherwise left out of the sum and the count.
enum MeterColumn : int { kVal, kMeterSum, kCount, kMeterNans, kMeterColumns };

// A step's row, in float64: [totals | tensor 0 | tensor 1 | ... | scalar 0 | scalar 1 | ...], and in a log at the end
// of its stride the further columns of [tensor 0 | tensor 1 | ...], where they are asked for, and two marks: the row's
// number, and who asked for it (RowTarget::asked_by).
enum Mark : int { kNumber, kAskedBy, kMarks };
constexpr int64_t tensor_offset(int64_t tensor) { return kTotals + tensor * kColumns; }
constexpr int64_t row_width(int64_t tensors, int64_t scalars) { return tensor_offset(tensors) + scalars; }
PYTRACKER_HD constexpr int64_t extras_offset(int64_t stride, int64_t tensors, int64_t tensor) {
  return stride - kMarks - (tensors - tensor) * kExtraColumns;
}

// IEEE's maximum that keeps a NaN from either side (std::fmax drops it).
PYTRACKER_HD double max_keep_nan(double a, double b) { return (b > a || b != b) ? b : a; }

struct Moments {
  double sum = 0, sum_sq = 0, abs_max = 0;
  int64_t zeros = 0, nans = 0, infs = 0;

  // One real value. The squares of 16- and 32-bit values are exact in float64 and cannot overflow or underflow.
  PYTRACKER_HD void add(double x) {
    const double a = fabs(x);
    sum += x;
    sum_sq += x * x;
    abs_max = max_keep_nan(abs_max, a);
    zeros += x == 0;
    nans += x != x;
    infs += a == std::numeric_limits<double>::infinity();
  }

  // One complex value, by its modulus; `sum` takes the real part (a mean of a complex gradient is a mean of real
  // parts). A value with a NaN part counts as a NaN and one with an infinite part as an Inf, as torch.isnan and
  // torch.isinf say, so one value can count as both.
  PYTRACKER_HD void add(double re, double im) {
    const double inf = std::numeric_limits<double>::infinity();
    const bool nan = re != re || im != im;
    sum += re;
    sum_sq += re * re + im * im;
    abs_max = max_keep_nan(abs_max, nan ? std::numeric_limits<double>::quiet_NaN() : hypot(re, im));
    zeros += re == 0 && im == 0;
    nans += nan;
    infs += fabs(re) == inf || fabs(im) == inf;
  }

  PYTRACKER_HD void merge(const Moments& other) {
    sum += other.sum;
    sum_sq += other.sum_sq;
    abs_max = max_keep_nan(abs_max, other.abs_max);
    zeros += other.zeros;
    nans += other.nans;
    infs += other.infs;
  }

  // Each element read stands for `repeat` elements (an expanded gradient), and `implicit_zeros` more are not stored
  // (a sparse one).
  PYTRACKER_HD void extend(int64_t repeat, int64_t implicit_zeros) {
    if (repeat != 1) {
      sum *= static_cast<double>(repeat);
      sum_sq *= static_cast<double>(repeat);
      zeros *= repeat;
      nans *= repeat;
      infs *= repeat;
    }
    zeros += implicit_zeros;
  }

  // The statistics of the gradient divided by `scale` (a GradScaler's): counts stay.
  PYTRACKER_HD void divide(double scale) {
    sum /= scale;
    sum_sq = sum_sq / scale / scale;
    abs_max /= fabs(scale);
  }

  PYTRACKER_HD void store(double* row) const {
    row[kSum] = sum;
    row[kSumSq] = sum_sq;
    row[kAbsMax] = abs_max;
    row[kZeros] = static_cast<double>(zeros);
    row[kNans] = static_cast<double>(nans);
    row[kInfs] = static_cast<double>(infs);
  }
};

// The further columns. Exponents are those of the gradient as it lies in memory, whatever it is divided by.
struct Extras {
  double l1 = 0;
  int64_t subnormal[kFormats] = {}, near_max[kFormats] = {};

  // One element, by its modulus: NaN where a part is.
  PYTRACKER_HD void add(double modulus) {
    l1 += modulus;
    for (int f = 0; f < kFormats; ++f) {
      subnormal[f] += modulus > 0 && modulus < smallest_normal(f);
      near_max[f] += modulus >= two_highest_binades(f);
    }
  }

  PYTRACKER_HD void merge(const Extras& other) {
    l1 += other.l1;
    for (int f = 0; f < kFormats; ++f) {
      subnormal[f] += other.subnormal[f];
      near_max[f] += other.near_max[f];
    }
  }

  // As a row: of a gradient each of whose elements stands for `repeat`, divided by `scale`.
  PYTRACKER_HD void store(double* row, int64_t repeat, double scale) const {
    row[kL1] = l1 * static_cast<double>(repeat) / fabs(scale);
    for (int f = 0; f < kFormats; ++f) {
      row[kSubnormal + f] = static_cast<double>(subnormal[f] * repeat);
      row[kNearMax + f] = static_cast<double>(near_max[f] * repeat);
    }
  }
};

// The row of a parameter that has no gradient in this step: missing, which is not zero. A gradient that is there never
// has a NaN among its counts, so the counts tell the two apart.
PYTRACKER_HD void store_missing(double* row, int columns = kColumns) {
  for (int c = 0; c < columns; ++c) row[c] = std::numeric_limits<double>::quiet_NaN();
}

}  // namespace pytracker
