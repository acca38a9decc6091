// The words of attention: Y = softmax(scale * q k^T + bias) v of each head.
#pragma once

#include "int8.h"
#include "matmul24.h"

namespace sparse_engine {

// q, k or v: where the head_dim numbers of a token and a head begin. Strides in numbers.
struct HeadVectors {
  const void* data = nullptr;  // floats, or bfloat16: see Attention
  size_t batch_stride = 0, token_stride = 0, head_stride = 0;

  template <class Number>
  SPARSE_ENGINE_INLINE const Number* head(size_t batch, int head) const {
    return static_cast<const Number*>(data) + batch * batch_stride + size_t(head) * head_stride;
  }
};

// Added to the scores: [batch, heads, queries, keys], the keys side by side. A stride of 0: one for all.
struct Bias {
  const float* data = nullptr;  // null: none
  size_t batch_stride = 0, head_stride = 0, query_stride = 0;

  // The row of a query; null where there is none.
  SPARSE_ENGINE_INLINE const float* row(size_t batch, int head, size_t query) const {
    return data ? data + batch * batch_stride + size_t(head) * head_stride + query * query_stride : nullptr;
  }
};

struct Attention {
  size_t batch = 0;
  size_t queries = 0, keys = 0;  // tokens; at least one key
  int heads = 0;
  int head_dim = 0;
  float scale = 0.0f;  // finite, above zero
  HeadVectors q, k, v;
  Bias bias;
  void* output = nullptr;  // [batch, queries, heads, head_dim]
  // What q, k and v are, and the output: floats, but for kernels in bf16 and in 8 bits, which also read
  // bfloat16 and write it or codes.
  Element input_element = Element::kFloat32, output_element = Element::kFloat32;
  Codes codes;  // of the output

  SPARSE_ENGINE_INLINE size_t width() const { return size_t(heads) * head_dim; }
};

// The part of it that one thread computes at a time: some queries of one head, against all of its keys.
struct QueryBlock {
  size_t batch = 0;
  int head = 0;
  size_t begin = 0, end = 0;

  template <class Number>
  SPARSE_ENGINE_INLINE const Number* of(const HeadVectors& vectors) const {
    return vectors.head<Number>(batch, head);
  }
  SPARSE_ENGINE_INLINE const float* bias(const Attention& attention, size_t query) const {
    return attention.bias.row(batch, head, query);
  }
  // Where a query's numbers begin in the output.
  SPARSE_ENGINE_INLINE size_t output(const Attention& attention, size_t query) const {
    return (batch * attention.queries + query) * attention.width() + size_t(head) * attention.head_dim;
  }
};

// One way to compute it. Plain function pointers, for the reason given at Tactic. A query's result does not
// depend on the block that it is in.
struct AttentionKernel {
  size_t tile_queries;  // queries are split between threads at multiples of this
  size_t (*scratch_bytes)(const Attention& attention);
  void (*run)(const Attention& attention, const QueryBlock& block, void* scratch);  // scratch: 64-byte aligned
};

// Defined by one file each.
extern const AttentionKernel kScalarAttention;
#ifdef SPARSE_ENGINE_X86
extern const AttentionKernel kAvx2Attention, kAvx512Attention, kAvx512Bf16Attention;
extern const AttentionKernel kAvx512VnniAttention;                                        // without a bias
extern const AttentionKernel kAvx512Bf16AttentionOfHalves, kAvx512VnniAttentionOfHalves;  // q, k and v are bfloat16
#endif
#ifdef SPARSE_ENGINE_NEON
extern const AttentionKernel kNeonAttention;
#endif

}  // namespace sparse_engine
