// AVX512-BF16: bfloat16 products summed in fp32. Intel since Cooper Lake (2020), AMD since Zen 4 (2022).
//
// vdpbf16ps multiplies pairs: lane += a.low * b.low + a.high * b.high. A group of four keeps a pair of
// weights, so one instruction does a whole group, if the same two x lie side by side. There are only six
// pairs in four, so the tile holds all six, and a stream's offset names the one that the group keeps.
//
// Bound: one vdpbf16ps per cycle and vector of sixteen tokens, twice the products of fp32; the tile is half
// as large again as fp32's for the same depth, and the six lines are what transposing costs more.
//
// The instruction rounds to nearest even, treats denormals as zero, and cannot be told otherwise.
#include "conv_lanes.h"
#include "conv_n_lanes.h"
#include "conv_r_lanes.h"
#include "n_lanes.h"
#include "peak.h"
#include "t_lanes.h"
#include "vector_avx512.h"

namespace sparse_engine {
namespace {

constexpr __mmask32 kHighHalves = 0xaaaaaaaau;

SPARSE_ENGINE_INLINE __m512 multiply_pairs(__m512 sum, __m512 weight, __m512i x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
}

// 32 floats, of which the first `count` are read, as 32 bfloat16.
SPARSE_ENGINE_INLINE __m512i load_bfloat16(const float* p, int count) {
  const auto first = static_cast<__mmask32>((1ull << count) - 1);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first), p);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first >> 16), p + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Transposes depth x tokens of `input`, rounded, and hands each group's pairs (0,1) and (2,3) of sixteen tokens to
// store(group, first token, pair01, pair23). What is missing becomes zero.
template <class Store>
SPARSE_ENGINE_INLINE void transpose_pairs(const float* input, size_t stride, int tokens, int depth,
                                          const Store& store) {
  using V = Avx512;
  for (int t = 0; t < tokens; t += V::kLanes) {
    const int rows = smaller(V::kLanes, tokens - t);
    for (int k = 0; k < depth; k += 32) {
      __m512 square[16];  // of pairs (k, k + 1)
      const float* const corner = input + t * stride + k;
      const int count = smaller(32, depth - k);
      if (rows == V::kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i) square[i] = (__m512)load_bfloat16(corner + i * stride, count);
      } else {
        for (int i = 0; i < V::kLanes; ++i) {
          square[i] = i < rows ? (__m512)load_bfloat16(corner + i * stride, count) : V::zero();
        }
      }
      V::transpose(square);
      for (int group = 0; group < smaller(8, (depth - k) / 4); ++group) {
        store(k / 4 + group, t, (__m512i)square[2 * group], (__m512i)square[2 * group + 1]);
      }
    }
  }
}

// (low[i], high[i]) of sixteen lanes, rounded.
SPARSE_ENGINE_INLINE __m512i interleave(__m512 low, __m512 high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

struct Bfloat16Streams {
  using V = Avx512;
  // 48 tokens x 128 k, six lines per four k: 36 KiB, a little more than L1 holds. Tiles that fit (64 x 64)
  // were measured 1% slower: they read and write the sums twice as often.
  static constexpr StreamLayout kLayout = {Operand::kBfloat16, 48, 128};

  static SPARSE_ENGINE_INLINE __m512 multiply_add(__m512 sum, __m512 weight, __m512 x) {
    return multiply_pairs(sum, weight, (__m512i)x);
  }

  static void pack_tile(const float* input, size_t stride, int tokens, int depth, uint8_t* tile) {
    transpose_pairs(input, stride, tokens, depth, [&](int group, int token, __m512i pair01, __m512i pair23) {
      store_pairs(tile + (size_t(group) * 6 * kLayout.tile_tokens + token) * 4, pair01, pair23);
    });
  }

  static SPARSE_ENGINE_INLINE void store_group(uint8_t* lines, const __m512 (&four)[4]) {
    store_pairs(lines, interleave(four[0], four[1]), interleave(four[2], four[3]));
  }

  // From the pairs (0,1) and (2,3) of sixteen tokens, the lines of all six pairs.
  static SPARSE_ENGINE_INLINE void store_pairs(uint8_t* lines, __m512i pair01, __m512i pair23) {
    const __m512i low1 = _mm512_srli_epi32(pair01, 16);
    const __m512i high2 = _mm512_slli_epi32(pair23, 16);
    const __m512i pairs[6] = {pair01,
                              _mm512_mask_blend_epi16(kHighHalves, pair01, high2),
                              _mm512_mask_blend_epi16(kHighHalves, pair01, pair23),
                              _mm512_or_si512(low1, high2),
                              _mm512_mask_blend_epi16(kHighHalves, low1, pair23),
                              pair23};
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) _mm512_store_si512(lines + i * kLayout.tile_tokens * 4, pairs[i]);
  }
};

// Dense weights, for the layers of a network that are not 2:4: a group keeps both of its pairs, and so does every other
// row, so two rows share every line. In bf16 ONNX Runtime has no dense product of its own on these processors.
struct DenseBfloat16Streams {
  using V = Avx512;
  static constexpr StreamLayout kLayout = {Operand::kDenseBfloat16, 96, 128};  // 24 KiB

  static SPARSE_ENGINE_INLINE __m512 multiply_add(__m512 sum, __m512 weight, __m512 x) {
    return multiply_pairs(sum, weight, (__m512i)x);
  }
  static void pack_tile(const float* input, size_t stride, int tokens, int depth, uint8_t* tile) {
    transpose_pairs(input, stride, tokens, depth, [&](int group, int token, __m512i pair01, __m512i pair23) {
      store_pairs(tile + (size_t(group) * 2 * kLayout.tile_tokens + token) * 4, pair01, pair23);
    });
  }
  static SPARSE_ENGINE_INLINE void store_group(uint8_t* lines, const __m512 (&four)[4]) {
    store_pairs(lines, interleave(four[0], four[1]), interleave(four[2], four[3]));
  }
  static SPARSE_ENGINE_INLINE void store_pairs(uint8_t* lines, __m512i pair01, __m512i pair23) {
    _mm512_store_si512(lines, pair01);
    _mm512_store_si512(lines + kLayout.tile_tokens * 4, pair23);
  }
};

// N-lanes: the pair's index picks a byte shuffle out of a table in a register.
struct Bfloat16Panels {
  using V = Avx512;
  static constexpr Operand kOperand = Operand::kBfloat16;
  static constexpr int kTokens = 8;
  static constexpr int kPanels = 2;
  static constexpr size_t kGroupBytes = 16 * 4;
  static constexpr size_t kGroupInputBytes = 4 * 2;

  struct Operands {
    __m512 pair;
    __m512i shuffle;
  };
  // Bytes (two per bfloat16) of the pairs (0,1) (0,2) (0,3) (1,2) (1,3) (2,3).
  __m512i shuffles = _mm512_castsi256_si512(
      _mm256_setr_epi32(0x03020100, 0x05040100, 0x07060100, 0x05040302, 0x07060302, 0x07060504, 0, 0));

  static int padded_depth(int depth) { return (depth + 31) / 32 * 32; }
  static size_t input_stride(int depth) { return size_t(padded_depth(depth)) * 2; }
  static size_t scratch_bytes(int depth, int tokens) { return tokens * input_stride(depth); }
  static SPARSE_ENGINE_INLINE void store_input(uint8_t* input, int k, __m512 x, int count) {
    _mm256_mask_storeu_epi16(input + 2 * k, V::first(count), (__m256i)_mm512_cvtneps_pbh(x));
  }

  static const uint8_t* convert_input(const float* input, int depth, int tokens, void* scratch) {
    uint8_t* out = static_cast<uint8_t*>(scratch);
    for (int t = 0; t < tokens; ++t, input += depth) {
      for (int k = 0; k < depth; k += 32, out += 64) {
        _mm512_storeu_si512(out, load_bfloat16(input + k, smaller(32, depth - k)));
      }
    }
    return static_cast<const uint8_t*>(scratch);
  }

  static size_t pixel_bytes(int channels) { return input_stride(channels); }
  static constexpr int kChannels = 32, kChannelsBytes = 64;
  // See Float32Panels.
  static SPARSE_ENGINE_INLINE void convert_pixels(const float* x, size_t plane, int channels, int count, uint8_t* out,
                                                  size_t stride) {
    __m512 square[16];  // of pairs of channels
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const float* const pair = x + 2 * i * plane;
      const bool exists = 2 * i < channels;  // both, or none
      square[i] = (__m512)(exists ? interleave(V::load_first(pair, count), V::load_first(pair + plane, count))
                                  : _mm512_setzero_si512());
    }
    V::transpose(square);
    for (int i = 0; i < count; ++i) _mm512_storeu_ps(out + i * stride, square[i]);
  }

  SPARSE_ENGINE_INLINE Operands load(const uint8_t* weights, __m512i codes) const {
    return {_mm512_loadu_ps(weights), _mm512_permutexvar_epi32(codes, shuffles)};
  }
  static SPARSE_ENGINE_INLINE __m512i load_input(const uint8_t* x) {
    long long four;
    __builtin_memcpy(&four, x, sizeof four);
    return _mm512_set1_epi64(four);
  }
  static SPARSE_ENGINE_INLINE __m512 multiply_add(__m512 sum, const Operands& operands, __m512i four) {
    return multiply_pairs(sum, operands.pair, _mm512_shuffle_epi8(four, operands.shuffle));
  }
};

// R-lanes: pixels as those of N-lanes, of which a step picks a pair in each lane.
struct Bfloat16Registers : Bfloat16Panels {
  using Register = __m512i;

  static SPARSE_ENGINE_INLINE Register load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static SPARSE_ENGINE_INLINE __m512 pick_and_add(__m512 sum, Register weights, Register indices, Register x) {
    return multiply_pairs(sum, (__m512)weights, _mm512_permutexvar_epi16(indices, x));
  }
};

}  // namespace

constexpr Tactic kAvx512Bf16Tokens = tokens_in_lanes<Bfloat16Streams>(Tier::kAvx512Bf16);
constexpr Tactic kAvx512Bf16Dense = tokens_in_lanes<DenseBfloat16Streams>(Tier::kAvx512Bf16);
constexpr Tactic kAvx512Bf16Rows = rows_in_lanes<Bfloat16Panels>(Tier::kAvx512Bf16);
constexpr ConvTactic kAvx512Bf16Conv = conv_in_lanes<Bfloat16Streams>();
constexpr ConvTactic kAvx512Bf16ConvRows = conv_rows_in_lanes<Bfloat16Panels>();
constexpr ConvTactic kAvx512Bf16ConvRegisters = conv_in_registers<Bfloat16Registers>();
constexpr PeakLoop kAvx512Bf16Peak = peak_loop<Bfloat16Streams>(2);

}  // namespace sparse_engine
