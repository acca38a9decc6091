// The reference: plain C++, any processor. One query at a time, its scores in the scratch.
#include <cmath>

#include "attention.h"

namespace sparse_engine {
namespace {

size_t scratch_bytes(const Attention& attention) { return attention.tokens * sizeof(float); }

float dot(const float* a, const float* b, int count) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// Leaves e^(scale * (score - the largest score)) in `scores`; returns their sum.
float exponentials(float* scores, size_t count, float scale) {
  float largest = scores[0];
  for (size_t i = 1; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
  float sum = 0.0f;
  for (size_t i = 0; i < count; ++i) {
    scores[i] = std::exp(scale * (scores[i] - largest));
    sum += scores[i];
  }
  return sum;
}

void run(const Attention& attention, const QueryBlock& block, void* scratch) {
  float* const scores = static_cast<float*>(scratch);
  const int dim = attention.head_dim;
  const size_t width = attention.width();
  const float* const q = block.queries(attention);
  const float* const k = q + width;
  const float* const v = k + width;
  for (size_t query = block.begin; query < block.end; ++query) {
    for (size_t key = 0; key < attention.tokens; ++key) {
      scores[key] = dot(q + query * 3 * width, k + key * 3 * width, dim);
    }
    const float sum = exponentials(scores, attention.tokens, attention.scale);
    float* const y = block.output(attention, query);
    for (int d = 0; d < dim; ++d) y[d] = 0.0f;
    for (size_t key = 0; key < attention.tokens; ++key) {
      for (int d = 0; d < dim; ++d) y[d] += scores[key] * v[key * 3 * width + d];
    }
    for (int d = 0; d < dim; ++d) y[d] /= sum;
  }
}

}  // namespace

constexpr AttentionKernel kScalarAttention = {16, scratch_bytes, run};

}  // namespace sparse_engine
