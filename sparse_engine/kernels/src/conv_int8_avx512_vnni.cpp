// AVX512-VNNI and AVX512-VBMI, convolutions in 8 bits: the step of tier_avx512_vnni.cpp over a pixel's channels.
//
//     a register of one pixel:          | c0 c1 c2 c3 ... c63 |
//     what rows n, n + 1, ... keep:     | 0 3 5 6 | 1 2 4 7 | ...     one vpermb
//     vpdpbusd with their weights:      sum of row n | sum of row n + 1 | ...
//
// Eight pixels' registers stay put for the eight steps of 64 channels; indices and weights serve all eight. Channels
// that are no multiple of 64 end with a register that is full in part, of as many steps as it has eights.
//
// Bound: as there, 1.5 times the dense peak of a Zen 5; of 3x3, sums are turned once per nine taps.
#include "codes_avx512.h"
#include "conv_int8_lanes.h"
#include "vnni_avx512.h"

namespace sparse_engine {
namespace {

constexpr int kRegister = 64;  // channels of a pixel in one
constexpr int kSteps = 8;      // of a full register
constexpr int kStepBytes = 128;

struct Vnni {
  using V = Avx512;
  static constexpr int kRows = V::kLanes;
  static constexpr int kPixels = 8;

  static SPARSE_ENGINE_INLINE int steps_of(int channels) { return (channels + kSteps - 1) / kSteps; }

  static size_t packed_bytes(int rows, int channels, int taps) {
    return size_t((rows + kRows - 1) / kRows) * taps * steps_of(channels) * kStepBytes;
  }

  // Per panel, tap and eight channels: the indices of each row's four codes in their register, then the weights.
  static void pack(const WeightsInt8& weights, int taps, void* packed) {
    const int channels = weights.depth / taps;
    const size_t panel_bytes = packed_bytes(kRows, channels, taps);
    const size_t tap_bytes = size_t(steps_of(channels)) * kStepBytes;
    __builtin_memset(packed, 0, packed_bytes(weights.rows, channels, taps));
    for (int row = 0; row < weights.rows; ++row) {
      uint8_t* const lane = static_cast<uint8_t*>(packed) + row / kRows * panel_bytes + row % kRows * 4;
      for (int group = 0; group < weights.groups(); ++group) {
        const size_t index = size_t(row) * weights.groups() + group;
        const int tap = group % taps, quad = group / taps, position = weights.positions[index];
        uint8_t* const two = lane + tap * tap_bytes + size_t(quad / 2) * kStepBytes + quad % 2 * 2;
        const int first = quad * 4 % kRegister;
        two[0] = static_cast<uint8_t>(first + (position & 3));
        two[1] = static_cast<uint8_t>(first + (position >> 2));
        __builtin_memcpy(two + kRegister, weights.values + 2 * index, 2);
      }
    }
  }

  static SPARSE_ENGINE_INLINE void add_step(__m512i (&sum)[kPixels], const __m512i (&x)[kPixels], const uint8_t* step) {
    const __m512i indices = _mm512_load_si512(step), weights = _mm512_load_si512(step + kRegister);
#pragma GCC unroll 8
    for (int t = 0; t < kPixels; ++t) add_products(sum[t], _mm512_permutexvar_epi8(indices, x[t]), weights);
  }

  static __attribute__((noinline)) void add_up(const uint8_t* panel, const uint8_t* const* places, int taps,
                                               int channels, const int32_t* starts, const float* scales, float* sums) {
    __m512i sum[kPixels];
    const __m512i start = _mm512_loadu_si512(starts);
#pragma GCC unroll 8
    for (int t = 0; t < kPixels; ++t) sum[t] = start;
    const int whole = channels / kRegister * kRegister, rest_steps = steps_of(channels - whole);
    const __mmask64 rest = (__mmask64(1) << (channels - whole)) - 1;
    for (int tap = 0; tap < taps; ++tap, places += kPixelTile) {
      __m512i x[kPixels];
      for (int k = 0; k < whole; k += kRegister, panel += kSteps * kStepBytes) {
#pragma GCC unroll 8
        for (int t = 0; t < kPixels; ++t) x[t] = _mm512_loadu_si512(places[t] + k);
#pragma GCC unroll 8
        for (int s = 0; s < kSteps; ++s) add_step(sum, x, panel + s * kStepBytes);
      }
      if (!rest) continue;
#pragma GCC unroll 8
      for (int t = 0; t < kPixels; ++t) x[t] = _mm512_maskz_loadu_epi8(rest, places[t] + whole);
      for (int s = 0; s < rest_steps; ++s, panel += kStepBytes) add_step(sum, x, panel);
    }
    const __m512 scale = V::load_unaligned(scales);
#pragma GCC unroll 8
    for (int t = 0; t < kPixels; ++t) V::store(sums + t * V::kLanes, _mm512_cvtepi32_ps(sum[t]) * scale);
  }
};

// Of sixteen channels and 64 places, from a register a channel to a quarter of one a place.
SPARSE_ENGINE_INLINE void turn(__m512i (&codes)[16]) {
  __m512i next[16];
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = _mm512_unpacklo_epi8(codes[i], codes[i + 8]);
      next[2 * i + 1] = _mm512_unpackhi_epi8(codes[i], codes[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) codes[i] = next[i];
  }
}

// One channel's codes of `count` places, up to 64.
template <Activation A>
SPARSE_ENGINE_INLINE __m512i code_row(const float* x, int count, const Affine* affine, const CodesOf& to_codes) {
  __m512 y[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int left = count - i * 16;
    y[i] = left >= 16 ? _mm512_loadu_ps(x + i * 16) : Avx512::load_first(x + i * 16, left < 0 ? 0 : left);
    if (affine) {
      const __m512 distance = y[i] - Avx512::set(affine->centre);
      y[i] = Avx512::multiply_add(distance, Avx512::set(affine->factor), Avx512::set(affine->offset));
    }
    y[i] = activate<Avx512, Operand::kFloat32, A>(y[i]);
  }
  return to_codes(y);
}

template <Activation A>
void code_with(const MapsToCodes& maps, size_t begin, size_t end) {
  const CodesOf to_codes(maps.codes);
  for (size_t place = begin; place < end; place += 64) {
    const int count = end - place < 64 ? int(end - place) : 64;
    for (int first = 0; first < maps.channels; first += 16) {
      const int channels = maps.channels - first < 16 ? maps.channels - first : 16;
      __m512i codes[16];
      for (int c = 0; c < 16; ++c) {
        const int channel = first + c;
        codes[c] = c < channels ? code_row<A>(maps.maps + channel * maps.area + place, count,
                                              maps.affines ? maps.affines + channel : nullptr, to_codes)
                                : _mm512_setzero_si512();
      }
      turn(codes);
      const __mmask16 there = Avx512::first(channels);
      alignas(64) uint8_t quarters[16 * 64];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(quarters + i * 64, codes[i]);
      for (int t = 0; t < count; ++t) {
        const __m128i pixel = _mm_load_si128(reinterpret_cast<const __m128i*>(quarters + t % 16 * 64 + t / 16 * 16));
        _mm_mask_storeu_epi8(maps.out + (place + t) * maps.channels + first, there, pixel);
      }
    }
  }
}

void code(const MapsToCodes& maps, size_t begin, size_t end) {
  (maps.activation == Activation::kSilu ? code_with<Activation::kSilu> : code_with<Activation::kNone>)(maps, begin,
                                                                                                       end);
}

}  // namespace

constexpr ConvTacticInt8 kAvx512VnniConvInt8 = conv_int8_in_lanes<Vnni>(Tier::kAvx512Vnni, code);

}  // namespace sparse_engine
