// One convolution: weights packed for this machine, ready to be run over images of any number and size.
#pragma once

#include "buffer.h"
#include "conv24.h"
#include "work_queue.h"

namespace sparse_engine {

// What happens to the sums: activation(sum + bias[row] + image_bias[image, row]) + residual.
struct ConvEpilogue {
  Epilogue epilogue;                  // the residual has the output's shape, and may be the output
  const float* image_bias = nullptr;  // [batch, rows], or null
};

// Throws Error(kInvalidInput) for a window that is none, or that does not divide the depth into whole groups.
void check_window(const Window& window, int depth);

// The sizes that a window makes of images of height x width. Throws Error(kInvalidInput) where there is no output.
ImageSizes sizes_after(const Window& window, int64_t height, int64_t width);

// The same convolution as fewer words: of one tap that moves pixel by pixel an image is one row of pixels.
ImageSizes sizes_to_walk(const Window& window, const ImageSizes& sizes);

class Conv24 {
 public:
  // Weights [rows, channels / 4 * taps * 4]: see conv24.h. They are packed now, and may then be freed.
  // Throws Error: kInvalidInput for weights or a window that are none, kUnsupported for a tier that is missing or lacks
  // the lanes.
  Conv24(const Weights24& weights, const Window& window, Tier tier, Lanes lanes);

  // As sizes_after().
  ImageSizes sizes(int64_t height, int64_t width) const { return sizes_after(window_, height, width); }

  // output[batch, rows, out_height, out_width] of input[batch, channels, height, width]. Safe to call from several
  // threads at once; the result does not depend on `threads`, nor an image's on the others.
  void run(const float* input, size_t batch, const ImageSizes& sizes, float* output, const ConvEpilogue& epilogue,
           int threads, const ParallelFor& parallel_for) const;

  // The weights were packed, and may leave memory.
  void page_out_weights() const;

  int rows() const { return weights_.rows; }
  int channels() const { return weights_.depth / window_.taps(); }
  Tier tier() const { return tier_; }
  size_t packed_bytes() const { return packed_.size(); }

 private:
  Weights24 weights_;
  Window window_;
  Tier tier_;
  Lanes lanes_;
  Buffer packed_;
};

}  // namespace sparse_engine
