// Every tactic of this machine over awkward shapes, in heap blocks of exactly the right size: a program for the
// sanitizers (cmake -DSPARSE_ENGINE_SANITIZE=ON), and for processors that are only emulated (-DSPARSE_ENGINE_SMOKE=ON).
// Exits with 1 where a result is wrong.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../sparse_engine/kernels/src/c_api.h"
#include "../../sparse_engine/kernels/src/dispatch.h"
#include "../../sparse_engine/kernels/src/self_attention.h"

namespace {

struct Case {
  int rows, depth, tokens;
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
bool run_pair_case(const Case& shape, const char* tier) {
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
    good &= !sparse_engine_matmul24_create(dims[i][0], dims[i][1], values.data(), positions.data(), tier, "t-lanes",
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
  if (!good) std::printf("%s pair of rows %d depth %d: %s\n", tier, shape.rows, shape.depth, message);
  return good;
}

// Keys that are all alike: every query attends to the mean of the values.
bool run_attention_case(const char* tier, int tokens, int head_dim, double tolerance) {
  const int batch = 2, heads = 3, width = heads * head_dim;
  std::mt19937 random(tokens);
  std::normal_distribution<float> normal;
  std::vector<float> qkv(size_t(batch) * tokens * 3 * width), y(size_t(batch) * tokens * width);
  for (float& value : qkv) value = normal(random);
  for (size_t row = 0; row < size_t(batch) * tokens; ++row) {
    for (int i = 0; i < width; ++i) qkv[(row * 3 + 1) * width + i] = 0.5f;
  }
  sparse_engine::Attention attention;
  attention.batch = batch;
  attention.tokens = tokens;
  attention.heads = heads;
  attention.head_dim = head_dim;
  attention.scale = 0.25f;
  attention.qkv = qkv.data();
  attention.output = y.data();
  sparse_engine::run_attention(attention, sparse_engine::parse_tier(tier), 1,
                               [](int, const std::function<void()>& work) { work(); });
  double error = 0;
  for (int b = 0; b < batch; ++b) {
    for (int i = 0; i < width; ++i) {
      double mean = 0;
      for (int t = 0; t < tokens; ++t) mean += qkv[((size_t(b) * tokens + t) * 3 + 2) * width + i] / double(tokens);
      for (int t = 0; t < tokens; ++t) {
        error = std::fmax(error, std::fabs(y[(size_t(b) * tokens + t) * width + i] - mean));
      }
    }
  }
  if (error <= tolerance) return true;
  std::printf("%s attention of %d tokens, heads of %d: error %g\n", tier, tokens, head_dim, error);
  return false;
}

}  // namespace

int main() {
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
    }
    for (const Case& shape : cases) good &= std::string(tier) == "scalar" || run_pair_case(shape, tier);
    const double tolerance = std::string(tier) == "avx512-bf16" ? 2e-2 : 1e-5;
    for (const int tokens : {1, 5, 97, 257}) {
      for (const int head_dim : {4, 20, 64}) good &= run_attention_case(tier, tokens, head_dim, tolerance);
    }
    std::printf("%s ran\n", tier);
  }
  return good ? 0 : 1;
}
