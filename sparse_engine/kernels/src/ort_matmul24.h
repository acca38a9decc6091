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
//               tactic     string  t-lanes (default), n-lanes
//               threads    int     how many of the session's threads to use at most; 0 (default): the
//               machine's
//
// And sparse_engine::MatMulBf16, version 1: the same over dense weights, in bf16.
//
//   inputs      X, weight float32 [N, K] (an initializer), bias, residual
#pragma once

#include "ort_support.h"

namespace sparse_engine::ort {

Operator matmul24(FunctionTable table);
Operator matmul_bf16(FunctionTable table);

// What the operators of two layers (ort_mlp.h) share with these. How a node's weights are given, and what its products
// are computed in unless it says so.
struct SparseForm {
  static constexpr bool kIsSparse = true;
  static constexpr const char* kDefaultCompute = "fp32";
};
struct DenseForm {
  static constexpr bool kIsSparse = false;
  static constexpr const char* kDefaultCompute = "bf16";
};

// What a node says of its products.
struct ProductAttributes {
  ProductAttributes(const Api& api, const KernelInfo* info, const char* default_compute);
  Activation activation;
  int threads;
  Tier tier;
  Lanes lanes;
};

// What a node is given, and the shape of Y.
struct Given {
  Given(const Api& api, KernelContext* context, int depth, int rows);  // K of X, which is input 0, and N
  const float* x;
  size_t tokens;
  Shape shape;
};

// Weights [rows, depth] from input `index` on: values
// and positions, or one dense weight. Others are null where the node does not have them.
Weights24 weights_input(const Api& api, const KernelInfo* info, int64_t rows, int64_t depth, size_t index,
                        bool is_sparse);
size_t tokens_of(const Shape& shape, int depth);  // of X
const float* bias_input(const Api& api, KernelContext* context, size_t index, const char* name, int rows);
const float* residual_input(const Api& api, KernelContext* context, size_t index, const Shape& shape);
void infer_rows(const Api& api, ShapeInferContext* context);  // Y is [..., N]

}  // namespace sparse_engine::ort
