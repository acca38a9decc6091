// The operator sparse_engine::LayersInt8, version 1: a layer in 8 bits, or two in a row, of which the first one's
// output is nobody else's. Everything about it that a graph can see:
//
//   X' = the codes of X, or of norm(X), or of X and X2 side by side
//   Y  = activation(dequantised X' * W1^T + bias1) + residual
//   or   (the codes of activation(X' * W1^T + bias1)) * W2^T + bias2 + residual
//   or, with a front, of which X and codes are then the input: x' = X' * W0^T + bias0 + residual0,
//        Y = (the codes of activation(the codes of norm(x') * W1^T + bias1)) * W2^T + bias2 + x'
//   inputs      X          float32 [..., K]        optional
//               X2         float32 [..., K2]       optional: more of each token; X is then [..., K - K2]
//               codes      uint8   [..., K]        optional: in place of X
//               values1    int8    [H, K / 2]      initializer: canonical 2:4 codes (int8.h); [H, K]: dense ones
//               positions1 uint8   [H, K / 4]      initializer; none: dense
//               scales1    float32 [H]             initializer: of each row's codes
//               bias1      float32 [H]             optional
//               values2, positions2, scales2, bias2    of the second layer, [N, H]; optional
//               residual   float32 [..., N]        optional, the shape of Y
//               gamma, beta    float32 [K]         optional, of the layer normalisation
//               values0, positions0, scales0, bias0    of the front, [K, F]; optional
//               residual0  float32 [..., K]        optional
//   outputs     Y          float32  [..., N]       optional; one of the three is there
//               Y_bf16     bfloat16 [..., N]       optional
//               Y_codes    uint8    [..., N]       optional
//   attributes  N, H, K    int     H = N where there is one layer, K = N where there is a front
//               F          int     of a front; X and codes are then [..., F]
//               f_scale float, f_zero int          of the front's X'
//               x_scale float, x_zero int          of X'
//               h_scale float, h_zero int          of what lies between two layers
//               y_scale float, y_zero int          of Y_codes
//               output     int     which of the outputs is there: 0 (default), 1, 2
//               activation string  none (default), gelu, gelu-tanh, silu: of the first layer
//               epsilon    float   of a layer normalisation over X; none: there is no such
//               threads    int     how many of the session's threads to use at most; 0 (default): the machine's
//
// A code is round(value / scale) + zero, from 0 to 255, ties to even. Sums are exact: Y does not depend on the tier.
#pragma once

#include "ort_support.h"

namespace sparse_engine::ort {

Operator layers_int8(FunctionTable table);

// What the operator of a convolution (ort_conv_int8.h) shares with it: canonical weights [rows, depth] from input
// `index` on, and what tells the system that they were packed.
struct Int8Input {
  WeightsInt8 weights;
  const float* scales;
  void page_out() const;
};
Int8Input int8_weights_input(const Api& api, const KernelInfo* info, int64_t rows, int64_t depth, size_t index);

}  // namespace sparse_engine::ort
