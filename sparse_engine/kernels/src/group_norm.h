// The words of group normalisation (Wu and He, arXiv 1803.08494), with the scale and shift that diffusion models give
// each image (FiLM: Perez et al., arXiv 1709.07871; "adaptive group normalisation" of Dhariwal and Nichol,
// arXiv 2105.05233): Y = activation((norm(X) * gamma + beta) * (1 + scale) + shift).
#pragma once

#include "matmul24.h"

namespace sparse_engine {

struct GroupNorm {
  size_t batch = 0;
  size_t channels = 0;
  size_t groups = 1;  // divides the channels
  size_t area = 0;    // places of a map
  float epsilon = 0.0f;
  const float* input = nullptr;                    // [batch, channels, area]
  float* output = nullptr;                         // the same; may be the input itself
  const float *gamma = nullptr, *beta = nullptr;   // [channels], or null
  const float *scale = nullptr, *shift = nullptr;  // [batch, channels], or null
  size_t scale_stride = 0, shift_stride = 0;       // from an image's to the next one's; 0: one for all
  Activation activation = Activation::kNone;       // or kSilu

  SPARSE_ENGINE_INLINE size_t group_channels() const { return channels / groups; }
};

// Of some values: their mean, and the sum of the squares of their distances from it.
struct Moments {
  double mean, squares;
};

// What becomes of the values of one channel: activation((x - centre) * factor + offset). With the centre apart, a mean
// that is large beside the deviation costs no digits.
struct Affine {
  float centre, factor, offset;
};

// One way to compute it. Plain function pointers, for the reason given at Tactic.
struct GroupNormKernel {
  Moments (*moments)(const float* x, size_t count);  // of at least one value, at most kMomentsBlock
  void (*apply)(const float* x, size_t count, const Affine& affine, Activation activation, float* y);
};

// 16 KiB: read twice, the second time from L1; a lane's sum is of few enough values to keep its digits.
constexpr size_t kMomentsBlock = 4096;

// Defined by one file each.
extern const GroupNormKernel kScalarGroupNorm;
#ifdef SPARSE_ENGINE_X86
extern const GroupNormKernel kAvx2GroupNorm, kAvx512GroupNorm;
#endif
#ifdef SPARSE_ENGINE_NEON
extern const GroupNormKernel kNeonGroupNorm;
#endif

}  // namespace sparse_engine
