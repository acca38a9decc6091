#include "partition.h"

#include <algorithm>
#include <limits>

namespace sparse_engine {
namespace {

size_t divide_up(size_t value, size_t divisor) { return (value + divisor - 1) / divisor; }

// The time of a grid in units of (one vector of tokens) x (all rows): the busiest thread's number of blocks
// times the time of one, which is as wide as the average where all threads have as many. Constants are fractions of
// that unit, fitted to timings on a Zen 4:
constexpr double kNarrowTileCost = 1.0;  // one vector alone does not cover the latency of a multiply-add
constexpr double kTransposeRows = 16.0;  // transposing a vector of X costs as much as so many rows; once per part

double cost(size_t vectors, size_t token_parts, size_t row_parts, int rows, int threads, double stream_cost) {
  const size_t blocks = token_parts * row_parts;
  const double rounds = double(divide_up(blocks, threads));
  const bool even = blocks % threads == 0;
  const double width = even ? double(vectors) / double(token_parts) : double(divide_up(vectors, token_parts));
  const double products = (width + stream_cost + (width < 2 ? kNarrowTileCost : 0.0)) / double(row_parts);
  return rounds * (products + width * kTransposeRows / rows);
}

}  // namespace

Partition::Partition(const Grain& grain, size_t tokens, int rows, int threads)
    : tokens_(tokens),
      token_unit_(grain.lane_count),
      token_units_(divide_up(tokens, grain.lane_count)),
      rows_(rows),
      row_unit_(grain.row_multiple),
      row_units_(divide_up(rows, grain.row_multiple)) {
  const size_t fewest = divide_up(tokens, grain.tile_tokens);
  const size_t most = std::min(token_units_, fewest + threads);
  double best = std::numeric_limits<double>::infinity();
  for (size_t token_parts = fewest; token_parts <= most; ++token_parts) {
    for (size_t row_parts = 1; row_parts <= std::min(row_units_, size_t(threads)); ++row_parts) {
      const double candidate = cost(token_units_, token_parts, row_parts, rows, threads, grain.stream_cost);
      if (candidate >= best) continue;
      best = candidate;
      token_parts_ = token_parts;
      row_parts_ = row_parts;
    }
  }
}

Block Partition::block(size_t index) const {
  const size_t t = index / row_parts_;
  const size_t r = index % row_parts_;
  Block block;
  block.token_begin = token_units_ * t / token_parts_ * token_unit_;
  block.token_end = std::min(tokens_, token_units_ * (t + 1) / token_parts_ * token_unit_);
  block.row_begin = int(row_units_ * r / row_parts_) * row_unit_;
  block.row_end = std::min(rows_, int(row_units_ * (r + 1) / row_parts_) * row_unit_);
  return block;
}

int Partition::most_block_rows() const { return std::min(rows_, int(divide_up(row_units_, row_parts_)) * row_unit_); }

}  // namespace sparse_engine
