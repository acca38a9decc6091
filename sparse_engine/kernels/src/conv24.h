// The words of a convolution: Y[image, row, y, x] = epilogue(sum over channels and taps of W * X).
//
// It is a product whose tokens are the output's pixels, image after image, and whose depth runs over (four channels,
// tap, channel of the four): groups of four are four neighbouring channels of one tap, so 2:4 along the input channels
// is 2:4 along the depth. Images are [batch, channels, height, width], as the runtime has them: pixels lie in the lanes
// already, and nothing is transposed.
#pragma once

#include "matmul24.h"

namespace sparse_engine {

// The sizes of a window and how it moves. Input pixels that do not exist are zero.
struct Window {
  int height = 1, width = 1;  // taps
  int stride = 1;
  int pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;
  int upsample = 1;  // each input pixel is read as so many by so many (nearest neighbour)

  SPARSE_ENGINE_INLINE int taps() const { return height * width; }
};

// The sizes of one image, in and out.
struct ImageSizes {
  int height = 0, width = 0;  // of the input, before it is enlarged
  int out_height = 0, out_width = 0;

  SPARSE_ENGINE_INLINE size_t pixels() const { return size_t(height) * width; }
  SPARSE_ENGINE_INLINE size_t out_pixels() const { return size_t(out_height) * out_width; }
};

struct Convolution {
  // rows: output channels; depth: input channels x taps; input and output: images; the residual has the output's shape.
  Product product;
  const float* image_bias = nullptr;  // [batch, rows], added beside the bias; or null
  int channels = 0;                   // of the input; a multiple of 4
  Window window;
  ImageSizes sizes;
};

// One way to compute it: see Tactic.
struct ConvTactic {
  Grain grain;
  size_t (*packed_bytes)(int rows, int depth, int taps);
  void (*pack)(const Weights24& weights, int taps, void* packed);
  size_t (*scratch_bytes)(const Convolution& convolution, int block_rows);
  void (*run)(const Convolution& convolution, const Block& block, void* scratch);  // scratch: 64-byte aligned
};

// Defined by one file each.
extern const ConvTactic kScalarConv;
#ifdef SPARSE_ENGINE_X86
extern const ConvTactic kAvx2Conv, kAvx512Conv, kAvx512Bf16Conv;
extern const ConvTactic kAvx2ConvRows, kAvx512ConvRows, kAvx512Bf16ConvRows, kAvx512Bf16ConvRegisters;
#endif
#ifdef SPARSE_ENGINE_NEON
extern const ConvTactic kNeonConv, kNeonConvRows;
#endif

}  // namespace sparse_engine
