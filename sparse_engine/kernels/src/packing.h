// Canonical 2:4 weights -> what the kernels walk. Compiled once, for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matmul24.h"

namespace sparse_engine {

// Throws Error(kInvalidInput) for weights that are not [rows, depth] with a depth of whole groups, or whose positions
// are not in order: those would make a kernel read another group's x.
void check_weights(const Weights24& weights);

enum class Operand { kFloat32, kBfloat16, kDenseBfloat16 };

// T-lanes: rows are computed in pairs, each pair a stream of (weight, byte offset) steps. An offset points at a step's
// operand, a line of the X tile that the kernel lays out:
//   kFloat32:  one step per kept weight; the tile has one line of `tile_tokens` floats per k.
//   kBfloat16: one step per group, its weight a pair; the tile has six lines per group, one for each pair
//              of positions (0,1) (0,2) (0,3) (1,2) (1,3) (2,3), each element a pair of bfloat16.
//   kDenseBfloat16: two steps and two lines per group, of the pairs (0,1) (2,3). All rows share all lines.
// Two rows that keep the same k want the same line, and a kernel that loads it once for both has a load to spare. Of 32
// steps two random rows share 16 (fp32; 5 of 32 groups in bf16), and rows of a window are paired so that they share
// more.
//
// The depth is cut into blocks whose part of X fits the L1 cache. A block has windows of kWindowRows rows; a window has
// pairs; a pair is, in chunks of kStepChunk steps, shared ones first:
//   weights: per chunk kStepChunk of the first row, kStepChunk of the second         8 bytes a step
//   offsets: per shared chunk kStepChunk, per other chunk kStepChunk for each row    4 bytes a step at most
//   PairHead
struct StreamLayout {
  Operand operand;
  int tile_tokens;  // a line of the tile is this many 4-byte elements
  int block_depth;  // a multiple of 16

  constexpr SPARSE_ENGINE_INLINE int steps_per_group() const { return operand == Operand::kBfloat16 ? 1 : 2; }
  constexpr SPARSE_ENGINE_INLINE int lines_per_group() const {
    return operand == Operand::kFloat32 ? 4 : operand == Operand::kBfloat16 ? 6 : 2;
  }
};

struct PairHead {
  uint16_t rows[2];  // in the window
  uint16_t shared_chunks;
  uint16_t unused[5];  // a pair is a multiple of 16 bytes, so that loads of four weights do not straddle cache lines
};

constexpr int kStepChunk = 4;           // steps of a row are padded to this: what the kernel reads at once
constexpr int kWindowRows = 64;         // rows that pairs are chosen among, and that are finished together
constexpr int kStreamRowMultiple = 16;  // rows are padded to this, with weights of zero
constexpr int kMostLines = 256;         // of a block
constexpr int kMostSteps = 64;          // of a row in a block

// The steps that a row takes in the block that starts at `block_begin`.
static constexpr SPARSE_ENGINE_INLINE int stream_steps(int depth, int block_begin, int block_depth,
                                                       int steps_per_group) {
  const int left = depth - block_begin;
  const int steps = (left < block_depth ? left : block_depth) / 4 * steps_per_group;
  return (steps + kStepChunk - 1) / kStepChunk * kStepChunk;
}

static constexpr SPARSE_ENGINE_INLINE size_t pair_bytes(int steps) { return size_t(steps) * 12 + sizeof(PairHead); }

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
// Weights of a convolution have a depth over (channels / 4, taps, 4), and panels of the depth (taps, channels). A
// product has one tap.
void pack_panels(const Weights24& weights, int taps, Operand operand, int lane_count, int panel_multiple, void* packed);

// R-lanes, of convolutions in bf16: panels of `lane_count` rows, whose depth (taps, channels) is cut into registers of
// twice as many channels; a tap's last register may be full in part. A step multiplies the two kept weights of a group,
// a pair; which two of the register they are multiplied with is said lane by lane. Blocks of kBlockRegisters have
// panels; a panel's registers follow one another, each
//   weights: steps x lane_count x 4 bytes
//   indices: steps x lane_count x 2 x 2 bytes, which are what a permutation takes: smaller ones would have to be
//   widened by
//     instructions that want the ports of the permutations (measured: a fifth slower)
struct RegisterWalk {
  int taps, channels, lane_count;

  constexpr SPARSE_ENGINE_INLINE int per_tap() const { return (channels + 2 * lane_count - 1) / (2 * lane_count); }
  constexpr SPARSE_ENGINE_INLINE int registers() const { return taps * per_tap(); }
  // Of a register, by its place in the tap.
  constexpr SPARSE_ENGINE_INLINE int steps(int place) const {
    const int left = channels - place * 2 * lane_count;
    return (left < 2 * lane_count ? left : 2 * lane_count) / 4;
  }
  constexpr SPARSE_ENGINE_INLINE size_t step_bytes() const { return size_t(lane_count) * 8; }
  // Of a panel's registers [begin, end).
  constexpr SPARSE_ENGINE_INLINE size_t bytes(int begin, int end) const {
    size_t steps_in_all = 0;
    for (int i = begin; i < end; ++i) steps_in_all += steps(i % per_tap());
    return steps_in_all * step_bytes();
  }
};

constexpr int kBlockRegisters = 12;  // 12 KiB of a panel: two of them stay in L1

size_t register_bytes(int rows, const RegisterWalk& walk);
void pack_registers(const Weights24& weights, const RegisterWalk& walk, void* packed);

// R-lanes, of products in bf16: two panels of sixteen rows side by side, one pair of panels after the other. Of 2:4
// weights a step is a group: for each panel the indices of the pair that each row keeps, among the 32 k of a register,
// and the pair: 2 x (64 + 64) bytes. Of dense ones a step is a pair of k: 2 x 64 bytes, and as many bytes a group.
// Missing rows have weights of 0.
constexpr int kRegisterPanelRows = 32;

size_t register_panel_bytes(int rows, int depth);
void pack_register_panels(const Weights24& weights, void* packed);

}  // namespace sparse_engine
