// N-lanes: output rows lie in the lanes. The kernel for few tokens: nothing is transposed.
//
//     four x of one token, repeated:  | x0 x1 x2 x3 | x0 x1 x2 x3 | ...
//     position of each row's weight:  |  0  2  1  3 |  0  0  1  2 | ...
//     chosen by one permutation:      | x0 x2 x1 x3 | x0 x0 x1 x2 | ...   * weights of the rows -> sums
//
// Bound: each multiply-add needs a permutation of its own, on a port that multiply-adds also want, so the
// ceiling is about 1.5 times dense in fp32; where a core permutes as fast as it multiplies (a Zen 5, in bf16) it is the
// fastest kernel for any number of tokens. A panel of weights is read from L1 for each eight tokens of a tile, once
// from further away.
//
// Included by instruction-set files only (see vector_avx512.h). A Format says how operands are multiplied:
//   V, kOperand, kTokens, kPanels        vector words, packing, the block of sums held in registers
//   Operands, load(...), load_input(...), multiply_add(...)
//   input_stride, convert_input(...)     how X is laid out; in place where nothing needs converting
//   store_input(...)                     some numbers of a token, so laid out
//   pixel_bytes, kChannels, convert_pixels(...)    how an image's pixels are laid out, their channels side by side
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
  static constexpr int kTileTokens = 64;  // laid out, and multiplied with a block of rows, one after the other

  static size_t packed_bytes(int rows, int depth) {
    return sparse_engine::panel_bytes(rows, depth, Format::kOperand, V::kLanes, Format::kPanels);
  }
  static void pack(const Weights24& weights, void* packed) {
    pack_panels(weights, 1, Format::kOperand, V::kLanes, Format::kPanels, packed);
  }
  static size_t scratch_bytes(int depth, int) { return Format::scratch_bytes(depth, kTileTokens); }

  static void run(const Product& product, const Block& block, void* scratch) {
    const size_t stride = Format::input_stride(product.depth);
    for (size_t token = block.token_begin; token < block.token_end; token += kTileTokens) {
      const size_t left = block.token_end - token;
      const int tokens = left < size_t(kTileTokens) ? int(left) : kTileTokens;
      const uint8_t* const input =
          Format::convert_input(product.input + token * product.depth, product.depth, tokens, scratch);
      run_tile(product, input, stride, token, tokens, block.row_begin, block.row_end, Store{product, token});
    }
  }

  static size_t pair_scratch_bytes(const Product& first, const Product& second) {
    return Format::scratch_bytes(first.depth, kTileTokens) + kTileTokens * Format::input_stride(second.depth);
  }

  // What lies between the layers is stored as the second one reads it, and stays in L2.
  static void run_pair(const Product& first, const Product& second, size_t token_begin, size_t token_end,
                       void* scratch) {
    const size_t stride = Format::input_stride(first.depth), hidden_stride = Format::input_stride(second.depth);
    uint8_t* const hidden = static_cast<uint8_t*>(scratch) + Format::scratch_bytes(first.depth, kTileTokens);
    for (size_t token = token_begin; token < token_end; token += kTileTokens) {
      const size_t left = token_end - token;
      const int tokens = left < size_t(kTileTokens) ? int(left) : kTileTokens;
      const uint8_t* const input =
          Format::convert_input(first.input + token * first.depth, first.depth, tokens, scratch);
      run_tile(first, input, stride, 0, tokens, 0, first.rows, Keep{hidden, hidden_stride});
      run_tile(second, hidden, hidden_stride, token, tokens, 0, second.rows, Store{second, token});
    }
  }

 private:
  // What finished numbers of adjacent rows become: a part of the output, with the residual, ...
  struct Store {
    const Product& product;
    size_t first;  // token

    SPARSE_ENGINE_INLINE void operator()(int token, int row, Vector y, int count) const {
      const size_t index = (first + token) * product.rows + row;
      const float* const residual = product.epilogue.residual;
      if (residual) y = y + V::load_first(residual + index, count);
      V::store_first(product.output + index, y, count);
    }
  };
  // ... or of the next layer's input.
  struct Keep {
    uint8_t* hidden;
    size_t stride;

    SPARSE_ENGINE_INLINE void operator()(int token, int row, Vector y, int count) const {
      Format::store_input(hidden + token * stride, row, y, count);
    }
  };

  // The lines that some tokens will read and write beside a block of rows: too far apart for the hardware to see that
  // they follow one another.
  static SPARSE_ENGINE_INLINE void fetch_rows(const Product& product, size_t token, int tokens, int row) {
    if (!product.output) return;
    for (int t = 0; t < tokens; ++t) {
      const size_t index = (token + t) * product.rows + row;
      for (int i = 0; i < kBlockRows; i += 16) {
        __builtin_prefetch(product.output + index + i, 1, 3);
        if (product.epilogue.residual) __builtin_prefetch(product.epilogue.residual + index + i);
      }
    }
  }

  // Some tokens and rows. The weights of a block of rows stay in L1 for all of the tokens, whose X stays in L2; those
  // of the next are fetched meanwhile.
  template <class Put>
  static SPARSE_ENGINE_INLINE void run_tile(const Product& product, const uint8_t* input, size_t stride, size_t first,
                                            int tokens, int row_begin, int row_end, const Put& put) {
    alignas(64) float sums[Format::kPanels * Format::kTokens * V::kLanes];
    const size_t bytes = panel_bytes(product.depth) * Format::kPanels;
    const int octets = (tokens + Format::kTokens - 1) / Format::kTokens;
    for (int row = row_begin; row < row_end; row += kBlockRows) {
      const uint8_t* const next = panel_of(product, row) + bytes;
      const bool more = row + kBlockRows < row_end;
      for (int i = 0; i < octets; ++i) {
        const int begin = tokens * i / octets, count = tokens * (i + 1) / octets - begin;
        for (size_t byte = bytes * i / octets; more && byte < bytes * (i + 1) / octets; byte += 64) {
          __builtin_prefetch(next + byte, 0, 2);
        }
        if (more) fetch_rows(product, first + begin, count, row + kBlockRows);
        add_up(product, row, input + begin * stride, stride, count, sums, Format::kTokens);
        finish(product, row, row_end, begin, count, sums, put);
      }
    }
  }

  template <class Put>
  static SPARSE_ENGINE_INLINE void finish(const Product& product, int row, int row_end, int token, int tokens,
                                          const float* sums, const Put& put) {
    with_activation(product.epilogue.activation, [&](auto activation) __attribute__((always_inline)) {
      constexpr Activation kActivation = decltype(activation)::value;
      for (int p = 0; p < Format::kPanels; ++p, row += V::kLanes, sums += Format::kTokens * V::kLanes) {
        const int left = row_end - row;
        if (left <= 0) break;
        const int count = left < V::kLanes ? left : V::kLanes;
        const Vector bias = load_bias<V>(product, row, count);
        for (int t = 0; t < tokens; ++t) {
          const Vector y = activate<V, Format::kOperand, kActivation>(V::load(sums + t * V::kLanes) + bias);
          put(token + t, row, y, count);
        }
      }
    });
  }

  static SPARSE_ENGINE_INLINE size_t panel_bytes(int depth) {
    return size_t((depth / 4 + kPanelChunkGroups - 1) / kPanelChunkGroups) * kChunkBytes;
  }
  static SPARSE_ENGINE_INLINE const uint8_t* panel_of(const Product& product, int row) {
    return static_cast<const uint8_t*>(product.packed) + row / V::kLanes * panel_bytes(product.depth);
  }

 public:
  // The sums of some tokens, which are read `stride` bytes apart, and of kBlockRows rows:
  // [kPanels][out_tokens][V::kLanes].
  template <int Tokens = Format::kTokens>
  static void add_up(const Product& product, int row, const uint8_t* input, size_t stride, int tokens, float* sums,
                     int out_tokens) {
    if constexpr (Tokens > 1) {
      if (tokens < Tokens) return add_up<Tokens - 1>(product, row, input, stride, tokens, sums, out_tokens);
    }
    add_up_panels<Tokens>(product, row, input, stride, sums, out_tokens);
  }

  // The inner loop: Tokens x kPanels sums in registers over the whole depth.
  template <int Tokens>
  static __attribute__((noinline)) void add_up_panels(const Product& product, int row, const uint8_t* input,
                                                      size_t stride, float* sums, int out_tokens) {
    constexpr int kPanels = Format::kPanels;
    const int groups = product.depth / 4;
    const size_t panel_stride = panel_bytes(product.depth);
    const uint8_t* panel = panel_of(product, row);
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
        for (int t = 0; t < Tokens; ++t, x += stride) {
          const auto four = Format::load_input(x);
#pragma GCC unroll 2
          for (int p = 0; p < kPanels; ++p) sum[t][p] = Format::multiply_add(sum[t][p], operands[p], four);
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) V::store(sums + size_t(p * out_tokens + t) * V::kLanes, sum[t][p]);
    }
  }
};

template <class Format>
constexpr Tactic rows_in_lanes(Tier tier) {
  using Kernel = RowsInLanes<Format>;
  return {tier,
          Lanes::kRows,
          Format::kTokens,
          Kernel::kTileTokens,
          Kernel::kBlockRows,
          Kernel::packed_bytes,
          Kernel::pack,
          Kernel::scratch_bytes,
          Kernel::run,
          Kernel::pair_scratch_bytes,
          Kernel::run_pair};
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

  static size_t scratch_bytes(int, int) { return 0; }
  static size_t input_stride(int depth) { return size_t(depth) * sizeof(float); }
  static const uint8_t* convert_input(const float* input, int, int, void*) {
    return reinterpret_cast<const uint8_t*>(input);
  }
  static SPARSE_ENGINE_INLINE void store_input(uint8_t* input, int k, Vector x, int count) {
    V::store_first(reinterpret_cast<float*>(input) + k, x, count);
  }

  static size_t pixel_bytes(int channels) {
    return size_t(channels + V::kLanes - 1) / V::kLanes * V::kLanes * sizeof(float);
  }
  static constexpr int kChannels = V::kLanes, kChannelsBytes = V::kLanes * 4;
  // kChannels channels, if there are so many, of `count` neighbouring pixels; channels are `plane` floats apart in x,
  // pixels `stride` bytes in out.
  static SPARSE_ENGINE_INLINE void convert_pixels(const float* x, size_t plane, int channels, int count, uint8_t* out,
                                                  size_t stride) {
    Vector square[V::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < V::kLanes; ++i) square[i] = i < channels ? V::load_first(x + i * plane, count) : V::zero();
    V::transpose(square);
    for (int i = 0; i < count; ++i) V::store(out + i * stride, square[i]);
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
