// NEON with dot products (FEAT_DotProd), 8-bit products: Cortex-A75, Neoverse N1, Apple's M1 and later.
//
// Four rows in a vector, four vectors a panel: the sums of four tokens are 16 of 32 registers. `tbl` chooses, `sdot`
// multiplies and adds up.
//
// `sdot` takes signed codes, and ours are 0..255: 128 is taken off each, by flipping its highest bit, and the sums
// begin with what that takes off them:
//
//     sum of (x - 128) w  +  (128 - zero) sum of w  =  sum of (x - zero) w
//
// which is exact: additions in 32 bits, the instruction's too, are exact modulo 2^32, a sum begins within
// 128 * 127 * 65,536 < 2^31, and what comes out is within 255 * 127 * 65,536 < 2^31 (int8.h). A code less 128 is
// within -128..127 and a product within 2^14, four of which an `sdot` adds up in 32 bits.
//
// `usdot` (FEAT_I8MM) would take codes as they are: of the eighteen instructions for sixteen k of a token and a panel
// it saves one. `smmla`, two tokens by two rows, has no use for it: rows choose different codes of a token.
//
// Tested under QEMU, which says nothing of speed: whether these kernels are faster than the runtime's dense ones is
// found out where an engine is loaded, as for every tier.
#include "int8_lanes.h"
#include "vector_neon.h"

namespace sparse_engine {
namespace {

struct NeonDot : Neon {
  using Bytes = uint8x16_t;
  using Sums = int32x4_t;
  static constexpr int kVectors = 4;
  static constexpr int kOffset = 128;

  static SPARSE_ENGINE_INLINE Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
  static SPARSE_ENGINE_INLINE Bytes less_offset(Bytes codes) { return veorq_u8(codes, vdupq_n_u8(kOffset)); }
  static SPARSE_ENGINE_INLINE Bytes repeat_part(const uint8_t* p) { return less_offset(vld1q_u8(p)); }
  static SPARSE_ENGINE_INLINE Bytes repeat_four(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return less_offset(vreinterpretq_u8_u32(vdupq_n_u32(four)));
  }
  static SPARSE_ENGINE_INLINE Bytes choose(Bytes part, Bytes indices) { return vqtbl1q_u8(part, indices); }
  static SPARSE_ENGINE_INLINE void add_products(Sums& sums, Bytes codes, Bytes weights) {
    sums = vdotq_s32(sums, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(weights));
  }

  static SPARSE_ENGINE_INLINE Sums load_sums(const int32_t* p) { return vld1q_s32(p); }
  static SPARSE_ENGINE_INLINE void store_sums(int32_t* p, Sums sums) { vst1q_s32(p, sums); }
  static SPARSE_ENGINE_INLINE Vector to_floats(Sums sums) { return vcvtq_f32_s32(sums); }

  static SPARSE_ENGINE_INLINE void narrow_codes(uint8_t* p, Vector x) {
    const uint16x4_t words = vmovn_u32(vreinterpretq_u32_s32(vcvtnq_s32_f32(x)));
    const uint8x8_t codes = vmovn_u16(vcombine_u16(words, words));
    vst1_lane_u32(reinterpret_cast<uint32_t*>(p), vreinterpret_u32_u8(codes), 0);
  }
  static SPARSE_ENGINE_INLINE void narrow_halves(uint8_t* p, Vector x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(rounded, 16));
  }

  static SPARSE_ENGINE_INLINE float add_lanes(Vector x) { return vaddvq_f32(x); }
  static SPARSE_ENGINE_INLINE Vector keep_first(Vector x, int count) {
    const uint32_t lanes[kLanes] = {0, 1, 2, 3};
    const uint32x4_t there = vcltq_u32(vld1q_u32(lanes), vdupq_n_u32(static_cast<uint32_t>(count)));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), there));
  }
};

}  // namespace

constexpr TacticInt8 kNeonDotInt8 = int8_in_lanes<NeonDot>(Tier::kNeonDot);

}  // namespace sparse_engine
