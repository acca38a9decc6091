// The reference of convolutions in 8 bits: plain C++, any processor. It reads the canonical weights as they are, so it
// is also the definition of what they mean.
#include <cmath>
#include <cstring>

#include "conv_int8.h"
#include "scalar_activation.h"
#include "scalar_codes.h"

namespace sparse_engine {
namespace {

size_t values_bytes(int rows, int depth) { return size_t(rows) * depth / 2; }

size_t packed_bytes(int rows, int channels, int taps) {
  return values_bytes(rows, channels * taps) + size_t(rows) * channels * taps / 4;
}

void pack(const WeightsInt8& weights, int, void* packed) {
  const size_t bytes = values_bytes(weights.rows, weights.depth);
  std::memcpy(packed, weights.values, bytes);
  std::memcpy(static_cast<char*>(packed) + bytes, weights.positions, size_t(weights.rows) * weights.groups());
}

// What a tap of an output pixel sees.
const uint8_t* seen(const ConvolutionInt8& convolution, size_t image, int row, int column, int tap) {
  const Window& window = convolution.conv.window;
  const ImageSizes& sizes = convolution.conv.sizes;
  const int y = row * window.stride + tap / window.width - window.pad_top;
  const int x = column * window.stride + tap % window.width - window.pad_left;
  if (y < 0 || x < 0 || y >= sizes.height * window.upsample || x >= sizes.width * window.upsample) {
    return convolution.border;
  }
  const size_t line = image * sizes.height + size_t(y / window.upsample);
  return convolution.codes + (line * sizes.width + size_t(x / window.upsample)) * convolution.conv.channels;
}

int32_t dot(const ConvolutionInt8& convolution, int row, size_t image, int y, int x) {
  const Product& product = convolution.conv.product;
  const int taps = convolution.conv.window.taps(), groups = product.depth / 4;
  const int8_t* const packed = static_cast<const int8_t*>(product.packed);
  const uint8_t* const positions = reinterpret_cast<const uint8_t*>(packed) + values_bytes(product.rows, product.depth);
  uint32_t sum = uint32_t(convolution.starts[row]);  // unsigned: it may wrap around on its way
  for (int group = 0; group < groups; ++group) {
    const size_t index = size_t(row) * groups + group;
    const uint8_t* const four = seen(convolution, image, y, x, group % taps) + size_t(group / taps) * 4;
    sum += uint32_t(int(four[positions[index] & 3]) * packed[2 * index]);
    sum += uint32_t(int(four[positions[index] >> 2]) * packed[2 * index + 1]);
  }
  return int32_t(sum);
}

size_t scratch_bytes(const ConvolutionInt8&) { return 0; }

void run(const ConvolutionInt8& convolution, const Block& block, void*) {
  const Convolution& conv = convolution.conv;
  const Epilogue& epilogue = conv.product.epilogue;
  const size_t pixels = conv.sizes.out_pixels();
  for (size_t token = block.token_begin; token < block.token_end; ++token) {
    const size_t image = token / pixels, pixel = token % pixels;
    const int y = int(pixel / conv.sizes.out_width), x = int(pixel % conv.sizes.out_width);
    for (int row = block.row_begin; row < block.row_end; ++row) {
      const size_t plane = image * conv.product.rows + row, index = plane * pixels + pixel;
      float sum = float(dot(convolution, row, image, y, x)) * convolution.scales[row];
      sum += (epilogue.bias ? epilogue.bias[row] : 0.0f) + (conv.image_bias ? conv.image_bias[plane] : 0.0f);
      sum = activate(sum, epilogue.activation);
      conv.product.output[index] = epilogue.residual ? sum + epilogue.residual[index] : sum;
    }
  }
}

void code(const MapsToCodes& maps, size_t begin, size_t end) {
  for (size_t place = begin; place < end; ++place) {
    for (int channel = 0; channel < maps.channels; ++channel) {
      float x = maps.maps[channel * maps.area + place];
      if (maps.affines) {
        const Affine& affine = maps.affines[channel];
        x = (x - affine.centre) * affine.factor + affine.offset;
      }
      maps.out[place * maps.channels + channel] = to_code(activate(x, maps.activation), maps.codes);
    }
  }
}

}  // namespace

constexpr ConvTacticInt8 kScalarConvInt8 = {Tier::kScalar, {1, 64, 1, 0.0}, packed_bytes, pack, scratch_bytes, run,
                                            code};

}  // namespace sparse_engine
