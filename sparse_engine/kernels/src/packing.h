// Canonical 2:4 weights -> what the kernels walk. Compiled once, for every instruction set.
#pragma once

#include <cstddef>

#include "matmul24.h"

namespace sparse_engine {

enum class Operand { kFloat32, kBfloat16 };

// T-lanes: each row is a stream of (weight, byte offset) steps, cut into blocks of the depth whose part of X
// fits the L1 cache. Within a block, row after row: all weights of the row (4 bytes each), then all offsets
// (2 bytes each). The offset points at the step's operand in the X tile that the kernel lays out:
//   kFloat32:  one step per kept weight; the tile has one line of `tile_tokens` floats per k.
//   kBfloat16: one step per group, its weight a pair; the tile has six lines per group, one for each pair
//              of positions (0,1) (0,2) (0,3) (1,2) (1,3) (2,3), each element a pair of bfloat16.
struct StreamLayout {
  Operand operand;
  int tile_tokens;  // a line of the tile is this many 4-byte elements
  int block_depth;  // a multiple of 16

  constexpr SPARSE_ENGINE_INLINE int steps_per_group() const { return operand == Operand::kFloat32 ? 2 : 1; }
  constexpr SPARSE_ENGINE_INLINE int lines_per_group() const { return operand == Operand::kFloat32 ? 4 : 6; }
};

constexpr int kStepChunk = 4;           // steps of a row are padded to this: what the kernel reads at once
constexpr int kStreamRowMultiple = 16;  // rows are padded to this, with weights of zero
constexpr int kStepBytes = 6;

// The steps that a row takes in the block that starts at `block_begin`.
static constexpr SPARSE_ENGINE_INLINE int stream_steps(int depth, int block_begin, int block_depth,
                                                       int steps_per_group) {
  const int left = depth - block_begin;
  const int steps = (left < block_depth ? left : block_depth) / 4 * steps_per_group;
  return (steps + kStepChunk - 1) / kStepChunk * kStepChunk;
}

size_t stream_bytes(int rows, int depth, const StreamLayout& layout);
void pack_streams(const Weights24& weights, const StreamLayout& layout, void* packed);

// N-lanes: panels of `lane_count` rows; a panel is a run of chunks of eight groups:
//   lane_count x uint32: four bits per group, the lowest group in the lowest bits. kFloat32: first | second
//     << 2. kBfloat16: the index of the pair of positions, 0..5, in the order above.
//   eight groups x (kFloat32: lane_count first floats, lane_count second floats; kBfloat16: lane_count pairs)
constexpr int kPanelChunkGroups = 8;

static constexpr SPARSE_ENGINE_INLINE size_t panel_chunk_bytes(Operand operand, int lane_count) {
  return size_t(lane_count) * 4 * (1 + kPanelChunkGroups * (operand == Operand::kFloat32 ? 2 : 1));
}

size_t panel_bytes(int rows, int depth, Operand operand, int lane_count, int panel_multiple);
void pack_panels(const Weights24& weights, Operand operand, int lane_count, int panel_multiple, void* packed);

}  // namespace sparse_engine
