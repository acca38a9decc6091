#include "c_api.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <thread>
#include <vector>

#include "convolution24.h"
#include "convolution_int8.h"
#include "cpu_features.h"
#include "dispatch.h"
#include "error.h"
#include "group_norm_loop.h"
#include "layers_bf16.h"
#include "product24.h"
#include "product_int8.h"

namespace {

using namespace sparse_engine;

// Runs `body`; an exception becomes a status and a message.
template <class Body>
int guarded(char* message, size_t message_size, const Body& body) {
  Status status = Status::kFailed;
  const char* what = "unknown failure";
  const auto report = [&] {
    if (message && message_size) std::snprintf(message, message_size, "%s", what);
    return int(status);
  };
  try {
    body();
    return int(Status::kOk);
  } catch (const Error& error) {
    status = error.status;
    what = error.what();
    return report();
  } catch (const std::exception& error) {
    what = error.what();
    return report();
  }
}

int to_int(int64_t value, const char* name) {
  if (value >= 0 && value <= std::numeric_limits<int>::max()) return int(value);
  throw Error(Status::kInvalidInput, std::string(name) + " is " + std::to_string(value) + ", out of range");
}

Window window_of(const int32_t* told) {
  return {told[0], told[1], told[2], told[3], told[4], told[5], told[6], told[7]};
}

void parallel_for(int workers, const std::function<void()>& work) {
  std::vector<std::thread> threads;
  for (int i = 1; i < workers; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

// The best of several short runs: the peak is what the machine can do undisturbed.
double measure(const PeakLoop& loop, bool load) {
  constexpr size_t kIterations = 200000;
  double best = 0;
  for (int run = 0; run < 25; ++run) {
    const auto start = std::chrono::steady_clock::now();
    loop.run(kIterations, load);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, kIterations * loop.flops_per_iteration / seconds.count());
  }
  return best;
}

const Conv24& as_conv(const void* conv) { return *static_cast<const Conv24*>(conv); }

const ConvInt8& as_conv_int8(const void* conv) { return *static_cast<const ConvInt8*>(conv); }

const LayerInt8& as_layer(const void* layer) { return *static_cast<const LayerInt8*>(layer); }

const LayerBf16& as_bf16(const void* layer) { return *static_cast<const LayerBf16*>(layer); }

const MatMul24& as_product(const void* product) { return *static_cast<const MatMul24*>(product); }

}  // namespace

int sparse_engine_abi_version() { return 8; }

int sparse_engine_has_tier(const char* tier) {
  bool has = false;
  const int status = guarded(nullptr, 0, [&] { has = machine_has(parse_tier(tier)); });
  return status == int(Status::kOk) && has;
}

int sparse_engine_best_tier(const char* compute, const char** tier, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    if (std::strcmp(compute, "int8") == 0) {
      *tier = tier_name(best_int8_tier());
    } else if (std::strcmp(compute, "int8 convolutions") == 0) {
      *tier = tier_name(best_conv_int8_tactic().tier);
    } else {
      *tier = tier_name(best_tier(parse_compute_is_bfloat16(compute)));
    }
  });
}

int sparse_engine_matmul24_create(int64_t rows, int64_t depth, const float* values, const uint8_t* positions,
                                  const char* tier, const char* lanes, void** product, char* message,
                                  size_t message_size) {
  return guarded(message, message_size, [&] {
    const Weights24 weights = {to_int(rows, "rows"), to_int(depth, "depth"), values, positions};
    *product = new MatMul24(weights, parse_tier(tier), parse_lanes(lanes));
  });
}

int sparse_engine_matmul24_run(const void* product, const float* input, int64_t tokens, float* output,
                               const float* bias, const float* residual, const char* activation, int threads,
                               char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const Epilogue epilogue = {bias, residual, parse_activation(activation)};
    as_product(product).run(input, to_int(tokens, "tokens"), output, epilogue, threads, parallel_for);
  });
}

int sparse_engine_matmul24_run_pair(const void* first, const float* first_bias, const char* activation,
                                    const void* second, const float* bias, const float* residual, const float* input,
                                    int64_t tokens, float* output, int threads, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const Epilogue first_epilogue = {first_bias, nullptr, parse_activation(activation)};
    const Epilogue epilogue = {bias, residual, Activation::kNone};
    MatMul24::run_pair(as_product(first), first_epilogue, as_product(second), epilogue, input, to_int(tokens, "tokens"),
                       output, threads, parallel_for);
  });
}

const char* sparse_engine_matmul24_tier(const void* product) { return tier_name(as_product(product).tier()); }

const char* sparse_engine_matmul24_lanes(const void* product) { return lanes_name(as_product(product).lanes()); }

size_t sparse_engine_matmul24_packed_bytes(const void* product) { return as_product(product).packed_bytes(); }

void sparse_engine_matmul24_destroy(void* product) { delete static_cast<MatMul24*>(product); }

int sparse_engine_int8_create(int64_t rows, int64_t depth, const int8_t* values, const uint8_t* positions,
                              const float* scales, float input_scale, int input_zero, const char* tier, void** layer,
                              char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const WeightsInt8 weights = {to_int(rows, "rows"), to_int(depth, "depth"), values, positions};
    *layer = new LayerInt8(weights, scales, {input_scale, input_zero}, parse_tier(tier));
  });
}

int sparse_engine_int8_run(const void* first, const void* second, const sparse_engine_int8_call* call, char* message,
                           size_t message_size) {
  return guarded(message, message_size, [&] {
    const LayerNorm norm = {call->gamma, call->beta, call->epsilon};
    const int depths[2] = {to_int(call->depths[0], "depth"), to_int(call->depths[1], "depth")};
    const InputInt8 input = {
        call->codes, {call->parts[0], call->parts[1]}, {depths[0], depths[1]}, call->normalise ? &norm : nullptr};
    const size_t tokens = size_t(to_int(call->tokens, "tokens"));
    const Codes codes = {call->output_scale, call->output_zero};
    EpilogueInt8 epilogue = {call->bias, call->residual, Activation::kNone, parse_element(call->element), codes};
    if (second) {
      EpilogueInt8 hidden;
      hidden.bias = call->first_bias;
      hidden.activation = parse_activation(call->activation);
      LayerInt8::run_pair({}, as_layer(first), hidden, as_layer(second), input, tokens, call->output, epilogue,
                          call->threads, parallel_for);
    } else {
      epilogue.activation = parse_activation(call->activation);
      as_layer(first).run(input, tokens, call->output, epilogue, call->threads, parallel_for);
    }
  });
}

const char* sparse_engine_int8_tier(const void* layer) { return tier_name(as_layer(layer).tier()); }

size_t sparse_engine_int8_packed_bytes(const void* layer) { return as_layer(layer).packed_bytes(); }

void sparse_engine_int8_destroy(void* layer) { delete static_cast<LayerInt8*>(layer); }

int sparse_engine_bf16_create(int64_t rows, int64_t depth, const float* values, const uint8_t* positions, void** layer,
                              char* message, size_t message_size) {
  return guarded(message, message_size,
                 [&] { *layer = new LayerBf16({to_int(rows, "rows"), to_int(depth, "depth"), values, positions}); });
}

int sparse_engine_bf16_run(const void* front, const void* first, const void* second,
                           const sparse_engine_bf16_call* call, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const LayerNorm norm = {call->gamma, call->beta, call->epsilon};
    const int depths[2] = {to_int(call->depths[0], "depth"), to_int(call->depths[1], "depth")};
    const InputBf16 input = {
        call->halves, {call->parts[0], call->parts[1]}, {depths[0], depths[1]}, call->normalise ? &norm : nullptr};
    const size_t tokens = size_t(to_int(call->tokens, "tokens"));
    EpilogueBf16 epilogue = {call->bias, call->residual, Activation::kNone, parse_element(call->element)};
    if (epilogue.element == Element::kCode) throw Error(Status::kInvalidInput, "layers in bf16 give no codes");
    if (!second) {
      epilogue.activation = parse_activation(call->activation);
      as_bf16(first).run(input, tokens, call->output, epilogue, call->threads, parallel_for);
      return;
    }
    FrontBf16 before;
    if (front) {
      before.layer = &as_bf16(front);
      before.epilogue.bias = call->front_bias;
      before.epilogue.residual = call->front_residual;
    }
    const EpilogueBf16 hidden = {call->first_bias, nullptr, parse_activation(call->activation), Element::kBfloat16};
    LayerBf16::run_pair(before, as_bf16(first), hidden, as_bf16(second), input, tokens, call->output, epilogue,
                        call->threads, parallel_for);
  });
}

size_t sparse_engine_bf16_packed_bytes(const void* layer) { return as_bf16(layer).packed_bytes(); }

void sparse_engine_bf16_destroy(void* layer) { delete static_cast<LayerBf16*>(layer); }

int sparse_engine_conv24_create(int64_t rows, int64_t depth, const float* values, const uint8_t* positions,
                                const int32_t* window, const char* tier, const char* lanes, void** conv, char* message,
                                size_t message_size) {
  return guarded(message, message_size, [&] {
    const Weights24 weights = {to_int(rows, "rows"), to_int(depth, "depth"), values, positions};
    *conv = new Conv24(weights, window_of(window), parse_tier(tier), parse_lanes(lanes));
  });
}

int sparse_engine_conv24_out_size(const void* conv, int64_t height, int64_t width, int64_t* out_height,
                                  int64_t* out_width, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const ImageSizes sizes = as_conv(conv).sizes(height, width);
    *out_height = sizes.out_height;
    *out_width = sizes.out_width;
  });
}

int sparse_engine_conv24_run(const void* conv, const float* input, int64_t batch, int64_t height, int64_t width,
                             float* output, const float* bias, const float* image_bias, const float* residual,
                             const char* activation, int threads, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const ConvEpilogue epilogue = {{bias, residual, parse_activation(activation)}, image_bias};
    as_conv(conv).run(input, size_t(to_int(batch, "batch")), as_conv(conv).sizes(height, width), output, epilogue,
                      threads, parallel_for);
  });
}

void sparse_engine_conv24_destroy(void* conv) { delete static_cast<Conv24*>(conv); }

int sparse_engine_conv_int8_create(int64_t rows, int64_t depth, const int8_t* values, const uint8_t* positions,
                                   const float* scales, float input_scale, int input_zero, const int32_t* window,
                                   const char* tier, void** conv, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const WeightsInt8 weights = {to_int(rows, "rows"), to_int(depth, "depth"), values, positions};
    *conv = new ConvInt8(weights, scales, window_of(window), {input_scale, input_zero}, parse_tier(tier));
  });
}

int sparse_engine_conv_int8_out_size(const void* conv, int64_t height, int64_t width, int64_t* out_height,
                                     int64_t* out_width, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const ImageSizes sizes = as_conv_int8(conv).sizes(height, width);
    *out_height = sizes.out_height;
    *out_width = sizes.out_width;
  });
}

int sparse_engine_conv_int8_run(const void* conv, const uint8_t* codes, const float* maps, int64_t batch,
                                int64_t height, int64_t width, float* output, const float* bias,
                                const float* image_bias, const float* residual, const char* activation, int threads,
                                char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const ConvEpilogue epilogue = {{bias, residual, parse_activation(activation)}, image_bias};
    const ConvInt8& self = as_conv_int8(conv);
    self.run({codes, maps}, size_t(to_int(batch, "batch")), self.sizes(height, width), output, epilogue, threads,
             parallel_for);
  });
}

const char* sparse_engine_conv_int8_tier(const void* conv) { return tier_name(as_conv_int8(conv).tier()); }

void sparse_engine_conv_int8_destroy(void* conv) { delete static_cast<ConvInt8*>(conv); }

int sparse_engine_group_norm(const float* input, int64_t batch, int64_t channels, int64_t area, int64_t groups,
                             float epsilon, const float* gamma, const float* beta, const float* scale,
                             const float* shift, const char* activation, const char* tier, int threads, float* output,
                             const char* codes_tier, float output_scale, int output_zero, uint8_t* codes, char* message,
                             size_t message_size) {
  return guarded(message, message_size, [&] {
    const Tier parsed = parse_tier(tier);
    find_tactic(parsed, Lanes::kTokens);  // throws where the machine lacks the tier
    GroupNorm norm;
    norm.batch = size_t(to_int(batch, "batch"));
    norm.channels = size_t(to_int(channels, "channels"));
    norm.area = size_t(to_int(area, "area"));
    norm.groups = size_t(to_int(groups, "groups"));
    norm.epsilon = epsilon;
    norm.input = input;
    norm.output = output;
    norm.gamma = gamma;
    norm.beta = beta;
    norm.scale = scale;
    norm.shift = shift;
    norm.scale_stride = norm.shift_stride = norm.channels;
    norm.activation = parse_activation(activation);
    if (codes) {
      const ConvTacticInt8& tactic = find_conv_int8_tactic(parse_tier(codes_tier));
      run_group_norm_to_codes(norm, {output_scale, output_zero}, codes, parsed, tactic, threads, parallel_for);
    } else {
      run_group_norm(norm, parsed, threads, parallel_for);
    }
  });
}

int sparse_engine_peak_flops(const char* tier, int load, double* flops_per_second, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    const PeakLoop* const loop = find_peak_loop(parse_tier(tier));
    *flops_per_second = loop ? measure(*loop, load != 0) : std::numeric_limits<double>::quiet_NaN();
  });
}
