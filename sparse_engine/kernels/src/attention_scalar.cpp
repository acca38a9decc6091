// The reference: plain C++, any processor. One query at a time, its scores in the scratch.
#include <cmath>

#include "attention.h"

namespace sparse_engine {
namespace {

size_t scratch_bytes(const Attention& attention) { return attention.keys * sizeof(float); }

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
  const float* const q = block.of<float>(attention.q);
  const float* const k = block.of<float>(attention.k);
  const float* const v = block.of<float>(attention.v);
  for (size_t query = block.begin; query < block.end; ++query) {
    for (size_t key = 0; key < attention.keys; ++key) {
      scores[key] = dot(q + query * attention.q.token_stride, k + key * attention.k.token_stride, dim);
    }
    const float* const bias = block.bias(attention, query);
    for (size_t key = 0; bias && key < attention.keys; ++key) scores[key] = attention.scale * scores[key] + bias[key];
    const float sum = exponentials(scores, attention.keys, bias ? 1.0f : attention.scale);
    float* const y = static_cast<float*>(attention.output) + block.output(attention, query);
    for (int d = 0; d < dim; ++d) y[d] = 0.0f;
    for (size_t key = 0; key < attention.keys; ++key) {
      for (int d = 0; d < dim; ++d) y[d] += scores[key] * v[key * attention.v.token_stride + d];
    }
    for (int d = 0; d < dim; ++d) y[d] /= sum;
  }
}

}  // namespace

constexpr AttentionKernel kScalarAttention = {16, scratch_bytes, run};

}  // namespace sparse_engine
