// Floats to codes and to bfloat16, sixteen at a time. Included by instruction-set files only (see vector_avx512.h).
#pragma once

#include "attention.h"
#include "int8.h"
#include "vector_avx512.h"

namespace sparse_engine {
namespace {

// The codes of floats: round(value / scale) + zero, within 0 and 255. NaN becomes 0.
class CodesOf {
 public:
  explicit SPARSE_ENGINE_INLINE CodesOf(Codes codes)
      : inverse_(_mm512_set1_ps(1.0f / codes.scale)), zero_(_mm512_set1_ps(float(codes.zero))) {}

  SPARSE_ENGINE_INLINE __m128i operator()(__m512 x) const {
    const __m512 code = _mm512_fmadd_ps(x, inverse_, zero_);
    const __m512 within = _mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), _mm512_set1_ps(255.0f));
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(within));  // in this order: the second operand is what NaN becomes
  }

  // 64 of them.
  SPARSE_ENGINE_INLINE __m512i operator()(const __m512 (&x)[4]) const {
    __m512i codes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4;
         ++i) {  // packing saturates; what is too large for an integer would become the lowest of them
      const __m512 code = _mm512_fmadd_ps(x[i], inverse_, zero_);
      codes[i] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_set1_ps(1e6f), code));
    }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i halves[2] = {_mm512_packs_epi32(codes[0], codes[1]), _mm512_packs_epi32(codes[2], codes[3])};
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(halves[0], halves[1]));
  }

 private:
  __m512 inverse_, zero_;
};

// Rounded to nearest even, by integers: the instruction is another extension's.
SPARSE_ENGINE_INLINE __m256i to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// `count` adjacent numbers of an attention's output, as what it is.
SPARSE_ENGINE_INLINE void store_output(const Attention& attention, size_t index, __m512 y, int count) {
  const __mmask16 there = Avx512::first(count);
  if (attention.output_element == Element::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(attention.output) + index, there, y);
  } else if (attention.output_element == Element::kBfloat16) {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(attention.output) + index, there, to_bfloat16(y));
  } else {
    const CodesOf codes(attention.codes);
    _mm_mask_storeu_epi8(static_cast<uint8_t*>(attention.output) + index, there, codes(y));
  }
}

}  // namespace
}  // namespace sparse_engine
