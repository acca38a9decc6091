// Sixteen floats in a register: the AVX-512 words in which the kernels are written (AVX-512 F, BW, DQ, VL).
//
// Only instruction-set files include this. Everything is in an anonymous namespace, so that each of them
// has its own copy: code compiled with AVX-512 must never be the copy that the linker keeps for others.
#pragma once

#include <immintrin.h>

#include "matmul24.h"

namespace sparse_engine {
namespace {

struct Avx512 {
  using Vector = __m512;
  static constexpr int kLanes = 16;

  static SPARSE_ENGINE_INLINE Vector zero() { return _mm512_setzero_ps(); }
  static SPARSE_ENGINE_INLINE Vector set(float x) { return _mm512_set1_ps(x); }
  static SPARSE_ENGINE_INLINE Vector load(const void* p) { return _mm512_load_ps(p); }
  static SPARSE_ENGINE_INLINE Vector load_unaligned(const void* p) { return _mm512_loadu_ps(p); }
  static SPARSE_ENGINE_INLINE void store(void* p, Vector x) { _mm512_store_ps(p, x); }
  static SPARSE_ENGINE_INLINE void store_unaligned(float* p, Vector x) { _mm512_storeu_ps(p, x); }
  // A load that stays one: the compiler may otherwise make it an operand of each instruction that uses it.
  static SPARSE_ENGINE_INLINE Vector load_once(const void* p) {
    Vector x = _mm512_load_ps(p);
    asm volatile("" : "+v"(x));
    return x;
  }

  // The first `count` lanes (0 .. kLanes); memory beyond them is not touched, lanes beyond them are zero.
  static SPARSE_ENGINE_INLINE Vector load_first(const float* p, int count) {
    return _mm512_maskz_loadu_ps(first(count), p);
  }
  static SPARSE_ENGINE_INLINE void store_first(float* p, Vector x, int count) {
    _mm512_mask_storeu_ps(p, first(count), x);
  }
  // Lanes begin .. end - 1 of those at p, which may begin before the array; the others are zero.
  static SPARSE_ENGINE_INLINE Vector load_between(const float* p, int begin, int end) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first(end) & ~first(begin)), p);
  }
  // Every second of two vectors' lanes; and each lane twice, the first lane but once if `odd`.
  static SPARSE_ENGINE_INLINE Vector every_second(Vector a, Vector b) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_ps(a, even, b);
  }
  static SPARSE_ENGINE_INLINE Vector twice(Vector x, int odd) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(odd)), 1), x);
  }
  static SPARSE_ENGINE_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

  static SPARSE_ENGINE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static SPARSE_ENGINE_INLINE Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  static SPARSE_ENGINE_INLINE Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static SPARSE_ENGINE_INLINE Vector abs(Vector x) { return _mm512_abs_ps(x); }
  static SPARSE_ENGINE_INLINE Vector round(Vector x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 1 / x within 2^-14, or refined by one step of Newton's to two bits of the last.
  template <bool Refine>
  static SPARSE_ENGINE_INLINE Vector reciprocal(Vector x) {
    const Vector y = _mm512_rcp14_ps(x);
    return Refine ? y * _mm512_fnmadd_ps(x, y, set(2.0f)) : y;
  }
  // x * 2^exponent
  static SPARSE_ENGINE_INLINE Vector scale(Vector x, Vector exponent) { return _mm512_scalef_ps(x, exponent); }
  static SPARSE_ENGINE_INLINE Vector select_negative(Vector sign, Vector if_negative, Vector otherwise) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign)), otherwise, if_negative);
  }

  // Four floats, repeated in each 128-bit part; and a choice among them by the low two bits of each lane.
  static SPARSE_ENGINE_INLINE Vector repeat_four(const void* p) {
    return _mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(p)));
  }
  static SPARSE_ENGINE_INLINE Vector choose_of_four(Vector four, __m512i code) {
    return _mm512_permutevar_ps(four, code);
  }
  using Codes = __m512i;
  static SPARSE_ENGINE_INLINE Codes load_codes(const void* p) { return _mm512_loadu_si512(p); }
  template <int Bits>
  static SPARSE_ENGINE_INLINE Codes shift_codes(Codes codes) {
    return _mm512_srli_epi32(codes, Bits);
  }

  // Four weights, of which one at a time is put into all lanes.
  struct FourWeights {
    Vector four;
    static SPARSE_ENGINE_INLINE FourWeights load(const uint8_t* p) { return {repeat_four(p)}; }
    template <int I>
    SPARSE_ENGINE_INLINE Vector get() const {
      return _mm512_permute_ps(four, I * 0x55);  // vpermilps: no index register
    }
  };

  // Sixteen rows of sixteen elements become sixteen columns.
  static SPARSE_ENGINE_INLINE void transpose(Vector (&rows)[16]) {
    Vector t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      rows[i] = unpack_pairs_low(t[i], t[i + 2]);
      rows[i + 1] = unpack_pairs_high(t[i], t[i + 2]);
      rows[i + 2] = unpack_pairs_low(t[i + 1], t[i + 3]);
      rows[i + 3] = unpack_pairs_high(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

 private:
  static SPARSE_ENGINE_INLINE Vector unpack_pairs_low(Vector a, Vector b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static SPARSE_ENGINE_INLINE Vector unpack_pairs_high(Vector a, Vector b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
};

}  // namespace
}  // namespace sparse_engine
