// N-lanes: output rows lie in the lanes. The kernel for few tokens: nothing is transposed.
//
//     four x of one token, repeated:  | x0 x1 x2 x3 | x0 x1 x2 x3 | ...
//     position of each row's weight:  |  0  2  1  3 |  0  0  1  2 | ...
//     chosen by one permutation:      | x0 x2 x1 x3 | x0 x0 x1 x2 | ...   * weights of the rows -> sums
//
// Bound: each multiply-add needs a permutation of its own, on a port that multiply-adds also want, so the
// ceiling is about 1.5 times dense. Each panel of weights is read once per eight tokens or so.
//
// Included by instruction-set files only (see vector_avx512.h). A Format says how operands are multiplied:
//   V, kOperand, kTokens, kPanels        vector words, packing, the block of sums held in registers
//   Selector                             the state that walks the codes of one chunk
//   element_bytes, convert_input(...)    how X is laid out; in place where nothing needs converting
#pragma once

#include "epilogue.h"
#include "matmul24.h"
#include "packing.h"

namespace sparse_engine {
namespace {

template <class Format>
struct RowsInLanes {
  using V = typename Format::V;
  using Vector = typename V::Vector;
  static constexpr size_t kChunkBytes = panel_chunk_bytes(Format::kOperand, V::kLanes);
  static constexpr size_t kCodeBytes = V::kLanes * 4;
  static constexpr int kBlockRows = V::kLanes * Format::kPanels;

  static size_t packed_bytes(int rows, int depth) {
    return panel_bytes(rows, depth, Format::kOperand, V::kLanes, Format::kPanels);
  }
  static void pack(const Weights24& weights, void* packed) {
    pack_panels(weights, Format::kOperand, V::kLanes, Format::kPanels, packed);
  }
  static size_t scratch_bytes(int depth, int) { return Format::scratch_bytes(depth); }

  static void run(const Product& product, const Block& block, void* scratch) {
    for (size_t token = block.token_begin; token < block.token_end; token += Format::kTokens) {
      const size_t left = block.token_end - token;
      const int tokens = left < size_t(Format::kTokens) ? int(left) : Format::kTokens;
      const uint8_t* const input =
          Format::convert_input(product.input + token * product.depth, product.depth, tokens, scratch);
      run_tokens(product, block, token, tokens, input);
    }
  }

  template <int Tokens = Format::kTokens>
  static void run_tokens(const Product& product, const Block& block, size_t token, int tokens, const uint8_t* input) {
    if constexpr (Tokens > 1) {
      if (tokens < Tokens) return run_tokens<Tokens - 1>(product, block, token, tokens, input);
    }
    for (int row = block.row_begin; row < block.row_end; row += kBlockRows) {
      run_panels<Tokens>(product, block, token, row, input);
    }
  }

  // The inner loop: Tokens x kPanels sums in registers over the whole depth.
  template <int Tokens>
  static __attribute__((noinline)) void run_panels(const Product& product, const Block& block, size_t token, int row,
                                                   const uint8_t* input) {
    constexpr int kPanels = Format::kPanels;
    const int groups = product.depth / 4;
    const size_t panel_stride = size_t((groups + kPanelChunkGroups - 1) / kPanelChunkGroups) * kChunkBytes;
    const size_t input_stride = Format::input_stride(product.depth);
    const uint8_t* panel = static_cast<const uint8_t*>(product.packed) + row / V::kLanes * panel_stride;
    const Format format;
    Vector sum[Tokens][kPanels];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) sum[t][p] = V::zero();
    }
    for (int chunk = 0; chunk < groups; chunk += kPanelChunkGroups, panel += kChunkBytes) {
      typename V::Codes codes[kPanels];
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) codes[p] = V::load_codes(panel + p * panel_stride);
      const int chunk_groups = groups - chunk < kPanelChunkGroups ? groups - chunk : kPanelChunkGroups;
      const uint8_t* weights = panel + kCodeBytes;
      for (int group = 0; group < chunk_groups; ++group, weights += Format::kGroupBytes) {
        typename Format::Operands operands[kPanels];
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) {
          operands[p] = format.load(weights + p * panel_stride, codes[p]);
          codes[p] = V::template shift_codes<4>(codes[p]);
        }
        const uint8_t* x = input + size_t(chunk + group) * Format::kGroupInputBytes;
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t, x += input_stride) {
          const auto four = Format::load_input(x);
#pragma GCC unroll 2
          for (int p = 0; p < kPanels; ++p) sum[t][p] = Format::multiply_add(sum[t][p], operands[p], four);
        }
      }
    }
    with_activation(product.epilogue.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        const int first_row = row + p * V::kLanes;
        if (first_row >= block.row_end) break;
        const int left = block.row_end - first_row;
        const int count = left < V::kLanes ? left : V::kLanes;
        const Vector bias = load_bias<V>(product, first_row, count);
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
          store_rows<V, Format::kOperand, kActivation>(product, (token + t) * product.rows + first_row, sum[t][p], bias,
                                                       count);
        }
      }
    });
  }
};

template <class Format>
constexpr Tactic rows_in_lanes(Tier tier) {
  using Kernel = RowsInLanes<Format>;
  return {tier,         Lanes::kRows,          1,          Format::kTokens, Kernel::kBlockRows, Kernel::packed_bytes,
          Kernel::pack, Kernel::scratch_bytes, Kernel::run};
}

// fp32 products: X is read in place, two permutations and two multiply-adds per group.
template <class Vectors, int Tokens, int Panels>
struct Float32Panels {
  using V = Vectors;
  using Vector = typename V::Vector;
  static constexpr Operand kOperand = Operand::kFloat32;
  static constexpr int kTokens = Tokens;
  static constexpr int kPanels = Panels;
  static constexpr size_t kGroupBytes = 2 * V::kLanes * 4;
  static constexpr size_t kGroupInputBytes = 4 * sizeof(float);

  struct Operands {
    Vector first, second;
    typename V::Codes first_code, second_code;
  };

  static size_t scratch_bytes(int) { return 0; }
  static size_t input_stride(int depth) { return size_t(depth) * sizeof(float); }
  static const uint8_t* convert_input(const float* input, int, int, void*) {
    return reinterpret_cast<const uint8_t*>(input);
  }

  static SPARSE_ENGINE_INLINE Operands load(const uint8_t* weights, typename V::Codes codes) {
    return {V::load_unaligned(weights), V::load_unaligned(weights + V::kLanes * 4), codes,
            V::template shift_codes<2>(codes)};
  }
  static SPARSE_ENGINE_INLINE Vector load_input(const uint8_t* x) { return V::repeat_four(x); }
  static SPARSE_ENGINE_INLINE Vector multiply_add(Vector sum, const Operands& operands, Vector four) {
    sum = V::multiply_add(operands.first, V::choose_of_four(four, operands.first_code), sum);
    return V::multiply_add(operands.second, V::choose_of_four(four, operands.second_code), sum);
  }
};

}  // namespace
}  // namespace sparse_engine
