// The operators sparse_engine::SelfAttention and sparse_engine::Attention, version 1. Everything about them that a
// graph can see:
//
//   SelfAttention: Y = softmax(scale * q k^T) v, of each head
//   inputs      qkv      float32 [B, L, 3 D]   q, k and v side by side, heads outermost within each; optional
//               qkv_bf16 bfloat16, in place of it; with compute = bf16 or int8
//   outputs     Y        float32 [B, L, D]     optional; one of the three is there
//               Y_bf16   bfloat16, Y_codes uint8: with compute = bf16 or int8
//   attributes  output   int     which of the outputs is there: 0 (default), 1, 2
//               y_scale  float, y_zero int     of Y_codes: round(value / scale) + zero, from 0 to 255
//
//   Attention: Y = softmax(scale * q k^T + bias) v, of each head
//   inputs      q        float32 [B, L, D] or [B, heads, L, D / heads]
//               k, v     float32 [B, S, D] or [B, heads, S, D / heads]; S is 1 or more
//               bias     float32 [1 or B, 1 or heads, 1 or L, S], optional
//   output      Y        float32 [B, L, D]
//
//   attributes of both
//               heads    int     divides D
//               scale    float   of the scores, finite and above 0; default: 1 / sqrt(D / heads)
//               compute  string  fp32 (default), bf16: the precision of the products; softmax and sums are float32.
//                        SelfAttention: int8 too, q, k, v and the probabilities rounded as they are met
//               threads  int     how many of the session's threads to use at most; 0 (default): the machine's
#pragma once

#include "ort_support.h"

namespace sparse_engine::ort {

Operator self_attention(FunctionTable table);
Operator attention(FunctionTable table);

}  // namespace sparse_engine::ort
