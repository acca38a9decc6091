// Eight floats in a register: the AVX2 + FMA words in which the kernels are written.
//
// Only instruction-set files include this. Everything is in an anonymous namespace, so that each of them
// has its own copy: code compiled with AVX2 must never be the copy that the linker keeps for others.
#pragma once

#include <immintrin.h>

#include "matmul24.h"

namespace sparse_engine {
namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr int kLanes = 8;

  static SPARSE_ENGINE_INLINE const float* floats(const void* p) { return static_cast<const float*>(p); }

  static SPARSE_ENGINE_INLINE Vector zero() { return _mm256_setzero_ps(); }
  static SPARSE_ENGINE_INLINE Vector set(float x) { return _mm256_set1_ps(x); }
  static SPARSE_ENGINE_INLINE Vector load(const void* p) { return _mm256_load_ps(floats(p)); }
  static SPARSE_ENGINE_INLINE Vector load_unaligned(const void* p) { return _mm256_loadu_ps(floats(p)); }
  // A load that stays one: the compiler may otherwise make it an operand of each instruction that uses it.
  static SPARSE_ENGINE_INLINE Vector load_once(const void* p) {
    Vector x = _mm256_load_ps(floats(p));
    asm volatile("" : "+x"(x));
    return x;
  }
  static SPARSE_ENGINE_INLINE void store(void* p, Vector x) { _mm256_store_ps(static_cast<float*>(p), x); }
  static SPARSE_ENGINE_INLINE void store_unaligned(float* p, Vector x) { _mm256_storeu_ps(p, x); }

  // The first `count` lanes (0 .. kLanes); memory beyond them is not touched, lanes beyond them are zero.
  static SPARSE_ENGINE_INLINE Vector load_first(const float* p, int count) {
    return count == kLanes ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(count));
  }
  static SPARSE_ENGINE_INLINE void store_first(float* p, Vector x, int count) {
    if (count == kLanes) {
      _mm256_storeu_ps(p, x);
    } else {
      _mm256_maskstore_ps(p, first(count), x);
    }
  }
  // Lanes begin .. end - 1 of those at p, which may begin before the array; the others are zero.
  static SPARSE_ENGINE_INLINE Vector load_between(const float* p, int begin, int end) {
    return _mm256_maskload_ps(p, _mm256_andnot_si256(first(begin), first(end)));
  }
  // Every second of two vectors' lanes; and each lane twice, the first lane but once if `odd`.
  static SPARSE_ENGINE_INLINE Vector every_second(Vector a, Vector b) {
    const __m256d mixed = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));  // in pairs: a0 b0 a1 b1
    return _mm256_castpd_ps(_mm256_permute4x64_pd(mixed, 0xd8));
  }
  static SPARSE_ENGINE_INLINE Vector twice(Vector x, int odd) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_permutevar8x32_ps(x, _mm256_srli_epi32(_mm256_add_epi32(lanes, _mm256_set1_epi32(odd)), 1));
  }
  static SPARSE_ENGINE_INLINE __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static SPARSE_ENGINE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static SPARSE_ENGINE_INLINE Vector min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
  static SPARSE_ENGINE_INLINE Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static SPARSE_ENGINE_INLINE Vector abs(Vector x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static SPARSE_ENGINE_INLINE Vector round(Vector x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 1 / x: AVX2's estimate is too coarse to be worth refining.
  template <bool Refine>
  static SPARSE_ENGINE_INLINE Vector reciprocal(Vector x) {
    return set(1.0f) / x;
  }
  // x * 2^exponent, for an exponent of a normal number: it is written into the bits of a factor.
  static SPARSE_ENGINE_INLINE Vector scale(Vector x, Vector exponent) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  static SPARSE_ENGINE_INLINE Vector select_negative(Vector sign, Vector if_negative, Vector otherwise) {
    return _mm256_blendv_ps(otherwise, if_negative, sign);
  }

  // Four weights, of which one at a time is put into all lanes: by a load each, since registers are few.
  struct FourWeights {
    const float* four;
    static SPARSE_ENGINE_INLINE FourWeights load(const uint8_t* p) { return {floats(p)}; }
    template <int I>
    SPARSE_ENGINE_INLINE Vector get() const {
      return _mm256_broadcast_ss(four + I);
    }
  };

  // Four floats, repeated in each 128-bit part; one of them in all lanes (vpermilps: no index register); and
  // a choice among them by the low two bits of each lane.
  static SPARSE_ENGINE_INLINE Vector repeat_four(const void* p) {
    return _mm256_broadcast_ps(static_cast<const __m128*>(p));
  }
  template <int I>
  static SPARSE_ENGINE_INLINE Vector one_of_four(Vector four) {
    return _mm256_permute_ps(four, I * 0x55);
  }
  static SPARSE_ENGINE_INLINE Vector choose_of_four(Vector four, __m256i code) {
    return _mm256_permutevar_ps(four, code);
  }
  using Codes = __m256i;
  static SPARSE_ENGINE_INLINE Codes load_codes(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  template <int Bits>
  static SPARSE_ENGINE_INLINE Codes shift_codes(Codes codes) {
    return _mm256_srli_epi32(codes, Bits);
  }

  // Eight rows of eight elements become eight columns.
  static SPARSE_ENGINE_INLINE void transpose(Vector (&rows)[8]) {
    Vector t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      rows[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      rows[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      rows[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      rows[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) rows[i] = t[i];
  }
};

}  // namespace
}  // namespace sparse_engine
