#include "convolution24.h"

#include <limits>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "packing.h"
#include "partition.h"

namespace sparse_engine {
namespace {

constexpr int kMostTaps = 1 << 10, kMostPadding = 1 << 10, kMostStride = 1 << 6, kMostUpsample = 1 << 3;

int out_size(int64_t size, int upsample, int pads, int taps, int stride) {
  const int64_t room = size * upsample + pads - taps;
  return room < 0 ? 0 : int(room / stride + 1);
}

}  // namespace

void check_window(const Window& window, int depth) {
  const auto check = [](const char* name, int value, int least, int most) {
    if (value >= least && value <= most) return;
    throw Error(Status::kInvalidInput, std::string(name) + " is " + std::to_string(value) + ", expected " +
                                           std::to_string(least) + " to " + std::to_string(most));
  };
  check("kernel height", window.height, 1, kMostTaps);
  check("kernel width", window.width, 1, kMostTaps);
  check("stride", window.stride, 1, kMostStride);
  check("upsample", window.upsample, 1, kMostUpsample);
  for (const int pad : {window.pad_top, window.pad_left, window.pad_bottom, window.pad_right}) {
    check("padding", pad, 0, kMostPadding);
  }
  if (depth % (4 * window.taps()) == 0) return;
  throw Error(Status::kInvalidInput, "the depth is " + std::to_string(depth) + ", expected a multiple of 4 x " +
                                         std::to_string(window.taps()) + " taps");
}

ImageSizes sizes_after(const Window& w, int64_t height, int64_t width) {
  constexpr int64_t kMost = 1 << 20;
  if (height < 1 || width < 1 || height > kMost || width > kMost || height * width > std::numeric_limits<int>::max()) {
    throw Error(Status::kInvalidInput, "images are " + std::to_string(height) + " x " + std::to_string(width) +
                                           ", expected at least 1 x 1 and fewer than 2^31 pixels");
  }
  const ImageSizes sizes = {int(height), int(width),
                            out_size(height, w.upsample, w.pad_top + w.pad_bottom, w.height, w.stride),
                            out_size(width, w.upsample, w.pad_left + w.pad_right, w.width, w.stride)};
  if (sizes.out_height && sizes.out_width && sizes.out_pixels() <= size_t(std::numeric_limits<int>::max()))
    return sizes;
  throw Error(Status::kInvalidInput, "images of " + std::to_string(height) + " x " + std::to_string(width) +
                                         " are too small or too large for a window of " + std::to_string(w.height) +
                                         " x " + std::to_string(w.width));
}

ImageSizes sizes_to_walk(const Window& window, const ImageSizes& sizes) {
  const bool pointwise = window.taps() == 1 && sizes.out_height == sizes.height && sizes.out_width == sizes.width &&
                         window.pad_top == 0 && window.pad_left == 0 && window.stride == 1;
  const int pixels = int(sizes.pixels());
  return pointwise ? ImageSizes{1, pixels, 1, pixels} : sizes;
}

Conv24::Conv24(const Weights24& weights, const Window& window, Tier tier, Lanes lanes)
    : weights_(weights), window_(window), tier_(tier), lanes_(lanes) {
  check_weights(weights);
  check_window(window, weights.depth);
  const ConvTactic& tactic = find_conv_tactic(tier, lanes);  // throws where the machine lacks the tier
  packed_ = Buffer(tactic.packed_bytes(weights.rows, weights.depth, window.taps()));
  tactic.pack(weights, window.taps(), packed_.data());
}

void Conv24::run(const float* input, size_t batch, const ImageSizes& sizes, float* output, const ConvEpilogue& epilogue,
                 int threads, const ParallelFor& parallel_for) const {
  if (batch == 0) return;
  const ConvTactic& tactic = find_conv_tactic(tier_, lanes_);
  Convolution conv;
  conv.product = {weights_.rows, weights_.depth, packed_.data(), input, output, epilogue.epilogue};
  conv.image_bias = epilogue.image_bias;
  conv.channels = channels();
  conv.window = window_;
  conv.sizes = sizes_to_walk(window_, sizes);
  const Partition partition(tactic.grain, batch * sizes.out_pixels(), weights_.rows, std::max(1, threads));
  run_blocks(partition, tactic.scratch_bytes(conv, partition.most_block_rows()), threads, parallel_for,
             [&](const Block& block, void* scratch) { tactic.run(conv, block, scratch); });
}

void Conv24::page_out_weights() const {
  page_out(weights_.values, size_t(weights_.rows) * weights_.depth / 2 * sizeof(float));
}

}  // namespace sparse_engine
