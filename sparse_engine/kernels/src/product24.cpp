#include "product24.h"

#include <algorithm>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "packing.h"
#include "partition.h"

namespace sparse_engine {

MatMul24::MatMul24(const Weights24& weights, Tier tier, Lanes lanes)
    : weights_(weights), tier_(tier), lanes_(weights.dense() ? Lanes::kTokens : lanes) {
  check_weights(weights);
  const Tactic& tactic = this->tactic();  // throws where the machine lacks the tier
  packed_ = Buffer(tactic.packed_bytes(weights.rows, weights.depth));
  tactic.pack(weights, packed_.data());
}

void MatMul24::page_out_weights() const {
  const size_t values = size_t(weights_.rows) * weights_.depth / (weights_.dense() ? 1 : 2);
  page_out(weights_.values, values * sizeof(float));
}

const Tactic& MatMul24::tactic() const {
  return weights_.dense() ? find_dense_tactic(tier_) : find_tactic(tier_, lanes_);
}

void MatMul24::run(const float* input, size_t tokens, float* output, const Epilogue& epilogue, int threads,
                   const ParallelFor& parallel_for) const {
  if (tokens == 0) return;
  const Tactic& tactic = this->tactic();
  const Product product = {weights_.rows, weights_.depth, packed_.data(), input, output, epilogue};
  const Partition partition(grain_of(tactic), tokens, product.rows, std::max(1, threads));
  const size_t scratch_bytes = tactic.scratch_bytes(product.depth, partition.most_block_rows());

  run_blocks(partition, scratch_bytes, threads, parallel_for,
             [&](const Block& block, void* scratch) { tactic.run(product, block, scratch); });
}

void MatMul24::run_pair(const MatMul24& first, const Epilogue& first_epilogue, const MatMul24& second,
                        const Epilogue& epilogue, const float* input, size_t tokens, float* output, int threads,
                        const ParallelFor& parallel_for) {
  if (first.rows() != second.depth()) {
    throw Error(Status::kInvalidInput, "the first layer has N = " + std::to_string(first.rows()) + ", the second K = " +
                                           std::to_string(second.depth()) + "; expected the same");
  }
  Tactic tactic = first.tactic();
  if (tactic.run != second.tactic().run) {
    throw Error(Status::kInvalidInput,
                "two layers in a row have one tier and the same lanes, and are both 2:4 or both dense");
  }
  if (!tactic.run_pair) {
    throw Error(Status::kUnsupported,
                std::string("two layers in a row have no ") + tier_name(first.tier()) + " kernel");
  }
  if (tokens == 0) return;
  const Product products[2] = {{first.rows(), first.depth(), first.packed_.data(), input, nullptr, first_epilogue},
                               {second.rows(), second.depth(), second.packed_.data(), nullptr, output, epilogue}};
  const int rows = first.rows() + second.rows();
  tactic.row_multiple = rows;  // blocks of tokens only: all rows of the first layer go into each of the second
  const Partition partition(grain_of(tactic), tokens, rows, std::max(1, threads));
  run_blocks(partition, tactic.pair_scratch_bytes(products[0], products[1]), threads, parallel_for,
             [&](const Block& block, void* scratch) {
               tactic.run_pair(products[0], products[1], block.token_begin, block.token_end, scratch);
             });
}

}  // namespace sparse_engine
