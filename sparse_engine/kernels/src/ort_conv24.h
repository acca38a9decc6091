// The operator sparse_engine::Conv24, version 1. Everything about it that a graph can see:
//
//   Y = activation(conv(X, W) + bias + image_bias) + residual
//   inputs      X          float32 [B, C, H, W]
//               values     float32 [N, K / 2]   initializer: canonical 2:4 weights (matmul24.h) of [N, K], where
//               positions  uint8   [N, K / 4]   initializer; K runs over (C / 4, kernel_h, kernel_w, 4)
//               bias       float32 [N]          optional
//               image_bias float32 [B, N, 1, 1] optional: one number an image and output channel
//               residual   float32 [B, N, ...]  optional, the shape of Y
//   output      Y          float32 [B, N, H', W'], H' = (H * upsample + pad_top + pad_bottom - kernel_h) / stride + 1
//   attributes  N, C       int, C a multiple of 4
//               kernel_h, kernel_w              int
//               stride, upsample                int, 1 by default; upsample: X is enlarged first, to its nearest pixels
//               pad_top, pad_left, pad_bottom, pad_right    int, 0 by default
//               activation, compute, tactic, threads    as MatMul24's
#pragma once

#include "convolution24.h"
#include "ort_support.h"

namespace sparse_engine::ort {

Operator conv24(FunctionTable table);

// What the operator in 8 bits (ort_conv_int8.h) shares with it.
int small_attribute(const Api& api, const KernelInfo* info, const char* name, int64_t missing);  // 0 and above
Window window_attributes(const Api& api, const KernelInfo* info);
// Of an output whose axes of places are `first` and the next one in `shape`, which is the input's.
void infer_places(const Api& api, ShapeInferContext* context, size_t first, Shape& shape,
                  std::vector<const char*>& names);
// The output of images of these sizes; `epilogue` gets the inputs from `bias` on: bias, image_bias and residual.
float* output_and_epilogue(const Api& api, KernelContext* context, size_t bias, const Shape& shape,
                           ConvEpilogue* epilogue);

}  // namespace sparse_engine::ort
