// A convolution's input as tokens: for a tile of output pixels, the part of the images that they see, pixel after
// pixel, a pixel's channels side by side.
//
// Included by instruction-set files only. A Format says how a pixel lies:
//   V, pixel_bytes(channels), kChannels, kChannelsBytes, convert_pixels(...)    see n_lanes.h
#pragma once

#include "conv_tile.h"

namespace sparse_engine {
namespace {

constexpr int kPixelTile = 96;  // output pixels
// Eight pixels take little longer than their weights, which come from far away where pixels are so few: rows are split
// rather than pixels.
constexpr double kPixelsStreamCost = 2.0;

// Of the input, before it is enlarged.
struct Area {
  int top, bottom, left, right;  // `bottom` and `right` are outside

  SPARSE_ENGINE_INLINE size_t pixels() const { return size_t(bottom - top) * (right - left); }
};

template <class Format>
struct PixelsSeen {
  using V = typename Format::V;
  using Vector = typename V::Vector;

  // Rows of output that are wider than a tile are cut where they end: what a segment sees is then narrow.
  static bool in_rows(const Convolution& conv) { return conv.sizes.out_width >= kPixelTile; }

  // A division takes as long as a copy.
  static int shrunk(const Window& window, int value) { return window.upsample == 1 ? value : value / window.upsample; }

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
      const size_t segments = 2 + kPixelTile / conv.sizes.out_width;
      return segments * most_seen(1, window.height, window, conv.sizes.height) *
             most_seen(kPixelTile, window.width, window, conv.sizes.width);
    }
    const size_t images = (kPixelTile - 2 + conv.sizes.out_pixels()) / conv.sizes.out_pixels() + 1;
    const int rows = (kPixelTile - 1) / conv.sizes.out_width + 2;
    const int most_rows = rows < conv.sizes.out_height ? rows : conv.sizes.out_height;
    return images * most_seen(most_rows, window.height, window, conv.sizes.height) * conv.sizes.width;
  }

  static size_t pixels_bytes(const Convolution& conv) {
    const size_t bytes = (most_pixels(conv) + 1) * Format::pixel_bytes(conv.channels);  // and one of zeros
    return (bytes + 63) / 64 * 64;
  }

  // Lays out what some segments see, after one pixel of zeros, and calls visit(token, tap, pixel) for each of their
  // taps: `pixel` is the one that it sees, that of zeros where it sees none.
  template <class Visit>
  static SPARSE_ENGINE_INLINE void see(const Convolution& conv, const Segment* segments, int count, uint8_t* pixels,
                                       const Visit& visit) {
    const size_t pixel_bytes = Format::pixel_bytes(conv.channels);
    const uint8_t* const zeros = pixels;
    __builtin_memset(pixels, 0, pixel_bytes);
    pixels += pixel_bytes;
    for (int s = 0; s < count; ++s) {
      const Area area = area_of(conv, segments[s]);
      lay_out(conv, segments[s].image, area, pixels);
      visit_taps(conv, segments[s], area, pixels, zeros, visit);
      pixels += area.pixels() * pixel_bytes;
    }
  }

 private:
  template <class Visit>
  static SPARSE_ENGINE_INLINE void visit_taps(const Convolution& conv, const Segment& segment, const Area& area,
                                              const uint8_t* pixels, const uint8_t* zeros, const Visit& visit) {
    const Window window = conv.window;  // in registers, as all of these: a store could be to anything
    const int height = conv.sizes.height * window.upsample, width = conv.sizes.width * window.upsample;
    const int out_width = conv.sizes.out_width;
    const size_t pixel_bytes = Format::pixel_bytes(conv.channels);
    const size_t line_bytes = (area.right - area.left) * pixel_bytes;
    int row = segment.row, column = segment.column;
    for (int t = segment.begin; t < segment.end; ++t) {
      int tap = 0;
      for (int down = 0; down < window.height; ++down) {
        const int y = row * window.stride + down - window.pad_top;
        const bool exists = y >= 0 && y < height;
        const uint8_t* const line = pixels + (exists ? shrunk(window, y) - area.top : 0) * line_bytes;
        for (int right = 0; right < window.width; ++right, ++tap) {
          const int x = column * window.stride + right - window.pad_left;
          const bool both = exists && x >= 0 && x < width;
          visit(t, tap, both ? line + size_t(shrunk(window, x) - area.left) * pixel_bytes : zeros);
        }
      }
      if (++column == out_width) {
        column = 0;
        ++row;
      }
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

 public:
  // Sums [panel][kPixelTile][V::kLanes] of some panels -> [row][kPixelTile].
  static void turn(const float* sums, int panels, int tokens, float* turned) {
    for (int p = 0; p < panels; ++p) {
      for (int t = 0; t < tokens; t += V::kLanes) {
        Vector square[V::kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i) square[i] = V::load(sums + size_t(p * kPixelTile + t + i) * V::kLanes);
        V::transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; ++i) {
          V::store(turned + size_t(p * V::kLanes + i) * kPixelTile + t, square[i]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace sparse_engine
