// The reference: plain C++, any processor.
#include <cmath>

#include "group_norm.h"

namespace sparse_engine {
namespace {

Moments moments(const float* x, size_t count) {
  double mean = 0.0, squares = 0.0;
  for (size_t i = 0; i < count; ++i) mean += x[i];
  mean /= double(count);
  for (size_t i = 0; i < count; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, squares};
}

void apply(const float* x, size_t count, const Affine& affine, Activation activation, float* y) {
  for (size_t i = 0; i < count; ++i) {
    const float value = (x[i] - affine.centre) * affine.factor + affine.offset;
    y[i] = activation == Activation::kSilu ? value / (1.0f + std::exp(-value)) : value;
  }
}

}  // namespace

constexpr GroupNormKernel kScalarGroupNorm = {moments, apply};

}  // namespace sparse_engine
