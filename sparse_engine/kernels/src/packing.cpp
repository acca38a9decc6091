#include "packing.h"

#include <algorithm>
#include <cstring>

namespace sparse_engine {
namespace {

struct Group {
  float value[2];
  int position[2];
};

Group group_at(const Weights24& weights, int row, int group) {
  const size_t index = size_t(row) * weights.groups() + group;
  const uint8_t code = weights.positions[index];
  return {{weights.values[2 * index], weights.values[2 * index + 1]}, {code & 3, code >> 2 & 3}};
}

// The index of a pair of positions among (0,1) (0,2) (0,3) (1,2) (1,3) (2,3).
int pair_index(const Group& group) {
  static constexpr int kFirstOf[3] = {0, 3, 5};
  return kFirstOf[group.position[0]] + group.position[1] - group.position[0] - 1;
}

uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Round to nearest, ties to even; a NaN stays a NaN.
uint32_t bfloat16_bits(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

uint32_t bfloat16_pair(const Group& group) {
  return bfloat16_bits(group.value[0]) | bfloat16_bits(group.value[1]) << 16;
}

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Writes one row's steps for the groups [group_begin, group_end). The padding repeats the last offset with a
// weight of zero, so that it reads nothing which the row does not read anyway.
void write_stream(const Weights24& weights, const StreamLayout& layout, int row, int group_begin,
                  int group_end, int steps, uint8_t* out) {
  uint8_t* const offsets = out + size_t(steps) * 4;
  const int line_bytes = layout.tile_tokens * 4;
  uint16_t offset = 0;
  int step = 0;
  const auto write = [&](uint32_t weight, int line) {
    offset = static_cast<uint16_t>(line * line_bytes);
    std::memcpy(out + size_t(step) * 4, &weight, sizeof weight);
    std::memcpy(offsets + size_t(step) * 2, &offset, sizeof offset);
    ++step;
  };
  for (int index = group_begin; index < group_end; ++index) {
    const Group group = group_at(weights, row, index);
    const int first_line = (index - group_begin) * layout.lines_per_group();
    if (layout.operand == Operand::kFloat32) {
      for (int i = 0; i < 2; ++i) write(float_bits(group.value[i]), first_line + group.position[i]);
    } else {
      write(bfloat16_pair(group), first_line + pair_index(group));
    }
  }
  for (; step < steps; ++step) std::memcpy(offsets + size_t(step) * 2, &offset, sizeof offset);
}

}  // namespace

size_t stream_bytes(int rows, int depth, const StreamLayout& layout) {
  size_t steps = 0;
  for (int begin = 0; begin < depth; begin += layout.block_depth) {
    steps += stream_steps(depth, begin, layout.block_depth, layout.steps_per_group());
  }
  return steps * kStepBytes * round_up(rows, kStreamRowMultiple);
}

void pack_streams(const Weights24& weights, const StreamLayout& layout, void* packed) {
  std::memset(packed, 0, stream_bytes(weights.rows, weights.depth, layout));
  uint8_t* block = static_cast<uint8_t*>(packed);
  for (int begin = 0; begin < weights.depth; begin += layout.block_depth) {
    const int end = std::min(weights.depth, begin + layout.block_depth);
    const int steps = stream_steps(weights.depth, begin, layout.block_depth, layout.steps_per_group());
    const size_t row_bytes = size_t(steps) * kStepBytes;
    for (int row = 0; row < weights.rows; ++row) {
      write_stream(weights, layout, row, begin / 4, end / 4, steps, block + row * row_bytes);
    }
    block += row_bytes * round_up(weights.rows, kStreamRowMultiple);
  }
}

size_t panel_bytes(int rows, int depth, Operand operand, int lane_count, int panel_multiple) {
  const size_t panels = round_up(rows, lane_count * panel_multiple) / lane_count;
  const size_t chunks = round_up(depth / 4, kPanelChunkGroups) / kPanelChunkGroups;
  return panels * chunks * panel_chunk_bytes(operand, lane_count);
}

void pack_panels(const Weights24& weights, Operand operand, int lane_count, int panel_multiple,
                 void* packed) {
  std::memset(packed, 0, panel_bytes(weights.rows, weights.depth, operand, lane_count, panel_multiple));
  const size_t chunk_bytes = panel_chunk_bytes(operand, lane_count);
  const size_t chunks = round_up(weights.groups(), kPanelChunkGroups) / kPanelChunkGroups;
  for (int row = 0; row < weights.rows; ++row) {
    uint8_t* const panel = static_cast<uint8_t*>(packed) + row / lane_count * chunks * chunk_bytes;
    const size_t lane = row % lane_count;
    for (int index = 0; index < weights.groups(); ++index) {
      const Group group = group_at(weights, row, index);
      uint32_t* const codes = reinterpret_cast<uint32_t*>(panel + index / kPanelChunkGroups * chunk_bytes);
      uint32_t* const words = codes + lane_count;
      const int place = index % kPanelChunkGroups;
      if (operand == Operand::kFloat32) {
        codes[lane] |= uint32_t(group.position[0] | group.position[1] << 2) << (4 * place);
        words[(2 * place + 0) * lane_count + lane] = float_bits(group.value[0]);
        words[(2 * place + 1) * lane_count + lane] = float_bits(group.value[1]);
      } else {
        codes[lane] |= uint32_t(pair_index(group)) << (4 * place);
        words[place * lane_count + lane] = bfloat16_pair(group);
      }
    }
  }
}

}  // namespace sparse_engine
