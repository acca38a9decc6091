// The operator sparse_engine::ConvInt8, version 1. Everything about it that a graph can see:
//
//   X' = the codes of X
//   Y  = activation(conv(dequantised X', W) + bias + image_bias) + residual
//   inputs      X          float32 [B, C, H, W]    optional
//               codes      uint8   [B, H, W, C]    optional: in place of X
//               values     int8    [N, K / 2]      initializer: canonical 2:4 codes (int8.h) of [N, K], where
//               positions  uint8   [N, K / 4]      initializer; K runs over (C / 4, kernel_h, kernel_w, 4)
//               scales     float32 [N]             initializer: of each row's codes
//               bias       float32 [N]             optional
//               image_bias float32 [B, N, 1, 1]    optional: one number an image and output channel
//               residual   float32 [B, N, ...]     optional, the shape of Y
//   output      Y          float32 [B, N, H', W'], as Conv24's
//   attributes  N, C, kernel_h, kernel_w, stride, upsample, pads, activation, threads    as Conv24's
//               x_scale float, x_zero int          of X'
//               codes      int                     1 where codes are given, 0 where X is: for the shape of Y
//
// A code is round(value / scale) + zero, from 0 to 255, ties to even. What lies outside an image is 0. Sums are exact.
#pragma once

#include "ort_support.h"

namespace sparse_engine::ort {

Operator conv_int8(FunctionTable table);

}  // namespace sparse_engine::ort
