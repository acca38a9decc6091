// Four floats in a register: the NEON words in which the kernels are written (64-bit Arm, where every processor has
// them).
//
// Only instruction-set files include this, as vector_avx2.h, whose functions these are.
#pragma once

#include <arm_neon.h>

#include "matmul24.h"

namespace sparse_engine {
namespace {

struct Neon {
  using Vector = float32x4_t;
  static constexpr int kLanes = 4;

  static SPARSE_ENGINE_INLINE const float* floats(const void* p) { return static_cast<const float*>(p); }

  static SPARSE_ENGINE_INLINE Vector zero() { return vdupq_n_f32(0.0f); }
  static SPARSE_ENGINE_INLINE Vector set(float x) { return vdupq_n_f32(x); }
  static SPARSE_ENGINE_INLINE Vector load(const void* p) { return vld1q_f32(floats(p)); }
  static SPARSE_ENGINE_INLINE Vector load_unaligned(const void* p) { return vld1q_f32(floats(p)); }
  static SPARSE_ENGINE_INLINE Vector load_once(const void* p) {
    return vld1q_f32(floats(p));
  }  // loads are never operands
  static SPARSE_ENGINE_INLINE void store(void* p, Vector x) { vst1q_f32(static_cast<float*>(p), x); }
  static SPARSE_ENGINE_INLINE void store_unaligned(float* p, Vector x) { vst1q_f32(p, x); }

  // The first `count` lanes (0 .. kLanes); memory beyond them is not touched, lanes beyond them are zero.
  static SPARSE_ENGINE_INLINE Vector load_first(const float* p, int count) {
    if (count == kLanes) return vld1q_f32(p);
    float lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i] = p[i];
    return vld1q_f32(lanes);
  }
  static SPARSE_ENGINE_INLINE void store_first(float* p, Vector x, int count) {
    if (count == kLanes) return vst1q_f32(p, x);
    float lanes[kLanes];
    vst1q_f32(lanes, x);
    for (int i = 0; i < count; ++i) p[i] = lanes[i];
  }

  // Lanes begin .. end - 1 of those at p, which may begin before the array; the others are zero.
  static SPARSE_ENGINE_INLINE Vector load_between(const float* p, int begin, int end) {
    float lanes[kLanes] = {};
    for (int i = begin; i < end; ++i) lanes[i] = p[i];
    return vld1q_f32(lanes);
  }

  // Every second of two vectors' lanes; and each lane twice, the first lane but once if `odd`.
  static SPARSE_ENGINE_INLINE Vector every_second(Vector a, Vector b) { return vuzp1q_f32(a, b); }
  static SPARSE_ENGINE_INLINE Vector twice(Vector x, int odd) {
    const Vector even = vzip1q_f32(x, x);
    return odd ? vextq_f32(even, vzip2q_f32(x, x), 1) : even;
  }

  static SPARSE_ENGINE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  // The second operand is the result where one is NaN, as on x86: vmaxq would make it NaN, vmaxnmq the number.
  static SPARSE_ENGINE_INLINE Vector min(Vector a, Vector b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static SPARSE_ENGINE_INLINE Vector max(Vector a, Vector b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static SPARSE_ENGINE_INLINE Vector abs(Vector x) { return vabsq_f32(x); }
  static SPARSE_ENGINE_INLINE Vector round(Vector x) { return vrndnq_f32(x); }
  template <bool Refine>
  static SPARSE_ENGINE_INLINE Vector reciprocal(Vector x) {
    return set(1.0f) / x;
  }
  // x * 2^exponent, for an exponent of a normal number: it is written into the bits of a factor.
  static SPARSE_ENGINE_INLINE Vector scale(Vector x, Vector exponent) {
    const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(exponent), vdupq_n_s32(127));
    return x * vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
  }
  static SPARSE_ENGINE_INLINE Vector select_negative(Vector sign, Vector if_negative, Vector otherwise) {
    const int32x4_t mask = vshrq_n_s32(vreinterpretq_s32_f32(sign), 31);
    return vbslq_f32(vreinterpretq_u32_s32(mask), if_negative, otherwise);
  }

  // Four weights, of which one at a time is put into all lanes: a multiply-add takes it out of its lane for nothing.
  struct FourWeights {
    Vector four;
    static SPARSE_ENGINE_INLINE FourWeights load(const uint8_t* p) { return {load_unaligned(p)}; }
    template <int I>
    SPARSE_ENGINE_INLINE Vector get() const {
      return vdupq_laneq_f32(four, I);
    }
  };

  // Four floats, and a choice among them by the low two bits of each lane: of bytes, by a table.
  static SPARSE_ENGINE_INLINE Vector repeat_four(const void* p) { return vld1q_f32(floats(p)); }
  static SPARSE_ENGINE_INLINE Vector choose_of_four(Vector four, uint32x4_t code) {
    const uint32x4_t first_byte = vmulq_n_u32(vandq_u32(code, vdupq_n_u32(3)), 0x04040404u);
    const uint8x16_t bytes = vreinterpretq_u8_u32(vaddq_u32(first_byte, vdupq_n_u32(0x03020100u)));
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(four), bytes));
  }
  using Codes = uint32x4_t;
  static SPARSE_ENGINE_INLINE Codes load_codes(const void* p) { return vld1q_u32(static_cast<const uint32_t*>(p)); }
  template <int Bits>
  static SPARSE_ENGINE_INLINE Codes shift_codes(Codes codes) {
    return vshrq_n_u32(codes, Bits);
  }

  // Four rows of four elements become four columns.
  static SPARSE_ENGINE_INLINE void transpose(Vector (&rows)[4]) {
    const float64x2_t t0 = vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1]));
    const float64x2_t t1 = vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1]));
    const float64x2_t t2 = vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3]));
    const float64x2_t t3 = vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]));
    rows[0] = vreinterpretq_f32_f64(vtrn1q_f64(t0, t2));
    rows[1] = vreinterpretq_f32_f64(vtrn1q_f64(t1, t3));
    rows[2] = vreinterpretq_f32_f64(vtrn2q_f64(t0, t2));
    rows[3] = vreinterpretq_f32_f64(vtrn2q_f64(t1, t3));
  }
};

}  // namespace
}  // namespace sparse_engine
