#include "convolution_int8.h"

#include <algorithm>

#include "dispatch.h"
#include "packing.h"
#include "partition.h"
#include "product_int8.h"

namespace sparse_engine {
namespace {

constexpr size_t kPlaces = 64;             // of a map that a thread rounds at a time
constexpr size_t kThreadValues = 1 << 14;  // fewer are not worth another thread

}  // namespace

void code_images(const MapsToCodes& maps, size_t batch, const ConvTacticInt8& tactic, int threads,
                 const ParallelFor& parallel_for) {
  const size_t parts = (maps.area + kPlaces - 1) / kPlaces, values = maps.area * maps.channels;
  const size_t workers = std::min(size_t(std::max(1, threads)), batch * values / kThreadValues + 1);
  for_each_item(batch * parts, 0, int(workers), parallel_for, [&](size_t item, void*) {
    const size_t image = item / parts, begin = item % parts * kPlaces;
    MapsToCodes one = maps;
    one.maps += image * values;
    one.out += image * values;
    if (one.affines) one.affines += image * maps.channels;
    tactic.code(one, begin, std::min(maps.area, begin + kPlaces));
  });
}

ConvInt8::ConvInt8(const WeightsInt8& weights, const float* scales, const Window& window, Codes input, Tier tier)
    : rows_(weights.rows), window_(window), input_(input), tactic_(&find_conv_int8_tactic(tier)) {
  check_int8(weights, scales, input);
  check_window(window, weights.depth);
  channels_ = weights.depth / window.taps();
  border_.assign(size_t(channels_), uint8_t(input.zero));
  packed_ = Buffer(tactic_->packed_bytes(rows_, channels_, window.taps()));
  tactic_->pack(weights, window.taps(), packed_.data());
  starts_.resize(size_t(rows_ + kRowPaddingInt8 - 1));
  scales_.resize(starts_.size());
  fill_starts_and_scales(weights, scales, input, 0, starts_.data(), scales_.data());
}

void ConvInt8::run(const ImagesInt8& input, size_t batch, const ImageSizes& sizes, float* output,
                   const ConvEpilogue& epilogue, int threads, const ParallelFor& parallel_for) const {
  if (batch == 0) return;
  const size_t area = sizes.pixels();
  const Scratch rounded(input.codes ? 0 : batch * area * channels_);
  if (!input.codes) {
    uint8_t* const out = static_cast<uint8_t*>(rounded.data());
    code_images({input.maps, area, channels_, nullptr, Activation::kNone, input_, out}, batch, *tactic_, threads,
                parallel_for);
  }
  ConvolutionInt8 convolution;
  Convolution& conv = convolution.conv;
  conv.product = {rows_, channels_ * window_.taps(), packed_.data(), nullptr, output, epilogue.epilogue};
  conv.image_bias = epilogue.image_bias;
  conv.channels = channels_;
  conv.window = window_;
  conv.sizes = sizes_to_walk(window_, sizes);
  convolution.codes = input.codes ? input.codes : static_cast<const uint8_t*>(rounded.data());
  convolution.border = border_.data();
  convolution.starts = starts_.data();
  convolution.scales = scales_.data();
  const Partition partition(tactic_->grain, batch * sizes.out_pixels(), rows_, std::max(1, threads));
  run_blocks(partition, tactic_->scratch_bytes(convolution), threads, parallel_for,
             [&](const Block& block, void* scratch) { tactic_->run(convolution, block, scratch); });
}

}  // namespace sparse_engine
