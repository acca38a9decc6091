// What the machine can do at most, to measure kernels against: multiply-adds that depend on nothing.
//
// Included by instruction-set files only (see vector_avx512.h). A Format is one of T-lanes': it says what a
// multiply-add is.
#pragma once

#include "matmul24.h"

namespace sparse_engine {
namespace {

// Sums in flight: two ports of up to five cycles' latency each, and four of sixteen registers left.
constexpr int kPeakSums = 12;
constexpr size_t kPeakBytes = 24 * 1024;  // lies in L1, as a tile of T-lanes does

template <class Format, bool Load>
void run_peak(size_t iterations) {
  using V = typename Format::V;
  constexpr size_t kVectorBytes = V::kLanes * 4;
  constexpr size_t kRuns = kPeakBytes / (kPeakSums * kVectorBytes);
  alignas(64) uint8_t lines[kRuns * kPeakSums * kVectorBytes] = {};
  typename V::Vector weight = V::zero(), sum[kPeakSums];
#pragma GCC unroll 12
  for (int i = 0; i < kPeakSums; ++i) {
    sum[i] = V::zero();
    asm volatile("" : "+x"(sum[i]));  // or the compiler would see that all sums are equal, and compute one
  }
  const uint8_t* line = lines;
  for (size_t iteration = 0; iteration < iterations; ++iteration) {
    asm volatile("" : "+x"(weight), "+r"(line) : : "memory");  // or the loop would be computed once, and dropped
#pragma GCC unroll 12
    for (int i = 0; i < kPeakSums; ++i) {
      sum[i] = Format::multiply_add(sum[i], weight, Load ? V::load(line + i * kVectorBytes) : weight);
    }
    line += kPeakSums * kVectorBytes;
    if (line == lines + sizeof lines) line = lines;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kPeakSums; ++i) asm volatile("" : : "x"(sum[i]));
}

// products: multiply-adds of one lane per instruction.
template <class Format>
constexpr PeakLoop peak_loop(int products) {
  return {2.0 * products * kPeakSums * Format::V::kLanes, [](size_t iterations, bool load) {
            load ? run_peak<Format, true>(iterations) : run_peak<Format, false>(iterations);
          }};
}

}  // namespace
}  // namespace sparse_engine
