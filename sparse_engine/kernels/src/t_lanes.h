// T-lanes: tokens lie in the lanes. The kernel for more than a dozen tokens.
//
//     X tile, transposed          one output row = a stream of steps        sums
//     k=0  | t0 t1 t2 ... t95 |    (weight, offset of line k) ...            | t0 t1 ... t95 |
//     k=1  | t0 t1 t2 ... t95 |        |            |
//     ...                              v            v
//     k=63 | t0 t1 t2 ... t95 |    sums += weight * line[offset]     one multiply-add per vector of tokens
//
// Each kept weight is broadcast once and multiplied with a line of the tile, whichever line that is: nothing
// is gathered, and the two weights that are zero cost nothing.
//
// Bound: every multiply-add loads its line from L1, and a core with one 512-bit (or two 256-bit) loads per
// cycle issues as many multiply-adds: load and multiply-add ports are full together, at twice the rate of a
// dense product that counts the zeros.
//
// Included by instruction-set files only (see vector_avx512.h). A Format says how operands are multiplied:
//   V                   vector words
//   kLayout             StreamLayout; the tile has kLayout.tile_tokens = kVectors * V::kLanes tokens
//   kAccumulators       sums kept in registers, to cover the latency of a multiply-add
//   multiply_add(sum, weight, x)
//   pack_tile(...)      X -> tile
#pragma once

#include "epilogue.h"
#include "matmul24.h"
#include "packing.h"

namespace sparse_engine {
namespace {

// Depth that is transposed at a time: one KiB of each token's row of X, so that pages and cache lines are
// visited once, in order.
constexpr int kPanelDepth = 256;
// Rows whose sums are finished, and written while still in L1, after the last block of the depth.
constexpr int kStoreRows = 64;

// How far ahead of the inner loop the streams are fetched: five rows, some 1000 cycles.
constexpr int kPrefetchBytes = 1024;

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

template <int I>
struct Index {
  static constexpr int value = I;
};

template <int Count, int I = 0, class Function>
SPARSE_ENGINE_INLINE void unroll(const Function& function) {
  if constexpr (I < Count) {
    function(Index<I>{});
    unroll<Count, I + 1>(function);
  }
}

template <class Format>
struct TokensInLanes {
  using V = typename Format::V;
  using Vector = typename V::Vector;
  static constexpr StreamLayout kLayout = Format::kLayout;
  static constexpr int kTileTokens = kLayout.tile_tokens;
  static constexpr int kVectors = kTileTokens / V::kLanes;
  static constexpr int kVectorBytes = V::kLanes * 4;
  static constexpr int kLineBytes = kTileTokens * 4;
  static constexpr int kTileBlockBytes = kLayout.block_depth / 4 * kLayout.lines_per_group() * kLineBytes;
  static_assert(kTileBlockBytes <= 1 << 16, "an offset has sixteen bits");
  static_assert(kPanelDepth % kLayout.block_depth == 0, "a panel is whole blocks");

  static size_t packed_bytes(int rows, int depth) { return stream_bytes(rows, depth, kLayout); }
  static void pack(const Weights24& weights, void* packed) { pack_streams(weights, kLayout, packed); }

  static size_t scratch_bytes(int, int block_rows) {
    return size_t(kPanelDepth / kLayout.block_depth) * kTileBlockBytes +
           size_t(round_up(block_rows, kStreamRowMultiple)) * kLineBytes;
  }

  static void run(const Product& product, const Block& block, void* scratch) {
    for (size_t token = block.token_begin; token < block.token_end; token += kTileTokens) {
      const size_t left = block.token_end - token;
      const int tokens = left < size_t(kTileTokens) ? int(left) : kTileTokens;
      run_tile(product, block, token, tokens, static_cast<uint8_t*>(scratch));
    }
  }

  // One tile of tokens: block after block of the depth, the sums resting in L2 between blocks.
  static void run_tile(const Product& product, const Block& block, size_t token, int tokens, uint8_t* tile) {
    float* const sums =
        reinterpret_cast<float*>(tile + size_t(kPanelDepth / kLayout.block_depth) * kTileBlockBytes);
    const int padded_rows = round_up(product.rows, kStreamRowMultiple);
    const float* const input = product.input + token * product.depth;
    const uint8_t* streams = static_cast<const uint8_t*>(product.packed);
    for (int begin = 0; begin < product.depth; begin += kLayout.block_depth) {
      const int panel_place = begin % kPanelDepth;
      if (panel_place == 0) {
        Format::pack_tile(input + begin, product.depth, tokens, smaller(kPanelDepth, product.depth - begin),
                          tile);
      }
      const uint8_t* const lines = tile + size_t(panel_place / kLayout.block_depth) * kTileBlockBytes;
      const int steps = stream_steps(product.depth, begin, kLayout.block_depth, kLayout.steps_per_group());
      const size_t row_bytes = size_t(steps) * kStepBytes;
      const uint8_t* const first_row = streams + block.row_begin * row_bytes;
      const bool first = begin == 0;
      if (begin + kLayout.block_depth < product.depth) {
        const int rows = round_up(block.row_end - block.row_begin, kStreamRowMultiple);
        accumulate(tokens, lines, first_row, steps, sums, rows, first);
      } else {
        finish(product, block, token, tokens, lines, first_row, steps, sums, first);
      }
      streams += row_bytes * padded_rows;
    }
  }

  // The last block of the depth: sums are stored as soon as they are complete.
  static void finish(const Product& product, const Block& block, size_t token, int tokens,
                     const uint8_t* lines, const uint8_t* streams, int steps, float* sums, bool first) {
    for (int row = block.row_begin; row < block.row_end; row += kStoreRows) {
      const int rows = smaller(kStoreRows, block.row_end - row);
      const int padded_rows = round_up(rows, kStreamRowMultiple);
      accumulate(tokens, lines, streams, steps, sums, padded_rows, first);
      store_sums(product, token, tokens, row, rows, sums);
      streams += size_t(padded_rows) * steps * kStepBytes;
      sums += size_t(padded_rows) * kTileTokens;
    }
  }

  static void store_sums(const Product& product, size_t token, int tokens, int row, int rows,
                         const float* sums) {
    with_activation(product.epilogue.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      for (int t = 0; t < tokens; t += V::kLanes) {
        for (int r = 0; r < rows; r += V::kLanes) {
          store_square<kActivation>(product, token + t, smaller(V::kLanes, tokens - t), row + r,
                                    smaller(V::kLanes, rows - r), sums + size_t(r) * kTileTokens + t);
        }
      }
    });
  }

  // kLanes rows of sums, kLanes tokens each, become kLanes tokens of kLanes rows each.
  template <Activation A>
  static SPARSE_ENGINE_INLINE void store_square(const Product& product, size_t token, int tokens, int row,
                                                int rows, const float* sums) {
    Vector square[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) square[i] = V::load(sums + size_t(i) * kTileTokens);
    V::transpose(square);
    const Vector bias = load_bias<V>(product, row, rows);
    size_t index = token * product.rows + row;
    if (tokens == V::kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < V::kLanes; ++i, index += product.rows) {
        store_rows<V, A>(product, index, square[i], bias, rows);
      }
    } else {
      for (int i = 0; i < tokens; ++i, index += product.rows) {
        store_rows<V, A>(product, index, square[i], bias, rows);
      }
    }
  }

  // Picks the kernel that is as wide as the tile has tokens.
  template <int Vectors = kVectors>
  static void accumulate(int tokens, const uint8_t* lines, const uint8_t* streams, int steps, float* sums,
                         int rows, bool first) {
    if constexpr (Vectors > 1) {
      if (tokens <= (Vectors - 1) * V::kLanes) {
        return accumulate<Vectors - 1>(tokens, lines, streams, steps, sums, rows, first);
      }
    }
    accumulate_rows<Vectors>(lines, streams, steps, sums, rows, first);
  }

  // Rows that are computed together, so that enough independent sums are in flight: a power of two.
  static constexpr int rows_at_once(int vectors) {
    int rows = 8;
    while (rows > 1 && rows * vectors > Format::kAccumulators) rows /= 2;
    return rows;
  }

  // The inner loop. sums[row] (+)= weights of the row * lines.
  template <int Vectors>
  static __attribute__((noinline)) void accumulate_rows(const uint8_t* lines, const uint8_t* streams,
                                                        int steps, float* sums, int rows, bool first) {
    constexpr int kRows = rows_at_once(Vectors);
    const size_t row_bytes = size_t(steps) * kStepBytes;
    for (int row = 0; row < rows; row += kRows, streams += kRows * row_bytes, sums += kRows * kTileTokens) {
      Vector sum[kRows][Vectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) {
          sum[r][v] = first ? V::zero() : V::load(sums + r * kTileTokens + v * V::kLanes);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) prefetch_row(streams + r * row_bytes, row_bytes);
      for (int step = 0; step < steps; step += 4) {
        Vector four_weights[kRows];
        uint64_t four_offsets[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const uint8_t* const stream = streams + r * row_bytes;
          four_weights[r] = V::repeat_four(stream + step * 4);
          four_offsets[r] = load_four_offsets(stream + steps * 4 + step * 2);
        }
        unroll<4>([&](auto index) __attribute__((always_inline)) {
          constexpr int kIndex = decltype(index)::value;
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const uint8_t* const line = lines + take_offset(four_offsets[r]);
            const Vector weight = V::template one_of_four<kIndex>(four_weights[r]);
#pragma GCC unroll 16
            for (int v = 0; v < Vectors; ++v) {
              sum[r][v] = Format::multiply_add(sum[r][v], weight, V::load(line + v * kVectorBytes));
            }
          }
        });
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) V::store(sums + r * kTileTokens + v * V::kLanes, sum[r][v]);
      }
    }
  }

  // Streams come from L2 or further and are read once per tile. The hardware fetches them too, but not always
  // far enough ahead: 2% at 257 tokens, measured.
  static SPARSE_ENGINE_INLINE void prefetch_row(const uint8_t* stream, size_t row_bytes) {
    for (size_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(stream + kPrefetchBytes + byte);
  }

  // Offsets are loaded four at a time and shifted out of a register: a load each would take the port that the
  // multiply-adds are waiting for.
  static SPARSE_ENGINE_INLINE uint64_t load_four_offsets(const uint8_t* offsets) {
    uint64_t four;
    __builtin_memcpy(&four, offsets, sizeof four);
    return four;
  }
  static SPARSE_ENGINE_INLINE uint16_t take_offset(uint64_t& four) {
    const uint16_t offset = static_cast<uint16_t>(four);
    four >>= 16;
    asm volatile("" : "+r"(four));  // or the compiler would turn the shifts back into loads
    return offset;
  }
};

template <class Format>
constexpr Tactic tokens_in_lanes(Tier tier) {
  using Kernel = TokensInLanes<Format>;
  return {tier,       Lanes::kTokens,       Format::V::kLanes, Kernel::kTileTokens,
          kStoreRows, Kernel::packed_bytes, Kernel::pack,      Kernel::scratch_bytes,
          Kernel::run};
}

// fp32 products: a line of the tile is one k, an element one float.
template <class Vectors, int Accumulators>
struct Float32Streams {
  using V = Vectors;
  // 96 tokens x 64 k = 24 KiB: the tile of one block leaves a quarter of a 32 KiB L1 to streams and sums.
  static constexpr StreamLayout kLayout = {Operand::kFloat32, 96, 64};
  static constexpr int kAccumulators = Accumulators;

  static SPARSE_ENGINE_INLINE typename V::Vector multiply_add(typename V::Vector sum,
                                                              typename V::Vector weight,
                                                              typename V::Vector x) {
    return V::multiply_add(weight, x, sum);
  }

  // Transposes depth x tokens of `input` into lines, square by square; what is missing becomes zero.
  static void pack_tile(const float* input, size_t stride, int tokens, int depth, uint8_t* tile) {
    float* const lines = reinterpret_cast<float*>(tile);
    for (int t = 0; t < tokens; t += V::kLanes) {
      const int rows = smaller(V::kLanes, tokens - t);
      for (int k = 0; k < depth; k += V::kLanes) {
        typename V::Vector square[V::kLanes];
        const float* const corner = input + t * stride + k;
        const int count = smaller(V::kLanes, depth - k);
        if (rows == V::kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < V::kLanes; ++i) square[i] = V::load_first(corner + i * stride, count);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < V::kLanes; ++i) {
            square[i] = i < rows ? V::load_first(corner + i * stride, count) : V::zero();
          }
        }
        V::transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i)
          V::store(lines + size_t(k + i) * kLayout.tile_tokens + t, square[i]);
      }
    }
  }
};

}  // namespace
}  // namespace sparse_engine
