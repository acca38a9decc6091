#include "attention_loop.h"

#include <algorithm>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "work_queue.h"

namespace sparse_engine {
namespace {

const AttentionKernel& find_kernel(const Attention& attention, Tier tier) {
  const bool halves = attention.input_element == Element::kBfloat16;
  const bool eight_bits = tier == Tier::kAvx512Vnni;
  if (eight_bits && attention.bias.data) {
    throw Error(Status::kUnsupported, "attention in 8 bits has no bias");
  }
  if (tier != Tier::kAvx512Bf16 && !eight_bits && (halves || attention.output_element != Element::kFloat32)) {
    throw Error(Status::kUnsupported, std::string("attention on ") + tier_name(tier) + " reads and writes floats");
  }
#ifdef SPARSE_ENGINE_X86
  if (eight_bits) return halves ? kAvx512VnniAttentionOfHalves : kAvx512VnniAttention;
  if (halves) return kAvx512Bf16AttentionOfHalves;
  if (tier == Tier::kAvx2) return kAvx2Attention;
  if (tier == Tier::kAvx512) return kAvx512Attention;
  if (tier == Tier::kAvx512Bf16) return kAvx512Bf16Attention;
#endif
#ifdef SPARSE_ENGINE_NEON
  if (tier == Tier::kNeon) return kNeonAttention;
#endif
  return kScalarAttention;
}

size_t divide_up(size_t value, size_t divisor) { return (value + divisor - 1) / divisor; }

// Laying out a head's keys and values, which each part of the head does anew, in units of a tile's time.
constexpr double kLayoutCost = 0.25;

// Into how many parts the queries of each head are cut: the number that keeps the busiest thread the shortest.
size_t parts_per_head(size_t heads, size_t tiles, size_t threads) {
  size_t best = 1;
  double best_cost = 0.0;
  for (size_t parts = 1; parts <= std::min(tiles, threads); ++parts) {
    const double rounds = double(divide_up(heads * parts, threads));
    const double cost = rounds * (double(divide_up(tiles, parts)) + kLayoutCost);
    if (parts > 1 && cost >= best_cost) continue;
    best = parts;
    best_cost = cost;
  }
  return best;
}

}  // namespace

void run_attention(const Attention& attention, Tier tier, int threads, const ParallelFor& parallel_for) {
  const size_t heads = attention.batch * attention.heads;
  if (heads == 0 || attention.queries == 0) return;
  const AttentionKernel& kernel = find_kernel(attention, tier);
  const size_t scratch_bytes = kernel.scratch_bytes(attention);
  const size_t tiles = divide_up(attention.queries, kernel.tile_queries);
  const size_t parts = parts_per_head(heads, tiles, size_t(std::max(1, threads)));

  for_each_item(heads * parts, scratch_bytes, threads, parallel_for, [&](size_t i, void* scratch) {
    const size_t head = i / parts;
    const size_t part = i % parts;
    QueryBlock block;
    block.batch = head / attention.heads;
    block.head = int(head % attention.heads);
    block.begin = tiles * part / parts * kernel.tile_queries;
    block.end = std::min(attention.queries, tiles * (part + 1) / parts * kernel.tile_queries);
    kernel.run(attention, block, scratch);
  });
}

}  // namespace sparse_engine
