// The Format of fp32 attention (see attention_lanes.h). Included by instruction-set files only.
#pragma once

#include "attention_lanes.h"

namespace sparse_engine {
namespace {

// An operand is one float.
template <class Vectors, int Rows, int TileVectors>
struct Float32Attention {
  using V = Vectors;
  using Vector = typename V::Vector;
  using Number = float;
  static constexpr int kRows = Rows;
  static constexpr int kVectors = TileVectors;
  static constexpr int kKeysPerOperand = 1;
  static constexpr int kDegree = 5;

  static size_t padded_steps(int head_dim) { return round_up(head_dim, V::kLanes); }
  static SPARSE_ENGINE_INLINE void store_output(const Attention& attention, size_t index, Vector y, int count) {
    V::store_first(static_cast<float*>(attention.output) + index, y, count);
  }

  static SPARSE_ENGINE_INLINE Vector multiply_add(Vector sum, Vector weight, Vector line) {
    return V::multiply_add(weight, line, sum);
  }

  static void pack_keys(const float* k, size_t stride, size_t tokens, int head_dim, float* keys) {
    for (size_t token = 0; token < tokens; ++token, k += stride) {
      if (token + kTokensAhead < tokens) fetch_ahead(k + kTokensAhead * stride, head_dim);
      for (int d = 0; d < head_dim; d += V::kLanes, keys += V::kLanes) V::store(keys, load(k, d, head_dim));
    }
  }
  static void pack_values(const float* v, size_t stride, size_t tokens, int head_dim, float* values) {
    pack_keys(v, stride, tokens, head_dim, values);
  }

  template <int TileWidth>
  static void pack_queries(const float* q, size_t stride, int count, int head_dim, float* lines) {
    for (int query = 0; query < count; ++query) fetch_ahead(q + query * stride, head_dim);
    for (int t = 0; t < TileWidth; ++t) {
      for (int d = 0; d < head_dim; d += V::kLanes) {
        Vector square[V::kLanes];
        for (int i = 0; i < V::kLanes; ++i) {
          const int query = t * V::kLanes + i;
          square[i] = query < count ? load(q + query * stride, d, head_dim) : V::zero();
        }
        V::transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i) V::store(lines + ((d + i) * TileWidth + t) * V::kLanes, square[i]);
      }
    }
  }

  // Stores probability(key) of all keys, one line each; returns their sum.
  template <class Function>
  static SPARSE_ENGINE_INLINE Vector pack_probabilities(const Function& probability, int keys, float* column,
                                                        size_t line) {
    Vector sum = V::zero();
    for (int key = 0; key < keys; ++key) {
      const Vector p = probability(key);
      V::store(column + key * line, p);
      sum = sum + p;
    }
    return sum;
  }

 private:
  static SPARSE_ENGINE_INLINE Vector load(const float* row, int d, int head_dim) {
    return V::load_first(row + d, head_dim - d < V::kLanes ? head_dim - d : V::kLanes);
  }
};

}  // namespace
}  // namespace sparse_engine
