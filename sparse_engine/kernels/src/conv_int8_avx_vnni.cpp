// AVX2 and AVX-VNNI, convolutions in 8 bits: the step of tier_avx_vnni.cpp over a pixel's channels.
//
// A shuffle picks within 128 bits, so sixteen channels of a pixel are repeated in both halves of a register, and two
// steps take what rows keep of them. The sums of four pixels and sixteen rows are eight of sixteen registers.
//
// Bound: as many shuffles as multiply-adds.
#include "conv_int8_lanes.h"
#include "vector_avx2.h"

namespace sparse_engine {
namespace {

constexpr int kPart = 16;         // channels of a pixel in 128 bits
constexpr int kStepChannels = 8;  // of a step
constexpr int kVectorBytes = 32;
constexpr int kVectorsOfPanel = 2;
constexpr int kStepBytes = kVectorsOfPanel * 2 * kVectorBytes;  // of each vector indices, then weights

SPARSE_ENGINE_INLINE __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

SPARSE_ENGINE_INLINE void add_chosen(__m256i& sum, __m256i part, __m256i indices, __m256i weights) {
  const __m256i chosen = _mm256_shuffle_epi8(part, indices);
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(chosen), "x"(weights));
}

// Sixteen channels in both halves; those beyond `left` meet weights of zero.
SPARSE_ENGINE_INLINE __m256i load_part(const uint8_t* x, int left) {
  if (left >= kPart) return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  alignas(16) uint8_t part[kPart] = {};
  const int eight = left & 8;  // no loop, of which the compiler would make a call, and spill all sums around it
  if (eight) __builtin_memcpy(part, x, 8);
  if (left & 4) __builtin_memcpy(part + eight, x + eight, 4);
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(part)));
}

struct Vnni {
  using V = Avx2;
  static constexpr int kRows = kVectorsOfPanel * V::kLanes;
  static constexpr int kPixels = 4;

  static SPARSE_ENGINE_INLINE int steps_of(int channels) { return (channels + kStepChannels - 1) / kStepChannels; }

  static size_t packed_bytes(int rows, int channels, int taps) {
    return size_t((rows + kRows - 1) / kRows) * taps * steps_of(channels) * kStepBytes;
  }

  // Per panel, tap and eight channels: of each vector the indices of its rows' four codes in their part, then the
  // weights.
  static void pack(const WeightsInt8& weights, int taps, void* packed) {
    const int channels = weights.depth / taps;
    const size_t panel_bytes = packed_bytes(kRows, channels, taps);
    const size_t tap_bytes = size_t(steps_of(channels)) * kStepBytes;
    __builtin_memset(packed, 0, packed_bytes(weights.rows, channels, taps));
    for (int row = 0; row < weights.rows; ++row) {
      const int vector = row % kRows / V::kLanes, lane = row % V::kLanes * 4;
      uint8_t* const out = static_cast<uint8_t*>(packed) + row / kRows * panel_bytes + vector * 2 * kVectorBytes + lane;
      for (int group = 0; group < weights.groups(); ++group) {
        const size_t index = size_t(row) * weights.groups() + group;
        const int tap = group % taps, quad = group / taps, position = weights.positions[index];
        uint8_t* const two = out + tap * tap_bytes + size_t(quad / 2) * kStepBytes + quad % 2 * 2;
        const int first = quad * 4 % kPart;
        two[0] = static_cast<uint8_t>(first + (position & 3));
        two[1] = static_cast<uint8_t>(first + (position >> 2));
        __builtin_memcpy(two + kVectorBytes, weights.values + 2 * index, 2);
      }
    }
  }

  static __attribute__((noinline)) void add_up(const uint8_t* panel, const uint8_t* const* places, int taps,
                                               int channels, const int32_t* starts, const float* scales, float* sums) {
    __m256i sum[kPixels][kVectorsOfPanel];
#pragma GCC unroll 4
    for (int t = 0; t < kPixels; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectorsOfPanel; ++v) sum[t][v] = load_bytes(starts + v * V::kLanes);
    }
    for (int tap = 0; tap < taps; ++tap, places += kPixelTile) {
      for (int k = 0; k < channels; k += kPart) {
        __m256i part[kPixels];
#pragma GCC unroll 4
        for (int t = 0; t < kPixels; ++t) part[t] = load_part(places[t] + k, channels - k);
        const int steps = channels - k > kStepChannels ? 2 : 1;
        for (int s = 0; s < steps; ++s, panel += kStepBytes) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectorsOfPanel; ++v) {
            const __m256i indices = load_bytes(panel + v * 2 * kVectorBytes);
            const __m256i weights = load_bytes(panel + v * 2 * kVectorBytes + kVectorBytes);
#pragma GCC unroll 4
            for (int t = 0; t < kPixels; ++t) add_chosen(sum[t][v], part[t], indices, weights);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectorsOfPanel; ++v) {
      const __m256 scale = V::load_unaligned(scales + v * V::kLanes);
#pragma GCC unroll 4
      for (int t = 0; t < kPixels; ++t) {
        V::store(sums + size_t(v * kPixelTile + t) * V::kLanes, _mm256_cvtepi32_ps(sum[t][v]) * scale);
      }
    }
  }
};

// Eight floats as codes: round(value / scale) + zero, within 0 and 255. NaN becomes 0.
SPARSE_ENGINE_INLINE void store_codes(uint8_t* out, __m256 x, __m256 inverse, __m256 zero) {
  const __m256 code = Avx2::multiply_add(x, inverse, zero);
  // In this order: the second operand is what NaN becomes.
  const __m256 within = Avx2::min(Avx2::max(code, Avx2::zero()), Avx2::set(255.0f));
  const __m256i whole = _mm256_cvtps_epi32(within);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
}

template <Activation A>
void code_with(const MapsToCodes& maps, size_t begin, size_t end) {
  constexpr int kPlaces = Avx2::kLanes, kChannels = 4;  // channels come in groups of four
  const __m256 inverse = Avx2::set(1.0f / maps.codes.scale), zero = Avx2::set(float(maps.codes.zero));
  for (size_t place = begin; place < end; place += kPlaces) {
    const int count = end - place < size_t(kPlaces) ? int(end - place) : kPlaces;
    for (int first = 0; first < maps.channels; first += kChannels) {
      uint8_t codes[kChannels][kPlaces] = {};
      for (int c = 0; c < kChannels && first + c < maps.channels; ++c) {
        __m256 x = Avx2::load_first(maps.maps + (first + c) * maps.area + place, count);
        if (maps.affines) {
          const Affine& affine = maps.affines[first + c];
          x = Avx2::multiply_add(x - Avx2::set(affine.centre), Avx2::set(affine.factor), Avx2::set(affine.offset));
        }
        store_codes(codes[c], activate<Avx2, Operand::kFloat32, A>(x), inverse, zero);
      }
      for (int t = 0; t < count; ++t) {
        uint8_t* const out = maps.out + (place + t) * maps.channels + first;
        for (int c = 0; c < kChannels && first + c < maps.channels; ++c) out[c] = codes[c][t];
      }
    }
  }
}

void code(const MapsToCodes& maps, size_t begin, size_t end) {
  (maps.activation == Activation::kSilu ? code_with<Activation::kSilu> : code_with<Activation::kNone>)(maps, begin,
                                                                                                       end);
}

}  // namespace

constexpr ConvTacticInt8 kAvxVnniConvInt8 = conv_int8_in_lanes<Vnni>(Tier::kAvxVnni, code);

}  // namespace sparse_engine
