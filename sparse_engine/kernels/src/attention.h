// The words of self-attention: Y = softmax(scale * q k^T) v of each head, where q, k and v are one tensor.
#pragma once

#include "matmul24.h"

namespace sparse_engine {

struct Attention {
  size_t batch = 0;
  size_t tokens = 0;  // L
  int heads = 0;
  int head_dim = 0;
  float scale = 0.0f;          // finite, above zero
  const float* qkv = nullptr;  // [batch, tokens, 3, heads, head_dim]
  float* output = nullptr;     // [batch, tokens, heads, head_dim]

  SPARSE_ENGINE_INLINE size_t width() const { return size_t(heads) * head_dim; }
};

// The part of it that one thread computes at a time: some queries of one head, against all of its keys.
struct QueryBlock {
  size_t batch = 0;
  int head = 0;
  size_t begin = 0, end = 0;

  // The head's q of token 0; its k and v are one and two widths further.
  SPARSE_ENGINE_INLINE const float* queries(const Attention& attention) const {
    return attention.qkv + batch * attention.tokens * 3 * attention.width() + size_t(head) * attention.head_dim;
  }
  SPARSE_ENGINE_INLINE float* output(const Attention& attention, size_t token) const {
    return attention.output + (batch * attention.tokens + token) * attention.width() +
           size_t(head) * attention.head_dim;
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
#endif
#ifdef SPARSE_ENGINE_NEON
extern const AttentionKernel kNeonAttention;
#endif

}  // namespace sparse_engine
