// The words of a convolution in 8 bits: Y[image, row, y, x] = epilogue(scales * sum over channels and taps of
// (X - zero) * W), X of codes 0..255, W of codes -127..127 that are 2:4 along the channels.
//
// Its depth, groups and output are those of conv24.h, its sums and scales those of int8.h. X is [batch, height, width,
// channels]: a pixel's channels lie side by side, so that a tap is a run of bytes. What lies outside an image is code
// `zero`, which stands for exactly 0: a sum starts at -zero times the sum of all its row's weights, at the border too.
#pragma once

#include "conv24.h"
#include "group_norm.h"
#include "int8.h"

namespace sparse_engine {

struct ConvolutionInt8 {
  Convolution conv;                 // what is said there, but for product.input
  const uint8_t* codes = nullptr;   // [batch, height, width, channels]
  const uint8_t* border = nullptr;  // [channels]: the pixel outside
  const int32_t* starts = nullptr;  // [rows, padded to kRowPaddingInt8]: -zero times the sum of a row's weights
  const float* scales = nullptr;    // the same: what a sum is multiplied with
};

// One image's maps of floats to codes, a place's channels side by side.
struct MapsToCodes {
  const float* maps = nullptr;  // [channels, area]
  size_t area = 0;
  int channels = 0;
  const Affine* affines = nullptr;            // [channels]: what becomes of each map first; null: nothing
  Activation activation = Activation::kNone;  // then; or kSilu
  Codes codes;
  uint8_t* out = nullptr;  // [area, channels]
};

// One way to compute them; plain function pointers for the reason given at Tactic.
struct ConvTacticInt8 {
  Tier tier;
  Grain grain;
  size_t (*packed_bytes)(int rows, int channels, int taps);
  void (*pack)(const WeightsInt8& weights, int taps, void* packed);  // packed: 64-byte aligned
  size_t (*scratch_bytes)(const ConvolutionInt8& convolution);
  void (*run)(const ConvolutionInt8& convolution, const Block& block, void* scratch);  // scratch: 64-byte aligned
  void (*code)(const MapsToCodes& maps, size_t begin, size_t end);                     // places [begin, end)
};

// Defined by one file each.
extern const ConvTacticInt8 kScalarConvInt8;
#ifdef SPARSE_ENGINE_X86
extern const ConvTacticInt8 kAvxVnniConvInt8, kAvx512VnniConvInt8;
#endif

}  // namespace sparse_engine
