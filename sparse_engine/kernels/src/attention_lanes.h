// Attention with queries in the lanes: the softmax of a query never leaves its lane.
//
//     q tile, transposed     one key                  scores of the tile       one d of v
//     d=0 | q0 q1 ... q47 |  k[0] k[1] ... k[63]      key 0 | q0 q1 ... q47 |  v[0][d] v[1][d] ...
//     d=1 | q0 q1 ... q47 |    |    |                 key 1 | q0 q1 ... q47 |    |       |
//     ...                      v    v                 ...                        v       v
//     score[key] = sum over d of k[d] * line d        y[d] = sum over keys of v[key][d] * line key
//
// Both products are the same loop: an element is broadcast out of memory and multiplied with a line. Keys come
// in blocks small enough for L1. When a block raises a query's largest score, what was summed before is scaled
// down (online softmax: Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, Dao et al., arXiv 2205.14135).
//
// Bound: multiply-adds, kRows x kVectors of them for kRows + kVectors loads, and about a dozen instructions per
// vector of scores for the exponential, next to 2 head_dim multiply-adds of fp32 (or head_dim of bf16 pairs). On a
// Zen 4 the products run at the peak rate of multiply-adds; everything else is a quarter of the time in bf16.
//
// Included by instruction-set files only (see vector_avx512.h). A Format says how operands are laid out; one is
// four bytes, a float or a pair of bfloat16:
//   V                       vector words
//   kRows, kVectors         the block of sums held in registers; kRows divides V::kLanes
//   kKeysPerOperand         1 or 2
//   kDegree                 of the polynomial for 2^r: what the operands' precision deserves
//   padded_steps(head_dim)  operands in a row of q or k
//   multiply_add(sum, weight, line)
//   pack_keys, pack_values, pack_queries, pack_probabilities
//   Number                  what q, k and v are: float, or uint16_t for bfloat16
//   store_output(attention, index, numbers, count)
#pragma once

#include "attention.h"
#include "exponential.h"

namespace sparse_engine {
namespace {

constexpr int kBlockKeys = 96;  // even: a pair of keys does not straddle two blocks
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -3.40282347e38f;

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A token's part of a head, on its way to L1: tokens lie so far apart that nothing else fetches the next one's.
template <class Number>
SPARSE_ENGINE_INLINE void fetch_ahead(const Number* token, int head_dim) {
  const char* const begin = reinterpret_cast<const char*>(token);
  for (size_t byte = 0; byte < head_dim * sizeof(Number); byte += 64) __builtin_prefetch(begin + byte);
}
constexpr size_t kTokensAhead = 12;

template <class Format>
struct QueriesInLanes {
  using V = typename Format::V;
  using Vector = typename V::Vector;
  using Number = typename Format::Number;
  static constexpr int kRows = Format::kRows;
  static constexpr int kVectors = Format::kVectors;
  static constexpr int kTileQueries = kVectors * V::kLanes;
  static_assert(V::kLanes % kRows == 0, "dims are padded to whole vectors, and computed kRows at a time");

  // Where things lie in the scratch, in operands.
  struct Layout {
    explicit Layout(const Attention& attention)
        : key_stride(Format::padded_steps(attention.head_dim)),
          value_stride(round_up(attention.head_dim, V::kLanes)),
          values(round_up(attention.keys * key_stride, 16)),
          queries(values + round_up(attention.keys, 2) / Format::kKeysPerOperand * value_stride),
          scores(queries + key_stride * kTileQueries),
          sums(scores + size_t(kBlockKeys) * kTileQueries),
          end(sums + value_stride * kTileQueries) {}
    size_t key_stride, value_stride;
    size_t values, queries, scores, sums, end;
  };

  static size_t scratch_bytes(const Attention& attention) { return Layout(attention).end * sizeof(float); }

  static void run(const Attention& attention, const QueryBlock& block, void* scratch) {
    const Layout layout(attention);
    float* const base = static_cast<float*>(scratch);
    const HeadVectors &k = attention.k, &v = attention.v;
    const Number* const values = block.template of<Number>(v);
    for (size_t i = 0; i < kTokensAhead && i < attention.keys; ++i) {
      fetch_ahead(values + i * v.token_stride, attention.head_dim);
    }
    Format::pack_keys(block.template of<Number>(k), k.token_stride, attention.keys, attention.head_dim, base);
    Format::pack_values(values, v.token_stride, attention.keys, attention.head_dim, base + layout.values);
    for (size_t query = block.begin; query < block.end; query += kTileQueries) {
      const size_t left = block.end - query;
      const int count = left < size_t(kTileQueries) ? int(left) : kTileQueries;
      run_tile(attention, layout, block, query, count, base);
    }
  }

  // Picks the kernel that is as wide as the tile has queries.
  template <int Vectors = kVectors>
  static void run_tile(const Attention& attention, const Layout& layout, const QueryBlock& block, size_t query,
                       int count, float* base) {
    if constexpr (Vectors > 1) {
      if (count <= (Vectors - 1) * V::kLanes) {
        return run_tile<Vectors - 1>(attention, layout, block, query, count, base);
      }
    }
    Tile<Vectors>::run(attention, layout, block, query, count, base);
  }

  template <int Vectors>
  struct Tile {
    static constexpr int kLine = Vectors * V::kLanes;

    // The state of the online softmax, of each query.
    struct Statistics {
      Vector largest[Vectors];  // score so far
      Vector sum[Vectors];      // of the exponentials so far
      Vector rescale[Vectors];  // what the last block made of earlier exponentials
    };

    static void run(const Attention& attention, const Layout& layout, const QueryBlock& block, size_t query, int count,
                    float* base) {
      float* const queries = base + layout.queries;
      float* const scores = base + layout.scores;
      float* const sums = base + layout.sums;
      const size_t q_stride = attention.q.token_stride;
      const Number* const q = block.template of<Number>(attention.q) + query * q_stride;
      const float* const bias = block.bias(attention, query);
      const Vector exponent = V::set(bias ? kLog2E : attention.scale * kLog2E);
      Format::template pack_queries<Vectors>(q, q_stride, count, attention.head_dim, queries);
      Statistics statistics;
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        statistics.largest[v] = V::set(kLowest);
        statistics.sum[v] = V::zero();
      }
      for (size_t i = 0; i < layout.value_stride * Vectors; ++i) V::store(sums + i * V::kLanes, V::zero());
      for (size_t key = 0; key < attention.keys; key += kBlockKeys) {
        const size_t left = attention.keys - key;
        const int keys = left < size_t(kBlockKeys) ? int(left) : kBlockKeys;
        const float* const values = base + layout.values + key / Format::kKeysPerOperand * layout.value_stride;
        Vector raised[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) raised[v] = statistics.largest[v];
        const float* const block_keys = base + key * layout.key_stride;
        if (bias) {
          Vector products[Vectors];  // the largest of them, which nobody asks for
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) products[v] = V::zero();
          compute_scores(block_keys, layout.key_stride, keys, queries, scores, products);
          add_bias(bias + key, attention.bias.query_stride, count, keys, V::set(attention.scale), scores, raised);
        } else {
          compute_scores(block_keys, layout.key_stride, keys, queries, scores, raised);
        }
        exponentiate(scores, keys, exponent, raised, statistics);
        add_values(values, layout.value_stride, keys, scores, statistics, sums);
      }
      store(attention, statistics, sums, count, block.output(attention, query));
    }

    // sum[row][v] += weights[row * row_stride + step * step_stride] * lines[step][v], over the steps.
    template <int Rows>
    static SPARSE_ENGINE_INLINE void accumulate(Vector (&sum)[Rows][Vectors], const float* weights, size_t row_stride,
                                                size_t step_stride, const float* lines, size_t steps) {
      for (size_t step = 0; step < steps; ++step, lines += kLine, weights += step_stride) {
        Vector line[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) line[v] = V::load(lines + v * V::kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const Vector weight = V::set(weights[r * row_stride]);
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) sum[r][v] = Format::multiply_add(sum[r][v], weight, line[v]);
        }
      }
    }

    // One line of scores per key; `largest` is raised to the largest of them, which passes over NaN.
    static void compute_scores(const float* keys, size_t stride, int count, const float* queries, float* scores,
                               Vector (&largest)[Vectors]) {
      int key = 0;
      for (; key + kRows <= count; key += kRows) {
        score_rows<kRows>(keys + key * stride, stride, queries, scores + key * kLine, largest);
      }
      for (; key < count; ++key) score_rows<1>(keys + key * stride, stride, queries, scores + key * kLine, largest);
    }

    template <int Rows>
    static SPARSE_ENGINE_INLINE void score_rows(const float* keys, size_t stride, const float* queries, float* scores,
                                                Vector (&largest)[Vectors]) {
      Vector sum[Rows][Vectors];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] = V::zero();
      }
      accumulate<Rows>(sum, keys, stride, 1, queries, stride);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          V::store(scores + r * kLine + v * V::kLanes, sum[r][v]);
          largest[v] = V::max(sum[r][v], largest[v]);
        }
      }
    }

    // scores = scale * scores + bias; `largest` is raised as above. Rows of the bias, one a query, are turned into
    // lines of a key each, as many at a time as a vector has lanes.
    static void add_bias(const float* bias, size_t query_stride, int count, int keys, Vector scale, float* scores,
                         Vector (&largest)[Vectors]) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        float* const column = scores + v * V::kLanes;
        const auto add = [&](int key, Vector term) __attribute__((always_inline)) {
          const Vector score = V::multiply_add(V::load(column + key * kLine), scale, term);
          V::store(column + key * kLine, score);
          largest[v] = V::max(score, largest[v]);
        };
        if (query_stride == 0) {
          for (int key = 0; key < keys; ++key) add(key, V::set(bias[key]));
          continue;
        }
        const float* const rows = bias + size_t(v) * V::kLanes * query_stride;
        for (int key = 0; key < keys; key += V::kLanes) {
          const int width = keys - key < V::kLanes ? keys - key : V::kLanes;
          Vector square[V::kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < V::kLanes; ++i) {
            const bool there = v * V::kLanes + i < count;
            square[i] = there ? V::load_first(rows + size_t(i) * query_stride + key, width) : V::zero();
          }
          V::transpose(square);
          for (int i = 0; i < width; ++i) add(key + i, square[i]);
        }
      }
    }

    // Replaces scores by 2^(exponent * (score - largest)), as operands. `raised`: the largest, of this block too.
    static void exponentiate(float* scores, int keys, Vector exponent, const Vector (&raised)[Vectors],
                             Statistics& statistics) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        float* const column = scores + v * V::kLanes;
        const Vector largest = raised[v];
        const Vector rescale = exp2_negative<V, Format::kDegree>((statistics.largest[v] - largest) * exponent);
        const auto probability = [&](int key) __attribute__((always_inline)) {
          const Vector score = V::load(column + key * kLine);
          return exp2_negative<V, Format::kDegree>((score - largest) * exponent);
        };
        const Vector sum = Format::pack_probabilities(probability, keys, column, kLine);
        statistics.largest[v] = largest;
        statistics.rescale[v] = rescale;
        statistics.sum[v] = V::multiply_add(statistics.sum[v], rescale, sum);
      }
    }

    // sums[d] = rescale * sums[d] + the block's values times its probabilities.
    static void add_values(const float* values, size_t stride, int keys, const float* probabilities,
                           const Statistics& statistics, float* sums) {
      const size_t steps = (keys + Format::kKeysPerOperand - 1) / Format::kKeysPerOperand;
      for (size_t d = 0; d < stride; d += kRows, sums += kRows * kLine) {
        Vector sum[kRows][Vectors];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) {
            sum[r][v] = statistics.rescale[v] * V::load(sums + r * kLine + v * V::kLanes);
          }
        }
        accumulate<kRows>(sum, values + d, 1, stride, probabilities, steps);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) V::store(sums + r * kLine + v * V::kLanes, sum[r][v]);
        }
      }
    }

    // Divides by the sum of the exponentials, and turns dims x queries into queries x dims.
    static void store(const Attention& attention, const Statistics& statistics, const float* sums, int count,
                      size_t index) {
      const int head_dim = attention.head_dim;
      const size_t stride = attention.width();
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const Vector factor = V::set(1.0f) / statistics.sum[v];
        const int left = count - v * V::kLanes;
        const int queries = left < V::kLanes ? left : V::kLanes;
        for (int d = 0; d < head_dim; d += V::kLanes) {
          Vector square[V::kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < V::kLanes; ++i) {
            square[i] = factor * V::load(sums + size_t(d + i) * kLine + v * V::kLanes);
          }
          V::transpose(square);
          const int dims = head_dim - d < V::kLanes ? head_dim - d : V::kLanes;
          const size_t first = index + size_t(v) * V::kLanes * stride + d;
          for (int i = 0; i < queries; ++i) Format::store_output(attention, first + i * stride, square[i], dims);
        }
      }
    }
  };
};

template <class Format>
constexpr AttentionKernel queries_in_lanes() {
  using Kernel = QueriesInLanes<Format>;
  return {Kernel::kTileQueries, Kernel::scratch_bytes, Kernel::run};
}

}  // namespace
}  // namespace sparse_engine
