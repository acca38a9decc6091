// T-lanes: tokens lie in the lanes. The kernel for more than a dozen tokens.
//
//     X tile, transposed          a pair of output rows = a stream of steps      sums of both rows
//     k=0  | t0 t1 t2 ... t95 |    shared: (two weights, offset of line k)        | t0 t1 ... t95 |
//     k=1  | t0 t1 t2 ... t95 |            |                  |                   | t0 t1 ... t95 |
//     ...                                  v                  v
//     k=63 | t0 t1 t2 ... t95 |    line = tile[offset];  sums of each row += its weight * line
//                                  then each row's other steps: sums += weight * tile[offset]
//
// Each kept weight is broadcast once and multiplied with a line of the tile, whichever line that is: nothing
// is gathered, and the two weights that are zero cost nothing.
//
// Bound: a core issues as many vector loads per cycle as multiply-adds (one of 512 bits on Zen 4), and the weights,
// offsets and sums are loads too. If every multiply-add loaded its line, loads would be the bound, and were: 195 of
// 236 GFLOP/s. Two rows need the same line for half of their weights, on average (packing.h); loaded once for both,
// the loads are a quarter fewer, and the bound is the multiply-adds, at twice the rate of a dense product that counts
// the zeros: the inner loop reaches 227.
//
// Included by instruction-set files only (see vector_avx512.h). A Format says how operands are multiplied:
//   V                   vector words
//   kLayout             StreamLayout; the tile has kLayout.tile_tokens = kVectors * V::kLanes tokens
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

// How far ahead of the inner loop the streams are fetched: five pairs, some 2000 cycles.
constexpr int kPrefetchBytes = 2048;

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
  static_assert(kLayout.block_depth / 4 * kLayout.lines_per_group() <= kMostLines, "a mask has room for all lines");
  static_assert(kLayout.block_depth / 4 * kLayout.steps_per_group() <= kMostSteps, "so has a row for all steps");
  static_assert(kPanelDepth % kLayout.block_depth == 0, "a panel is whole blocks");
  static size_t packed_bytes(int rows, int depth) { return stream_bytes(rows, depth, kLayout); }
  static void pack(const Weights24& weights, void* packed) { pack_streams(weights, kLayout, packed); }

  static size_t scratch_bytes(int, int block_rows) {
    return tile_bytes(kPanelDepth) + size_t(round_up(block_rows, kStreamRowMultiple)) * kLineBytes;
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
    float* const sums = reinterpret_cast<float*>(tile + tile_bytes(kPanelDepth));
    for (int begin = 0; begin < product.depth; begin += kLayout.block_depth) {
      const int place = begin % kPanelDepth;
      if (place == 0) pack_panel(product, token, tokens, begin, tile);
      multiply_block(
          product, begin, tile + tile_bytes(place), tokens, block.row_begin, block.row_end, sums,
          [&](int row, int rows, const float* window) { store_sums(product, token, tokens, row, rows, window); });
    }
  }

  // Two products in a row: kPanelDepth rows of the first are finished, become the lines of a tile, and are multiplied
  // by the second's weights. What is between them is neither transposed nor written to memory.
  static void run_pair(const Product& first, const Product& second, size_t token_begin, size_t token_end,
                       void* scratch) {
    for (size_t token = token_begin; token < token_end; token += kTileTokens) {
      const size_t left = token_end - token;
      const int tokens = left < size_t(kTileTokens) ? int(left) : kTileTokens;
      run_pair_tile(first, second, token, tokens, static_cast<uint8_t*>(scratch));
    }
  }

  static size_t pair_scratch_bytes(const Product& first, const Product& second) {
    return tile_bytes(round_up(first.depth, kPanelDepth)) + tile_bytes(kPanelDepth) +
           size_t(kPanelDepth + round_up(second.rows, kStreamRowMultiple)) * kLineBytes;
  }

  static void run_pair_tile(const Product& first, const Product& second, size_t token, int tokens, uint8_t* tile) {
    uint8_t* const hidden = tile + tile_bytes(round_up(first.depth, kPanelDepth));
    float* const hidden_sums = reinterpret_cast<float*>(hidden + tile_bytes(kPanelDepth));
    float* const sums = hidden_sums + size_t(kPanelDepth) * kTileTokens;
    for (int begin = 0; begin < first.depth; begin += kPanelDepth) {
      pack_panel(first, token, tokens, begin, tile + tile_bytes(begin));
    }
    for (int panel = 0; panel < first.rows; panel += kPanelDepth) {
      const int panel_end = smaller(panel + kPanelDepth, first.rows);
      for (int begin = 0; begin < first.depth; begin += kLayout.block_depth) {
        multiply_block(first, begin, tile + tile_bytes(begin), tokens, panel, panel_end, hidden_sums,
                       [&](int row, int rows, const float* window) {
                         store_lines(first, tokens, row, rows, window, hidden + tile_bytes(row - panel));
                       });
      }
      for (int begin = panel; begin < panel_end; begin += kLayout.block_depth) {
        multiply_block(
            second, begin, hidden + tile_bytes(begin - panel), tokens, 0, second.rows, sums,
            [&](int row, int rows, const float* window) { store_sums(second, token, tokens, row, rows, window); });
      }
    }
  }

  static constexpr size_t tile_bytes(int depth) { return size_t(depth / 4) * kLayout.lines_per_group() * kLineBytes; }

  static void pack_panel(const Product& product, size_t token, int tokens, int begin, uint8_t* tile) {
    Format::pack_tile(product.input + token * product.depth + begin, product.depth, tokens,
                      smaller(kPanelDepth, product.depth - begin), tile);
  }

  // Adds one block of the depth to the sums of some rows. After the last block each window's sums are finished, and
  // finish(row, rows, sums) is called while they are still in L1.
  template <class Finish>
  static SPARSE_ENGINE_INLINE void multiply_block(const Product& product, int begin, const uint8_t* lines, int tokens,
                                                  int row_begin, int row_end, float* sums, const Finish& finish) {
    const size_t pairs = round_up(product.rows, kStreamRowMultiple) / 2;
    const int full = stream_steps(product.depth, 0, kLayout.block_depth, kLayout.steps_per_group());
    const int steps = stream_steps(product.depth, begin, kLayout.block_depth, kLayout.steps_per_group());
    const uint8_t* const streams =
        static_cast<const uint8_t*>(product.packed) + begin / kLayout.block_depth * pairs * pair_bytes(full);
    const bool last = begin + kLayout.block_depth >= product.depth;
    for (int row = row_begin; row < row_end; row += kWindowRows) {
      const int rows = smaller(kWindowRows, row_end - row);
      float* const window = sums + size_t(row - row_begin) * kTileTokens;
      accumulate(tokens, lines, streams + row / 2 * pair_bytes(steps), steps, window,
                 round_up(rows, kStreamRowMultiple) / 2, begin == 0);
      if (last) finish(row, rows, window);
    }
  }

  // Finished rows as lines of the next product's tile.
  static void store_lines(const Product& product, int tokens, int row, int rows, const float* sums, uint8_t* lines) {
    with_activation(product.epilogue.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      const float* const bias = product.epilogue.bias;
      for (int r = 0; r < rows; r += 4) {
        for (int t = 0; t < tokens; t += V::kLanes) {
          Vector four[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const Vector sum = V::load(sums + size_t(r + i) * kTileTokens + t);
            four[i] = activate<V, kLayout.operand, kActivation>(bias ? sum + V::set(bias[row + r + i]) : sum);
          }
          Format::store_group(lines + tile_bytes(r) + size_t(t) * 4, four);
        }
      }
    });
  }

  static void store_sums(const Product& product, size_t token, int tokens, int row, int rows, const float* sums) {
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
  static SPARSE_ENGINE_INLINE void store_square(const Product& product, size_t token, int tokens, int row, int rows,
                                                const float* sums) {
    Vector square[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) square[i] = V::load(sums + size_t(i) * kTileTokens);
    V::transpose(square);
    const Vector bias = load_bias<V>(product, row, rows);
    size_t index = token * product.rows + row;
    if (tokens == V::kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < V::kLanes; ++i, index += product.rows) {
        store_rows<V, kLayout.operand, A>(product, index, square[i], bias, rows);
      }
    } else {
      for (int i = 0; i < tokens; ++i, index += product.rows) {
        store_rows<V, kLayout.operand, A>(product, index, square[i], bias, rows);
      }
    }
  }

  // Picks the kernel that is as wide as the tile has tokens.
  template <int Vectors = kVectors>
  static void accumulate(int tokens, const uint8_t* lines, const uint8_t* streams, int steps, float* sums, int pairs,
                         bool first) {
    if constexpr (Vectors > 1) {
      if (tokens <= (Vectors - 1) * V::kLanes) {
        return accumulate<Vectors - 1>(tokens, lines, streams, steps, sums, pairs, first);
      }
    }
    accumulate_pairs<Vectors>(lines, streams, steps, sums, pairs, first);
  }

  // The inner loop. Of each pair of rows: sums[row] (+)= weights of the row * lines.
  template <int Vectors>
  static __attribute__((noinline)) void accumulate_pairs(const uint8_t* lines, const uint8_t* streams, int steps,
                                                         float* sums, int pairs, bool first) {
    const size_t bytes = pair_bytes(steps);
    for (int pair = 0; pair < pairs; ++pair, streams += bytes) {
      PairHead head;
      __builtin_memcpy(&head, streams + bytes - sizeof head, sizeof head);
      prefetch(streams + kPrefetchBytes, bytes);
      Vector sum[2][Vectors];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          sum[r][v] = first ? V::zero() : V::load(sums + head.rows[r] * kTileTokens + v * V::kLanes);
        }
      }
      const uint8_t* weights = streams;
      const uint8_t* offsets = streams + size_t(steps) * 8;
      int chunk = 0;
      for (; chunk < head.shared_chunks; ++chunk, weights += 8 * kStepChunk, offsets += 2 * kStepChunk) {
        shared_steps(sum, lines, weights, offsets);
      }
      for (; chunk < steps / kStepChunk; ++chunk, weights += 8 * kStepChunk, offsets += 4 * kStepChunk) {
        separate_steps(sum, lines, weights, offsets);
      }
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          V::store(sums + head.rows[r] * kTileTokens + v * V::kLanes, sum[r][v]);
        }
      }
    }
  }

  // A chunk of steps on lines that both rows want.
  template <int Vectors>
  static SPARSE_ENGINE_INLINE void shared_steps(Vector (&sum)[2][Vectors], const uint8_t* lines, const uint8_t* weights,
                                                const uint8_t* offsets) {
    const typename V::FourWeights four[2] = {V::FourWeights::load(weights), V::FourWeights::load(weights + 16)};
    uint64_t four_offsets = load_four_offsets(offsets);
    unroll<kStepChunk>([&](auto index) __attribute__((always_inline)) {
      constexpr int kIndex = decltype(index)::value;
      const uint8_t* const line = lines + take_offset(four_offsets);
      const Vector weight[2] = {four[0].template get<kIndex>(), four[1].template get<kIndex>()};
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const Vector x = V::load_once(line + v * kVectorBytes);
        sum[0][v] = Format::multiply_add(sum[0][v], weight[0], x);
        sum[1][v] = Format::multiply_add(sum[1][v], weight[1], x);
      }
    });
  }

  // A chunk of steps of each row, on lines of its own.
  template <int Vectors>
  static SPARSE_ENGINE_INLINE void separate_steps(Vector (&sum)[2][Vectors], const uint8_t* lines,
                                                  const uint8_t* weights, const uint8_t* offsets) {
    const typename V::FourWeights four[2] = {V::FourWeights::load(weights), V::FourWeights::load(weights + 16)};
    uint64_t four_offsets[2] = {load_four_offsets(offsets), load_four_offsets(offsets + 8)};
    unroll<kStepChunk>([&](auto index) __attribute__((always_inline)) {
      constexpr int kIndex = decltype(index)::value;
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const uint8_t* const line = lines + take_offset(four_offsets[r]);
        const Vector weight = four[r].template get<kIndex>();
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          sum[r][v] = Format::multiply_add(sum[r][v], weight, V::load(line + v * kVectorBytes));
        }
      }
    });
  }

  // Streams come from L2 or further and are read once per tile. The hardware fetches them too, but not always
  // far enough ahead: 2% at 257 tokens, measured.
  static SPARSE_ENGINE_INLINE void prefetch(const uint8_t* stream, size_t bytes) {
    for (size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(stream + byte);
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
  return {tier,
          Lanes::kTokens,
          Format::V::kLanes,
          Kernel::kTileTokens,
          kWindowRows,
          Kernel::packed_bytes,
          Kernel::pack,
          Kernel::scratch_bytes,
          Kernel::run,
          Kernel::pair_scratch_bytes,
          Kernel::run_pair};
}

// fp32 products: a line of the tile is one k, an element one float.
template <class Vectors, int TileVectors>
struct Float32Streams {
  using V = Vectors;
  // At most 24 KiB: the tile of one block leaves a quarter of a 32 KiB L1 to streams and sums.
  static constexpr int kTileTokens = TileVectors * V::kLanes;
  static constexpr int kBlockDepth = smaller(24 * 1024 / (kTileTokens * 4), kMostSteps * 2);
  static constexpr StreamLayout kLayout = {Operand::kFloat32, kTileTokens, kBlockDepth};

  static SPARSE_ENGINE_INLINE typename V::Vector multiply_add(typename V::Vector sum, typename V::Vector weight,
                                                              typename V::Vector x) {
    return V::multiply_add(weight, x, sum);
  }

  // Four k of sixteen tokens.
  static SPARSE_ENGINE_INLINE void store_group(uint8_t* lines, const typename V::Vector (&four)[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) V::store(lines + i * kLayout.tile_tokens * 4, four[i]);
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
        for (int i = 0; i < V::kLanes; ++i) V::store(lines + size_t(k + i) * kLayout.tile_tokens + t, square[i]);
      }
    }
  }
};

}  // namespace
}  // namespace sparse_engine
