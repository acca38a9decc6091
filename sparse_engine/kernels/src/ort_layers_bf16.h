// The operator sparse_engine::LayersBf16, version 1: a layer in bf16, or two in a row, of which the first one's output
// is nobody else's. Everything about it that a graph can see:
//
//   X' = X, or norm(X), or X and X2 side by side, rounded to bfloat16; or halves
//   Y  = activation(X' * W1^T + bias1) + residual
//   or   round(activation(X' * W1^T + bias1)) * W2^T + bias2 + residual
//   or, with a front, of which X and halves are then the input: x' = X' * W0^T + bias0 + residual0,
//        Y = round(activation(round(norm(x')) * W1^T + bias1)) * W2^T + bias2 + x'
//   inputs      X          float32 [..., K]        optional
//               X2         float32 [..., K2]       optional: more of each token; X is then [..., K - K2]
//               halves     bfloat16 [..., K]       optional: in place of X
//               values1    float32 [H, K / 2]      initializer: canonical 2:4 weights (matmul24.h); [H, K]: dense ones
//               positions1 uint8   [H, K / 4]      initializer; none: dense
//               bias1      float32 [H]             optional
//               values2, positions2, bias2         of the second layer, [N, H]; optional
//               residual   float32 [..., N]        optional, the shape of Y
//               gamma, beta    float32 [K]         optional, of the layer normalisation
//               values0, positions0, bias0         of the front, [K, F]; optional
//               residual0  float32 [..., K]        optional
//   outputs     Y          float32  [..., N]       optional; one of the two is there
//               Y_bf16     bfloat16 [..., N]       optional
//   attributes  N, H, K    int     H = N where there is one layer, K = N where there is a front
//               F          int     of a front; X and halves are then [..., F]
//               layers     int     1 (default), 2, or 3: two with a front
//               output     int     which of the outputs is there: 0 (default), 1
//               activation string  none (default), gelu, gelu-tanh, silu: of the first layer
//               epsilon    float   of a layer normalisation over X; none: there is no such
//               threads    int     how many of the session's threads to use at most; 0 (default): the machine's
//
// Sums are float32, each in the order of K alone.
#pragma once

#include "ort_support.h"

namespace sparse_engine::ort {

Operator layers_bf16(FunctionTable table);

}  // namespace sparse_engine::ort
