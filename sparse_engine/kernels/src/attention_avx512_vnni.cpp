// AVX512-VNNI: attention in 8 bits. q and k are rounded to codes of a scale of their own for each token and head, v to
// codes of a scale for each number of a head, and the probabilities to codes 0..255 of the largest so far; sums are
// exact integers, softmax and the sums over blocks of keys are fp32.
//
// The form is that of attention_lanes.h: queries in the lanes, an element broadcast out of memory and multiplied with a
// line. vpdpbusd multiplies four pairs, unsigned by signed: four numbers of q (128 above their codes) and k, or the
// probabilities of four keys and v. That is half the multiply-adds of bfloat16.
#include "attention.h"
#include "codes_avx512.h"
#include "exponential.h"
#include "vector_avx512.h"
#include "vnni_avx512.h"

namespace sparse_engine {
namespace {

using V = Avx512;

constexpr int kRows = 8;     // keys, or numbers of a head, whose sums are in registers
constexpr int kVectors = 3;  // of queries
constexpr int kTileQueries = kVectors * V::kLanes;
constexpr int kBlockKeys = 96;  // a multiple of four
constexpr int kDims = 64;       // codes of a register
constexpr float kLog2E = 1.44269504f;
constexpr float kLog2Of255 = 7.99435344f;
constexpr float kLowest = -3.40282347e38f;

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where things lie in the scratch, in units of four bytes: floats, integers, or four codes.
struct Layout {
  explicit Layout(const Attention& attention)
      : steps(round_up(attention.head_dim, kDims) / 4),
        dims(round_up(attention.head_dim, V::kLanes)),
        starts(round_up(attention.keys * steps, 16)),
        key_scales(starts + round_up(attention.keys, 16)),
        values(key_scales + round_up(attention.keys, 16)),
        value_scales(values + round_up(attention.keys, 4) / 4 * dims),
        queries(value_scales + dims),
        scores(queries + steps * kTileQueries),
        sums(scores + size_t(kBlockKeys) * kTileQueries),
        end(sums + dims * kTileQueries) {}
  size_t steps, dims;
  size_t starts, key_scales, values, value_scales, queries, scores, sums, end;
};

size_t scratch_bytes(const Attention& attention) { return Layout(attention).end * sizeof(float); }

SPARSE_ENGINE_INLINE __m512 load_numbers(const float* p, int count) { return V::load_first(p, count); }
SPARSE_ENGINE_INLINE __m512 load_numbers(const uint16_t* p, int count) {
  const __m512i halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(V::first(count), p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
}
SPARSE_ENGINE_INLINE int lanes_left(int total, int done) {
  return total - done < V::kLanes ? (total > done ? total - done : 0) : V::kLanes;
}

// What codes of -127..127 are multiplied with to cover `largest`; 1 where there is nothing but zeros.
SPARSE_ENGINE_INLINE float scale_of(float largest) { return largest > 0.0f ? largest / 127.0f : 1.0f; }

// The codes of a token's head, plus `zero`, `dims` bytes; returns their scale. *sum: of the codes.
template <class Number>
SPARSE_ENGINE_INLINE float round_token(const Number* x, int head_dim, size_t dims, int zero, uint8_t* out, int* sum) {
  __m512 largest = V::zero();
  for (int d = 0; d < head_dim; d += V::kLanes) {
    largest = V::max(largest, V::abs(load_numbers(x + d, lanes_left(head_dim, d))));
  }
  const float scale = scale_of(_mm512_reduce_max_ps(largest));
  const __m512 inverse = V::set(1.0f / scale);
  __m512i total = _mm512_setzero_si512();
  for (int d = 0; d < int(dims); d += V::kLanes) {
    const __m512i codes = _mm512_cvtps_epi32(load_numbers(x + d, lanes_left(head_dim, d)) * inverse);
    total = _mm512_add_epi32(total, codes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d),
                     _mm512_cvtepi32_epi8(_mm512_add_epi32(codes, _mm512_set1_epi32(zero))));
  }
  if (sum) *sum = _mm512_reduce_add_epi32(total);
  return scale;
}

// A token's part of a head, on its way to L1: tokens lie so far apart that nothing else fetches the next one's.
template <class Number>
SPARSE_ENGINE_INLINE void fetch_ahead(const Number* token, int head_dim) {
  const char* const begin = reinterpret_cast<const char*>(token);
  for (size_t byte = 0; byte < head_dim * sizeof(Number); byte += 64) _mm_prefetch(begin + byte, _MM_HINT_T0);
}

// Fetches the values too, which are read next.
template <class Number>
void pack_keys(const Attention& attention, const Number* k, const Number* v, const Layout& layout, float* base) {
  constexpr size_t kAhead = 12;
  int32_t* const starts = reinterpret_cast<int32_t*>(base + layout.starts);
  for (size_t key = 0; key < attention.keys; ++key, k += attention.k.token_stride, v += attention.v.token_stride) {
    if (key + kAhead < attention.keys) fetch_ahead(k + kAhead * attention.k.token_stride, attention.head_dim);
    fetch_ahead(v, attention.head_dim);
    uint8_t* const out = reinterpret_cast<uint8_t*>(base + key * layout.steps);
    int sum;
    base[layout.key_scales + key] = round_token(k, attention.head_dim, layout.steps * 4, 0, out, &sum);
    starts[key] = -128 * sum;  // what the queries' codes have too much
  }
}

// Four keys of each number side by side. Keys lie far apart, so all numbers of one that a register of codes has are
// read before the next one's. Fetches the first queries too.
template <class Number>
void pack_values(const Attention& attention, const Number* v, const Number* q, size_t queries, const Layout& layout,
                 float* base) {
  constexpr int kParts = kDims / V::kLanes;
  const size_t stride = attention.v.token_stride, keys = attention.keys;
  for (int d = 0; d < attention.head_dim; d += kDims) {
    int counts[kParts];
    for (int i = 0; i < kParts; ++i) counts[i] = lanes_left(attention.head_dim, d + i * V::kLanes);
    __m512 largest[kParts] = {V::zero(), V::zero(), V::zero(), V::zero()}, inverse[kParts];
    for (size_t key = 0; key < keys; ++key) {
      if (d == 0 && key < queries) fetch_ahead(q + key * attention.q.token_stride, attention.head_dim);
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        const Number* const numbers = v + key * stride + d + i * V::kLanes;
        largest[i] = V::max(largest[i], V::abs(load_numbers(numbers, counts[i])));
      }
    }
    for (int i = 0; i < kParts; ++i) {
      const __mmask16 some = _mm512_cmp_ps_mask(largest[i], V::zero(), _CMP_GT_OQ);
      const __m512 scale = _mm512_mask_div_ps(V::set(1.0f), some, largest[i], V::set(127.0f));
      inverse[i] = V::set(1.0f) / scale;
      if (counts[i] > 0) V::store(base + layout.value_scales + d + i * V::kLanes, scale);
    }
    for (size_t key = 0; key < keys; key += 4) {
      __m512i four[kParts];
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) four[i] = _mm512_setzero_si512();
      for (size_t next = key + 4 < keys ? key + 4 : keys; next-- > key;) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          const Number* const numbers = v + next * stride + d + i * V::kLanes;
          const __m512i codes = _mm512_cvtps_epi32(load_numbers(numbers, counts[i]) * inverse[i]);
          // (four << 8) | (codes & 255)
          const __m512i low = _mm512_set1_epi32(255);
          four[i] = _mm512_ternarylogic_epi32(_mm512_slli_epi32(four[i], 8), codes, low, 0xf8);
        }
      }
      for (int i = 0; i < kParts; ++i) {
        float* const out = base + layout.values + key / 4 * layout.dims + d + i * V::kLanes;
        if (counts[i] > 0) _mm512_store_si512(out, four[i]);
      }
    }
  }
}

template <int Vectors>
struct Tile {
  static constexpr int kLine = Vectors * V::kLanes;

  // The state of the online softmax, of each query.
  struct Statistics {
    __m512 largest[Vectors];  // score so far, without the query's scale
    __m512 sum[Vectors];      // of the codes of the probabilities so far
    __m512 rescale[Vectors];  // what the last block made of earlier ones
    __m512 exponent[Vectors];
  };

  template <class Number>
  static void run(const Attention& attention, const Layout& layout, const QueryBlock& block, size_t query, int count,
                  float* base) {
    Statistics statistics;
    const Number* const q = block.of<Number>(attention.q) + query * attention.q.token_stride;
    pack_queries(attention, q, count, layout, base + layout.queries, statistics);
    float* const scores = base + layout.scores;
    float* const sums = base + layout.sums;
    for (size_t i = 0; i < layout.dims * Vectors; ++i) V::store(sums + i * V::kLanes, V::zero());
    for (size_t key = 0; key < attention.keys; key += kBlockKeys) {
      const size_t left = attention.keys - key;
      const int keys = left < size_t(kBlockKeys) ? int(left) : kBlockKeys;
      __m512 raised[Vectors];
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) raised[v] = statistics.largest[v];
      int row = 0;
      for (; row + kRows <= keys; row += kRows)
        score_keys<kRows>(layout, base, key + row, scores + row * kLine, raised);
      for (; row < keys; ++row) score_keys<1>(layout, base, key + row, scores + row * kLine, raised);
      exponentiate(scores, keys, raised, statistics);
      add_values(layout, base, key / 4, (keys + 3) / 4, statistics, sums);
    }
    store(attention, layout, statistics, base, count, block.output(attention, query));
  }

  template <class Number>
  static void pack_queries(const Attention& attention, const Number* q, int count, const Layout& layout, float* lines,
                           Statistics& statistics) {
    alignas(64) float scales[kLine];
    alignas(64) uint8_t codes[V::kLanes][kDims];
    const int dim = attention.head_dim;
    for (int t = 0; t < kLine; t += V::kLanes) {
      for (int d = 0; d < int(layout.steps) * 4; d += kDims) {
        __m512 square[V::kLanes];
        for (int i = 0; i < V::kLanes; ++i) {
          if (t + i < count) {
            round_part(q + size_t(t + i) * attention.q.token_stride, dim, d, codes[i], &scales[t + i]);
          } else {
            __builtin_memset(codes[i], 128, kDims);
            scales[t + i] = 1.0f;
          }
          square[i] = V::load(codes[i]);
        }
        V::transpose(square);
        for (int i = 0; i < V::kLanes; ++i) V::store(lines + size_t(d / 4 + i) * kLine + t, square[i]);
      }
    }
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) {
      statistics.exponent[v] = V::load(scales + v * V::kLanes) * V::set(attention.scale * kLog2E);
      statistics.largest[v] = V::set(kLowest);
      statistics.sum[v] = V::zero();
    }
  }

  // The codes of numbers d .. d + 63 of a query, 128 above.
  template <class Number>
  static SPARSE_ENGINE_INLINE void round_part(const Number* q, int dim, int d, uint8_t* out, float* scale) {
    if (d == 0) {
      __m512 largest = V::zero();
      for (int i = 0; i < dim; i += V::kLanes) {
        largest = V::max(largest, V::abs(load_numbers(q + i, lanes_left(dim, i))));
      }
      *scale = scale_of(_mm512_reduce_max_ps(largest));
    }
    const __m512 inverse = V::set(1.0f / *scale);
    for (int i = 0; i < kDims; i += V::kLanes) {
      const __m512i codes = _mm512_cvtps_epi32(load_numbers(q + d + i, lanes_left(dim, d + i)) * inverse);
      _mm_store_si128(reinterpret_cast<__m128i*>(out + i),
                      _mm512_cvtepi32_epi8(_mm512_add_epi32(codes, _mm512_set1_epi32(128))));
    }
  }

  // sum[row][v] += four codes of weights[row * row_stride + step * step_stride] with those of lines[step][v].
  template <int Rows>
  static SPARSE_ENGINE_INLINE void accumulate(__m512i (&sum)[Rows][Vectors], const float* weights, size_t row_stride,
                                              size_t step_stride, const float* lines, size_t steps) {
    for (size_t step = 0; step < steps; ++step, lines += kLine, weights += step_stride) {
      __m512i line[Vectors];
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) line[v] = _mm512_load_si512(lines + v * V::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m512i weight = _mm512_castps_si512(V::set(weights[r * row_stride]));
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) add_products(sum[r][v], line[v], weight);
      }
    }
  }

  // One line of scores a key; `largest` is raised to the largest of them.
  template <int Rows>
  static SPARSE_ENGINE_INLINE void score_keys(const Layout& layout, const float* base, size_t key, float* scores,
                                              __m512 (&largest)[Vectors]) {
    const int32_t* const starts = reinterpret_cast<const int32_t*>(base + layout.starts) + key;
    const float* const scales = base + layout.key_scales + key;
    __m512i sum[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_set1_epi32(starts[r]);
    }
    accumulate<Rows>(sum, base + key * layout.steps, layout.steps, 1, base + layout.queries, layout.steps);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512 scale = V::set(scales[r]);
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) {
        const __m512 score = _mm512_cvtepi32_ps(sum[r][v]) * scale;
        V::store(scores + r * kLine + v * V::kLanes, score);
        largest[v] = V::max(score, largest[v]);
      }
    }
  }

  // Replaces scores by round(255 * 2^(exponent * (score - largest))), four keys to a line. A line is written when the
  // four that it takes the place of have been read.
  static void exponentiate(float* scores, int keys, const __m512 (&raised)[Vectors], Statistics& statistics) {
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) {
      float* const column = scores + v * V::kLanes;
      const __m512 exponent = statistics.exponent[v];
      const __m512 rescale = exp2_negative<V, 3>((statistics.largest[v] - raised[v]) * exponent);
      const __m512 offset = V::set(kLog2Of255) - raised[v] * exponent;
      const auto code = [&](int key) __attribute__((always_inline)) {
        const __m512 power = V::multiply_add(V::load(column + key * kLine), exponent, offset);
        return _mm512_cvtps_epi32(exp2_negative<V, 3>(power));
      };
      __m512i sum = _mm512_setzero_si512();
      int key = 0;
      for (; key + 4 <= keys; key += 4) {
        const __m512i a = code(key), b = code(key + 1), c = code(key + 2), d = code(key + 3);
        sum = _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d)));
        const __m512i low = _mm512_or_si512(a, _mm512_slli_epi32(b, 8));
        const __m512i high = _mm512_or_si512(_mm512_slli_epi32(c, 16), _mm512_slli_epi32(d, 24));
        _mm512_store_si512(column + key / 4 * kLine, _mm512_or_si512(low, high));
      }
      if (key < keys) {
        __m512i last = _mm512_setzero_si512();
        for (int i = keys - 1; i >= key; --i) {
          const __m512i one = code(i);
          sum = _mm512_add_epi32(sum, one);
          last = _mm512_or_si512(_mm512_slli_epi32(last, 8), one);
        }
        _mm512_store_si512(column + key / 4 * kLine, last);
      }
      statistics.largest[v] = raised[v];
      statistics.rescale[v] = rescale;
      statistics.sum[v] = V::multiply_add(statistics.sum[v], rescale, _mm512_cvtepi32_ps(sum));
    }
  }

  // sums[d] = rescale * sums[d] + the block's values times its probabilities.
  static void add_values(const Layout& layout, const float* base, size_t group, size_t groups,
                         const Statistics& statistics, float* sums) {
    const float* const values = base + layout.values + group * layout.dims;
    for (size_t d = 0; d < layout.dims; d += kRows, sums += kRows * kLine) {
      __m512i sum[kRows][Vectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_setzero_si512();
      }
      accumulate<kRows>(sum, values + d, 1, layout.dims, base + layout.scores, groups);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) {
          float* const out = sums + r * kLine + v * V::kLanes;
          V::store(out, V::multiply_add(V::load(out), statistics.rescale[v], _mm512_cvtepi32_ps(sum[r][v])));
        }
      }
    }
  }

  // Divides by the sum of the codes, and turns numbers x queries into queries x numbers.
  static void store(const Attention& attention, const Layout& layout, const Statistics& statistics, const float* base,
                    int count, size_t index) {
    const float* const sums = base + layout.sums;
    const float* const scales = base + layout.value_scales;
    const int head_dim = attention.head_dim;
    const size_t stride = attention.width();
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) {
      const __m512 factor = V::set(1.0f) / statistics.sum[v];
      const int queries = lanes_left(count, v * V::kLanes);
      for (int d = 0; d < head_dim; d += V::kLanes) {
        __m512 square[V::kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i) {
          square[i] = factor * V::load(sums + size_t(d + i) * kLine + v * V::kLanes) * V::set(scales[d + i]);
        }
        V::transpose(square);
        const size_t first = index + size_t(v) * V::kLanes * stride + d;
        for (int i = 0; i < queries; ++i) {
          store_output(attention, first + i * stride, square[i], lanes_left(head_dim, d));
        }
      }
    }
  }
};

template <class Number, int Vectors = kVectors>
void run_tile(const Attention& attention, const Layout& layout, const QueryBlock& block, size_t query, int count,
              float* base) {
  if constexpr (Vectors > 1) {
    if (count <= (Vectors - 1) * V::kLanes) {
      return run_tile<Number, Vectors - 1>(attention, layout, block, query, count, base);
    }
  }
  Tile<Vectors>::template run<Number>(attention, layout, block, query, count, base);
}

template <class Number>
void run(const Attention& attention, const QueryBlock& block, void* scratch) {
  const Layout layout(attention);
  float* const base = static_cast<float*>(scratch);
  const Number* const v = block.of<Number>(attention.v);
  const Number* const q = block.of<Number>(attention.q) + block.begin * attention.q.token_stride;
  pack_keys(attention, block.of<Number>(attention.k), v, layout, base);
  pack_values(attention, v, q, block.end - block.begin, layout, base);
  for (size_t query = block.begin; query < block.end; query += kTileQueries) {
    const size_t left = block.end - query;
    run_tile<Number>(attention, layout, block, query, left < size_t(kTileQueries) ? int(left) : kTileQueries, base);
  }
}

}  // namespace

constexpr AttentionKernel kAvx512VnniAttention = {kTileQueries, scratch_bytes, run<float>};
constexpr AttentionKernel kAvx512VnniAttentionOfHalves = {kTileQueries, scratch_bytes, run<uint16_t>};

}  // namespace sparse_engine
