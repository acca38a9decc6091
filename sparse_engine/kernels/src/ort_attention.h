// The operator sparse_engine::SelfAttention, version 1. Everything about it that a graph can see:
//
//   Y = softmax(scale * q k^T) v, of each head
//   input       qkv      float32 [B, L, 3 D]   q, k and v side by side, heads outermost within each
//   output      Y        float32 [B, L, D]
//   attributes  heads    int     divides D
//               scale    float   of the scores, finite and above 0; default: 1 / sqrt(D / heads)
//               compute  string  fp32 (default), bf16: the precision of the products; softmax and sums are float32
//               threads  int     how many of the session's threads to use at most; 0 (default): the machine's
#pragma once

#include "ort_support.h"

namespace sparse_engine::ort {

Operator self_attention(FunctionTable table);

}  // namespace sparse_engine::ort
