#include "packing.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "error.h"

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

uint32_t bfloat16_pair(const float* pair) { return bfloat16_bits(pair[0]) | bfloat16_bits(pair[1]) << 16; }

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int kMaskWords = kMostLines / 64;

// One row's part of a block: weights and the lines that they are multiplied with, in the order of k.
struct RowSteps {
  int count = 0;  // the rest is padding
  uint32_t weights[kMostSteps];
  uint16_t lines[kMostSteps];
  uint64_t mask[kMaskWords];  // of the lines

  void set(int step, uint32_t weight, int line) {
    weights[step] = weight;
    lines[step] = static_cast<uint16_t>(line);
    mask[line / 64] |= uint64_t(1) << (line % 64);
  }
  int wants(int line) const { return int(mask[line / 64] >> (line % 64) & 1); }
};

// A row's steps in the groups [group_begin, group_end). The padding repeats the last line with a weight of zero, so
// that it reads nothing which the row does not read anyway; a row that is itself padding reads the first line.
void fill(RowSteps& row, const Weights24& weights, const StreamLayout& layout, int index, int group_begin,
          int group_end, int steps) {
  std::memset(row.mask, 0, sizeof row.mask);
  int step = 0;
  for (int g = group_begin; g < group_end && index < weights.rows; ++g) {
    const int first_line = (g - group_begin) * layout.lines_per_group();
    if (weights.dense()) {
      const float* const four = weights.values + size_t(index) * weights.depth + size_t(g) * 4;
      for (int i = 0; i < 2; ++i) row.set(step++, bfloat16_pair(four + 2 * i), first_line + i);
      continue;
    }
    const Group group = group_at(weights, index, g);
    if (layout.operand == Operand::kFloat32) {
      for (int i = 0; i < 2; ++i) row.set(step++, float_bits(group.value[i]), first_line + group.position[i]);
    } else {
      row.set(step++, bfloat16_pair(group.value), first_line + pair_index(group));
    }
  }
  row.count = step;
  const uint16_t last = step ? row.lines[step - 1] : 0;
  for (; step < steps; ++step) {
    row.weights[step] = 0;
    row.lines[step] = last;
  }
}

int count_ones(uint64_t x) {
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  return int(((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
}

int shared_lines(const RowSteps& a, const RowSteps& b, int mask_words) {
  int count = 0;
  for (int word = 0; word < mask_words; ++word) count += count_ones(a.mask[word] & b.mask[word]);
  return count;
}

// The place in `rows` of the row that shares the most lines with the first, or the first that shares `enough`.
int best_partner(const RowSteps* window, const std::vector<int>& rows, int mask_words, int enough) {
  int best = 1, most = -1;
  for (int i = 1; i < int(rows.size()) && most < enough; ++i) {
    const int shared = shared_lines(window[rows[0]], window[rows[i]], mask_words);
    if (shared <= most) continue;
    best = i;
    most = shared;
  }
  return best;
}

// The order of a row's steps: `count` of those on lines that the other row wants too, then all others. Which steps
// those are cannot be predicted, so nothing branches on it.
void shared_first(const RowSteps& row, const RowSteps& other, int steps, int count, int* order) {
  int shared = 0, separate = count;
  for (int step = 0; step < row.count; ++step) {
    const int is_shared = other.wants(row.lines[step]) & int(shared < count);
    order[is_shared ? shared : separate] = step;
    shared += is_shared;
    separate += 1 - is_shared;
  }
  for (int step = row.count; step < steps; ++step) order[separate++] = step;
}

// Writes a pair as packing.h says.
void write_pair(const RowSteps& first, const RowSteps& second, PairHead head, int steps, int line_bytes, uint8_t* out) {
  const RowSteps* const rows[2] = {&first, &second};
  head.shared_chunks = static_cast<uint16_t>(shared_lines(first, second, kMaskWords) / kStepChunk);
  const int shared = head.shared_chunks * kStepChunk;
  int order[2][kMostSteps];
  shared_first(first, second, steps, shared, order[0]);
  shared_first(second, first, steps, shared, order[1]);
  uint32_t* weight = reinterpret_cast<uint32_t*>(out);
  uint16_t* offset = reinterpret_cast<uint16_t*>(out + size_t(steps) * 8);
  for (int begin = 0; begin < steps; begin += kStepChunk) {
    for (int r = 0; r < 2; ++r) {
      for (int i = begin; i < begin + kStepChunk; ++i) {
        const int step = order[r][i];
        *weight++ = rows[r]->weights[step];
        if (r == 0 || begin >= shared) *offset++ = static_cast<uint16_t>(rows[r]->lines[step] * line_bytes);
      }
    }
  }
  while (reinterpret_cast<uint8_t*>(offset) < out + size_t(steps) * 12) *offset++ = 0;  // not read
  std::memcpy(out + pair_bytes(steps) - sizeof head, &head, sizeof head);
}

// The pairs of one window of one block; returns where the next one begins.
uint8_t* write_window(const Weights24& weights, const StreamLayout& layout, int row, int group_begin, int group_end,
                      int steps, uint8_t* out) {
  const int mask_words = (layout.block_depth / 4 * layout.lines_per_group() + 63) / 64;
  RowSteps window[kWindowRows];
  std::vector<int> left(std::min(kWindowRows, round_up(weights.rows - row, kStreamRowMultiple)));
  for (int i = 0; i < int(left.size()); ++i) {
    left[i] = i;
    fill(window[i], weights, layout, row + i, group_begin, group_end, steps);
  }
  while (!left.empty()) {
    const int place = best_partner(window, left, mask_words, steps / 2);
    const PairHead head = {{static_cast<uint16_t>(left[0]), static_cast<uint16_t>(left[place])}, 0, {}};
    write_pair(window[left[0]], window[left[place]], head, steps, layout.tile_tokens * 4, out);
    left.erase(left.begin() + place);
    left.erase(left.begin());
    out += pair_bytes(steps);
  }
  return out;
}

}  // namespace

void check_weights(const Weights24& weights) {
  if (weights.rows < 1 || weights.depth < 4 || weights.depth % 4 != 0) {
    throw Error(Status::kInvalidInput, "2:4 weights are [N, K] with N >= 1 and K a positive multiple of 4, got N = " +
                                           std::to_string(weights.rows) + ", K = " + std::to_string(weights.depth));
  }
  if (weights.dense()) return;
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

size_t stream_bytes(int rows, int depth, const StreamLayout& layout) {
  size_t bytes = 0;
  for (int begin = 0; begin < depth; begin += layout.block_depth) {
    bytes += pair_bytes(stream_steps(depth, begin, layout.block_depth, layout.steps_per_group()));
  }
  return bytes * (round_up(rows, kStreamRowMultiple) / 2);
}

void pack_streams(const Weights24& weights, const StreamLayout& layout, void* packed) {
  uint8_t* out = static_cast<uint8_t*>(packed);
  for (int begin = 0; begin < weights.depth; begin += layout.block_depth) {
    const int end = std::min(weights.depth, begin + layout.block_depth);
    const int steps = stream_steps(weights.depth, begin, layout.block_depth, layout.steps_per_group());
    for (int window = 0; window < weights.rows; window += kWindowRows) {
      out = write_window(weights, layout, window, begin / 4, end / 4, steps, out);
    }
  }
}

size_t panel_bytes(int rows, int depth, Operand operand, int lane_count, int panel_multiple) {
  const size_t panels = round_up(rows, lane_count * panel_multiple) / lane_count;
  const size_t chunks = round_up(depth / 4, kPanelChunkGroups) / kPanelChunkGroups;
  return panels * chunks * panel_chunk_bytes(operand, lane_count);
}

void pack_panels(const Weights24& weights, int taps, Operand operand, int lane_count, int panel_multiple,
                 void* packed) {
  std::memset(packed, 0, panel_bytes(weights.rows, weights.depth, operand, lane_count, panel_multiple));
  const size_t chunk_bytes = panel_chunk_bytes(operand, lane_count);
  const size_t chunks = round_up(weights.groups(), kPanelChunkGroups) / kPanelChunkGroups;
  for (int row = 0; row < weights.rows; ++row) {
    uint8_t* const panel = static_cast<uint8_t*>(packed) + row / lane_count * chunks * chunk_bytes;
    const size_t lane = row % lane_count;
    for (int index = 0; index < weights.groups(); ++index) {
      const Group group = group_at(weights, row, index);
      const int at = index % taps * (weights.groups() / taps) + index / taps;
      uint32_t* const codes = reinterpret_cast<uint32_t*>(panel + at / kPanelChunkGroups * chunk_bytes);
      uint32_t* const words = codes + lane_count;
      const int place = at % kPanelChunkGroups;
      if (operand == Operand::kFloat32) {
        codes[lane] |= uint32_t(group.position[0] | group.position[1] << 2) << (4 * place);
        words[(2 * place + 0) * lane_count + lane] = float_bits(group.value[0]);
        words[(2 * place + 1) * lane_count + lane] = float_bits(group.value[1]);
      } else {
        codes[lane] |= uint32_t(pair_index(group)) << (4 * place);
        words[place * lane_count + lane] = bfloat16_pair(group.value);
      }
    }
  }
}

size_t register_bytes(int rows, const RegisterWalk& walk) {
  return size_t(round_up(rows, walk.lane_count) / walk.lane_count) * walk.bytes(0, walk.registers());
}

void pack_registers(const Weights24& weights, const RegisterWalk& walk, void* packed) {
  std::memset(packed, 0, register_bytes(weights.rows, walk));
  const int lanes = walk.lane_count, groups_of_register = lanes / 2;
  uint8_t* out = static_cast<uint8_t*>(packed);
  for (int begin = 0; begin < walk.registers(); begin += kBlockRegisters) {
    const int end = std::min(walk.registers(), begin + kBlockRegisters);
    for (int panel = 0; panel < weights.rows; panel += lanes) {
      for (int index = begin; index < end; ++index) {
        const int tap = index / walk.per_tap(), place = index % walk.per_tap(), steps = walk.steps(place);
        uint32_t* const weight = reinterpret_cast<uint32_t*>(out);
        uint32_t* const chosen = weight + size_t(steps) * lanes;
        out += size_t(steps) * walk.step_bytes();
        for (int lane = 0; lane < lanes && panel + lane < weights.rows; ++lane) {
          for (int step = 0; step < steps; ++step) {
            const int quad = place * groups_of_register + step;
            const Group group = group_at(weights, panel + lane, quad * walk.taps + tap);
            weight[step * lanes + lane] = bfloat16_pair(group.value);
            chosen[step * lanes + lane] =
                uint32_t(4 * step + group.position[0]) | uint32_t(4 * step + group.position[1]) << 16;
          }
        }
      }
    }
  }
}

size_t register_panel_bytes(int rows, int depth) {
  return size_t(round_up(rows, kRegisterPanelRows)) * (depth / 4) * 2 * sizeof(uint32_t);
}

void pack_register_panels(const Weights24& weights, void* packed) {
  constexpr int kLanes = kRegisterPanelRows / 2, kGroupsOfRegister = 8;
  std::memset(packed, 0, register_panel_bytes(weights.rows, weights.depth));
  const size_t panel_words = size_t(weights.groups()) * kRegisterPanelRows * 2;
  for (int row = 0; row < weights.rows; ++row) {
    uint32_t* const panels = static_cast<uint32_t*>(packed) + row / kRegisterPanelRows * panel_words;
    const int panel = row % kRegisterPanelRows / kLanes, lane = row % kLanes;
    for (int index = 0; index < weights.groups(); ++index) {
      uint32_t* const words = panels + size_t(index) * kRegisterPanelRows * 2;
      if (weights.dense()) {
        const float* const four = weights.values + size_t(row) * weights.depth + 4 * index;
        words[panel * kLanes + lane] = bfloat16_pair(four);
        words[(2 + panel) * kLanes + lane] = bfloat16_pair(four + 2);
      } else {
        const Group group = group_at(weights, row, index);
        const int first = index % kGroupsOfRegister * 4;
        words[2 * panel * kLanes + lane] = uint32_t(first + group.position[0]) | uint32_t(first + group.position[1])
                                                                                     << 16;
        words[(2 * panel + 1) * kLanes + lane] = bfloat16_pair(group.value);
      }
    }
  }
}

}  // namespace sparse_engine
