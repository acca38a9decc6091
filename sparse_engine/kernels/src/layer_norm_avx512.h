// The moments of a token, for a layer normalisation. Included by instruction-set files only (see vector_avx512.h).
#pragma once

#include "vector_avx512.h"

namespace sparse_engine {
namespace {

// The sum over a token of function(sixteen of its numbers, which of them there are), in four parts.
template <class Function>
SPARSE_ENGINE_INLINE float sum_over(const float* x, int depth, const Function& function) {
  using V = Avx512;
  __m512 parts[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int k = 0;
  for (; k + 4 * V::kLanes <= depth; k += 4 * V::kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      parts[i] = parts[i] + function(V::load_unaligned(x + k + i * V::kLanes), __mmask16(0xffff));
    }
  }
  for (; k < depth; k += V::kLanes) {
    const int count = depth - k < V::kLanes ? depth - k : V::kLanes;
    parts[0] = parts[0] + function(V::load_first(x + k, count), V::first(count));
  }
  return _mm512_reduce_add_ps((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// Mean, and 1 / sqrt(variance + epsilon), of a token.
struct Moments {
  SPARSE_ENGINE_INLINE Moments() = default;
  SPARSE_ENGINE_INLINE Moments(const float* x, int depth, float epsilon) {
    mean = sum_over(x, depth, [](__m512 y, __mmask16) { return y; }) / float(depth);
    const __m512 middle = Avx512::set(mean);
    const float squares = sum_over(x, depth, [&](__m512 y, __mmask16 there) {
      const __m512 distance = _mm512_maskz_sub_ps(there, y, middle);
      return distance * distance;
    });
    slope = 1.0f / __builtin_sqrtf(squares / float(depth) + epsilon);
  }
  float mean, slope;
};

}  // namespace
}  // namespace sparse_engine
