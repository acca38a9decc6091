#include "layers_bf16.h"

#include <algorithm>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "packing.h"
#include "partition.h"

namespace sparse_engine {
namespace {

constexpr int kOctet = 8;  // tokens that a kernel takes at a time
// Tokens of a block: what is rounded of them, and what lies between two layers, stays in L2 while the weights go past.
constexpr size_t kTileBytes = 512 * 1024;

// As many tokens as fit kTileBytes, whole octets.
int tile_tokens(size_t bytes_a_token) {
  const int fit = int(kTileBytes / bytes_a_token) / kOctet * kOctet;
  return std::clamp(fit, 3 * kOctet, kMostTokensBf16);
}

Grain grain_of(int tokens, int row_multiple) { return {kOctet, tokens, row_multiple, kStreamCost}; }

size_t bytes_of(Element element) { return element == Element::kFloat32 ? sizeof(float) : sizeof(uint16_t); }

void check_order(const LayerBf16& first, const LayerBf16& second) {
  if (first.rows() == second.depth()) return;
  throw Error(Status::kInvalidInput, "the first layer has N = " + std::to_string(first.rows()) +
                                         ", the second K = " + std::to_string(second.depth()) + "; expected the same");
}

void check_front(const LayerBf16& front, const LayerBf16& first, const LayerBf16& second) {
  check_order(front, first);
  if (second.rows() == first.depth()) return;
  throw Error(Status::kInvalidInput, "the front has N = " + std::to_string(first.depth()) + ", the last layer N = " +
                                         std::to_string(second.rows()) + "; expected the same");
}

}  // namespace

LayerBf16::LayerBf16(const Weights24& weights)
    : rows_(weights.rows), depth_(weights.depth), dense_(weights.dense()), tactic_(&find_bf16_tactic()) {
  check_weights(weights);
  packed_ = Buffer(register_panel_bytes(rows_, depth_));
  pack_register_panels(weights, packed_.data());
}

ProductBf16 LayerBf16::product(void* output, const EpilogueBf16& epilogue) const {
  return {rows_, depth_, dense_, packed_.data(), output, epilogue, nullptr};
}

// Bytes of a token in the scratch: whole registers.
size_t LayerBf16::rounded_stride() const { return (size_t(depth_) * sizeof(uint16_t) + 63) / 64 * 64; }

const uint8_t* LayerBf16::rounded(const InputBf16& input, size_t begin, size_t tokens, uint8_t* scratch,
                                  size_t* stride) const {
  if (input.halves) {
    *stride = size_t(depth_) * sizeof(uint16_t);
    return reinterpret_cast<const uint8_t*>(input.halves + begin * depth_);
  }
  *stride = rounded_stride();
  uint8_t* out = scratch;
  for (int part = 0; part < 2 && input.parts[part]; ++part) {
    const size_t depth = input.depths[part];
    tactic_->round(input.parts[part] + begin * depth, depth, tokens, int(depth), input.norm, out, *stride);
    out += depth * sizeof(uint16_t);
  }
  return scratch;
}

void LayerBf16::run(const InputBf16& input, size_t tokens, void* output, const EpilogueBf16& epilogue, int threads,
                    const ParallelFor& parallel_for) const {
  if (tokens == 0) return;
  const ProductBf16 product = this->product(output, epilogue);
  const int tile = tile_tokens(rounded_stride());
  const Partition partition(grain_of(tile, tactic_->row_multiple), tokens, rows_, std::max(1, threads));
  const size_t scratch_bytes = input.halves ? 0 : tile * rounded_stride();
  run_blocks(partition, scratch_bytes, threads, parallel_for, [&](const Block& block, void* scratch) {
    const size_t count = block.token_end - block.token_begin;
    size_t stride;
    const uint8_t* const x = rounded(input, block.token_begin, count, static_cast<uint8_t*>(scratch), &stride);
    tactic_->run(product, x, stride, block.token_begin, count, block.row_begin, block.row_end);
  });
}

// Where the parts of a block's scratch lie.
struct LayerBf16::PairScratch {
  PairScratch(const FrontBf16& front, const LayerBf16& first, const LayerBf16& second)
      : front_bytes(front.layer ? front.layer->rounded_stride() : 0),
        float_bytes(front.layer ? (size_t(first.depth_) * sizeof(float) + 63) / 64 * 64 : 0),
        tokens(tile_tokens(front_bytes + first.rounded_stride() + second.rounded_stride() + float_bytes)),
        first(tokens * front_bytes),
        second(this->first + tokens * first.rounded_stride()),
        floats(this->second + tokens * second.rounded_stride()),
        end(floats + tokens * float_bytes) {}
  size_t front_bytes, float_bytes;    // of a token
  size_t tokens;                      // the most of a block
  size_t first, second, floats, end;  // X of the two layers, and the front's output; its own X is at 0
};

void LayerBf16::run_pair(const FrontBf16& front, const LayerBf16& first, const EpilogueBf16& hidden,
                         const LayerBf16& second, const InputBf16& input, size_t tokens, void* output,
                         const EpilogueBf16& epilogue, int threads, const ParallelFor& parallel_for) {
  check_order(first, second);
  if (front.layer) check_front(*front.layer, first, second);
  if (tokens == 0) return;
  const int rows = first.rows_ + second.rows_;  // blocks of tokens only: all hidden rows go into each of the second's
  const PairScratch layout(front, first, second);
  const Partition partition(grain_of(int(layout.tokens), rows), tokens, rows, std::max(1, threads));
  EpilogueBf16 between = hidden;
  between.residual = nullptr;
  between.element = Element::kBfloat16;
  run_blocks(partition, layout.end, threads, parallel_for, [&](const Block& block, void* scratch) {
    uint8_t* const base = static_cast<uint8_t*>(scratch);
    const size_t begin = block.token_begin, count = block.token_end - begin;
    EpilogueBf16 last = epilogue;
    InputBf16 given = input;
    size_t place = begin, stride;  // of the block's first token in what `given` and `last` say
    uint8_t* out = static_cast<uint8_t*>(output);
    if (front.layer) {
      InputBf16 before = input;
      before.norm = nullptr;
      EpilogueBf16 sum = front.epilogue;
      if (sum.residual) sum.residual += begin * first.depth_;
      float* const floats = reinterpret_cast<float*>(base + layout.floats);
      const uint8_t* const x = front.layer->rounded(before, begin, count, base, &stride);
      ProductBf16 product = front.layer->product(floats, sum);
      product.next = first.packed_.data();
      front.layer->tactic_->run(product, x, stride, 0, count, 0, front.layer->rows_);
      given = {nullptr, {floats, nullptr}, {first.depth_, 0}, input.norm};
      last.residual = floats;
      out += begin * second.rows_ * bytes_of(epilogue.element);
      place = 0;
    }
    const uint8_t* const x = first.rounded(given, place, count, base + layout.first, &stride);
    uint8_t* const middle = base + layout.second;
    ProductBf16 products[2] = {first.product(middle, between), second.product(out, last)};
    products[0].next = second.packed_.data();
    products[1].next = (front.layer ? front.layer : &first)->packed_.data();  // of the next block
    first.tactic_->run(products[0], x, stride, 0, count, 0, first.rows_);
    second.tactic_->run(products[1], middle, size_t(first.rows_) * sizeof(uint16_t), place, count, 0, second.rows_);
  });
}

}  // namespace sparse_engine
