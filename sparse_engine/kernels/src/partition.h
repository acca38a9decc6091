// How a product is cut into blocks for the threads.
#pragma once

#include <cstddef>

#include "matmul24.h"

namespace sparse_engine {

// A grid of blocks: token_parts x row_parts, near equal, cut where the tactic allows.
class Partition {
 public:
  Partition(const Tactic& tactic, size_t tokens, int rows, int threads);

  size_t size() const { return token_parts_ * row_parts_; }
  Block block(size_t index) const;
  int most_block_rows() const;  // the rows of the largest block

 private:
  size_t tokens_, token_unit_, token_units_, token_parts_ = 1;
  int rows_, row_unit_;
  size_t row_units_, row_parts_ = 1;
};

}  // namespace sparse_engine
