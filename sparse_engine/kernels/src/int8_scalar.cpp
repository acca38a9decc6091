// The reference of 8-bit products: plain C++, any processor. It reads the canonical weights as they are, so it is also
// the definition of what they mean.
#include <cmath>
#include <cstring>

#include "int8.h"
#include "scalar_activation.h"
#include "scalar_codes.h"

namespace sparse_engine {
namespace {

size_t values_bytes(int rows, int depth, bool dense) { return size_t(rows) * depth / (dense ? 1 : 2); }

size_t packed_bytes(int rows, int depth, bool dense) {
  return values_bytes(rows, depth, dense) + (dense ? 0 : size_t(rows) * depth / 4);
}

void pack(const WeightsInt8& weights, void* packed) {
  const size_t bytes = values_bytes(weights.rows, weights.depth, weights.dense());
  std::memcpy(packed, weights.values, bytes);
  if (weights.dense()) return;
  std::memcpy(static_cast<char*>(packed) + bytes, weights.positions, size_t(weights.rows) * weights.groups());
}

int32_t dot(const ProductInt8& product, int row, const uint8_t* x) {
  const int groups = product.depth / 4;
  const int8_t* const packed = static_cast<const int8_t*>(product.packed);
  uint32_t sum = uint32_t(product.starts[row]);  // unsigned: it may wrap around on its way
  if (product.dense) {
    for (int k = 0; k < product.depth; ++k) sum += uint32_t(int(x[k]) * packed[size_t(row) * product.depth + k]);
    return int32_t(sum);
  }
  const uint8_t* const positions =
      reinterpret_cast<const uint8_t*>(packed) + values_bytes(product.rows, product.depth, false);
  for (int group = 0; group < groups; ++group) {
    const size_t index = size_t(row) * groups + group;
    const uint8_t* const four = x + 4 * group;
    sum += uint32_t(int(four[positions[index] & 3]) * packed[2 * index]);
    sum += uint32_t(int(four[positions[index] >> 2]) * packed[2 * index + 1]);
  }
  return int32_t(sum);
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

void run(const ProductInt8& product, const uint8_t* x, size_t stride, size_t first, size_t tokens, int row_begin,
         int row_end) {
  const EpilogueInt8& epilogue = product.epilogue;
  for (size_t token = 0; token < tokens; ++token) {
    for (int row = row_begin; row < row_end; ++row) {
      const size_t index = (first + token) * product.rows + row;
      float y = float(dot(product, row, x + token * stride)) * product.scales[row];
      if (epilogue.bias) y += epilogue.bias[row];
      y = activate(y, epilogue.activation);
      if (epilogue.residual) y += epilogue.residual[index];
      if (epilogue.element == Element::kFloat32) static_cast<float*>(product.output)[index] = y;
      if (epilogue.element == Element::kBfloat16) static_cast<uint16_t*>(product.output)[index] = to_bfloat16(y);
      if (epilogue.element == Element::kCode) static_cast<uint8_t*>(product.output)[index] = to_code(y, epilogue.codes);
    }
  }
}

void quantise(const float* x, size_t stride, size_t tokens, int depth, const LayerNorm* norm, Codes codes, uint8_t* out,
              size_t out_stride) {
  for (size_t token = 0; token < tokens; ++token, x += stride, out += out_stride) {
    double mean = 0.0, squares = 0.0;
    for (int k = 0; norm && k < depth; ++k) mean += double(x[k]) / depth;
    for (int k = 0; norm && k < depth; ++k) squares += (x[k] - mean) * (x[k] - mean);
    const double slope = norm ? 1.0 / std::sqrt(squares / depth + double(norm->epsilon)) : 1.0;
    for (int k = 0; k < depth; ++k) {
      float y = float((x[k] - mean) * slope);
      if (norm && norm->gamma) y *= norm->gamma[k];
      if (norm && norm->beta) y += norm->beta[k];
      out[k] = to_code(y, codes);
    }
  }
}

}  // namespace

constexpr TacticInt8 kScalarInt8 = {Tier::kScalar, 1, packed_bytes, pack, quantise, run};

}  // namespace sparse_engine
