// One layer: weights packed for this machine, ready to be multiplied by any number of threads.
#pragma once

#include "buffer.h"
#include "matmul24.h"
#include "work_queue.h"

namespace sparse_engine {

class MatMul24 {
 public:
  // The weights are packed now, and may then be freed. Dense weights have T-lanes only.
  // Throws Error: kInvalidInput for weights that are neither, kUnsupported for a missing tier.
  MatMul24(const Weights24& weights, Tier tier, Lanes lanes);

  // output[tokens, rows] = activation(input[tokens, depth] * W^T + bias) + residual. Safe to call from
  // several threads at once; the result does not depend on `threads`.
  void run(const float* input, size_t tokens, float* output, const Epilogue& epilogue, int threads,
           const ParallelFor& parallel_for) const;

  // The weights were packed, and may leave memory.
  void page_out_weights() const;

  // output = second(first(input)), where second.depth() is first.rows(): bit for bit what two calls of run() give, but
  // what lies between them stays in the caches, and is not transposed to memory and back. The first layer's epilogue
  // has no residual. Throws Error: kInvalidInput for layers that do not follow one another or are packed differently,
  // kUnsupported on a tier without such a kernel.
  static void run_pair(const MatMul24& first, const Epilogue& first_epilogue, const MatMul24& second,
                       const Epilogue& epilogue, const float* input, size_t tokens, float* output, int threads,
                       const ParallelFor& parallel_for);

  int rows() const { return weights_.rows; }
  int depth() const { return weights_.depth; }
  Tier tier() const { return tier_; }
  Lanes lanes() const { return lanes_; }
  size_t packed_bytes() const { return packed_.size(); }

 private:
  const Tactic& tactic() const;

  Weights24 weights_;
  Tier tier_;
  Lanes lanes_;
  Buffer packed_;
};

}  // namespace sparse_engine
