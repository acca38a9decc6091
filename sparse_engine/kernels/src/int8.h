// The words of 8-bit products: Y[tokens, rows] = epilogue(scales * (X - zero) * W^T), X of codes 0..255, W of codes
// -127..127, where in each group of four consecutive weights of a row at most two are not zero.
//
// Sums are integers and exact: an element's does not depend on the order that its products are added up in, nor on
// threads, tokens or tiers. It fits 32 bits: 255 * 127 * 65,536, the largest depth, is below 2^31, and what a sum
// passes through on its way may wrap around, since additions modulo 2^32 do.
#pragma once

#include "matmul24.h"

namespace sparse_engine {

constexpr int kMostDepthInt8 = 65536;

// value = scale * (code - zero)
struct Codes {
  float scale = 1.0f;
  int zero = 0;  // 0..255
};

enum class Element : int { kFloat32 = 0, kBfloat16 = 1, kCode = 2 };

// Canonical 2:4 codes, as Weights24; or dense ones.
struct WeightsInt8 {
  int rows = 0;
  int depth = 0;                       // a multiple of 4, at most kMostDepthInt8
  const int8_t* values = nullptr;      // [rows, depth / 2]; dense: [rows, depth]
  const uint8_t* positions = nullptr;  // [rows, depth / 4], first | second << 2, first < second; dense: null

  SPARSE_ENGINE_INLINE bool dense() const { return positions == nullptr; }
  SPARSE_ENGINE_INLINE int groups() const { return depth / 4; }
};

// A layer normalisation over a token's numbers: (x - mean) / sqrt(variance + epsilon) * gamma + beta.
struct LayerNorm {
  const float* gamma = nullptr;  // [depth], or null: ones
  const float* beta = nullptr;   // [depth], or null: zeros
  float epsilon = 0.0f;
};

struct EpilogueInt8 {
  const float* bias = nullptr;      // [rows], or null
  const float* residual = nullptr;  // [tokens, rows], or null; may be the output itself
  Activation activation = Activation::kNone;
  Element element = Element::kFloat32;
  Codes codes;  // of the output, where it is codes
};

struct ProductInt8 {
  int rows = 0;
  int depth = 0;
  bool dense = false;
  const void* packed = nullptr;     // written by the same tactic's pack()
  const int32_t* starts = nullptr;  // [rows, padded]: the tactic's offset less zero, times the sum of a row's codes
  const float* scales = nullptr;    // [rows, padded]: what a sum is multiplied with
  void* output = nullptr;           // [tokens, rows] of the epilogue's element
  EpilogueInt8 epilogue;
};

constexpr int kRowPaddingInt8 = 16;  // what `starts` and `scales` are padded to

// One way to compute them; plain function pointers for the reason given at Tactic.
struct TacticInt8 {
  Tier tier;
  int row_multiple;  // rows are split between threads at multiples of this
  size_t (*packed_bytes)(int rows, int depth, bool dense);
  void (*pack)(const WeightsInt8& weights, void* packed);  // packed: 64-byte aligned

  // Tokens of floats, `stride` apart, after a layer normalisation if there is one, to codes `out_stride` bytes apart.
  void (*quantise)(const float* x, size_t stride, size_t tokens, int depth, const LayerNorm* norm, Codes codes,
                   uint8_t* out, size_t out_stride);

  // Rows [row_begin, row_end) of `tokens` tokens of codes, `stride` bytes apart; the first is the output's token
  // `first`.
  void (*run)(const ProductInt8& product, const uint8_t* x, size_t stride, size_t first, size_t tokens, int row_begin,
              int row_end);

  int offset = 0;  // what it takes off each code of X before the product, 0..255
};

extern const TacticInt8 kScalarInt8;
#ifdef SPARSE_ENGINE_X86
extern const TacticInt8 kAvxVnniInt8, kAvx512VnniInt8;
extern const PeakLoop kAvx512VnniPeak;
#endif
#ifdef SPARSE_ENGINE_NEON
extern const TacticInt8 kNeonDotInt8;
#endif

}  // namespace sparse_engine
