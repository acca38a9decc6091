// AVX512-BF16: q, k, v and the probabilities are rounded to bfloat16; scores, softmax and sums are fp32.
//
// vdpbf16ps multiplies pairs: (d, d + 1) of q and k; (key, key + 1) of the probabilities and v. So the values
// of two keys are interleaved when they are laid out, and the probabilities when they are stored.
#include "attention_lanes.h"
#include "codes_avx512.h"
#include "vector_avx512.h"

namespace sparse_engine {
namespace {

template <class Numbers>
struct Bfloat16Attention {
  using V = Avx512;
  using Number = Numbers;
  static constexpr int kRows = 8;
  static constexpr int kVectors = 3;
  static constexpr int kKeysPerOperand = 2;
  static constexpr int kDegree = 3;

  static size_t padded_steps(int head_dim) { return round_up(head_dim, 32) / 2; }

  static SPARSE_ENGINE_INLINE __m512 multiply_add(__m512 sum, __m512 weight, __m512 line) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)line);
  }

  static void pack_keys(const Number* k, size_t stride, size_t tokens, int head_dim, float* keys) {
    for (size_t token = 0; token < tokens; ++token, k += stride) {
      if (token + kTokensAhead < tokens) fetch_ahead(k + kTokensAhead * stride, head_dim);
      for (int d = 0; d < head_dim; d += 32, keys += 16) V::store(keys, load_adjacent(k, d, head_dim));
    }
  }

  static void pack_values(const Number* v, size_t stride, size_t tokens, int head_dim, float* values) {
    for (size_t token = 0; token < tokens; token += 2, v += 2 * stride) {
      for (size_t ahead = kTokensAhead; ahead < kTokensAhead + 2 && token + ahead < tokens; ++ahead) {
        fetch_ahead(v + ahead * stride, head_dim);
      }
      for (int d = 0; d < head_dim; d += 16, values += 16) {
        const int count = head_dim - d < 16 ? head_dim - d : 16;
        V::store(values, load_two(v + d, token + 1 < tokens ? v + stride + d : nullptr, count));
      }
    }
  }

  template <int TileWidth>
  static void pack_queries(const Number* q, size_t stride, int count, int head_dim, float* lines) {
    for (int query = 0; query < count; ++query) fetch_ahead(q + query * stride, head_dim);
    for (int t = 0; t < TileWidth; ++t) {
      for (int d = 0; d < head_dim; d += 32) {
        __m512 square[16];
        for (int i = 0; i < 16; ++i) {
          const int query = t * 16 + i;
          square[i] = query < count ? load_adjacent(q + query * stride, d, head_dim) : V::zero();
        }
        V::transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) V::store(lines + ((d / 2 + i) * TileWidth + t) * 16, square[i]);
      }
    }
  }

  static SPARSE_ENGINE_INLINE void store_output(const Attention& attention, size_t index, __m512 y, int count) {
    sparse_engine::store_output(attention, index, y, count);
  }

  // Stores probability(key) of all keys, two to a line; returns their sum. A line is written when both of the
  // lines that it takes the place of have been read.
  template <class Function>
  static SPARSE_ENGINE_INLINE __m512 pack_probabilities(const Function& probability, int keys, float* column,
                                                        size_t line) {
    __m512 sum = V::zero();
    int key = 0;
    for (; key + 1 < keys; key += 2) {
      const __m512 first = probability(key);
      const __m512 second = probability(key + 1);
      V::store(column + key / 2 * line, interleave(first, second));
      sum += first + second;
    }
    if (key < keys) {
      const __m512 last = probability(key);
      V::store(column + key / 2 * line, interleave(last, V::zero()));
      sum += last;
    }
    return sum;
  }

 private:
  // Up to 32 floats from `d` on, as pairs of bfloat16.
  static SPARSE_ENGINE_INLINE __m512 load_adjacent(const float* row, int d, int head_dim) {
    const int left = head_dim - d;
    const __mmask32 first = left < 32 ? (1u << left) - 1u : ~0u;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first), row + d);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first >> 16), row + d + 16);
    return (__m512)_mm512_cvtne2ps_pbh(high, low);
  }

  static SPARSE_ENGINE_INLINE __m512 load_adjacent(const uint16_t* row, int d, int head_dim) {
    const int left = head_dim - d;
    return (__m512)_mm512_maskz_loadu_epi16(left < 32 ? (1u << left) - 1u : ~0u, row + d);
  }

  // Pairs of what lies at `first` and at `second`; zeros where that is null.
  static SPARSE_ENGINE_INLINE __m512 load_two(const float* first, const float* second, int count) {
    return interleave(V::load_first(first, count), second ? V::load_first(second, count) : V::zero());
  }
  static SPARSE_ENGINE_INLINE __m512 load_two(const uint16_t* first, const uint16_t* second, int count) {
    const __mmask16 there = V::first(count);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, first));
    if (!second) return (__m512)low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, second));
    return (__m512)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

  // Pairs (low[i], high[i]).
  static SPARSE_ENGINE_INLINE __m512 interleave(__m512 low, __m512 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (__m512)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
};

}  // namespace

constexpr AttentionKernel kAvx512Bf16Attention = queries_in_lanes<Bfloat16Attention<float>>();
constexpr AttentionKernel kAvx512Bf16AttentionOfHalves = queries_in_lanes<Bfloat16Attention<uint16_t>>();

}  // namespace sparse_engine
