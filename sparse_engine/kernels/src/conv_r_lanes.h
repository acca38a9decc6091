// A convolution in R-lanes: the loop of r_lanes.h, where a token is an output pixel and its taps are pixels of the input.
//
// For a tile of output pixels the part of the images that they see is laid out once, pixel after pixel, a pixel's channels
// side by side in registers. Where each tap of each output pixel lies is a table of addresses, in which a border is a
// pixel of zeros: strides, paddings and enlarged inputs are in the table alone.
//
// Included by instruction-set files only.
#pragma once

#include "conv_tile.h"
#include "r_lanes.h"

namespace sparse_engine {
namespace {

template <class Format>
struct ConvInRegisters {
  using Loop = RegistersInLanes<Format>;
  using V = typename Format::V;
  using Vector = typename V::Vector;
  static constexpr int kTileTokens = Loop::kTileTokens;
  static constexpr int kWindow = V::kLanes;  // rows that are finished together

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
    seen(segment.row, segment.last_row, window.height, window.pad_top, window, conv.sizes.height, area.top, area.bottom);
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

  static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }
  static size_t pixels_bytes(const Convolution& conv) {
    return (most_pixels(conv) + 1) * Loop::token_bytes(conv.channels);  // and one of zeros
  }
  static size_t places_bytes(const Convolution& conv) {
    return size_t(conv.window.taps()) * kTileTokens * sizeof(uint8_t*);
  }
  static size_t window_bytes() { return whole_lines((size_t(kWindow) * kTileTokens + V::kLanes) * sizeof(float)); }

  static size_t scratch_bytes(const Convolution& conv, int block_rows) {
    const size_t rows = size_t(block_rows + V::kLanes - 1) / V::kLanes * V::kLanes;
    return pixels_bytes(conv) + places_bytes(conv) + window_bytes() + rows * kTileTokens * sizeof(float);
  }

  static size_t packed_bytes(int rows, int depth, int taps) { return register_bytes(rows, depth, taps, Loop::kLayout); }
  static void pack(const Weights24& weights, int taps, void* packed) {
    pack_registers(weights, taps, Loop::kLayout, packed);
  }

  static void run(const Convolution& conv, const Block& block, void* scratch) {
    for (size_t token = block.token_begin; token < block.token_end; token += kTileTokens) {
      const size_t left = block.token_end - token;
      const int tokens = left < size_t(kTileTokens) ? int(left) : kTileTokens;
      run_tile(conv, block, token, tokens, static_cast<uint8_t*>(scratch));
    }
  }

 private:
  static void run_tile(const Convolution& conv, const Block& block, size_t token, int tokens, uint8_t* scratch) {
    const size_t pixel_bytes = Loop::token_bytes(conv.channels);
    uint8_t* const zeros = scratch;
    uint8_t* pixels = scratch + pixel_bytes;
    const uint8_t** const places = reinterpret_cast<const uint8_t**>(scratch + pixels_bytes(conv));
    float* const window = reinterpret_cast<float*>(scratch + pixels_bytes(conv) + places_bytes(conv));
    float* const sums = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(window) + window_bytes());
    Segment segments[kTileTokens];
    const int count = cut_into_segments(conv, token, tokens, in_rows(conv), segments);
    __builtin_memset(zeros, 0, pixel_bytes);
    const size_t entries = size_t(conv.window.taps()) * kTileTokens;
    for (size_t i = 0; i < entries; ++i) places[i] = zeros;
    for (int s = 0; s < count; ++s) {
      const Area area = area_of(conv, segments[s]);
      lay_out(conv, segments[s].image, area, pixels);
      find_places(conv, segments[s], area, pixels, places);
      pixels += size_t(area.bottom - area.top) * (area.right - area.left) * pixel_bytes;
    }
    Loop::multiply(conv.product, conv.window.taps(), conv.channels, places, tokens, block.row_begin, block.row_end, sums,
                   [&](int row, const float* panel) {
                     const int left = block.row_end - row;
                     turn(panel, tokens, window);
                     store_rows_of_pixels<V, Format::kOperand>(conv, segments, count, row,
                                                               left < V::kLanes ? left : V::kLanes, window, kTileTokens);
                   });
  }

  // The channels of each pixel of an area, in registers.
  static void lay_out(const Convolution& conv, size_t image, const Area& area, uint8_t* out) {
    const size_t pixel_bytes = Loop::token_bytes(conv.channels);
    const size_t plane = conv.sizes.pixels();
    const float* const first = channel_of(conv, image, 0);
    const bool whole_rows = area.left == 0 && area.right == conv.sizes.width;
    const int width = whole_rows ? (area.bottom - area.top) * conv.sizes.width : area.right - area.left;
    const int rows = whole_rows ? 1 : area.bottom - area.top;
    if (area.top == area.bottom) return;
    for (int row = 0; row < rows; ++row) {
      const float* const from = first + size_t(area.top + row) * conv.sizes.width + area.left;
      for (int x = 0; x < width; x += V::kLanes, out += size_t(V::kLanes) * pixel_bytes) {
        const int count = width - x < V::kLanes ? width - x : V::kLanes;
        Format::convert_pixels(from + x, plane, conv.channels, count, out, pixel_bytes);
        if (count < V::kLanes) out -= size_t(V::kLanes - count) * pixel_bytes;
      }
    }
  }

  static void find_places(const Convolution& conv, const Segment& segment, const Area& area, const uint8_t* pixels,
                          const uint8_t** places) {
    const Window& window = conv.window;
    const size_t pixel_bytes = Loop::token_bytes(conv.channels);
    const int width = area.right - area.left;
    int row = segment.row, column = segment.column;
    for (int t = segment.begin; t < segment.end; ++t) {
      const uint8_t** place = places + t;
      for (int down = 0; down < window.height; ++down) {
        const int y = row * window.stride + down - window.pad_top;
        const bool exists = y >= 0 && y < conv.sizes.height * window.upsample;
        const uint8_t* const line = pixels + size_t(exists ? y / window.upsample - area.top : 0) * width * pixel_bytes;
        for (int right = 0; right < window.width; ++right, place += kTileTokens) {
          const int x = column * window.stride + right - window.pad_left;
          if (exists && x >= 0 && x < conv.sizes.width * window.upsample) {
            *place = line + size_t(x / window.upsample - area.left) * pixel_bytes;
          }
        }
      }
      if (++column == conv.sizes.out_width) {
        column = 0;
        ++row;
      }
    }
  }

  // Sums of one panel, [token][row] -> [row][kTileTokens].
  static void turn(const float* panel, int tokens, float* window) {
    for (int t = 0; t < tokens; t += V::kLanes) {
      Vector square[V::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < V::kLanes; ++i) square[i] = V::load(panel + size_t(t + i) * V::kLanes);
      V::transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < V::kLanes; ++i) V::store(window + size_t(i) * kTileTokens + t, square[i]);
    }
  }
};

template <class Format>
constexpr ConvTactic conv_in_registers(const Tactic& product) {
  using Kernel = ConvInRegisters<Format>;
  return {&product, Kernel::packed_bytes, Kernel::pack, Kernel::scratch_bytes, Kernel::run};
}

}  // namespace
}  // namespace sparse_engine
