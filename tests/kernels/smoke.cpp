// Every tactic of this machine over awkward shapes, in heap blocks of exactly the right size: a program for the
// sanitizers (cmake -DSPARSE_ENGINE_SANITIZE=ON), and for processors that are only emulated (-DSPARSE_ENGINE_SMOKE=ON).
// Exits with 1 where a result is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../sparse_engine/kernels/src/attention_loop.h"
#include "../../sparse_engine/kernels/src/c_api.h"
#include "../../sparse_engine/kernels/src/conv24.h"
#include "../../sparse_engine/kernels/src/dispatch.h"
#include "../../sparse_engine/kernels/src/partition.h"

namespace {

struct Case {
  int rows, depth, tokens;
};

struct ConvCase {
  int batch, channels, rows, height, width;
  sparse_engine::Window window;
};

double activate(double x, const std::string& activation) {
  const double cubic = x + 0.044715 * x * x * x;
  if (activation == "gelu") return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  if (activation == "gelu-tanh") return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * cubic));
  return activation == "silu" ? x / (1 + std::exp(-x)) : x;
}

// Positions and values are random; every seventh group keeps nothing.
bool run_case(const Case& shape, const char* tier, const char* lanes, const char* activation, double tolerance) {
  std::mt19937 random(shape.rows * 1000 + shape.tokens);
  std::normal_distribution<float> normal;
  const auto floats = [&](size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
  };
  const size_t groups = size_t(shape.rows) * shape.depth / 4;
  std::vector<float> values = floats(2 * groups);
  std::vector<uint8_t> positions(groups);
  const uint8_t codes[6] = {0 | 1 << 2, 0 | 2 << 2, 0 | 3 << 2, 1 | 2 << 2, 1 | 3 << 2, 2 | 3 << 2};
  for (size_t g = 0; g < groups; ++g) {
    positions[g] = codes[random() % 6];
    if (g % 7 == 0) values[2 * g] = values[2 * g + 1] = 0.0f;
  }
  const std::vector<float> x = floats(size_t(shape.tokens) * shape.depth);
  const std::vector<float> bias = floats(shape.rows);
  const std::vector<float> residual = floats(size_t(shape.tokens) * shape.rows);
  std::vector<float> y(residual.size());

  char message[256] = "";
  void* product = nullptr;
  if (sparse_engine_matmul24_create(shape.rows, shape.depth, values.data(), positions.data(), tier, lanes, &product,
                                    message, sizeof message) ||
      sparse_engine_matmul24_run(product, x.data(), shape.tokens, y.data(), bias.data(), residual.data(), activation, 2,
                                 message, sizeof message)) {
    std::printf("%s %s: %s\n", tier, lanes, message);
    return false;
  }
  sparse_engine_matmul24_destroy(product);

  double largest = 0, error = 0;
  for (int t = 0; t < shape.tokens; ++t) {
    for (int r = 0; r < shape.rows; ++r) {
      double sum = bias[r];
      for (int k = 0; k < shape.depth / 2; ++k) {
        const size_t g = size_t(r) * (shape.depth / 4) + k / 2;
        const int position = k % 2 ? positions[g] >> 2 : positions[g] & 3;
        sum += double(values[size_t(r) * (shape.depth / 2) + k]) * x[size_t(t) * shape.depth + k / 2 * 4 + position];
      }
      const size_t i = size_t(t) * shape.rows + r;
      const double expected = activate(sum, activation) + residual[i];
      largest = std::fmax(largest, std::fabs(expected));
      error = std::fmax(error, std::fabs(y[i] - expected));
    }
  }
  if (error <= tolerance * largest) return true;
  std::printf("%s %s rows %d depth %d tokens %d: error %g of %g\n", tier, lanes, shape.rows, shape.depth, shape.tokens,
              error, largest);
  return false;
}

// Two layers in a row, in one call and in two: the same bits.
bool run_pair_case(const Case& shape, const char* tier, const char* lanes) {
  std::mt19937 random(shape.rows);
  std::normal_distribution<float> normal;
  const int hidden = shape.rows / 4 * 4 + 4;
  const int dims[2][2] = {{hidden, shape.depth}, {shape.rows, hidden}};
  void* layers[2] = {nullptr, nullptr};
  char message[256] = "";
  bool good = true;
  for (int i = 0; i < 2; ++i) {
    std::vector<float> values(size_t(dims[i][0]) * dims[i][1] / 2);
    for (float& value : values) value = normal(random);
    std::vector<uint8_t> positions(values.size() / 2, 1 | 3 << 2);
    good &= !sparse_engine_matmul24_create(dims[i][0], dims[i][1], values.data(), positions.data(), tier, lanes,
                                           &layers[i], message, sizeof message);
  }
  std::vector<float> x(size_t(shape.tokens) * shape.depth), h(size_t(shape.tokens) * hidden);
  std::vector<float> apart(size_t(shape.tokens) * shape.rows), together(apart.size());
  for (float& value : x) value = normal(random);
  good &= !sparse_engine_matmul24_run(layers[0], x.data(), shape.tokens, h.data(), nullptr, nullptr, "gelu", 2, message,
                                      sizeof message);
  good &= !sparse_engine_matmul24_run(layers[1], h.data(), shape.tokens, apart.data(), nullptr, nullptr, "none", 2,
                                      message, sizeof message);
  good &= !sparse_engine_matmul24_run_pair(layers[0], nullptr, "gelu", layers[1], nullptr, nullptr, x.data(),
                                           shape.tokens, together.data(), 2, message, sizeof message);
  for (void* layer : layers) sparse_engine_matmul24_destroy(layer);
  good &= apart == together;
  if (!good) std::printf("%s %s pair of rows %d depth %d: %s\n", tier, lanes, shape.rows, shape.depth, message);
  return good;
}

// Against the definition, in double: keys of another length, k with heads outermost, and a bias of one row for all
// queries (bias_rows = 1), of a row each, or none.
bool run_attention_case(const char* tier, int queries, int keys, int head_dim, int bias_rows, double tolerance) {
  const int batch = 2, heads = 3, width = heads * head_dim;
  std::mt19937 random(queries * 1000 + keys);
  std::normal_distribution<float> normal;
  const auto floats = [&](size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = std::round(normal(random) * 16) / 16;  // exact in bfloat16
    return values;
  };
  const std::vector<float> q = floats(size_t(batch) * queries * width), k = floats(size_t(batch) * keys * width);
  const std::vector<float> v = floats(size_t(batch) * keys * width), bias = floats(size_t(heads) * bias_rows * keys);
  std::vector<float> y(q.size());
  sparse_engine::Attention attention;
  attention.batch = batch;
  attention.queries = queries;
  attention.keys = keys;
  attention.heads = heads;
  attention.head_dim = head_dim;
  attention.scale = 0.25f;
  attention.q = {q.data(), size_t(queries) * width, size_t(width), size_t(head_dim)};
  attention.k = {k.data(), size_t(keys) * width, size_t(head_dim), size_t(keys) * head_dim};
  attention.v = {v.data(), size_t(keys) * width, size_t(width), size_t(head_dim)};
  if (bias_rows > 0) {
    attention.bias = {bias.data(), 0, size_t(bias_rows) * keys, size_t(bias_rows == 1 ? 0 : keys)};
  }
  attention.output = y.data();
  sparse_engine::run_attention(attention, sparse_engine::parse_tier(tier), 1,
                               [](int, const std::function<void()>& work) { work(); });
  double error = 0;
  std::vector<double> weights(keys);
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < queries; ++i) {
        const size_t row = (size_t(b) * queries + i) * width + h * head_dim;
        double total = 0;
        for (int j = 0; j < keys; ++j) {
          double score = bias_rows > 0 ? bias[(size_t(h) * bias_rows + (bias_rows == 1 ? 0 : i)) * keys + j] : 0.0;
          for (int d = 0; d < head_dim; ++d) {
            score += 0.25 * q[row + d] * k[((size_t(b) * heads + h) * keys + j) * head_dim + d];
          }
          total += weights[j] = std::exp(score);
        }
        for (int d = 0; d < head_dim; ++d) {
          double sum = 0;
          for (int j = 0; j < keys; ++j) {
            sum += weights[j] / total * v[(size_t(b) * keys + j) * width + h * head_dim + d];
          }
          error = std::fmax(error, std::fabs(y[row + d] - sum));
        }
      }
    }
  }
  if (error <= tolerance) return true;
  std::printf("%s attention of %d tokens to %d, heads of %d, %d rows of bias: error %g\n", tier, queries, keys,
              head_dim, bias_rows, error);
  return false;
}

// Against the definition, in double, far from 0: with scale and shift of each image and SiLU, or alone.
bool run_group_norm_case(const char* tier, int channels, int groups, int area, bool modulated) {
  const int batch = 2;
  std::mt19937 random(channels * 1000 + area);
  std::normal_distribution<float> normal;
  const auto floats = [&](size_t count, float mean) {
    std::vector<float> values(count);
    for (float& value : values) value = mean + normal(random);
    return values;
  };
  const std::vector<float> x = floats(size_t(batch) * channels * area, 1000.0f);
  const std::vector<float> gamma = floats(channels, 0.0f), beta = floats(channels, 0.0f);
  const std::vector<float> scale = floats(size_t(batch) * channels, 0.0f), shift = floats(scale.size(), 0.0f);
  std::vector<float> y(x.size());
  char message[256] = "";
  if (sparse_engine_group_norm(x.data(), batch, channels, area, groups, 1e-5f, modulated ? gamma.data() : nullptr,
                               modulated ? beta.data() : nullptr, modulated ? scale.data() : nullptr,
                               modulated ? shift.data() : nullptr, modulated ? "silu" : "none", tier, 2, y.data(),
                               "scalar", 1.0f, 0, nullptr, message, sizeof message)) {
    std::printf("%s group norm: %s\n", tier, message);
    return false;
  }
  double largest = 0, error = 0;
  const size_t count = size_t(channels / groups) * area;
  for (size_t begin = 0; begin < x.size(); begin += count) {
    double mean = 0, variance = 0;
    for (size_t i = begin; i < begin + count; ++i) mean += x[i] / double(count);
    for (size_t i = begin; i < begin + count; ++i) variance += (x[i] - mean) * (x[i] - mean) / double(count);
    for (size_t i = begin; i < begin + count; ++i) {
      const size_t map = i / area, channel = map % channels;
      double expected = (x[i] - mean) / std::sqrt(variance + 1e-5);
      if (modulated) {
        expected = (expected * gamma[channel] + beta[channel]) * (1.0 + scale[map]) + shift[map];
        expected = activate(expected, "silu");
      }
      largest = std::fmax(largest, std::fabs(expected));
      error = std::fmax(error, std::fabs(y[i] - expected));
    }
  }
  if (error <= 4e-6 * std::fmax(largest, 1.0)) return true;
  std::printf("%s group norm of %d channels in %d groups, %d places: error %g of %g\n", tier, channels, groups, area,
              error, largest);
  return false;
}

// A heap block of exactly so many bytes.
std::unique_ptr<void, decltype(&std::free)> exact_block(size_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, 64, bytes)) throw std::bad_alloc();
  return {block, std::free};
}

// The tactic alone: packed weights and scratch have a page's room to spare otherwise, and scratch that of larger calls.
void run_conv_in_exact_blocks(sparse_engine::Convolution conv, size_t pixels, const sparse_engine::Weights24& weights,
                              sparse_engine::Tier tier, sparse_engine::Lanes lanes) {
  const sparse_engine::ConvTactic& tactic = sparse_engine::find_conv_tactic(tier, lanes);
  const int taps = conv.window.taps();
  const auto packed = exact_block(tactic.packed_bytes(weights.rows, weights.depth, taps));
  tactic.pack(weights, taps, packed.get());
  conv.product.packed = packed.get();
  const sparse_engine::Partition partition(tactic.grain, pixels, weights.rows, 2);
  const auto scratch = exact_block(tactic.scratch_bytes(conv, partition.most_block_rows()));
  for (size_t i = 0; i < partition.size(); ++i) tactic.run(conv, partition.block(i), scratch.get());
}

// Against the definition, in double, of operands that are exact in bfloat16.
bool run_conv_case(const ConvCase& shape, const char* tier, const char* lanes, const char* activation) {
  const sparse_engine::Window& window = shape.window;
  std::mt19937 random(shape.rows * 1000 + shape.width);
  std::normal_distribution<float> normal;
  const auto floats = [&](size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = std::round(normal(random) * 16) / 16;
    return values;
  };
  const int depth = shape.channels * window.taps();
  const std::vector<float> values = floats(size_t(shape.rows) * depth / 2);
  std::vector<uint8_t> positions(values.size() / 2);
  const uint8_t codes[6] = {0 | 1 << 2, 0 | 2 << 2, 0 | 3 << 2, 1 | 2 << 2, 1 | 3 << 2, 2 | 3 << 2};
  for (uint8_t& code : positions) code = codes[random() % 6];
  const std::vector<float> x = floats(size_t(shape.batch) * shape.channels * shape.height * shape.width);
  const std::vector<float> bias = floats(shape.rows), image_bias = floats(size_t(shape.batch) * shape.rows);
  const int32_t told[8] = {window.height,   window.width,      window.stride,    window.pad_top,
                           window.pad_left, window.pad_bottom, window.pad_right, window.upsample};
  char message[256] = "";
  void* conv = nullptr;
  int64_t height = 0, width = 0;
  std::vector<float> residual, y;
  bool good = !sparse_engine_conv24_create(shape.rows, depth, values.data(), positions.data(), told, tier, lanes, &conv,
                                           message, sizeof message) &&
              !sparse_engine_conv24_out_size(conv, shape.height, shape.width, &height, &width, message, sizeof message);
  if (good) {
    residual = floats(size_t(shape.batch) * shape.rows * height * width);
    y.resize(residual.size());
    good = !sparse_engine_conv24_run(conv, x.data(), shape.batch, shape.height, shape.width, y.data(), bias.data(),
                                     image_bias.data(), residual.data(), activation, 2, message, sizeof message);
  }
  sparse_engine_conv24_destroy(conv);
  if (!good) {
    std::printf("%s %s convolution: %s\n", tier, lanes, message);
    return false;
  }
  std::vector<float> again(y.size());
  sparse_engine::Convolution alone;
  alone.product = {shape.rows, depth, nullptr, x.data(), again.data(), {}};
  alone.product.epilogue = {bias.data(), residual.data(), sparse_engine::parse_activation(activation)};
  alone.image_bias = image_bias.data();
  alone.channels = shape.channels;
  alone.window = window;
  alone.sizes = {shape.height, shape.width, int(height), int(width)};
  run_conv_in_exact_blocks(alone, size_t(shape.batch) * height * width,
                           {shape.rows, depth, values.data(), positions.data()}, sparse_engine::parse_tier(tier),
                           sparse_engine::parse_lanes(lanes));

  const auto pixel = [&](int image, int channel, int row, int column) -> double {
    if (row < 0 || row >= shape.height * window.upsample) return 0;
    if (column < 0 || column >= shape.width * window.upsample) return 0;
    const size_t line =
        (size_t(image) * shape.channels + channel) * shape.height + static_cast<size_t>(row / window.upsample);
    return x[line * shape.width + column / window.upsample];
  };
  double largest = 0, error = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const int column = int(i % width), row = int(i / width % height);
    const size_t plane = i / (width * height);
    const int n = int(plane % shape.rows), image = int(plane / shape.rows);
    double sum = double(bias[n]) + image_bias[plane];
    for (int g = 0; g < depth / 4; ++g) {
      const size_t group = size_t(n) * (depth / 4) + g;
      const int tap = g % window.taps(), channel = g / window.taps() * 4;
      const int seen_row = row * window.stride - window.pad_top + tap / window.width;
      const int seen_column = column * window.stride - window.pad_left + tap % window.width;
      sum += values[2 * group] * pixel(image, channel + (positions[group] & 3), seen_row, seen_column);
      sum += values[2 * group + 1] * pixel(image, channel + (positions[group] >> 2), seen_row, seen_column);
    }
    const double expected = activate(sum, activation) + residual[i];
    largest = std::fmax(largest, std::fabs(expected));
    error = std::fmax(error, std::fabs(y[i] - expected));
  }
  if (error <= 4e-6 * largest && again == y) return true;
  std::printf("%s %s convolution %d x %d x %d x %d to %d, window %d x %d, stride %d, enlarged %d: error %g of %g\n",
              tier, lanes, shape.batch, shape.channels, shape.height, shape.width, shape.rows, window.height,
              window.width, window.stride, window.upsample, error, largest);
  return false;
}

// Windows: height, width, stride, pads (top, left, bottom, right), enlarged.
const ConvCase kConvCases[] = {
    {2, 8, 21, 5, 32, {3, 3, 1, 1, 1, 1, 1, 1}},    // rows of whole vectors
    {3, 12, 37, 8, 8, {3, 3, 1, 1, 1, 1, 1, 1}},    // several rows a vector
    {9, 8, 20, 2, 2, {3, 3, 1, 1, 1, 1, 1, 1}},     // several images a vector
    {3, 4, 8, 1, 1, {3, 3, 1, 1, 1, 1, 1, 1}},      // nothing but border
    {2, 8, 16, 7, 13, {3, 3, 1, 1, 1, 1, 1, 1}},    // odd sizes
    {1, 4, 3, 3, 200, {3, 3, 1, 1, 1, 1, 1, 1}},    // rows wider than a tile
    {3, 4, 5, 1, 97, {1, 3, 1, 0, 1, 0, 1, 1}},     // one row, wider than a tile
    {2, 8, 8, 6, 3, {3, 3, 1, 2, 2, 2, 4, 1}},      // narrower than its padding
    {1, 8, 8, 17, 18, {3, 3, 1, 0, 0, 0, 0, 1}},    // no padding
    {2, 8, 16, 17, 33, {3, 3, 2, 0, 0, 1, 1, 1}},   // stride 2, padded below and
                                                    // right
    {2, 8, 16, 16, 16, {3, 3, 2, 1, 1, 1, 1, 1}},   // stride 2, padded all around
    {2, 4, 5, 9, 130, {3, 3, 2, 1, 0, 0, 1, 1}},    // stride 2, two pads, rows of
                                                    // 65
    {2, 8, 66, 8, 8, {3, 3, 1, 1, 1, 1, 1, 2}},     // enlarged
    {1, 4, 9, 5, 7, {3, 3, 1, 1, 1, 1, 1, 2}},      // enlarged, odd
    {1, 4, 5, 3, 51, {3, 3, 1, 1, 1, 1, 1, 2}},     // enlarged to rows wider than a
                                                    // tile
    {3, 36, 20, 9, 5, {1, 1, 1, 0, 0, 0, 0, 1}},    // one tap
    {2, 32, 20, 16, 16, {1, 1, 1, 0, 0, 0, 0, 1}},  // one tap, whole vectors
    {2, 8, 7, 6, 5, {1, 1, 2, 0, 0, 0, 0, 1}},      // one tap, stride 2
    {2, 4, 24, 8, 12, {2, 2, 2, 0, 0, 0, 0, 1}},    // patches
    {1, 8, 16, 11, 10, {5, 4, 3, 2, 1, 0, 3, 2}},   // anything
    {1, 132, 17, 6, 6, {3, 3, 1, 1, 1, 1, 1, 1}},   // several blocks of the depth
    {1, 64, 65, 10, 16, {3, 3, 1, 1, 1, 1, 1, 1}},  // and of rows
};

bool run_conv_cases(const char* tier) {
  bool good = true;
  for (const char* lanes : {"t-lanes", "n-lanes", "r-lanes"}) {
    if (std::string(lanes) == "r-lanes" && std::string(tier) != "avx512-bf16") continue;
    for (const ConvCase& shape : kConvCases) {
      for (const char* activation : {"none", "silu"}) good &= run_conv_case(shape, tier, lanes, activation);
    }
    // Every number of pixels in a tile's last vectors, of one image and of three.
    for (int width = 1; width <= 100; ++width) {
      good &= run_conv_case({1, 4, 5, 1, width, {1, 3, 1, 0, 1, 0, 1, 1}}, tier, lanes, "none");
      good &= run_conv_case({3, 4, 5, 2, width, {2, 3, 1, 0, 1, 1, 1, 1}}, tier, lanes, "none");
    }
  }
  return good;
}

// Exact sums, of floats that are rounded and normalised first; every kind of output; two layers in a row.
bool run_int8_case(const Case& shape, const char* tier, bool dense) {
  std::mt19937 random(shape.rows * 1000 + shape.tokens);
  const size_t kept = size_t(shape.rows) * shape.depth / (dense ? 1 : 2);
  std::vector<int8_t> values(kept);
  for (int8_t& value : values) value = int8_t(int(random() % 255) - 127);
  std::vector<uint8_t> positions(size_t(shape.rows) * shape.depth / 4), x(size_t(shape.tokens) * shape.depth);
  const uint8_t codes[6] = {0 | 1 << 2, 0 | 2 << 2, 0 | 3 << 2, 1 | 2 << 2, 1 | 3 << 2, 2 | 3 << 2};
  for (uint8_t& position : positions) position = codes[random() % 6];
  for (uint8_t& code : x) code = uint8_t(random());
  const std::vector<float> ones(std::max(shape.rows, shape.depth), 1.0f);
  std::vector<float> y(size_t(shape.tokens) * shape.rows), floats(x.begin(), x.end());
  char message[256] = "";
  void *layer = nullptr, *next = nullptr;
  const uint8_t* const where = dense ? nullptr : positions.data();
  bool good = !sparse_engine_int8_create(shape.rows, shape.depth, values.data(), where, ones.data(), 1.0f, 7, tier,
                                         &layer, message, sizeof message);
  sparse_engine_int8_call call = {};
  call.codes = x.data();
  call.tokens = shape.tokens;
  call.activation = "none";
  call.output = y.data();
  call.element = "fp32";
  call.output_scale = 1.0f;
  call.threads = 2;
  good &= !sparse_engine_int8_run(layer, nullptr, &call, message, sizeof message);
  for (int token = 0; good && token < shape.tokens; ++token) {
    for (int row = 0; row < shape.rows; ++row) {
      int64_t sum = 0;
      for (size_t i = 0; i < kept / shape.rows; ++i) {
        const size_t index = size_t(row) * (kept / shape.rows) + i;
        const uint8_t position = positions[index / (dense ? 4 : 2)];
        const size_t k = dense ? i : i / 2 * 4 + (i % 2 ? position >> 2 : position & 3);
        sum += int64_t(values[index]) * (x[size_t(token) * shape.depth + k] - 7);
      }
      good &= y[size_t(token) * shape.rows + row] == float(sum);
    }
  }
  call.codes = nullptr;
  call.parts[0] = floats.data();
  call.depths[0] = shape.depth;
  std::vector<uint16_t> halves(y.size());
  std::vector<uint8_t> rounded(y.size());
  for (int normalise = 0; normalise < 2; ++normalise) {
    call.normalise = normalise;
    call.gamma = call.beta = call.bias = ones.data();
    call.activation = "gelu";
    call.element = "bf16", call.output = halves.data();
    good &= !sparse_engine_int8_run(layer, nullptr, &call, message, sizeof message);
    call.element = "codes", call.output = rounded.data();
    good &= !sparse_engine_int8_run(layer, nullptr, &call, message, sizeof message);
  }
  if (shape.rows % 4 == 0) {
    values.resize(size_t(8) * shape.rows);
    good &= !sparse_engine_int8_create(8, shape.rows, values.data(), nullptr, ones.data(), 1.0f, 0, tier, &next,
                                       message, sizeof message);
    std::vector<float> apart(size_t(shape.tokens) * 8), together(apart.size());
    call.element = "fp32", call.output = together.data(), call.bias = nullptr, call.first_bias = ones.data();
    good &= !sparse_engine_int8_run(layer, next, &call, message, sizeof message);
    call.codes = rounded.data(), call.activation = "none", call.output = apart.data(), call.normalise = 0;
    good &= !sparse_engine_int8_run(next, nullptr, &call, message, sizeof message);
    good &= apart == together;
  }
  sparse_engine_int8_destroy(layer);
  sparse_engine_int8_destroy(next);
  if (!good)
    std::printf("%s int8 rows %d depth %d tokens %d: %s\n", tier, shape.rows, shape.depth, shape.tokens, message);
  return good;
}

// Sums of small integers, which are exact in bfloat16; every kind of input and output; layers in a row with a front.
bool run_bf16_case(const Case& shape, bool dense) {
  std::mt19937 random(shape.rows * 1000 + shape.tokens);
  const size_t kept = size_t(shape.depth) / (dense ? 1 : 2);
  std::vector<float> values(shape.rows * kept), back(size_t(shape.depth) * shape.rows, 0.5f);
  std::vector<uint8_t> positions(size_t(shape.rows) * shape.depth / 4);
  const uint8_t codes[6] = {0 | 1 << 2, 0 | 2 << 2, 0 | 3 << 2, 1 | 2 << 2, 1 | 3 << 2, 2 | 3 << 2};
  for (float& value : values) value = float(int(random() % 9) - 4);
  for (uint8_t& position : positions) position = codes[random() % 6];
  std::vector<float> x(size_t(shape.tokens) * shape.depth), y(size_t(shape.tokens) * shape.rows);
  for (float& number : x) number = float(int(random() % 17) - 8);
  const std::vector<float> ones(std::max(shape.rows, shape.depth), 1.0f);
  char message[256] = "";
  void *layer = nullptr, *next = nullptr;
  bool good = !sparse_engine_bf16_create(shape.rows, shape.depth, values.data(), dense ? nullptr : positions.data(),
                                         &layer, message, sizeof message);
  sparse_engine_bf16_call call = {};
  call.parts[0] = x.data();
  call.depths[0] = shape.depth;
  call.tokens = shape.tokens;
  call.activation = "none";
  call.output = y.data();
  call.element = "fp32";
  call.threads = 2;
  good &= !sparse_engine_bf16_run(nullptr, layer, nullptr, &call, message, sizeof message);
  for (int token = 0; good && token < shape.tokens; ++token) {
    for (int row = 0; row < shape.rows; ++row) {
      float sum = 0.0f;
      for (size_t i = 0; i < kept; ++i) {
        const uint8_t position = positions[size_t(row) * (shape.depth / 4) + i / (dense ? 4 : 2)];
        const size_t k = dense ? i : i / 2 * 4 + (i % 2 ? position >> 2 : position & 3);
        sum += values[row * kept + i] * x[size_t(token) * shape.depth + k];
      }
      good &= y[size_t(token) * shape.rows + row] == sum;
    }
  }
  // Two parts; the front's output is what the layer before the last takes, so that a token comes back as wide as it
  // was.
  std::vector<uint16_t> halves(y.size());
  call.element = "bf16";
  call.output = halves.data();
  call.depths[0] = shape.depth - 1;
  call.depths[1] = 1;
  const std::vector<float> more(shape.tokens, 1.0f), begin(x.begin(), x.begin() + shape.tokens * (shape.depth - 1));
  call.parts[0] = begin.data();
  call.parts[1] = more.data();
  good &= !sparse_engine_bf16_run(nullptr, layer, nullptr, &call, message, sizeof message);
  if (shape.rows % 4 == 0) {
    good &= !sparse_engine_bf16_create(shape.depth, shape.rows, back.data(), nullptr, &next, message, sizeof message);
    call.parts[0] = call.parts[1] = nullptr;
    call.halves = halves.data();
    call.normalise = 1;
    call.epsilon = 1e-5f;
    call.gamma = call.beta = call.front_bias = call.first_bias = call.bias = ones.data();
    call.front_residual = x.data();
    call.activation = "gelu";
    call.element = "fp32";
    void* last = nullptr;
    std::vector<float> square(size_t(shape.depth) * shape.depth, 0.25f);
    good &=
        !sparse_engine_bf16_create(shape.depth, shape.depth, square.data(), nullptr, &last, message, sizeof message);
    std::vector<float> out(size_t(shape.tokens) * shape.depth);
    call.output = out.data();
    good &= !sparse_engine_bf16_run(next, last, last, &call, message, sizeof message);
    for (const float number : out) good &= std::isfinite(number);
    sparse_engine_bf16_destroy(last);
  }
  sparse_engine_bf16_destroy(layer);
  sparse_engine_bf16_destroy(next);
  if (!good) {
    std::printf("bf16 layer rows %d depth %d tokens %d: %s\n", shape.rows, shape.depth, shape.tokens, message);
  }
  return good;
}

// What is done to exact sums, against the reference: floats to 1e-5, bfloat16 to its last bit or two, codes to one.
bool run_int8_epilogue_case(const Case& shape, const char* tier, const char* activation, bool with_residual) {
  std::mt19937 random(shape.rows);
  std::normal_distribution<float> normal;
  const auto floats = [&](size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
  };
  std::vector<int8_t> values(size_t(shape.rows) * shape.depth / 2);
  for (int8_t& value : values) value = int8_t(int(random() % 255) - 127);
  const std::vector<uint8_t> positions(values.size() / 2, 1 | 2 << 2);
  const std::vector<float> scales(shape.rows, 2e-3f), bias = floats(shape.rows), gamma = floats(shape.depth);
  const std::vector<float> x = floats(size_t(shape.tokens) * shape.depth);
  const std::vector<float> residual = floats(size_t(shape.tokens) * shape.rows);
  std::vector<float> y[2];
  std::vector<uint16_t> halves[2];
  std::vector<uint8_t> codes[2];
  const char* const tiers[2] = {"scalar", tier};
  char message[256] = "";
  bool good = true;
  for (int i = 0; i < 2; ++i) {
    y[i].resize(residual.size()), halves[i].resize(residual.size()), codes[i].resize(residual.size());
    void* layer = nullptr;
    good &= !sparse_engine_int8_create(shape.rows, shape.depth, values.data(), positions.data(), scales.data(), 0.03f,
                                       131, tiers[i], &layer, message, sizeof message);
    sparse_engine_int8_call call = {};
    call.parts[0] = x.data(), call.depths[0] = shape.depth, call.tokens = shape.tokens;
    call.normalise = 1, call.gamma = call.beta = gamma.data(), call.epsilon = 1e-5f;
    call.bias = bias.data(), call.residual = with_residual ? residual.data() : nullptr, call.activation = activation;
    call.output_scale = 0.02f, call.output_zero = 30, call.threads = 2;
    const std::pair<const char*, void*> outputs[] = {
        {"fp32", y[i].data()}, {"bf16", halves[i].data()}, {"codes", codes[i].data()}};
    for (const auto& [element, output] : outputs) {
      call.element = element, call.output = output;
      good &= !sparse_engine_int8_run(layer, nullptr, &call, message, sizeof message);
    }
    sparse_engine_int8_destroy(layer);
  }
  // A code of X that is rounded the other way moves a few sums: of those there may be some.
  size_t moved = 0;
  for (size_t i = 0; i < residual.size(); ++i) {
    const float error = std::fabs(y[0][i] - y[1][i]);
    moved += error > 1e-5f;
    good &= error <= 0.03f && std::abs(int(codes[0][i]) - int(codes[1][i])) <= 2;
    good &= error > 1e-5f || std::abs(int(halves[0][i]) - int(halves[1][i])) <= 2 || std::fabs(y[0][i]) < 1e-3f;
  }
  good &= moved * 50 <= residual.size() * 2;
  if (!good) std::printf("%s int8 %s: %zu of %zu differ %s\n", tier, activation, moved, residual.size(), message);
  return good;
}

// The largest sums there can be, of either sign.
bool run_int8_extreme_case(const char* tier, bool dense, int weight, int code, int zero) {
  const int rows = 3, depth = 65536, tokens = 5;
  const std::vector<int8_t> values(size_t(rows) * depth / (dense ? 1 : 2), int8_t(weight));
  const std::vector<uint8_t> positions(size_t(rows) * depth / 4, 0 | 3 << 2), x(size_t(tokens) * depth, uint8_t(code));
  const std::vector<float> ones(rows, 1.0f);
  std::vector<float> y(tokens * rows);
  void* layer = nullptr;
  char message[256] = "";
  sparse_engine_int8_call call = {};
  call.codes = x.data(), call.tokens = tokens, call.output = y.data(), call.output_scale = 1.0f, call.threads = 1;
  call.activation = "none", call.element = "fp32";
  bool good = !sparse_engine_int8_create(rows, depth, values.data(), dense ? nullptr : positions.data(), ones.data(),
                                         1.0f, zero, tier, &layer, message, sizeof message) &&
              !sparse_engine_int8_run(layer, nullptr, &call, message, sizeof message);
  sparse_engine_int8_destroy(layer);
  const int64_t expected = int64_t(weight) * (code - zero) * depth / (dense ? 1 : 2);
  for (const float sum : y) good &= sum == float(expected);
  if (!good) std::printf("%s int8 of %d and %d less %d: %s\n", tier, weight, code, zero, message);
  return good;
}

// Exact sums of a convolution in 8 bits, of codes and of floats that are
// rounded first; and a group norm's codes.
bool run_conv_int8_case(const ConvCase& shape, const char* tier) {
  const sparse_engine::Window& window = shape.window;
  std::mt19937 random(shape.rows * 1000 + shape.width);
  const int depth = shape.channels * window.taps(), zero = 77;
  std::vector<int8_t> values(size_t(shape.rows) * depth / 2);
  for (int8_t& value : values) value = int8_t(int(random() % 255) - 127);
  std::vector<uint8_t> positions(values.size() / 2);
  const uint8_t patterns[6] = {0 | 1 << 2, 0 | 2 << 2, 0 | 3 << 2, 1 | 2 << 2, 1 | 3 << 2, 2 | 3 << 2};
  for (uint8_t& position : positions) position = patterns[random() % 6];
  const size_t area = size_t(shape.height) * shape.width;
  std::vector<uint8_t> codes(size_t(shape.batch) * area * shape.channels);
  for (uint8_t& code : codes) code = uint8_t(random());
  std::vector<float> maps(codes.size());  // the same as floats, a map a channel
  for (size_t i = 0; i < codes.size(); ++i) {
    const size_t channel = i % shape.channels, place = i / shape.channels % area, image = i / shape.channels / area;
    maps[(image * shape.channels + channel) * area + place] = float(codes[i] - zero);
  }
  const int32_t told[8] = {window.height,   window.width,      window.stride,    window.pad_top,
                           window.pad_left, window.pad_bottom, window.pad_right, window.upsample};
  const std::vector<float> ones(shape.rows, 1.0f);
  char message[256] = "";
  void* conv = nullptr;
  int64_t height = 0, width = 0;
  std::vector<float> y, again;
  bool good =
      !sparse_engine_conv_int8_create(shape.rows, depth, values.data(), positions.data(), ones.data(), 1.0f, zero, told,
                                      tier, &conv, message, sizeof message) &&
      !sparse_engine_conv_int8_out_size(conv, shape.height, shape.width, &height, &width, message, sizeof message);
  if (good) {
    y.resize(size_t(shape.batch) * shape.rows * height * width);
    again.resize(y.size());
    good &= !sparse_engine_conv_int8_run(conv, codes.data(), nullptr, shape.batch, shape.height, shape.width, y.data(),
                                         nullptr, nullptr, nullptr, "none", 2, message, sizeof message);
    good &= !sparse_engine_conv_int8_run(conv, nullptr, maps.data(), shape.batch, shape.height, shape.width,
                                         again.data(), nullptr, nullptr, nullptr, "none", 2, message, sizeof message);
  }
  sparse_engine_conv_int8_destroy(conv);
  good &= y == again;
  for (size_t i = 0; good && i < y.size(); ++i) {
    const int column = int(i % width), row = int(i / width % height);
    const size_t plane = i / (width * height);
    const int n = int(plane % shape.rows), image = int(plane / shape.rows);
    int64_t sum = 0;
    for (int g = 0; g < depth / 4; ++g) {
      const size_t group = size_t(n) * (depth / 4) + g;
      const int tap = g % window.taps(), channel = g / window.taps() * 4;
      const int down = row * window.stride - window.pad_top + tap / window.width;
      const int right = column * window.stride - window.pad_left + tap % window.width;
      if (down < 0 || right < 0 || down >= shape.height * window.upsample || right >= shape.width * window.upsample) {
        continue;
      }
      const size_t place = image * area + size_t(down / window.upsample) * shape.width + right / window.upsample;
      const uint8_t* const four = codes.data() + place * shape.channels + channel;
      sum += int64_t(values[2 * group]) * (four[positions[group] & 3] - zero);
      sum += int64_t(values[2 * group + 1]) * (four[positions[group] >> 2] - zero);
    }
    good &= y[i] == float(sum);
  }
  std::vector<uint8_t> rounded(codes.size());
  good &= !sparse_engine_group_norm(maps.data(), shape.batch, shape.channels, area, 2, 1e-5f, nullptr, nullptr, nullptr,
                                    nullptr, "silu", "scalar", 2, maps.data(), tier, 0.02f, 30, rounded.data(), message,
                                    sizeof message);
  if (!good) {
    std::printf(
        "%s int8 convolution %d x %d x %d x %d to %d, window %d x %d, "
        "stride %d, enlarged %d: %s\n",
        tier, shape.batch, shape.channels, shape.height, shape.width, shape.rows, window.height, window.width,
        window.stride, window.upsample, message);
  }
  return good;
}

bool run_int8_cases(const char* tier) {
  bool good = true;
  for (const bool dense : {false, true}) {
    for (const Case& shape : {Case{1, 4, 1}, {37, 76, 17}, {130, 260, 97}, {64, 512, 7}, {513, 320, 200}}) {
      good &= run_int8_case(shape, tier, dense);
    }
    for (int tokens = 1; tokens <= 130; ++tokens) good &= run_int8_case({37, 140, tokens}, tier, dense);
    for (int depth = 4; depth <= 76; depth += 4) good &= run_int8_case({19, depth, 5}, tier, dense);
    for (int rows = 1; rows <= 35; ++rows) good &= run_int8_case({rows, 20, 6}, tier, dense);
    for (const int weight : {127, -127}) {
      for (const int code : {0, 255}) good &= run_int8_extreme_case(tier, dense, weight, code, 255 - code);
    }
  }
  for (const char* activation : {"none", "gelu", "gelu-tanh", "silu"}) {
    for (const bool residual : {false, true}) good &= run_int8_epilogue_case({53, 196, 29}, tier, activation, residual);
  }
  return good;
}

// "fp32 avx512", "int8 avx512-vnni": what would be chosen.
bool print_best_tiers() {
  bool good = true;
  for (const char* compute : {"fp32", "int8"}) {
    const char* tier = "";
    char message[256] = "";
    good &= !sparse_engine_best_tier(compute, &tier, message, sizeof message);
    std::printf("%s %s%s\n", compute, tier, message);
  }
  return good;
}

}  // namespace

// With "best", says what would be chosen and computes nothing.
int main(int count, char** arguments) {
  if (count > 1) return std::string(arguments[1]) == "best" && print_best_tiers() ? 0 : 1;
  const Case cases[] = {{1, 4, 1}, {37, 76, 17}, {130, 260, 97}, {64, 512, 7}, {513, 320, 200}};
  bool good = true;
  for (const char* tier : {"scalar", "avx2", "avx512", "avx512-bf16", "neon"}) {
    if (!sparse_engine_has_tier(tier)) continue;
    for (const char* lanes : {"t-lanes", "n-lanes"}) {
      const double tolerance = std::string(tier) == "avx512-bf16" ? 1e-2 : 4e-6;
      for (const Case& shape : cases) good &= run_case(shape, tier, lanes, "silu", tolerance);
      for (const char* activation : {"none", "gelu", "gelu-tanh"}) {
        good &= run_case(cases[1], tier, lanes, activation, tolerance);
      }
      for (int tokens = 1; tokens <= 130; ++tokens) {
        good &= run_case({37, 140, tokens}, tier, lanes, "none", tolerance);
      }
      for (const Case& shape : cases) good &= std::string(tier) == "scalar" || run_pair_case(shape, tier, lanes);
    }
    const double tolerance = std::string(tier) == "avx512-bf16" ? 2e-2 : 1e-5;
    for (const int queries : {1, 5, 97}) {
      for (const int keys : {1, 7, 96, 257}) {
        for (const int head_dim : {4, 20, 64}) {
          for (const int bias_rows : {0, 1, queries}) {
            good &= run_attention_case(tier, queries, keys, head_dim, bias_rows, tolerance);
          }
        }
      }
    }
    for (const int area : {1, 5, 16, 35, 64, 4099}) {
      for (const int groups : {1, 3, 12}) {
        for (const bool modulated : {false, true}) good &= run_group_norm_case(tier, 12, groups, area, modulated);
      }
    }
    good &= run_conv_cases(tier);
    for (const bool dense : {false, true}) {
      if (std::string(tier) != "avx512-bf16") break;
      for (const Case& shape : cases) good &= run_bf16_case(shape, dense);
      for (int tokens = 1; tokens <= 20; ++tokens) good &= run_bf16_case({36, 140, tokens}, dense);
    }
    std::printf("%s ran\n", tier);
  }
  for (const char* tier : {"scalar", "avx-vnni", "avx512-vnni", "neon-dot"}) {
    if (!sparse_engine_has_tier(tier)) continue;
    good &= run_int8_cases(tier);
    if (std::string(tier) != "neon-dot") {
      for (const ConvCase& shape : kConvCases) good &= run_conv_int8_case(shape, tier);
      for (int width = 1; width <= 100; ++width) {
        good &= run_conv_int8_case({3, 4, 5, 2, width, {2, 3, 1, 0, 1, 1, 1, 1}}, tier);
      }
    }
    std::printf("%s in int8 ran\n", tier);
  }
  return good ? 0 : 1;
}
