// Activations as they are defined, for the references.
#pragma once

#include <cmath>

#include "matmul24.h"

namespace sparse_engine {
namespace {

float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kGelu:  // x * Phi(x); erfc and not 1 + erf, which cancels for negative x
      return 0.5f * x * std::erfc(-x * 0.70710678f);
    case Activation::kGeluTanh:  // 0.5 x (1 + tanh u) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
      return x / (1.0f + std::exp(-1.5957691f * x * (1.0f + 0.044715f * x * x)));
    case Activation::kSilu:
      return x / (1.0f + std::exp(-x));
  }
  return x;
}

}  // namespace
}  // namespace sparse_engine
