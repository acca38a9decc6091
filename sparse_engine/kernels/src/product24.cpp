#include "product24.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "partition.h"

namespace sparse_engine {
namespace {

void check_shape(const Weights24& weights) {
  if (weights.rows < 1 || weights.depth < 4 || weights.depth % 4 != 0) {
    throw Error(Status::kInvalidInput,
                "2:4 weights are [N, K] with N >= 1 and K a positive multiple of 4, got N = " +
                    std::to_string(weights.rows) + ", K = " + std::to_string(weights.depth));
  }
}

// A position out of order would make a kernel read another group's x, or compute a pair that is not there.
void check_positions(const Weights24& weights) {
  for (int row = 0; row < weights.rows; ++row) {
    for (int group = 0; group < weights.groups(); ++group) {
      const int code = weights.positions[size_t(row) * weights.groups() + group];
      if (code < 16 && (code & 3) < code >> 2) continue;
      throw Error(Status::kInvalidInput, "2:4 positions of row " + std::to_string(row) + ", group " +
                                             std::to_string(group) + " are " + std::to_string(code) +
                                             ", expected first | second << 2 with first < second");
    }
  }
}

}  // namespace

MatMul24::MatMul24(const Weights24& weights, Tier tier, Lanes lanes)
    : weights_(weights), tier_(tier), lanes_(weights.dense() ? Lanes::kTokens : lanes) {
  check_shape(weights);
  if (!weights.dense()) check_positions(weights);
  if (lanes_ != Lanes::kAuto) packed_for(tactic(lanes_));
}

void MatMul24::page_out_weights() const {
  if (lanes_ == Lanes::kAuto) return;
  const size_t values = size_t(weights_.rows) * weights_.depth / (weights_.dense() ? 1 : 2);
  page_out(weights_.values, values * sizeof(float));
}

const Tactic& MatMul24::tactic(Lanes lanes) const {
  return weights_.dense() ? find_dense_tactic(tier_) : find_tactic(tier_, lanes);
}

Lanes MatMul24::lanes_for(size_t tokens) const {
  return lanes_ == Lanes::kAuto ? default_lanes(tier_, tokens) : lanes_;
}

size_t MatMul24::packed_bytes() const { return packed_[0].buffer.size() + packed_[1].buffer.size(); }

const void* MatMul24::packed_for(const Tactic& tactic) const {
  Packed& packed = packed_[tactic.lanes == Lanes::kRows ? 1 : 0];
  std::call_once(packed.once, [&] {
    Buffer buffer(tactic.packed_bytes(weights_.rows, weights_.depth));
    tactic.pack(weights_, buffer.data());
    packed.buffer = std::move(buffer);
  });
  return packed.buffer.data();
}

void MatMul24::run(const float* input, size_t tokens, float* output, const Epilogue& epilogue, int threads,
                   const ParallelFor& parallel_for) const {
  if (tokens == 0) return;
  const Tactic& tactic = this->tactic(lanes_for(tokens));
  const Product product = {weights_.rows, weights_.depth, packed_for(tactic), input, output, epilogue};
  const Partition partition(tactic, tokens, product.rows, std::max(1, threads));
  const size_t scratch_bytes = tactic.scratch_bytes(product.depth, partition.most_block_rows());

  std::atomic<size_t> next{0};
  const std::function<void()> work = [&] {
    const Scratch scratch(scratch_bytes);
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < partition.size();) {
      tactic.run(product, partition.block(i), scratch.data());
    }
  };
  const int workers = int(std::min(partition.size(), size_t(std::max(1, threads))));
  if (workers == 1) {
    work();
  } else {
    parallel_for(workers, work);
  }
}

}  // namespace sparse_engine
