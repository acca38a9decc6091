// A convolution in T-lanes: the loop of t_lanes.h over a tile whose lines are shifted pictures of the input.
//
//     output pixels 0..95 of the image's rows        tile
//     | row y   : x = 0 .. 31 |        channel 0, tap (-1,-1)  | X[0][y-1][-1..30] X[0][y][-1..30] X[0][y+1][-1..30] |
//     | row y+1 : x = 0 .. 31 |   ->   channel 1, tap (-1,-1)  | X[1] ...                                            |
//     | row y+2 : x = 0 .. 31 |        ...                                                                           |
//
// A line is what a tap of a channel sees at 96 output pixels. Laying it out is a copy, where a product's tile is a
// transposition; sums leave as they lie. What an output pixel sees of the border is zero.
//
// Bound: as t_lanes.h, plus one load and one store per line and vector, against rows / 2 multiply-adds.
//
// Included by instruction-set files only. Two ways to the lines:
//   direct  stride 1, nothing enlarged, and no vector of pixels goes beyond its row: loads from X, masked at the
//   borders. planes  anything else: for four channels, the rows that the tile needs are first written as the taps of
//   each column
//           see them, [column tap][row parity][rows, out_width], so that every line is contiguous within an image.
#pragma once

#include "conv_tile.h"
#include "t_lanes.h"

namespace sparse_engine {
namespace {

constexpr size_t divide_up(size_t value, size_t divisor) { return (value + divisor - 1) / divisor; }

template <class Format>
struct ConvInLanes {
  using Tile = TokensInLanes<Format>;
  using V = typename Format::V;
  using Vector = typename V::Vector;
  static constexpr int kTileTokens = Tile::kTileTokens;
  static constexpr int kLayoutLines = Tile::kLayout.lines_per_group();

  static bool is_direct(const Convolution& conv) {
    return conv.window.stride == 1 && conv.window.upsample == 1 && conv.sizes.out_width % V::kLanes == 0;
  }

  // Rows that the planes of one segment have, beyond those of its output.
  static int extra_rows(const Window& window) { return (window.height - 1) / window.stride; }

  static size_t most_plane_floats(const Convolution& conv) {
    if (is_direct(conv)) return 0;
    const size_t images = divide_up(kTileTokens - 1, conv.sizes.out_pixels()) + 1;
    const size_t rows = kTileTokens / conv.sizes.out_width + images * (2 + extra_rows(conv.window));
    return rows * conv.sizes.out_width + V::kLanes;
  }

  static size_t lines_bytes() { return size_t(4) * Tile::kLineBytes; }
  static size_t planes_bytes(const Convolution& conv) {
    const size_t planes = size_t(4) * conv.window.width * conv.window.stride;
    return divide_up(planes * most_plane_floats(conv) * sizeof(float), 64) * 64;
  }

  static size_t scratch_bytes(const Convolution& conv, int block_rows) {
    // The last row of sums may be read a vector beyond its end.
    return Tile::kTileBlockBytes + lines_bytes() + planes_bytes(conv) +
           size_t(round_up(block_rows, kStreamRowMultiple)) * Tile::kLineBytes + V::kLanes * sizeof(float);
  }

  static size_t packed_bytes(int rows, int depth, int) { return Tile::packed_bytes(rows, depth); }
  static void pack(const Weights24& weights, int, void* packed) { Tile::pack(weights, packed); }

  static void run(const Convolution& conv, const Block& block, void* scratch) {
    for (size_t token = block.token_begin; token < block.token_end; token += kTileTokens) {
      const size_t left = block.token_end - token;
      ConvInLanes(conv, token, left < size_t(kTileTokens) ? int(left) : kTileTokens, scratch).run_tile(block);
    }
  }

 private:
  const Convolution& conv;
  int tokens;
  Segment segments[kTileTokens];
  size_t plane_of[kTileTokens];  // where the rows of each segment begin in each plane, in floats
  int segment_count = 0;
  bool whole_vectors = true;  // no vector of tokens lies in two images
  size_t plane_floats = 0;
  uint8_t* tile;
  float* lines;   // four, [4][kTileTokens]
  float* planes;  // [4][window.width][window.stride][plane_floats]
  float* sums;

  ConvInLanes(const Convolution& convolution, size_t token, int token_count, void* scratch)
      : conv(convolution), tokens(token_count), tile(static_cast<uint8_t*>(scratch)) {
    lines = reinterpret_cast<float*>(tile + Tile::kTileBlockBytes);
    planes = reinterpret_cast<float*>(tile + Tile::kTileBlockBytes + lines_bytes());
    sums = reinterpret_cast<float*>(tile + Tile::kTileBlockBytes + lines_bytes() + planes_bytes(conv));
    segment_count = cut_into_segments(conv, token, tokens, false, segments);
    for (int s = 0; s < segment_count; ++s) {
      plane_of[s] = plane_floats;
      plane_floats += size_t(plane_rows(segments[s])) * conv.sizes.out_width;
      whole_vectors = whole_vectors && segments[s].begin % V::kLanes == 0;
    }
    plane_floats += V::kLanes;  // the last vector is read whole
  }

  // Block after block of the depth, the sums resting in L2 between blocks.
  void run_tile(const Block& block) {
    const bool direct = is_direct(conv);
    if (!direct) __builtin_memset(lines, 0, lines_bytes());
    const int taps = conv.window.taps();
    int quad = -1;  // whose four channels the planes hold
    for (int begin = 0; begin < conv.product.depth; begin += Tile::kLayout.block_depth) {
      const int groups = smaller(Tile::kLayout.block_depth, conv.product.depth - begin) / 4;
      for (int group = 0; group < groups; ++group) {
        const int index = begin / 4 + group;
        uint8_t* const out = tile + size_t(group) * kLayoutLines * Tile::kLineBytes;
        if (direct) {
          lay_out_direct(index / taps, index % taps, out);
          continue;
        }
        if (index / taps != quad) fill_planes(quad = index / taps);
        lay_out_planes(index % taps, out);
      }
      Tile::multiply_block(conv.product, begin, tile, tokens, block.row_begin, block.row_end, sums,
                           [&](int row, int rows, const float* window) {
                             store_rows_of_pixels<V, Tile::kLayout.operand>(conv, segments, segment_count, row, rows,
                                                                            window, kTileTokens);
                           });
    }
  }

  int plane_rows(const Segment& segment) const { return segment.last_row - segment.row + 1 + extra_rows(conv.window); }

  // Four channels of one tap, at every pixel of the tile.
  void lay_out_direct(int quad, int tap, uint8_t* out) const {
    const int down = tap / conv.window.width - conv.window.pad_top;
    const int right = tap % conv.window.width - conv.window.pad_left;
    const int width = conv.sizes.width;
    const size_t pixels = conv.sizes.pixels();
    for (int s = 0; s < segment_count; ++s) {
      const Segment& segment = segments[s];
      const float* const first = channel_of(conv, segment.image, 4 * quad);
      int y = segment.row + down;
      int x = segment.column + right;
      const int row_end = conv.sizes.out_width + right;
      for (int t = segment.begin; t < segment.end; t += V::kLanes) {
        Vector four[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        if (y >= 0 && y < conv.sizes.height) {
          const float* const row = first + size_t(y) * width;
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) four[i] = load_existing<V>(row + i * pixels, width, x);
        }
        Format::store_group(out + size_t(t) * 4, four);
        x += V::kLanes;
        if (x == row_end) {
          x = right;
          ++y;
        }
      }
    }
  }

  // The rows that the tile needs of four channels, shifted by each column tap.
  void fill_planes(int quad) {
    float* plane = planes;
    for (int i = 0; i < 4; ++i) {
      for (int column = 0; column < conv.window.width; ++column) {
        for (int parity = 0; parity < conv.window.stride; ++parity, plane += plane_floats) {
          for (int s = 0; s < segment_count; ++s) {
            fill_rows(segments[s], channel_of(conv, segments[s].image, 4 * quad + i), column, parity,
                      plane + plane_of[s]);
          }
        }
      }
    }
  }

  // Rows are written a vector at a time and in order: what goes beyond a row is overwritten by the next.
  void fill_rows(const Segment& segment, const float* input, int column, int parity, float* out) const {
    const Window& window = conv.window;
    const int shift = column - window.pad_left;
    const int out_width = conv.sizes.out_width, stride = window.stride;  // in registers: a store could be to anything
    const int rows = plane_rows(segment);
    for (int row = 0; row < rows; ++row, out += out_width) {
      const int y = (segment.row + row) * stride + parity - window.pad_top;
      const bool exists = y >= 0 && y < conv.sizes.height * window.upsample;
      const float* const from = input + (exists ? size_t(y / window.upsample) * conv.sizes.width : 0);
      const int width = exists ? conv.sizes.width : 0;
      for (int x = 0; x < out_width; x += V::kLanes) {
        V::store_unaligned(out + x, see(from, width, x * stride + shift));
      }
    }
  }

  // What neighbouring output pixels see of a row of the input from `position` on, which counts enlarged pixels.
  SPARSE_ENGINE_INLINE Vector see(const float* row, int width, int position) const {
    const Window& window = conv.window;
    if (window.stride == 1 && window.upsample == 1) return load_existing<V>(row, width, position);
    if (window.stride == 2 && window.upsample == 1) {
      return V::every_second(load_existing<V>(row, width, position),
                             load_existing<V>(row, width, position + V::kLanes));
    }
    if (window.stride == 1 && window.upsample == 2) {
      return V::twice(load_existing<V>(row, width, position >> 1), position & 1);
    }
    float seen[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i, position += window.stride) {
      seen[i] = position >= 0 && position < width * window.upsample ? row[position / window.upsample] : 0.0f;
    }
    return V::load_unaligned(seen);
  }

  // Four channels of one tap, out of the planes.
  void lay_out_planes(int tap, uint8_t* out) const {
    const Window& window = conv.window;
    const int row = tap / window.width;
    const float* const plane =
        planes + (size_t(tap % window.width) * window.stride + row % window.stride) * plane_floats;
    const size_t next = size_t(window.width) * window.stride * plane_floats;  // channel
    for (int s = 0; s < segment_count; ++s) {
      const Segment& segment = segments[s];
      const float* const from =
          plane + plane_of[s] + size_t(row / window.stride) * conv.sizes.out_width + segment.column;
      for (int t = segment.begin; t < segment.end; t += V::kLanes) {
        const float* const p = from + (t - segment.begin);
        if (whole_vectors) {
          Vector four[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) four[i] = V::load_unaligned(p + i * next);
          Format::store_group(out + size_t(t) * 4, four);
        } else {
          const int count = smaller(V::kLanes, segment.end - t);
          for (int i = 0; i < 4; ++i)
            V::store_first(lines + i * kTileTokens + t, V::load_unaligned(p + i * next), count);
        }
      }
    }
    if (whole_vectors) return;
    for (int t = 0; t < tokens; t += V::kLanes) {
      Vector four[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) four[i] = V::load(lines + i * kTileTokens + t);
      Format::store_group(out + size_t(t) * 4, four);
    }
  }
};

template <class Format>
constexpr ConvTactic conv_in_lanes() {
  using Kernel = ConvInLanes<Format>;
  return {{Format::V::kLanes, Kernel::kTileTokens, kWindowRows, kStreamCost},
          Kernel::packed_bytes,
          Kernel::pack,
          Kernel::scratch_bytes,
          Kernel::run};
}

}  // namespace
}  // namespace sparse_engine
