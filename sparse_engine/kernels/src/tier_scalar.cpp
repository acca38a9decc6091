// The reference: plain C++, any processor. Bound: one multiply-add at a time.
//
// It reads the canonical weights as they are, so it is also the definition of what they mean.
#include <cstring>

#include "conv24.h"
#include "matmul24.h"
#include "scalar_activation.h"

namespace sparse_engine {
namespace {

size_t values_bytes(int rows, int depth) { return size_t(rows) * depth / 2 * sizeof(float); }
size_t packed_bytes(int rows, int depth) { return values_bytes(rows, depth) + size_t(rows) * depth / 4; }
size_t scratch_bytes(int, int) { return 0; }

void pack(const Weights24& weights, void* packed) {
  const size_t bytes = values_bytes(weights.rows, weights.depth);
  std::memcpy(packed, weights.values, bytes);
  std::memcpy(static_cast<char*>(packed) + bytes, weights.positions, size_t(weights.rows) * weights.groups());
}

float dot(const float* values, const uint8_t* positions, const float* x, int groups) {
  float sum = 0.0f;
  for (int group = 0; group < groups; ++group) {
    sum += values[2 * group] * x[4 * group + (positions[group] & 3)];
    sum += values[2 * group + 1] * x[4 * group + (positions[group] >> 2)];
  }
  return sum;
}

void run(const Product& product, const Block& block, void*) {
  const int groups = product.depth / 4;
  const float* const values = static_cast<const float*>(product.packed);
  const uint8_t* const positions =
      static_cast<const uint8_t*>(product.packed) + values_bytes(product.rows, product.depth);
  const Epilogue& epilogue = product.epilogue;
  for (size_t token = block.token_begin; token < block.token_end; ++token) {
    const float* const x = product.input + token * product.depth;
    for (int row = block.row_begin; row < block.row_end; ++row) {
      const size_t group = size_t(row) * groups;
      float y = dot(values + 2 * group, positions + group, x, groups);
      if (epilogue.bias) y += epilogue.bias[row];
      y = activate(y, epilogue.activation);
      const size_t index = token * product.rows + row;
      if (epilogue.residual) y += epilogue.residual[index];
      product.output[index] = y;
    }
  }
}

size_t conv_scratch_bytes(const Convolution&, int) { return 0; }

// What one output pixel is the product of: the input at a tap, zero beyond the border.
float pixel_at(const Convolution& conv, const float* channel, int y, int x) {
  const int height = conv.sizes.height * conv.window.upsample;
  const int width = conv.sizes.width * conv.window.upsample;
  if (y < 0 || y >= height || x < 0 || x >= width) return 0.0f;
  return channel[size_t(y / conv.window.upsample) * conv.sizes.width + x / conv.window.upsample];
}

float convolve(const Convolution& conv, const float* values, const uint8_t* positions, const float* image, int y,
               int x) {
  const Window& window = conv.window;
  float sum = 0.0f;
  for (int group = 0; group < conv.product.depth / 4; ++group) {
    const int tap = group % window.taps();
    const float* const four = image + size_t(group / window.taps()) * 4 * conv.sizes.pixels();
    const int down = y * window.stride + tap / window.width - window.pad_top;
    const int right = x * window.stride + tap % window.width - window.pad_left;
    const int kept[2] = {positions[group] & 3, positions[group] >> 2};
    for (int i = 0; i < 2; ++i) {
      sum += values[2 * group + i] * pixel_at(conv, four + kept[i] * conv.sizes.pixels(), down, right);
    }
  }
  return sum;
}

size_t conv_packed_bytes(int rows, int depth, int) { return packed_bytes(rows, depth); }
void pack_conv(const Weights24& weights, int, void* packed) { pack(weights, packed); }

void run_conv(const Convolution& conv, const Block& block, void*) {
  const Product& product = conv.product;
  const float* const values = static_cast<const float*>(product.packed);
  const uint8_t* const positions =
      static_cast<const uint8_t*>(product.packed) + values_bytes(product.rows, product.depth);
  const size_t pixels = conv.sizes.out_pixels();
  for (size_t token = block.token_begin; token < block.token_end; ++token) {
    const size_t image = token / pixels;
    const int pixel = int(token % pixels);
    const float* const x = product.input + image * conv.channels * conv.sizes.pixels();
    for (int row = block.row_begin; row < block.row_end; ++row) {
      const size_t group = size_t(row) * (product.depth / 4);
      const size_t plane = image * product.rows + row;
      float y = convolve(conv, values + 2 * group, positions + group, x, pixel / conv.sizes.out_width,
                         pixel % conv.sizes.out_width);
      if (product.epilogue.bias) y += product.epilogue.bias[row];
      if (conv.image_bias) y += conv.image_bias[plane];
      y = activate(y, product.epilogue.activation);
      const size_t index = plane * pixels + pixel;
      if (product.epilogue.residual) y += product.epilogue.residual[index];
      product.output[index] = y;
    }
  }
}

}  // namespace

constexpr Tactic kScalarTactic = {Tier::kScalar, Lanes::kTokens, 1, 64, 1, packed_bytes, pack, scratch_bytes, run};
constexpr ConvTactic kScalarConv = {
    {1, 64, 1, kStreamCost}, conv_packed_bytes, pack_conv, conv_scratch_bytes, run_conv};

}  // namespace sparse_engine
