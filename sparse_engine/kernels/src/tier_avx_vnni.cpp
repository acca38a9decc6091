// AVX2 and AVX-VNNI, 8-bit products: Intel since Alder Lake (2021), whose desktop processors have no AVX-512, and AMD
// since Zen 5 (2024).
//
// Eight rows in a vector, two vectors a panel: the sums of four tokens are eight of sixteen registers.
#include "int8_lanes.h"
#include "vector_avx2.h"

namespace sparse_engine {
namespace {

struct AvxVnni : Avx2 {
  using Bytes = __m256i;
  using Sums = __m256i;
  static constexpr int kVectors = 2;
  static constexpr int kOffset = 0;  // codes are multiplied unsigned

  static SPARSE_ENGINE_INLINE __m256i load_bytes(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static SPARSE_ENGINE_INLINE __m256i repeat_part(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static SPARSE_ENGINE_INLINE __m256i repeat_four(const uint8_t* p) {
    float four;  // as a float, or it would be loaded into a general register first
    __builtin_memcpy(&four, p, sizeof four);
    return _mm256_castps_si256(set(four));
  }
  static SPARSE_ENGINE_INLINE __m256i choose(__m256i part, __m256i indices) {
    return _mm256_shuffle_epi8(part, indices);
  }
  static SPARSE_ENGINE_INLINE void add_products(__m256i& sums, __m256i codes, __m256i weights) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(weights));
  }

  static SPARSE_ENGINE_INLINE __m256i load_sums(const int32_t* p) { return load_bytes(p); }
  static SPARSE_ENGINE_INLINE void store_sums(int32_t* p, __m256i sums) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), sums);
  }
  static SPARSE_ENGINE_INLINE __m256 to_floats(__m256i sums) { return _mm256_cvtepi32_ps(sums); }

  static SPARSE_ENGINE_INLINE void narrow_codes(uint8_t* p, __m256 x) {
    const __m256i codes = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static SPARSE_ENGINE_INLINE void narrow_halves(uint8_t* p, __m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i halves = _mm256_srli_epi32(rounded, 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_store_si128(reinterpret_cast<__m128i*>(p), packed);
  }

  static SPARSE_ENGINE_INLINE float add_lanes(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static SPARSE_ENGINE_INLINE __m256 keep_first(__m256 x, int count) {
    return count == kLanes ? x : _mm256_and_ps(x, _mm256_castsi256_ps(first(count)));
  }
};

}  // namespace

constexpr TacticInt8 kAvxVnniInt8 = int8_in_lanes<AvxVnni>(Tier::kAvxVnni);

}  // namespace sparse_engine
