// A convolution in N-lanes: the loop of n_lanes.h, where a token is an output pixel and its taps are pixels of the
// input.
//
// For a tile of output pixels the part of the images that they see is laid out once, pixel after pixel, a pixel's
// channels side by side; then, for each output pixel, what its taps see, side by side. Strides, paddings and enlarged
// inputs are a matter of where that is copied from. A panel's weights stay in L2 while the tile goes past it.
//
// Included by instruction-set files only.
#pragma once

#include "conv_tile.h"
#include "n_lanes.h"

namespace sparse_engine {
namespace {

template <class Format>
struct ConvRowsInLanes {
  using Loop = RowsInLanes<Format>;
  using V = typename Format::V;
  using Vector = typename V::Vector;
  static constexpr int kTileTokens = 96;
  static constexpr size_t kMostSeenBytes = 256 * 1024;  // what a tile's taps see stays in L2

  // Of the input, before it is enlarged.
  struct Area {
    int top, bottom, left, right;  // the last two of each are outside
  };

  // Rows of output that are wider than a tile are cut where they end: what a segment sees is then narrow.
  static bool in_rows(const Convolution& conv) { return conv.sizes.out_width >= kTileTokens; }

  static int clamp(int value, int most) { return value < 0 ? 0 : value > most ? most : value; }

  // What output pixels [first, last] along an axis see of it.
  static void seen(int first, int last, int taps, int pad, const Window& window, int size, int& begin, int& end) {
    const int from = first * window.stride - pad, to = last * window.stride - pad + taps - 1;
    begin = clamp(from < 0 ? 0 : from / window.upsample, size);
    end = clamp(to < 0 ? 0 : to / window.upsample + 1, size);
    if (end < begin) end = begin;
  }

  static Area area_of(const Convolution& conv, const Segment& segment) {
    const Window& window = conv.window;
    const bool one_row = segment.row == segment.last_row;
    const int last_column = one_row ? segment.column + segment.tokens() - 1 : conv.sizes.out_width - 1;
    Area area;
    seen(segment.row, segment.last_row, window.height, window.pad_top, window, conv.sizes.height, area.top,
         area.bottom);
    seen(one_row ? segment.column : 0, last_column, window.width, window.pad_left, window, conv.sizes.width, area.left,
         area.right);
    return area;
  }

  // Of output pixels side by side, at most: what they see along an axis.
  static size_t most_seen(int pixels, int taps, const Window& window, int size) {
    const size_t span = (size_t(pixels - 1) * window.stride + taps - 1) / window.upsample + 2;
    return span < size_t(size) ? span : size_t(size);
  }

  static size_t most_pixels(const Convolution& conv) {
    const Window& window = conv.window;
    if (in_rows(conv)) {  // two segments, or one of each image
      const size_t segments = 2 + kTileTokens / conv.sizes.out_width;
      return segments * most_seen(1, window.height, window, conv.sizes.height) *
             most_seen(kTileTokens, window.width, window, conv.sizes.width);
    }
    const size_t images = (kTileTokens - 2 + conv.sizes.out_pixels()) / conv.sizes.out_pixels() + 1;
    const int rows = (kTileTokens - 1) / conv.sizes.out_width + 2;
    const int most_rows = rows < conv.sizes.out_height ? rows : conv.sizes.out_height;
    return images * most_seen(most_rows, window.height, window, conv.sizes.height) * conv.sizes.width;
  }

  static size_t pixels_bytes(const Convolution& conv) {
    const size_t bytes = (most_pixels(conv) + 1) * Format::pixel_bytes(conv.channels);  // and one of zeros
    return (bytes + 63) / 64 * 64;
  }
  // A token's taps; the last one may be written a vector beyond its end.
  static size_t token_bytes(const Convolution& conv) { return Format::pixel_bytes(conv.product.depth) + 64; }
  // Fewer tokens where the depth is large, whole vectors of them.
  static int tile_tokens(const Convolution& conv) {
    const size_t tokens = kMostSeenBytes / token_bytes(conv) / V::kLanes * V::kLanes;
    return tokens < size_t(V::kLanes) ? V::kLanes : tokens < size_t(kTileTokens) ? int(tokens) : kTileTokens;
  }
  static constexpr size_t kSums = size_t(Loop::kBlockRows) * kTileTokens;  // of the rows that are finished together

  static size_t scratch_bytes(const Convolution& conv, int) {
    // The sums as they come, and turned, of which the last row may be read a vector beyond its end.
    return pixels_bytes(conv) + tile_tokens(conv) * token_bytes(conv) + (2 * kSums + V::kLanes) * sizeof(float);
  }

  static size_t packed_bytes(int rows, int depth, int) {
    return panel_bytes(rows, depth, Format::kOperand, V::kLanes, Format::kPanels);
  }
  static void pack(const Weights24& weights, int taps, void* packed) {
    pack_panels(weights, taps, Format::kOperand, V::kLanes, Format::kPanels, packed);
  }

  static void run(const Convolution& conv, const Block& block, void* scratch) {
    const int most = tile_tokens(conv);
    for (size_t token = block.token_begin; token < block.token_end; token += most) {
      const size_t left = block.token_end - token;
      const int tokens = left < size_t(most) ? int(left) : most;
      run_tile(conv, block, token, tokens, static_cast<uint8_t*>(scratch));
    }
  }

 private:
  static void run_tile(const Convolution& conv, const Block& block, size_t token, int tokens, uint8_t* scratch) {
    const size_t pixel_bytes = Format::pixel_bytes(conv.channels);
    uint8_t* const zeros = scratch;
    uint8_t* pixels = scratch + pixel_bytes;
    const size_t stride = token_bytes(conv);
    uint8_t* const taps = scratch + pixels_bytes(conv);  // of each token
    float* const sums = reinterpret_cast<float*>(taps + tile_tokens(conv) * stride);
    float* const turned = sums + kSums;
    Segment segments[kTileTokens];
    const int count = cut_into_segments(conv, token, tokens, in_rows(conv), segments);
    __builtin_memset(zeros, 0, pixel_bytes);
    for (int s = 0; s < count; ++s) {
      const Area area = area_of(conv, segments[s]);
      lay_out(conv, segments[s].image, area, pixels);
      gather(conv, segments[s], area, pixels, zeros, taps);
      pixels += size_t(area.bottom - area.top) * (area.right - area.left) * pixel_bytes;
    }
    for (int row = block.row_begin; row < block.row_end; row += Loop::kBlockRows) {
      for (int t = 0; t < tokens; t += Format::kTokens) {
        const int left = tokens - t;
        Loop::add_up(conv.product, row, taps + t * stride, stride, left < Format::kTokens ? left : Format::kTokens,
                     sums + size_t(t) * V::kLanes, kTileTokens);
      }
      const int left = block.row_end - row;
      turn(sums, tokens, turned);
      store_rows_of_pixels<V, Format::kOperand>(conv, segments, count, row,
                                                left < Loop::kBlockRows ? left : Loop::kBlockRows, turned, kTileTokens);
    }
  }

  // The channels of each pixel of an area.
  static void lay_out(const Convolution& conv, size_t image, const Area& area, uint8_t* out) {
    const size_t pixel_bytes = Format::pixel_bytes(conv.channels);
    const size_t plane = conv.sizes.pixels();
    const float* const first = channel_of(conv, image, 0);
    const bool whole_rows = area.left == 0 && area.right == conv.sizes.width;
    const int width = whole_rows ? (area.bottom - area.top) * conv.sizes.width : area.right - area.left;
    const int rows = whole_rows ? 1 : area.bottom - area.top;
    if (area.top == area.bottom) return;
    // A few channels of all pixels at a time: each is on a page of its own, and there are few of those at hand.
    for (int channel = 0; channel < conv.channels; channel += Format::kChannels, out += Format::kChannelsBytes) {
      uint8_t* to = out;
      for (int row = 0; row < rows; ++row) {
        const float* const from = first + channel * plane + size_t(area.top + row) * conv.sizes.width + area.left;
        for (int x = 0; x < width; x += V::kLanes) {
          const int count = width - x < V::kLanes ? width - x : V::kLanes;
          Format::convert_pixels(from + x, plane, conv.channels - channel, count, to, pixel_bytes);
          to += size_t(count) * pixel_bytes;
        }
      }
    }
  }

  // What the taps of each output pixel see, one after the other.
  static void gather(const Convolution& conv, const Segment& segment, const Area& area, const uint8_t* pixels,
                     const uint8_t* zeros, uint8_t* taps) {
    // In registers: a store could be to anything.
    const Window window = conv.window;
    const int height = conv.sizes.height * window.upsample, width = conv.sizes.width * window.upsample;
    const int out_width = conv.sizes.out_width;
    const size_t pixel_bytes = Format::pixel_bytes(conv.channels);
    const size_t line_bytes = (area.right - area.left) * pixel_bytes;
    const size_t tap_bytes = conv.channels / 4 * Format::kGroupInputBytes;
    const size_t stride = token_bytes(conv);
    // A division takes as long as a copy.
    const auto shrunk = [&](int value) { return window.upsample == 1 ? value : value / window.upsample; };
    int row = segment.row, column = segment.column;
    for (int t = segment.begin; t < segment.end; ++t) {
      uint8_t* out = taps + t * stride;
      for (int down = 0; down < window.height; ++down) {
        const int y = row * window.stride + down - window.pad_top;
        const bool exists = y >= 0 && y < height;
        const uint8_t* const line = pixels + (exists ? shrunk(y) - area.top : 0) * line_bytes;
        for (int right = 0; right < window.width; ++right, out += tap_bytes) {
          const int x = column * window.stride + right - window.pad_left;
          const bool both = exists && x >= 0 && x < width;
          copy(both ? line + size_t(shrunk(x) - area.left) * pixel_bytes : zeros, tap_bytes, out);
        }
      }
      if (++column == out_width) {
        column = 0;
        ++row;
      }
    }
  }

  // A vector at a time: what is written beyond the end is overwritten by the next tap, or not read.
  static SPARSE_ENGINE_INLINE void copy(const uint8_t* from, size_t bytes, uint8_t* to) {
    for (size_t byte = 0; byte < bytes; byte += V::kLanes * 4) {
      V::store_unaligned(reinterpret_cast<float*>(to + byte), V::load_unaligned(from + byte));
    }
  }

  // Sums [panel][kTileTokens][V::kLanes] -> [row][kTileTokens].
  static void turn(const float* sums, int tokens, float* turned) {
    for (int p = 0; p < Format::kPanels; ++p) {
      for (int t = 0; t < tokens; t += V::kLanes) {
        Vector square[V::kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i) square[i] = V::load(sums + size_t(p * kTileTokens + t + i) * V::kLanes);
        V::transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i) {
          V::store(turned + size_t(p * V::kLanes + i) * kTileTokens + t, square[i]);
        }
      }
    }
  }
};

template <class Format>
constexpr ConvTactic conv_rows_in_lanes(const Tactic& product) {
  using Kernel = ConvRowsInLanes<Format>;
  return {&product, Kernel::packed_bytes, Kernel::pack, Kernel::scratch_bytes, Kernel::run};
}

}  // namespace
}  // namespace sparse_engine
