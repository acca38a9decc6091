// What every convolution kernel does with a tile of output pixels: which images they are of, what they see, where sums
// go.
//
// Included by instruction-set files only (see vector_avx512.h).
#pragma once

#include "conv24.h"
#include "epilogue.h"

namespace sparse_engine {
namespace {

// The part of a tile that lies in one image.
struct Segment {
  int begin, end;  // tokens of the tile
  size_t image;
  int pixel;        // of the image's output, at `begin`
  int row, column;  // of that pixel
  int last_row;     // of the segment's last pixel

  SPARSE_ENGINE_INLINE int tokens() const { return end - begin; }
};

// Cuts the pixels [token, token + tokens) of all images where an image ends and, if `in_rows`, where a row does.
// Returns the number of segments, at most `tokens`.
inline int cut_into_segments(const Convolution& conv, size_t token, int tokens, bool in_rows, Segment* segments) {
  const size_t pixels = conv.sizes.out_pixels();
  const int width = conv.sizes.out_width;
  int count = 0;
  for (int begin = 0; begin < tokens; begin = segments[count - 1].end) {
    Segment& segment = segments[count++];
    segment.begin = begin;
    segment.image = (token + begin) / pixels;
    segment.pixel = int((token + begin) % pixels);
    segment.row = segment.pixel / width;
    segment.column = segment.pixel % width;
    const size_t left = in_rows ? size_t(width - segment.column) : pixels - segment.pixel;
    segment.end = left < size_t(tokens - begin) ? begin + int(left) : tokens;
    segment.last_row = (segment.pixel + segment.tokens() - 1) / width;
  }
  return count;
}

SPARSE_ENGINE_INLINE const float* channel_of(const Convolution& conv, size_t image, int channel) {
  return conv.product.input + (image * conv.channels + channel) * conv.sizes.pixels();
}

// Pixels of a row of the input from `position` on, zero where there is none.
template <class V>
SPARSE_ENGINE_INLINE typename V::Vector load_existing(const float* row, int width, int position) {
  if (position >= 0 && position + V::kLanes <= width) return V::load_unaligned(row + position);
  if (position + V::kLanes <= 0 || position >= width) return V::zero();
  const int left = width - position;
  return V::load_between(row + position, position < 0 ? -position : 0, left < V::kLanes ? left : V::kLanes);
}

// Finishes the pixels of one output channel and segment; `sums` are those of the tile's tokens, a vector of which may
// be read beyond the segment.
template <class V, Operand O, Activation A>
SPARSE_ENGINE_INLINE void store_pixels(const Convolution& conv, const Segment& segment, int row, const float* sums) {
  const Product& product = conv.product;
  const size_t plane = segment.image * product.rows + row;
  const size_t at = plane * conv.sizes.out_pixels() + segment.pixel;
  const float bias =
      (product.epilogue.bias ? product.epilogue.bias[row] : 0.0f) + (conv.image_bias ? conv.image_bias[plane] : 0.0f);
  const float* const residual = product.epilogue.residual ? product.epilogue.residual + at : nullptr;
  float* const output = product.output + at;
  const float* const from = sums + segment.begin;
  const int count = segment.tokens();
  const auto added = V::set(bias);
  int t = 0;
  for (; t + V::kLanes <= count; t += V::kLanes) {
    auto y = activate<V, O, A>(V::load_unaligned(from + t) + added);
    if (residual) y = y + V::load_unaligned(residual + t);
    V::store_unaligned(output + t, y);
  }
  if (t == count) return;
  auto y = activate<V, O, A>(V::load_unaligned(from + t) + added);
  if (residual) y = y + V::load_first(residual + t, count - t);
  V::store_first(output + t, y, count - t);
}

// The same of several output channels from `row` on, each kept in `stride` sums.
template <class V, Operand O>
void store_rows_of_pixels(const Convolution& conv, const Segment* segments, int segment_count, int row, int rows,
                          const float* sums, int stride) {
  with_activation(conv.product.epilogue.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    for (int s = 0; s < segment_count; ++s) {
      for (int r = 0; r < rows; ++r) {
        store_pixels<V, O, kActivation>(conv, segments[s], row + r, sums + size_t(r) * stride);
      }
    }
  });
}

}  // namespace
}  // namespace sparse_engine
