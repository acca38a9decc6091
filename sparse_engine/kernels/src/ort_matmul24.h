// The operator sparse_engine::MatMul24, version 1. Everything about it that a graph can see:
//
//   Y = activation(X * W^T + bias) + residual
//   inputs      X          float32 [..., K]
//               values     float32 [N, K / 2]   initializer: canonical 2:4 weights (matmul24.h)
//               positions  uint8   [N, K / 4]   initializer
//               bias       float32 [N]          optional
//               residual   float32 [..., N]     optional, the shape of Y
//   output      Y          float32 [..., N]
//   attributes  N, K       int
//               activation string  none (default), gelu, gelu-tanh, silu
//               compute    string  fp32 (default), bf16: the precision of the products; sums are float32
//               tactic     string  auto (default), t-lanes, n-lanes
//               threads    int     how many of the session's threads to use at most; 0 (default): the
//               machine's
//
// And sparse_engine::MatMulBf16, version 1: the same over dense weights, in bf16.
//
//   inputs      X, weight float32 [N, K] (an initializer), bias, residual
#pragma once

#include "ort_abi.h"

namespace sparse_engine::ort {

// The runtime's functions travel with the operator: shape inference is given nothing else.
struct MatMulOp : CustomOp {
  enum class Weights { k24, kDense };
  MatMulOp(FunctionTable table, Weights weights);
  Api api;
};

}  // namespace sparse_engine::ort
