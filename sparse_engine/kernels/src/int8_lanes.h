// 8-bit products with output rows in the lanes, where an instruction chooses among the sixteen bytes of 128 bits: the
// form of tier_avx512_vnni.cpp in shorter registers. Sixteen k of a token are repeated in each 128 bits of a register,
// and two steps take what rows keep of them:
//
//     sixteen codes of a token:      | x0 x1 x2 x3 x4 x5 ... x15 |
//     what rows n, n + 1, ... keep:  | 0 3 5 6 | 1 2 4 7 | ...     indices, a byte each
//     chosen by one instruction:     | x0 x3 x5 x6 | x1 x2 x4 x7 | ...
//     multiplied with the weights:   sum of row n | sum of row n + 1 | ...
//
// A panel is sixteen rows, in several vectors; the sums of four tokens are in registers, and indices and weights of a
// step serve all four. Bound: as many choices as multiply-adds.
//
// Included by instruction-set files only (see vector_avx2.h). W has, beside what epilogue.h wants of a V:
//   Bytes, Sums, kVectors           of a panel
//   kOffset                         what it takes off each code, to have it signed
//   load_bytes(p)                   4 * kLanes bytes
//   repeat_part(p), repeat_four(p)  16 codes in each 128 bits, 4 in each lane; less the offset
//   choose(part, indices)
//   add_products(sums, codes, weights)  four a lane
//   load_sums(p), store_sums(p, sums), to_floats(sums)
//   narrow_codes(p, x)              floats within 0..255, rounded to nearest even, as kLanes bytes
//   narrow_halves(p, x)             as kLanes bfloat16
//   add_lanes(x), keep_first(x, count)  the others become zero
#pragma once

#include "epilogue.h"
#include "int8.h"

namespace sparse_engine {
namespace {

constexpr int kRows = kRowPaddingInt8;  // of a panel: sums are started sixteen at a time
constexpr int kTokens = 4;              // whose sums are in registers
constexpr int kPart = 16;               // k of a token in 128 bits
constexpr int kStepDepth = 8;           // k of a step
constexpr int kHalfStep = 4 * kRows;    // bytes of a dense step; a sparse one is indices and weights
constexpr int kStepBytes = 2 * kHalfStep;

SPARSE_ENGINE_INLINE int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

SPARSE_ENGINE_INLINE size_t panel_bytes_of(int depth, bool dense) {
  return dense ? size_t(depth / 4) * kHalfStep : size_t(divide_up(depth, kStepDepth)) * kStepBytes;
}

size_t packed_bytes(int rows, int depth, bool dense) { return divide_up(rows, kRows) * panel_bytes_of(depth, dense); }

// A panel after the other: per step, or per four k of dense weights, of each vector the indices and then the weights of
// its rows. What is missing is weight 0 of index 0.
template <class W>
void pack(const WeightsInt8& weights, void* packed) {
  constexpr int kVectorBytes = 4 * W::kLanes;
  const bool dense = weights.dense();
  const size_t panel_bytes = panel_bytes_of(weights.depth, dense);
  uint8_t* const out = static_cast<uint8_t*>(packed);
  __builtin_memset(out, 0, packed_bytes(weights.rows, weights.depth, dense));
  for (int row = 0; row < weights.rows; ++row) {
    const int vector = row % kRows / W::kLanes, lane = row % W::kLanes * 4;
    uint8_t* const panel = out + row / kRows * panel_bytes;
    for (int group = 0; group < weights.groups(); ++group) {
      const size_t index = size_t(row) * weights.groups() + group;
      if (dense) {
        uint8_t* const four = panel + size_t(group) * kHalfStep + vector * kVectorBytes + lane;
        __builtin_memcpy(four, weights.values + 4 * index, 4);
        continue;
      }
      const int position = weights.positions[index], first = group * 4 % kPart;
      uint8_t* const two = panel + size_t(group / 2) * kStepBytes + vector * 2 * kVectorBytes + lane + group % 2 * 2;
      two[0] = static_cast<uint8_t>(first + (position & 3));
      two[1] = static_cast<uint8_t>(first + (position >> 2));
      __builtin_memcpy(two + kVectorBytes, weights.values + 2 * index, 2);
    }
  }
}

// Sixteen k of a token; those beyond `left` meet weights of zero.
template <class W>
SPARSE_ENGINE_INLINE typename W::Bytes load_part(const uint8_t* x, int left) {
  if (left >= kPart) return W::repeat_part(x);
  alignas(16) uint8_t part[kPart] = {};
  const int eight = left & 8;  // no loop, of which the compiler would make a call, and spill all sums around it
  if (eight) __builtin_memcpy(part, x, 8);
  if (left & 4) __builtin_memcpy(part + eight, x + eight, 4);
  return W::repeat_part(part);
}

// Begins the sums of a panel in registers, has add(sums) add to them, and stores them: [token][row].
template <class W, int Tokens, class Add>
SPARSE_ENGINE_INLINE void with_sums(const int32_t* starts, int32_t* sums, const Add& add) {
  typename W::Sums sum[Tokens][W::kVectors];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < W::kVectors; ++v) sum[t][v] = W::load_sums(starts + v * W::kLanes);
  }
  add(sum);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < W::kVectors; ++v) W::store_sums(sums + t * kRows + v * W::kLanes, sum[t][v]);
  }
}

template <class W, int Tokens>
__attribute__((noinline)) void add_up_sparse(const uint8_t* panel, const uint8_t* x, size_t stride, int depth,
                                             const int32_t* starts, int32_t* sums) {
  constexpr int kVectorBytes = 4 * W::kLanes;
  with_sums<W, Tokens>(starts, sums, [=](typename W::Sums(&sum)[Tokens][W::kVectors]) __attribute__((always_inline)) {
    const uint8_t* step = panel;
    for (int k = 0; k < depth; k += kPart) {
      typename W::Bytes part[Tokens];
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) part[t] = load_part<W>(x + t * stride + k, depth - k);
      const int steps = depth - k > kStepDepth ? 2 : 1;
      for (int s = 0; s < steps; ++s, step += kStepBytes) {
#pragma GCC unroll 4
        for (int v = 0; v < W::kVectors; ++v) {
          const auto indices = W::load_bytes(step + v * 2 * kVectorBytes);
          const auto weights = W::load_bytes(step + v * 2 * kVectorBytes + kVectorBytes);
#pragma GCC unroll 4
          for (int t = 0; t < Tokens; ++t) W::add_products(sum[t][v], W::choose(part[t], indices), weights);
        }
      }
    }
  });
}

template <class W, int Tokens>
__attribute__((noinline)) void add_up_dense(const uint8_t* panel, const uint8_t* x, size_t stride, int depth,
                                            const int32_t* starts, int32_t* sums) {
  with_sums<W, Tokens>(starts, sums, [=](typename W::Sums(&sum)[Tokens][W::kVectors]) __attribute__((always_inline)) {
    const uint8_t* step = panel;
    for (int k = 0; k < depth; k += 4, step += kHalfStep) {
      typename W::Bytes weights[W::kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < W::kVectors; ++v) weights[v] = W::load_bytes(step + v * 4 * W::kLanes);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const auto four = W::repeat_four(x + t * stride + k);
#pragma GCC unroll 4
        for (int v = 0; v < W::kVectors; ++v) W::add_products(sum[t][v], four, weights[v]);
      }
    }
  });
}

// The kernel that is as wide as there are tokens, 1 to 4.
template <class W, int Tokens = kTokens>
void add_up(const ProductInt8& product, int row, const uint8_t* x, size_t stride, int tokens, int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return add_up<W, Tokens - 1>(product, row, x, stride, tokens, sums);
  }
  const size_t panel_bytes = panel_bytes_of(product.depth, product.dense);
  const uint8_t* const panel = static_cast<const uint8_t*>(product.packed) + row / kRows * panel_bytes;
  (product.dense ? add_up_dense<W, Tokens> : add_up_sparse<W, Tokens>)(panel, x, stride, product.depth,
                                                                       product.starts + row, sums);
}

// The codes of floats: round(value / scale) + zero, within 0 and 255. NaN becomes 0.
template <class W>
class CodesOf {
 public:
  explicit SPARSE_ENGINE_INLINE CodesOf(Codes codes)
      : inverse_(W::set(1.0f / codes.scale)), zero_(W::set(float(codes.zero))) {}

  SPARSE_ENGINE_INLINE void store(uint8_t* out, typename W::Vector x) const {
    const auto code = W::multiply_add(x, inverse_, zero_);
    // In this order: the second operand is what NaN becomes.
    W::narrow_codes(out, W::min(W::max(code, W::zero()), W::set(255.0f)));
  }

 private:
  typename W::Vector inverse_, zero_;
};

template <class W, Activation A>
SPARSE_ENGINE_INLINE void finish(const ProductInt8& product, size_t token, int tokens, int row, int count,
                                 const int32_t* sums) {
  const EpilogueInt8& epilogue = product.epilogue;
  const CodesOf<W> to_codes(epilogue.codes);
  const auto scales = W::load_unaligned(product.scales + row);
  const auto bias = epilogue.bias ? W::load_first(epilogue.bias + row, count) : W::zero();
  for (int t = 0; t < tokens; ++t) {
    const size_t index = (token + t) * product.rows + row;
    const auto sum = W::to_floats(W::load_sums(sums + t * kRows));
    auto y = activate<W, Operand::kFloat32, A>(W::multiply_add(sum, scales, bias));
    if (epilogue.residual) y = y + W::load_first(epilogue.residual + index, count);
    if (epilogue.element == Element::kFloat32) {
      W::store_first(static_cast<float*>(product.output) + index, y, count);
      continue;
    }
    constexpr int kMostBytes = 2 * W::kLanes;
    alignas(16) uint8_t narrow[kMostBytes];
    const bool halves = epilogue.element == Element::kBfloat16;
    halves ? W::narrow_halves(narrow, y) : to_codes.store(narrow, y);
    const size_t bytes = halves ? 2 : 1;
    uint8_t* const out = static_cast<uint8_t*>(product.output) + index * bytes;
    if (count == W::kLanes) {
      halves ? __builtin_memcpy(out, narrow, kMostBytes) : __builtin_memcpy(out, narrow, W::kLanes);
    } else {
      for (size_t i = 0; i < count * bytes; ++i) out[i] = narrow[i];
    }
  }
}

template <class W>
void run(const ProductInt8& product, const uint8_t* x, size_t stride, size_t first, size_t tokens, int row_begin,
         int row_end) {
  const size_t parts = (tokens + kTokens - 1) / kTokens;
  with_activation(product.epilogue.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    for (int row = row_begin; row < row_end; row += kRows) {
      for (size_t i = 0; i < parts; ++i) {
        const size_t begin = tokens * i / parts;
        const int count = int(tokens * (i + 1) / parts - begin);
        alignas(32) int32_t sums[kTokens * kRows];
        add_up<W>(product, row, x + begin * stride, stride, count, sums);
        for (int v = 0; v < W::kVectors && row + v * W::kLanes < row_end; ++v) {
          const int left = row_end - row - v * W::kLanes;
          finish<W, kActivation>(product, first + begin, count, row + v * W::kLanes,
                                 left < W::kLanes ? left : W::kLanes, sums + v * W::kLanes);
        }
      }
    }
  });
}

// Calls function(numbers, where they stand, how many) for each vector of a token.
template <class W, class Function>
SPARSE_ENGINE_INLINE void for_vectors(const float* x, int depth, const Function& function) {
  for (int k = 0; k < depth; k += W::kLanes) {
    const int count = depth - k < W::kLanes ? depth - k : W::kLanes;
    function(W::load_first(x + k, count), k, count);
  }
}

template <class W>
void quantise(const float* x, size_t stride, size_t tokens, int depth, const LayerNorm* norm, Codes codes, uint8_t* out,
              size_t out_stride) {
  using Vector = typename W::Vector;
  const CodesOf<W> to_codes(codes);
  for (size_t token = 0; token < tokens; ++token, x += stride, out += out_stride) {
    Vector middle = W::zero(), slope = W::set(1.0f);
    if (norm) {
      Vector sum = W::zero(), squares = W::zero();
      for_vectors<W>(x, depth, [&](Vector numbers, int, int) { sum = sum + numbers; });
      middle = W::set(W::add_lanes(sum) / float(depth));
      for_vectors<W>(x, depth, [&](Vector numbers, int, int count) {
        const Vector distance = W::keep_first(numbers - middle, count);
        squares = W::multiply_add(distance, distance, squares);
      });
      slope = W::set(1.0f / __builtin_sqrtf(W::add_lanes(squares) / float(depth) + norm->epsilon));
    }
    for_vectors<W>(x, depth, [&](Vector numbers, int k, int count) {
      Vector y = (numbers - middle) * slope;
      if (norm && norm->gamma) y = y * W::load_first(norm->gamma + k, count);
      if (norm && norm->beta) y = y + W::load_first(norm->beta + k, count);
      alignas(16) uint8_t narrow[W::kLanes];
      to_codes.store(narrow, y);
      for (int i = 0; i < count; i += 4) __builtin_memcpy(out + k + i, narrow + i, 4);  // a depth is whole groups
    });
  }
}

template <class W>
constexpr TacticInt8 int8_in_lanes(Tier tier) {
  static_assert(W::kVectors * W::kLanes == kRows, "a panel is whole vectors");
  return {tier, kRows, packed_bytes, pack<W>, quantise<W>, run<W>, W::kOffset};
}

}  // namespace
}  // namespace sparse_engine
