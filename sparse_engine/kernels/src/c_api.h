// The C functions of the library, for tests, benchmarks and other languages. Functions return a status:
// 0 done, 1 invalid input, 2 not supported by this machine, 3 failed; `message` (of `message_size` bytes, or
// null) then says why. Matrices are row-major, contiguous float32 of any alignment that suits a float.
#pragma once

#include <cstddef>
#include <cstdint>

#define SPARSE_ENGINE_API extern "C" __attribute__((visibility("default")))

// Incremented when a function below changes.
SPARSE_ENGINE_API int sparse_engine_abi_version();

// 1 if this machine runs the tier (scalar, avx2, avx-vnni, avx512, avx512-vnni, avx512-bf16, neon, neon-dot), else 0.
SPARSE_ENGINE_API int sparse_engine_has_tier(const char* tier);

// The tier used for a precision (fp32, bf16, int8, or "int8 convolutions"), SPARSE_ENGINE_ISA respected. *tier is a
// static string.
SPARSE_ENGINE_API int sparse_engine_best_tier(const char* compute, const char** tier, char* message,
                                              size_t message_size);

// Canonical weights: values [rows, depth / 2], positions [rows, depth / 4] (first | second << 2). They
// are packed for the tier and the lanes, and may then be freed.
SPARSE_ENGINE_API int sparse_engine_matmul24_create(int64_t rows, int64_t depth, const float* values,
                                                    const uint8_t* positions, const char* tier, const char* lanes,
                                                    void** product, char* message, size_t message_size);

// output[tokens, rows] = activation(input[tokens, depth] * W^T + bias) + residual. bias, residual: may be
// null; residual may be the output. Starts threads - 1 threads and joins them.
SPARSE_ENGINE_API int sparse_engine_matmul24_run(const void* product, const float* input, int64_t tokens, float* output,
                                                 const float* bias, const float* residual, const char* activation,
                                                 int threads, char* message, size_t message_size);

// output = second(first(input)), with one tier and the same lanes for both. Bias and residual may be null.
SPARSE_ENGINE_API int sparse_engine_matmul24_run_pair(const void* first, const float* first_bias,
                                                      const char* activation, const void* second, const float* bias,
                                                      const float* residual, const float* input, int64_t tokens,
                                                      float* output, int threads, char* message, size_t message_size);

// The tier, and what lies in its lanes. Static strings.
SPARSE_ENGINE_API const char* sparse_engine_matmul24_tier(const void* product);
SPARSE_ENGINE_API const char* sparse_engine_matmul24_lanes(const void* product);
SPARSE_ENGINE_API size_t sparse_engine_matmul24_packed_bytes(const void* product);

SPARSE_ENGINE_API void sparse_engine_matmul24_destroy(void* product);

// A layer in 8 bits (int8.h): codes [rows, depth / 2] with positions, or [rows, depth] and null; scales [rows] of the
// rows. value = scale * (code - zero) of what it is given.
SPARSE_ENGINE_API int sparse_engine_int8_create(int64_t rows, int64_t depth, const int8_t* values,
                                                const uint8_t* positions, const float* scales, float input_scale,
                                                int input_zero, const char* tier, void** layer, char* message,
                                                size_t message_size);

// What it, or a pair of layers, is given and gives. Pointers may be null unless said.
struct sparse_engine_int8_call {
  const uint8_t* codes;   // [tokens, depth]; or
  const float* parts[2];  // [tokens, depths[i]] each, side by side; the second may be null
  int64_t depths[2];
  int normalise;       // 1: a layer normalisation comes first
  const float* gamma;  // [depth]
  const float* beta;   // [depth]
  float epsilon;
  int64_t tokens;
  const float* first_bias;  // of a pair's first layer, which the activation is of too
  const float* bias;
  const float* residual;   // [tokens, rows]; may be the output
  const char* activation;  // not null
  void* output;            // [tokens, rows], not null
  const char* element;     // fp32, bf16, codes: of the output
  float output_scale;      // of codes
  int output_zero;
  int threads;
};

// second(first(input)), or first(input) where the second is null. Starts threads - 1 threads and joins them.
SPARSE_ENGINE_API int sparse_engine_int8_run(const void* first, const void* second, const sparse_engine_int8_call* call,
                                             char* message, size_t message_size);

SPARSE_ENGINE_API const char* sparse_engine_int8_tier(const void* layer);
SPARSE_ENGINE_API size_t sparse_engine_int8_packed_bytes(const void* layer);
SPARSE_ENGINE_API void sparse_engine_int8_destroy(void* layer);

// A layer in bf16 with what surrounds it (layers_bf16.h): weights [rows, depth / 2] with positions, or [rows, depth]
// and null.
SPARSE_ENGINE_API int sparse_engine_bf16_create(int64_t rows, int64_t depth, const float* values,
                                                const uint8_t* positions, void** layer, char* message,
                                                size_t message_size);

// What it, or layers in a row, are given and give. Pointers may be null unless said.
struct sparse_engine_bf16_call {
  const uint16_t* halves;  // [tokens, depth], bfloat16; or
  const float* parts[2];   // [tokens, depths[i]] each, side by side; the second may be null
  int64_t depths[2];
  int normalise;       // 1: a layer normalisation comes first, or after the front
  const float* gamma;  // [depth]
  const float* beta;   // [depth]
  float epsilon;
  int64_t tokens;
  const float* front_bias;
  const float* front_residual;
  const float* first_bias;  // of a pair's first layer, which the activation is of too
  const float* bias;
  const float* residual;   // [tokens, rows]; may be the output
  const char* activation;  // not null
  void* output;            // [tokens, rows], not null
  const char* element;     // fp32, bf16: of the output
  int threads;
};

// second(first(input)), or first(input) where the second is null; with a front, which may be null, what FrontBf16 says.
// Starts threads - 1 threads and joins them.
SPARSE_ENGINE_API int sparse_engine_bf16_run(const void* front, const void* first, const void* second,
                                             const sparse_engine_bf16_call* call, char* message, size_t message_size);

SPARSE_ENGINE_API size_t sparse_engine_bf16_packed_bytes(const void* layer);
SPARSE_ENGINE_API void sparse_engine_bf16_destroy(void* layer);

// A convolution: canonical weights [rows, depth], depth over (channels / 4, kernel_h, kernel_w, 4). window:
// kernel_h, kernel_w, stride, pad_top, pad_left, pad_bottom, pad_right, upsample.
SPARSE_ENGINE_API int sparse_engine_conv24_create(int64_t rows, int64_t depth, const float* values,
                                                  const uint8_t* positions, const int32_t* window, const char* tier,
                                                  const char* lanes, void** conv, char* message, size_t message_size);

// The size of the output of images of height x width.
SPARSE_ENGINE_API int sparse_engine_conv24_out_size(const void* conv, int64_t height, int64_t width,
                                                    int64_t* out_height, int64_t* out_width, char* message,
                                                    size_t message_size);

// output[batch, rows, out_height, out_width] = activation(conv(input) + bias[rows] + image_bias[batch, rows]) +
// residual, of input[batch, channels, height, width]. The last three may be null; residual may be the output.
SPARSE_ENGINE_API int sparse_engine_conv24_run(const void* conv, const float* input, int64_t batch, int64_t height,
                                               int64_t width, float* output, const float* bias, const float* image_bias,
                                               const float* residual, const char* activation, int threads,
                                               char* message, size_t message_size);

SPARSE_ENGINE_API void sparse_engine_conv24_destroy(void* conv);

// A convolution in 8 bits, of canonical 2:4 codes: weights as sparse_engine_int8_create's, depth and window as
// sparse_engine_conv24_create's.
SPARSE_ENGINE_API int sparse_engine_conv_int8_create(int64_t rows, int64_t depth, const int8_t* values,
                                                     const uint8_t* positions, const float* scales, float input_scale,
                                                     int input_zero, const int32_t* window, const char* tier,
                                                     void** conv, char* message, size_t message_size);
SPARSE_ENGINE_API int sparse_engine_conv_int8_out_size(const void* conv, int64_t height, int64_t width,
                                                       int64_t* out_height, int64_t* out_width, char* message,
                                                       size_t message_size);

// As sparse_engine_conv24_run, of codes[batch, height, width, channels] or, where that is null, of maps[batch,
// channels, height, width], which are rounded to codes first.
SPARSE_ENGINE_API int sparse_engine_conv_int8_run(const void* conv, const uint8_t* codes, const float* maps,
                                                  int64_t batch, int64_t height, int64_t width, float* output,
                                                  const float* bias, const float* image_bias, const float* residual,
                                                  const char* activation, int threads, char* message,
                                                  size_t message_size);

SPARSE_ENGINE_API const char* sparse_engine_conv_int8_tier(const void* conv);
SPARSE_ENGINE_API void sparse_engine_conv_int8_destroy(void* conv);

// output[batch, channels, area] = activation((norm(input) * gamma + beta) * (1 + scale) + shift), norm() over each
// group of channels / groups adjacent channels of an image. gamma, beta [channels]; scale, shift [batch, channels];
// each may be null. activation: none, silu. The output may be the input. Where `codes` is not null, they are written
// instead, uint8 [batch, area, channels] of that scale and zero point, by a tier for 8 bits. Starts threads - 1 threads
// and joins them.
SPARSE_ENGINE_API int sparse_engine_group_norm(const float* input, int64_t batch, int64_t channels, int64_t area,
                                               int64_t groups, float epsilon, const float* gamma, const float* beta,
                                               const float* scale, const float* shift, const char* activation,
                                               const char* tier, int threads, float* output, const char* codes_tier,
                                               float output_scale, int output_zero, uint8_t* codes, char* message,
                                               size_t message_size);

// The machine's peak with one thread, in floating-point operations per second: of multiply-adds between
// registers, or (load = 1) with an operand from L1. Takes about 20 ms. NaN for the scalar tier.
SPARSE_ENGINE_API int sparse_engine_peak_flops(const char* tier, int load, double* flops_per_second, char* message,
                                               size_t message_size);
