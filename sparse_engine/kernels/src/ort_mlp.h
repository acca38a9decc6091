// The operator sparse_engine::Mlp24, version 1: two layers in a row, of which the first one's output is nobody else's.
//
//   Y = activation(X * W1^T + bias1) * W2^T + bias2 + residual
//   inputs      X                      float32 [..., K]
//               values1, positions1    W1 [H, K], as MatMul24's
//               bias1                  float32 [H]          optional
//               values2, positions2    W2 [N, H]
//               bias2                  float32 [N]          optional
//               residual               float32 [..., N]     optional, the shape of Y
//   output      Y                      float32 [..., N]
//   attributes  N, H, K                int
//               activation, compute, tactic, threads: as MatMul24's
//
// And sparse_engine::MlpBf16, version 1: the same over dense weights, in bf16.
//
//   inputs      X, weight1 float32 [H, K], bias1, weight2 float32 [N, H], bias2, residual
//
// The results are bit for bit those of two MatMul24 (MatMulBf16) nodes: a graph may be written either way.
#pragma once

#include "ort_support.h"

namespace sparse_engine::ort {

Operator mlp24(FunctionTable table);
Operator mlp_bf16(FunctionTable table);

}  // namespace sparse_engine::ort
