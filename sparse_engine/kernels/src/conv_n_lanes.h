// A convolution in N-lanes: the loop of n_lanes.h, where a token is an output pixel and its taps are pixels of the
// input.
//
// For a tile of output pixels the part of the images that they see is laid out once, pixel after pixel, a pixel's
// channels side by side; then, for each output pixel, what its taps see, side by side. Strides, paddings and enlarged
// inputs are a matter of where that is copied from. A panel's weights stay in L2 while the tile goes past it.
//
// Included by instruction-set files only.
#pragma once

#include "conv_pixels.h"
#include "n_lanes.h"

namespace sparse_engine {
namespace {

template <class Format>
struct ConvRowsInLanes {
  using Loop = RowsInLanes<Format>;
  using V = typename Format::V;
  using Seen = PixelsSeen<Format>;
  static constexpr size_t kMostSeenBytes = 256 * 1024;  // what a tile's taps see stays in L2

  // A token's taps; the last one may be written a vector beyond its end.
  static size_t token_bytes(const Convolution& conv) { return Format::pixel_bytes(conv.product.depth) + 64; }
  // Fewer tokens where the depth is large, whole vectors of them.
  static int tile_tokens(const Convolution& conv) {
    const size_t tokens = kMostSeenBytes / token_bytes(conv) / V::kLanes * V::kLanes;
    return tokens < size_t(V::kLanes) ? V::kLanes : tokens < size_t(kPixelTile) ? int(tokens) : kPixelTile;
  }
  static constexpr size_t kSums = size_t(Loop::kBlockRows) * kPixelTile;  // of the rows that are finished together

  static size_t scratch_bytes(const Convolution& conv, int) {
    // The sums as they come, and turned, of which the last row may be read a vector beyond its end.
    return Seen::pixels_bytes(conv) + tile_tokens(conv) * token_bytes(conv) + (2 * kSums + V::kLanes) * sizeof(float);
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
    const size_t stride = token_bytes(conv);
    const size_t tap_bytes = conv.channels / 4 * Format::kGroupInputBytes;
    uint8_t* const taps = scratch + Seen::pixels_bytes(conv);  // what those of each token see, one after the other
    float* const sums = reinterpret_cast<float*>(taps + tile_tokens(conv) * stride);
    float* const turned = sums + kSums;
    Segment segments[kPixelTile];
    const int count = cut_into_segments(conv, token, tokens, Seen::in_rows(conv), segments);
    Seen::see(conv, segments, count, scratch, [=](int t, int tap, const uint8_t* pixel) __attribute__((always_inline)) {
      copy(pixel, tap_bytes, taps + t * stride + tap * tap_bytes);
    });
    for (int row = block.row_begin; row < block.row_end; row += Loop::kBlockRows) {
      for (int t = 0; t < tokens; t += Format::kTokens) {
        const int left = tokens - t;
        Loop::add_up(conv.product, row, taps + t * stride, stride, left < Format::kTokens ? left : Format::kTokens,
                     sums + size_t(t) * V::kLanes, kPixelTile);
      }
      const int left = block.row_end - row;
      Seen::turn(sums, Format::kPanels, tokens, turned);
      store_rows_of_pixels<V, Format::kOperand>(conv, segments, count, row,
                                                left < Loop::kBlockRows ? left : Loop::kBlockRows, turned, kPixelTile);
    }
  }

  // A vector at a time: what is written beyond the end is overwritten by the next tap, or not read.
  static SPARSE_ENGINE_INLINE void copy(const uint8_t* from, size_t bytes, uint8_t* to) {
    for (size_t byte = 0; byte < bytes; byte += V::kLanes * 4) {
      V::store_unaligned(reinterpret_cast<float*>(to + byte), V::load_unaligned(from + byte));
    }
  }
};

template <class Format>
constexpr ConvTactic conv_rows_in_lanes() {
  using Kernel = ConvRowsInLanes<Format>;
  return {{Format::kTokens, kPixelTile, RowsInLanes<Format>::kBlockRows, kPixelsStreamCost},
          Kernel::packed_bytes,
          Kernel::pack,
          Kernel::scratch_bytes,
          Kernel::run};
}

}  // namespace
}  // namespace sparse_engine
