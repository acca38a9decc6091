// Layers in bf16 with what comes before and after them: Y[tokens, rows] = epilogue(round(X) * round(W)^T), where X may
// be normalised first, or two tensors side by side, or bfloat16 already, and Y floats or bfloat16. W keeps at most two
// of each four consecutive weights of a row, or is dense. Products of bfloat16 are summed in fp32, in the order of k.
#pragma once

#include "buffer.h"
#include "int8.h"
#include "matmul24.h"
#include "work_queue.h"

namespace sparse_engine {

struct EpilogueBf16 {
  const float* bias = nullptr;      // [rows], or null
  const float* residual = nullptr;  // [tokens, rows], or null; may be the output itself
  Activation activation = Activation::kNone;
  Element element = Element::kFloat32;  // of the output: floats or bfloat16
};

struct ProductBf16 {
  int rows = 0;
  int depth = 0;
  bool dense = false;
  const void* packed = nullptr;  // pack_register_panels()
  void* output = nullptr;        // [tokens, rows] of the epilogue's element
  EpilogueBf16 epilogue;
  const void* next = nullptr;  // weights that are read after these, whose first lines are fetched at the end; or null
};

constexpr int kMostTokensBf16 = 136;  // of one call of run()

// One way to compute them; plain function pointers for the reason given at Tactic.
struct TacticBf16 {
  Tier tier;
  int row_multiple;  // rows are split between threads at multiples of this

  // Tokens of floats, `stride` apart, after a layer normalisation if there is one, to bfloat16 `out_stride` bytes
  // apart.
  void (*round)(const float* x, size_t stride, size_t tokens, int depth, const LayerNorm* norm, uint8_t* out,
                size_t out_stride);

  // Rows [row_begin, row_end) of `tokens` tokens of bfloat16, at most kMostTokensBf16, `stride` bytes apart; the first
  // is the output's token `first`.
  void (*run)(const ProductBf16& product, const uint8_t* x, size_t stride, size_t first, size_t tokens, int row_begin,
              int row_end);
};

#ifdef SPARSE_ENGINE_X86
extern const TacticBf16 kAvx512Bf16Layers;
#endif

// What a layer is given: bfloat16, or floats that are rounded to it.
struct InputBf16 {
  const uint16_t* halves = nullptr;            // [tokens, depth]
  const float* parts[2] = {nullptr, nullptr};  // else [tokens, depths[i]] each, side by side; the second may be null
  int depths[2] = {0, 0};
  const LayerNorm* norm = nullptr;  // of one part; null: none
};

class LayerBf16;

// A layer before a pair, as FrontInt8: x' = x + front(a), y = x' + second(first(norm(x'))). Nobody else reads x'.
struct FrontBf16 {
  const LayerBf16* layer = nullptr;  // null: none
  EpilogueBf16 epilogue;             // bias and residual
};

class LayerBf16 {
 public:
  // The weights are packed now, and may then be freed. Throws Error: kInvalidInput for weights that are not canonical,
  // kUnsupported where the machine, or SPARSE_ENGINE_ISA, has no AVX512-BF16.
  explicit LayerBf16(const Weights24& weights);

  // output[tokens, rows], of the epilogue's element. Safe to call from several threads at once; the result does not
  // depend on `threads`, nor a token's on the other tokens.
  void run(const InputBf16& input, size_t tokens, void* output, const EpilogueBf16& epilogue, int threads,
           const ParallelFor& parallel_for) const;

  // second(first(input)): to the bit what two calls give that hand bfloat16 over, but what lies between them stays in
  // the caches. Of `hidden`, bias and activation are taken. With a front, `input` is that one's but for the norm, and
  // the epilogue's residual its output. Throws Error(kInvalidInput) for layers that do not follow one another.
  static void run_pair(const FrontBf16& front, const LayerBf16& first, const EpilogueBf16& hidden,
                       const LayerBf16& second, const InputBf16& input, size_t tokens, void* output,
                       const EpilogueBf16& epilogue, int threads, const ParallelFor& parallel_for);

  int rows() const { return rows_; }
  int depth() const { return depth_; }
  size_t packed_bytes() const { return packed_.size(); }

 private:
  struct PairScratch;
  ProductBf16 product(void* output, const EpilogueBf16& epilogue) const;
  size_t rounded_stride() const;
  const uint8_t* rounded(const InputBf16& input, size_t begin, size_t tokens, uint8_t* scratch, size_t* stride) const;

  int rows_, depth_;
  bool dense_;
  const TacticBf16* tactic_;
  Buffer packed_;
};

}  // namespace sparse_engine
