#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include <lockstep/base/exact_sum.h>

// Instruction-set clones: same bits from each, since every operation here is exact. Sanitizers run before ifuncs can
// resolve.
#if defined(LOCKSTEP_SANITIZED) || !defined(__x86_64__)
#define LOCKSTEP_CLONES
#else
#define LOCKSTEP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace lockstep {
namespace {

// Bin k holds multiples of its quantum 2^(40k) and is the top bin of terms with 2^(40k-1) <= |term| < 2^(40(k+1)-1). A
// term is cut into its multiple of the top quantum and of the one below; what is smaller is rounded away. Cutting
// against a higher bin than its own gives a term 0 there, so the cut depends on the largest term of all and on nothing
// else.
constexpr int kBinBits = 40;
constexpr int kLowestBin = -24;  // its quantum of the bin below is still a normal number
constexpr size_t kBlock = 4096;  // 2^12 cuts of less than 2^39 quanta sum exactly in a double

int bin_of(double magnitude) {
  const int shifted = std::ilogb(magnitude) + 1;
  const int bin = shifted >= 0 ? shifted / kBinBits : -((-shifted + kBinBits - 1) / kBinBits);
  return std::max(bin, kLowestBin);
}

// Adding and taking away M leaves the multiple of 2^(40 bin) nearest to a term: M's last digit has that weight.
double cutter(int bin) { return std::ldexp(1.5, kBinBits * bin + 52); }

struct Cuts {
  double high = 0, low = 0;
};

// Into quanta of a bin.
int64_t quanta(double cut, int bin) { return static_cast<int64_t>(std::ldexp(cut, -kBinBits * bin)); }

LOCKSTEP_CLONES Cuts cut_squares(const float* values, size_t n, double high_cutter, double low_cutter) {
  constexpr size_t kLanes = 32;  // measured: 0.32 ms a million on AVX-512; 16 makes GCC 12 spill, 0.99 ms
  double high[kLanes] = {}, low[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) {
      const double value = values[i + j], square = value * value;
      const double q = (square + high_cutter) - high_cutter;
      high[j] += q;
      low[j] += ((square - q) + low_cutter) - low_cutter;
    }
  }
  for (; i < n; ++i) {
    const double value = values[i], square = value * value;
    const double q = (square + high_cutter) - high_cutter;
    high[0] += q;
    low[0] += ((square - q) + low_cutter) - low_cutter;
  }
  Cuts cuts;
  for (size_t j = 0; j < kLanes; ++j) cuts.high += high[j], cuts.low += low[j];
  return cuts;
}

// The largest magnitude's bits. As integers, floats without sign order like their values, inf and nan above all.
LOCKSTEP_CLONES uint32_t largest_bits(const float* values, size_t n) {
  uint32_t largest = 0;
  for (size_t i = 0; i < n; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(values[i]) & 0x7fffffffu);
  return largest;
}

}  // namespace

void ExactSum::raise_to(int bin) {
  if (bin <= top_bin_) return;
  const bool next = top_bin_ != std::numeric_limits<int32_t>::min() && bin == top_bin_ + 1;
  bins_ = {0, next ? bins_[0] : __int128{0}};
  top_bin_ = bin;
}

ExactSum::Cut ExactSum::cut_for(double magnitude) {
  const int bin = bin_of(magnitude);
  return {bin, cutter(bin), cutter(bin - 1), std::ldexp(1.0, kBinBits * bin), std::ldexp(1.0, kBinBits * (bin - 1))};
}

void ExactSum::add_quanta(int bin, int64_t high, int64_t low) {
  raise_to(bin);
  const int below = top_bin_ - bin;  // 0: same top; 1: our high is its low; more: too small to count
  if (below == 0) {
    bins_[0] += high;
    bins_[1] += low;
  } else if (below == 1) {
    bins_[1] += high;
  }
}

void ExactSum::add(double term) {
  if (!std::isfinite(term)) non_finite_ = 1;
  if (!std::isfinite(term) || term == 0) return;
  const int bin = bin_of(std::fabs(term));
  const double high = (term + cutter(bin)) - cutter(bin);
  const double low = ((term - high) + cutter(bin - 1)) - cutter(bin - 1);
  add_quanta(bin, quanta(high, bin), quanta(low, bin - 1));
}

void ExactSum::add_squares(std::span<const float> values) {
  for (size_t start = 0; start < values.size(); start += kBlock) {
    const float* block = values.data() + start;
    const size_t n = std::min(kBlock, values.size() - start);
    const uint32_t largest = largest_bits(block, n);
    if (largest >= 0x7f800000u) {
      non_finite_ = 1;
      return;
    }
    if (largest == 0) continue;
    const double value = std::bit_cast<float>(largest);
    const int bin = bin_of(value * value);
    const Cuts cuts = cut_squares(block, n, cutter(bin), cutter(bin - 1));
    add_quanta(bin, quanta(cuts.high, bin), quanta(cuts.low, bin - 1));
  }
}

void ExactSum::merge(const ExactSum& other) {
  non_finite_ |= other.non_finite_;
  if (other.top_bin_ == std::numeric_limits<int32_t>::min()) return;
  raise_to(other.top_bin_);
  const int below = top_bin_ - other.top_bin_;
  if (below == 0) {
    bins_[0] += other.bins_[0];
    bins_[1] += other.bins_[1];
  } else if (below == 1) {
    bins_[1] += other.bins_[0];
  }
}

double ExactSum::value() const {
  if (non_finite_) return std::numeric_limits<double>::quiet_NaN();
  if (top_bin_ == std::numeric_limits<int32_t>::min()) return 0;
  const __int128 quanta = bins_[0] * (__int128{1} << kBinBits) + bins_[1];
  return std::ldexp(static_cast<double>(quanta), kBinBits * (top_bin_ - 1));
}

}  // namespace lockstep
