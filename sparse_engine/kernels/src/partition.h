// How a product is cut into blocks for the threads.
#pragma once

#include <cstddef>

#include "matmul24.h"
#include "work_queue.h"

namespace sparse_engine {

inline Grain grain_of(const Tactic& tactic) {
  return {tactic.lane_count, tactic.tile_tokens, tactic.row_multiple, kStreamCost};
}

// A grid of blocks: token_parts x row_parts, near equal, cut where the grain allows.
class Partition {
 public:
  Partition(const Grain& grain, size_t tokens, int rows, int threads);

  size_t size() const { return token_parts_ * row_parts_; }
  Block block(size_t index) const;
  int most_block_rows() const;  // the rows of the largest block

 private:
  size_t tokens_, token_unit_, token_units_, token_parts_ = 1;
  int rows_, row_unit_;
  size_t row_units_, row_parts_ = 1;
};

// Calls run(block, scratch) for every block of a partition, on up to `threads` threads.
template <class Run>
void run_blocks(const Partition& partition, size_t scratch_bytes, int threads, const ParallelFor& parallel_for,
                const Run& run) {
  for_each_item(partition.size(), scratch_bytes, threads, parallel_for,
                [&](size_t index, void* scratch) { run(partition.block(index), scratch); });
}

}  // namespace sparse_engine
