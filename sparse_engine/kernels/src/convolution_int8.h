// One convolution in 8 bits: weights packed for this machine, ready to be run over images of any number and size.
#pragma once

#include <vector>

#include "buffer.h"
#include "conv_int8.h"
#include "convolution24.h"

namespace sparse_engine {

// Maps of images to codes, on the threads of a runtime: [batch, channels, area] floats to [batch, area, channels] codes
// of `maps`, whose pointers are those of the first image. affines: [batch, channels], or null.
void code_images(const MapsToCodes& maps, size_t batch, const ConvTacticInt8& tactic, int threads,
                 const ParallelFor& parallel_for);

// What it is given: codes, or floats that it rounds to its own codes first.
struct ImagesInt8 {
  const uint8_t* codes = nullptr;  // [batch, height, width, channels]
  const float* maps = nullptr;     // else [batch, channels, height, width]
};

class ConvInt8 {
 public:
  // 2:4 weights [rows, channels / 4 * taps * 4]: see conv24.h. They are packed now, and may then be freed. scales
  // [rows]: of each row's weights. Throws Error: kInvalidInput for weights, scales, codes or a window that are none;
  // kUnsupported for a missing tier.
  ConvInt8(const WeightsInt8& weights, const float* scales, const Window& window, Codes input, Tier tier);

  // As sizes_after().
  ImageSizes sizes(int64_t height, int64_t width) const { return sizes_after(window_, height, width); }

  // output[batch, rows, out_height, out_width]. Safe to call from several threads at once; the result does not depend
  // on `threads`, nor an image's on the others.
  void run(const ImagesInt8& input, size_t batch, const ImageSizes& sizes, float* output, const ConvEpilogue& epilogue,
           int threads, const ParallelFor& parallel_for) const;

  int rows() const { return rows_; }
  int channels() const { return channels_; }
  Tier tier() const { return tactic_->tier; }
  size_t packed_bytes() const { return packed_.size(); }

 private:
  int rows_, channels_;
  Window window_;
  Codes input_;
  const ConvTacticInt8* tactic_;
  Buffer packed_;
  std::vector<uint8_t> border_;
  std::vector<int32_t> starts_;
  std::vector<float> scales_;
};

}  // namespace sparse_engine
