// A convolution in 8 bits with output channels in the lanes: the loop of tier_avx512_vnni.cpp, where the codes that a
// panel of rows is multiplied with lie at one address for each pixel and tap.
//
//     places[tap][pixel]  ->  | c0 c1 c2 ... c63 |   of the pixel that the tap sees; outside, a pixel of zero points
//
// Strides, paddings and enlarged inputs are in that table alone. Codes are read as they lie: nothing is copied. A panel
// of finished sums becomes floats, is turned and goes out as maps.
//
// Included by instruction-set files only. A Format says how codes are multiplied:
//   V             the vectors that sums are finished in
//   kRows         of a panel, whole vectors
//   kPixels       whose sums are in registers; divides kPixelTile
//   packed_bytes(rows, channels, taps), pack(weights, taps, packed)      panels that follow one another
//   add_up(panel, places, taps, channels, starts, scales, sums)
//                 scaled sums [vector of the panel][kPixelTile][V::kLanes] of kPixels pixels, places [tap][kPixelTile]
#pragma once

#include "conv_int8.h"
#include "conv_pixels.h"

namespace sparse_engine {
namespace {

template <class Format>
struct ConvInt8InLanes {
  using V = typename Format::V;
  using Seen = PixelsSeen<Format>;
  static constexpr int kVectors = Format::kRows / V::kLanes;
  static_assert(kPixelTile % Format::kPixels == 0 && Format::kRows % V::kLanes == 0, "whole vectors");

  static size_t places_bytes(const ConvolutionInt8& convolution) {
    return size_t(convolution.conv.window.taps()) * kPixelTile * sizeof(uint8_t*);
  }

  // Sums of one panel as they are made, and turned; the last row of either may be read a vector beyond its end.
  static size_t scratch_bytes(const ConvolutionInt8& convolution) {
    return places_bytes(convolution) + (2 * size_t(Format::kRows) * kPixelTile + 2 * V::kLanes) * sizeof(float);
  }

  static void run(const ConvolutionInt8& convolution, const Block& block, void* scratch) {
    for (size_t token = block.token_begin; token < block.token_end; token += kPixelTile) {
      const size_t left = block.token_end - token;
      run_tile(convolution, block, token, left < size_t(kPixelTile) ? int(left) : kPixelTile, scratch);
    }
  }

 private:
  static void run_tile(const ConvolutionInt8& convolution, const Block& block, size_t token, int tokens,
                       void* scratch) {
    const Convolution& conv = convolution.conv;
    const uint8_t** const places = static_cast<const uint8_t**>(scratch);
    float* const sums = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + places_bytes(convolution));
    float* const turned = sums + size_t(Format::kRows) * kPixelTile + V::kLanes;
    Segment segments[kPixelTile];
    const int count = cut_into_segments(conv, token, tokens, false, segments);
    const int taps = conv.window.taps();
    for (int i = 0; i < taps * kPixelTile; ++i) places[i] = convolution.border;  // of pixels beyond the tile's too
    for (int s = 0; s < count; ++s) find_places(convolution, segments[s], places);
    const size_t panel_bytes = Format::packed_bytes(Format::kRows, conv.channels, taps);
    for (int row = block.row_begin; row < block.row_end; row += Format::kRows) {
      const uint8_t* const panel =
          static_cast<const uint8_t*>(conv.product.packed) + size_t(row / Format::kRows) * panel_bytes;
      for (int t = 0; t < tokens; t += Format::kPixels) {
        Format::add_up(panel, places + t, taps, conv.channels, convolution.starts + row, convolution.scales + row,
                       sums + size_t(t) * V::kLanes);
      }
      Seen::turn(sums, kVectors, tokens, turned);
      const int left = block.row_end - row;
      store_rows_of_pixels<V, Operand::kFloat32>(conv, segments, count, row,
                                                 left < Format::kRows ? left : Format::kRows, turned, kPixelTile);
    }
  }

  // Where the taps of a segment's pixels are read; those outside are left as they are.
  static void find_places(const ConvolutionInt8& convolution, const Segment& segment, const uint8_t** places) {
    const Convolution& conv = convolution.conv;
    const Window window = conv.window;  // in registers, as all of these: a store could be to anything
    const int height = conv.sizes.height * window.upsample, width = conv.sizes.width * window.upsample;
    const int out_width = conv.sizes.out_width;
    const size_t pixel_bytes = size_t(conv.channels), line_bytes = conv.sizes.width * pixel_bytes;
    const uint8_t* const image = convolution.codes + segment.image * conv.sizes.height * line_bytes;
    int row = segment.row, column = segment.column;
    for (int t = segment.begin; t < segment.end; ++t) {
      const uint8_t** place = places + t;
      for (int down = 0; down < window.height; ++down) {
        const int y = row * window.stride + down - window.pad_top;
        if (y < 0 || y >= height) {
          place += size_t(window.width) * kPixelTile;
          continue;
        }
        const uint8_t* const line = image + Seen::shrunk(window, y) * line_bytes;
        for (int right = 0; right < window.width; ++right, place += kPixelTile) {
          const int x = column * window.stride + right - window.pad_left;
          if (x >= 0 && x < width) *place = line + Seen::shrunk(window, x) * pixel_bytes;
        }
      }
      if (++column == out_width) {
        column = 0;
        ++row;
      }
    }
  }
};

template <class Format>
constexpr ConvTacticInt8 conv_int8_in_lanes(Tier tier, void (*code)(const MapsToCodes&, size_t, size_t)) {
  using Kernel = ConvInt8InLanes<Format>;
  return {tier,
          {Format::kPixels, kPixelTile, Format::kRows, kPixelsStreamCost},
          Format::packed_bytes,
          Format::pack,
          Kernel::scratch_bytes,
          Kernel::run,
          code};
}

}  // namespace
}  // namespace sparse_engine
