// R-lanes: output rows lie in the lanes, and a whole register of a token's x is permuted at once.
//
//     a register of one token:          | x0 x1 x2 x3 ... x31 |      32 numbers in bf16, 16 in fp32
//     what each row keeps of a group:   |  0  2  1  3 ...     |      bf16: a pair; fp32: one of its two
//     chosen by one permutation:        | x0 x2 x1 x3 ...     |   * weights of the rows -> sums
//
// A step is one permutation and one multiply-add. Its indices and weights are loaded once for eight tokens, whose
// registers and sums stay put; a full register is eight steps. X is read as it lies, a token's numbers side by side: no
// lines, no six-line tile. A block of the depth is so many registers that the stream of sixteen rows stays in L1 while all
// tokens of the tile go past it.
//
// Bound: as many permutations as multiply-adds. A Zen 5 issues two 512-bit ones of each per cycle, so that a 2:4 product
// takes half the instructions of a dense one on each port; where a core has a single port for permutations (Intel), no
// gain over dense products is expected: a layer's lanes are timed.
//
// Included by instruction-set files only. A Format says how operands lie and are multiplied:
//   V                        vector words; rows of a panel = V::kLanes
//   kOperand                 kFloat32 or kBfloat16
//   Register, load(p), pick_and_add(sum, weights, indices, x)
//   convert_tokens(...)      rows of X -> registers
//   convert_pixels(...)      sixteen pixels of an image's channels -> registers
#pragma once

#include "epilogue.h"
#include "matmul24.h"
#include "packing.h"

namespace sparse_engine {
namespace {

// The inner loops of products and convolutions: see the text above. A tap is a place that all of a token's channels are
// read at; a product has one.
template <class Format>
struct RegistersInLanes {
  using V = typename Format::V;
  using Vector = typename V::Vector;
  static constexpr RegisterLayout kLayout = {Format::kOperand, V::kLanes};
  static constexpr int kOctet = 8;       // tokens whose sums are in registers
  static constexpr int kTileTokens = 96;
  static constexpr int kRegisterBytes = V::kLanes * 4;

  static constexpr size_t token_bytes(int channels) { return size_t(kLayout.registers(channels)) * kRegisterBytes; }

  // Where each tap of each token of the tile is read: [taps][kTileTokens].
  using Places = const uint8_t* const*;

  // All rows of a block of output rows for one tile of tokens. finish(row, sums) is called for each panel of V::kLanes
  // rows: sums [token][V::kLanes].
  template <class Finish>
  static SPARSE_ENGINE_INLINE void multiply(const Product& product, int taps, int channels, Places places, int tokens,
                                            int row_begin, int row_end, float* sums, const Finish& finish) {
    const RegisterWalk walk = {kLayout, taps, channels};
    const uint8_t* block = static_cast<const uint8_t*>(product.packed);
    const int panels = (product.rows + V::kLanes - 1) / V::kLanes;
    for (int begin = 0; begin < walk.registers(); begin += kBlockRegisters) {
      const int end = begin + kBlockRegisters < walk.registers() ? begin + kBlockRegisters : walk.registers();
      const size_t bytes = walk.bytes(begin, end);
      for (int row = row_begin; row < row_end; row += V::kLanes) {
        float* const panel_sums = sums + size_t(row - row_begin) * kTileTokens;
        const uint8_t* const stream = block + size_t(row / V::kLanes) * bytes;
        for (int token = 0; token < tokens; token += kOctet) {
          accumulate(walk, begin, end, stream, places + token, panel_sums + size_t(token) * V::kLanes, begin == 0);
        }
        if (end == walk.registers()) finish(row, panel_sums);
      }
      block += bytes * panels;
    }
  }

  // Eight tokens of one panel. Tokens beyond the tile's read what places say, and are not stored.
  static __attribute__((noinline)) void accumulate(const RegisterWalk& walk, int begin, int end, const uint8_t* stream,
                                                   Places places, float* sums, bool first) {
    Vector sum[kOctet];
#pragma GCC unroll 8
    for (int t = 0; t < kOctet; ++t) sum[t] = first ? V::zero() : V::load(sums + t * V::kLanes);
    const int per_tap = walk.registers_per_tap();
    int tap = begin / per_tap, place = begin % per_tap;
    Places at = places + size_t(tap) * kTileTokens;
    for (int index = begin; index < end; ++index) {
      typename Format::Register x[kOctet];
#pragma GCC unroll 8
      for (int t = 0; t < kOctet; ++t) x[t] = Format::load(at[t] + size_t(place) * kRegisterBytes);
      const int steps = walk.steps(place);
      const uint8_t* weights = stream;
      const uint8_t* indices = stream + size_t(steps) * kRegisterBytes;
      for (int step = 0; step < steps; ++step) {
        const auto weight = Format::load(weights);
        const auto index_of = Format::load_indices(indices);
#pragma GCC unroll 8
        for (int t = 0; t < kOctet; ++t) sum[t] = Format::pick_and_add(sum[t], weight, index_of, x[t]);
        weights += kRegisterBytes;
        indices += kLayout.index_bytes();
      }
      stream = indices;
      if (++place == per_tap) {
        place = 0;
        at += kTileTokens;
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kOctet; ++t) V::store(sums + t * V::kLanes, sum[t]);
  }
};

// Products: X is [tokens, depth].
template <class Format>
struct ProductInRegisters {
  using Loop = RegistersInLanes<Format>;
  using V = typename Format::V;
  using Vector = typename V::Vector;
  static constexpr int kTileTokens = Loop::kTileTokens;

  static size_t packed_bytes(int rows, int depth) { return register_bytes(rows, depth, 1, Loop::kLayout); }
  static void pack(const Weights24& weights, void* packed) { pack_registers(weights, 1, Loop::kLayout, packed); }
  static size_t scratch_bytes(int depth, int block_rows) {
    const size_t rows = size_t(block_rows + V::kLanes - 1) / V::kLanes * V::kLanes;
    return kTileTokens * (Loop::token_bytes(depth) + rows * sizeof(float) + sizeof(uint8_t*));
  }

  static void run(const Product& product, const Block& block, void* scratch) {
    const size_t stride = Loop::token_bytes(product.depth);
    uint8_t* const converted = static_cast<uint8_t*>(scratch);
    const uint8_t** const places = reinterpret_cast<const uint8_t**>(converted + kTileTokens * stride);
    float* const sums = reinterpret_cast<float*>(places + kTileTokens);
    for (size_t token = block.token_begin; token < block.token_end; token += kTileTokens) {
      const size_t left = block.token_end - token;
      const int tokens = left < size_t(kTileTokens) ? int(left) : kTileTokens;
      for (int t = 0; t < kTileTokens; ++t) places[t] = converted + (t < tokens ? t : 0) * stride;
      for (int t = 0; t < tokens; ++t) {
        Format::convert_token(product.input + (token + t) * product.depth, product.depth, converted + t * stride);
      }
      Loop::multiply(product, 1, product.depth, places, tokens, block.row_begin, block.row_end, sums,
                     [&](int row, const float* panel) { store(product, token, tokens, row, block.row_end, panel); });
    }
  }

  static void store(const Product& product, size_t token, int tokens, int row, int row_end, const float* sums) {
    const int left = row_end - row;
    const int count = left < V::kLanes ? left : V::kLanes;
    with_activation(product.epilogue.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      const Vector bias = load_bias<V>(product, row, count);
      for (int t = 0; t < tokens; ++t) {
        store_rows<V, Format::kOperand, kActivation>(product, (token + t) * product.rows + row,
                                                     V::load(sums + t * V::kLanes), bias, count);
      }
    });
  }
};

template <class Format>
constexpr Tactic registers_in_lanes(Tier tier) {
  using Kernel = ProductInRegisters<Format>;
  return {tier,
          Lanes::kRegisters,
          RegistersInLanes<Format>::kOctet,
          Kernel::kTileTokens,
          Format::V::kLanes,
          Kernel::packed_bytes,
          Kernel::pack,
          Kernel::scratch_bytes,
          Kernel::run};
}

}  // namespace
}  // namespace sparse_engine
