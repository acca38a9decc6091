// The operator sparse_engine::GroupNorm, version 1. Everything about it that a graph can see:
//
//   Y = activation((norm(X) * gamma + beta) * (1 + scale) + shift), where norm() takes, of each image and each group of
//   adjacent channels, the mean away and divides by the deviation
//
//   inputs      X            float32 [B, C, L] or [B, C, H, W]
//               gamma, beta  float32 [C], or with axes of size 1 after it; optional
//               scale, shift float32 [B, C] or [1, C], or with axes of size 1 after it; optional
//   outputs     Y            float32, of X's shape; optional: one of the two is there
//               Y_codes      uint8 [B, L, C] or [B, H, W, C], the third output: what ConvInt8 takes; optional
//   attributes  groups      int     divides C
//               epsilon     float   added to the variance, 0 or above
//               activation  string  none (default), silu
//               output      int     which of the outputs is there: 0 (default) or 2
//               y_scale float, y_zero int   of Y_codes
//               threads     int     how many of the session's threads to use at most; 0 (default): the machine's
#pragma once

#include "ort_support.h"

namespace sparse_engine::ort {

Operator group_norm(FunctionTable table);

}  // namespace sparse_engine::ort
