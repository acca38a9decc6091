#include "product_int8.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "packing.h"
#include "partition.h"

namespace sparse_engine {
namespace {

// Tokens of a block: their codes, and those between two layers, stay in L2 while the weights go past them. Seventeen
// octets: an image of 256 tokens and one more is two blocks, for two threads, and not four.
constexpr int kTileTokens = 136;
constexpr int kOctet = 8;  // tokens that a kernel takes at a time

Grain grain_of(int row_multiple) { return {kOctet, kTileTokens, row_multiple, kStreamCost}; }

size_t bytes_of(Element element) {
  return element == Element::kFloat32 ? sizeof(float) : element == Element::kBfloat16 ? sizeof(uint16_t) : 1;
}

}  // namespace

void check_int8(const WeightsInt8& weights, const float* scales, Codes input) {
  if (weights.depth > kMostDepthInt8) {
    throw Error(Status::kInvalidInput, "K is " + std::to_string(weights.depth) + ", and 8-bit sums hold " +
                                           std::to_string(kMostDepthInt8) + " products at most");
  }
  check_weights({weights.rows, weights.depth, nullptr, weights.positions});
  for (int row = 0; row < weights.rows; ++row) {
    if (scales[row] > 0.0f && std::isfinite(scales[row])) continue;
    throw Error(Status::kInvalidInput, "the scale of row " + std::to_string(row) + " is " +
                                           std::to_string(scales[row]) + ", expected a finite number above 0");
  }
  if (!(input.scale > 0.0f && std::isfinite(input.scale)) || input.zero < 0 || input.zero > 255) {
    throw Error(Status::kInvalidInput, "codes of X have scale " + std::to_string(input.scale) + " and zero point " +
                                           std::to_string(input.zero) + ", expected above 0, and 0 to 255");
  }
}

void fill_starts_and_scales(const WeightsInt8& weights, const float* scales, Codes input, int offset, int32_t* starts,
                            float* products) {
  const size_t kept = size_t(weights.depth) / (weights.dense() ? 1 : 2);
  for (int row = 0; row < weights.rows; ++row) {
    int32_t sum = 0;
    for (size_t i = 0; i < kept; ++i) sum += weights.values[row * kept + i];
    starts[row] = (offset - input.zero) * sum;  // within 255 * 127 * depth
    products[row] = scales[row] * input.scale;
  }
}

LayerInt8::LayerInt8(const WeightsInt8& weights, const float* scales, Codes input, Tier tier)
    : rows_(weights.rows),
      depth_(weights.depth),
      dense_(weights.dense()),
      input_(input),
      tactic_(&find_int8_tactic(tier)) {
  check_int8(weights, scales, input);
  packed_ = Buffer(tactic_->packed_bytes(rows_, depth_, dense_));
  tactic_->pack(weights, packed_.data());
  const size_t padded = size_t(rows_ + tactic_->row_multiple + kRowPaddingInt8 - 1);
  starts_.resize(padded);
  scales_.resize(padded);
  fill_starts_and_scales(weights, scales, input, tactic_->offset, starts_.data(), scales_.data());
}

ProductInt8 LayerInt8::product(void* output, const EpilogueInt8& epilogue) const {
  return {rows_, depth_, dense_, packed_.data(), starts_.data(), scales_.data(), output, epilogue};
}

// Of codes in the scratch, whole registers of 64 bytes.
size_t LayerInt8::codes_stride() const { return (size_t(depth_) + 63) / 64 * 64; }

const uint8_t* LayerInt8::codes_of(const InputInt8& input, size_t begin, size_t tokens, uint8_t* scratch,
                                   size_t* stride) const {
  *stride = input.codes ? size_t(depth_) : codes_stride();
  if (input.codes) return input.codes + begin * depth_;
  uint8_t* out = scratch;
  for (int part = 0; part < 2 && input.parts[part]; ++part) {
    const size_t depth = input.depths[part];
    tactic_->quantise(input.parts[part] + begin * depth, depth, tokens, int(depth), input.norm, input_, out, *stride);
    out += depth;
  }
  return scratch;
}

void LayerInt8::run(const InputInt8& input, size_t tokens, void* output, const EpilogueInt8& epilogue, int threads,
                    const ParallelFor& parallel_for) const {
  if (tokens == 0) return;
  const ProductInt8 product = this->product(output, epilogue);
  const Partition partition(grain_of(tactic_->row_multiple), tokens, rows_, std::max(1, threads));
  const size_t scratch_bytes = input.codes ? 0 : kTileTokens * codes_stride();
  run_blocks(partition, scratch_bytes, threads, parallel_for, [&](const Block& block, void* scratch) {
    const size_t count = block.token_end - block.token_begin;
    size_t stride;
    const uint8_t* const x = codes_of(input, block.token_begin, count, static_cast<uint8_t*>(scratch), &stride);
    tactic_->run(product, x, stride, block.token_begin, count, block.row_begin, block.row_end);
  });
}

// Where the parts of a block's scratch lie.
struct LayerInt8::PairScratch {
  PairScratch(const FrontInt8& front, const LayerInt8& first)
      : codes(front.layer ? kTileTokens * front.layer->codes_stride() : 0),
        middle(codes + kTileTokens * first.codes_stride()),
        floats(middle + size_t(kTileTokens) * ((first.rows_ + 63) / 64 * 64)),
        end(floats + (front.layer ? kTileTokens * size_t(first.depth_) * sizeof(float) : 0)) {}
  size_t codes, middle, floats, end;  // of the first layer, of the second, and the front's output; its codes are at 0
};

void LayerInt8::run_pair(const FrontInt8& front, const LayerInt8& first, const EpilogueInt8& hidden,
                         const LayerInt8& second, const InputInt8& input, size_t tokens, void* output,
                         const EpilogueInt8& epilogue, int threads, const ParallelFor& parallel_for) {
  check_order(first, second);
  if (front.layer) check_order(*front.layer, first);
  if (front.layer && second.rows_ != first.depth_) {
    throw Error(Status::kInvalidInput, "the front has N = " + std::to_string(first.depth_) + ", the last layer N = " +
                                           std::to_string(second.rows_) + "; expected the same");
  }
  if (tokens == 0) return;
  const int rows = first.rows_ + second.rows_;  // blocks of tokens only: all hidden rows go into each of the second's
  const Partition partition(grain_of(rows), tokens, rows, std::max(1, threads));
  const PairScratch layout(front, first);
  EpilogueInt8 between = hidden;
  between.residual = nullptr;
  between.element = Element::kCode;
  between.codes = second.input_;
  run_blocks(partition, layout.end, threads, parallel_for, [&](const Block& block, void* scratch) {
    uint8_t* const base = static_cast<uint8_t*>(scratch);
    const size_t begin = block.token_begin, count = block.token_end - begin;
    EpilogueInt8 last = epilogue;
    InputInt8 given = input;
    size_t place = begin, stride;  // of the block's first token in what `given` and `last` say
    uint8_t* out = static_cast<uint8_t*>(output);
    if (front.layer) {
      InputInt8 before = input;
      before.norm = nullptr;
      EpilogueInt8 sum = front.epilogue;
      if (sum.residual) sum.residual += begin * first.depth_;
      float* const floats = reinterpret_cast<float*>(base + layout.floats);
      const uint8_t* const x = front.layer->codes_of(before, begin, count, base, &stride);
      front.layer->tactic_->run(front.layer->product(floats, sum), x, stride, 0, count, 0, front.layer->rows_);
      given = {nullptr, {floats, nullptr}, {first.depth_, 0}, input.norm};
      last.residual = floats;
      out += begin * second.rows_ * bytes_of(epilogue.element);
      place = 0;
    }
    const uint8_t* const x = first.codes_of(given, place, count, base + layout.codes, &stride);
    uint8_t* const middle = base + layout.middle;
    first.tactic_->run(first.product(middle, between), x, stride, 0, count, 0, first.rows_);
    second.tactic_->run(second.product(out, last), middle, size_t(first.rows_), place, count, 0, second.rows_);
  });
}

void LayerInt8::check_order(const LayerInt8& first, const LayerInt8& second) {
  if (first.rows_ == second.depth_ && first.tactic_ == second.tactic_) return;
  throw Error(Status::kInvalidInput, "the first layer has N = " + std::to_string(first.rows_) + ", the second K = " +
                                         std::to_string(second.depth_) + "; expected the same, and one tier");
}

}  // namespace sparse_engine
