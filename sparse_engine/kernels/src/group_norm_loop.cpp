#include "group_norm_loop.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "convolution_int8.h"
#include "error.h"
#include "work_queue.h"

namespace sparse_engine {
namespace {

// bf16 is for products: that tier normalises as AVX-512 does.
const GroupNormKernel& find_kernel([[maybe_unused]] Tier tier) {
#ifdef SPARSE_ENGINE_X86
  if (tier == Tier::kAvx2) return kAvx2GroupNorm;
  if (tier == Tier::kAvx512 || tier == Tier::kAvx512Bf16) return kAvx512GroupNorm;
#endif
#ifdef SPARSE_ENGINE_NEON
  if (tier == Tier::kNeon) return kNeonGroupNorm;
#endif
  return kScalarGroupNorm;
}

constexpr size_t kThreadValues = 1 << 13;  // fewer are not worth another thread

void check(const GroupNorm& norm) {
  const auto fail = [](const std::string& message) { throw Error(Status::kInvalidInput, message); };
  if (norm.groups < 1 || norm.channels % norm.groups != 0) {
    fail("groups = " + std::to_string(norm.groups) + ", expected a divisor of the " + std::to_string(norm.channels) +
         " channels");
  }
  if (!(norm.epsilon >= 0.0f && std::isfinite(norm.epsilon))) {
    fail("epsilon = " + std::to_string(norm.epsilon) + ", expected a finite number, 0 or above");
  }
  if (norm.activation != Activation::kNone && norm.activation != Activation::kSilu) {
    fail("group normalisation is followed by the activation none or silu alone");
  }
}

// Of a group, a block at a time (Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
// Sample Variances", 1979): no difference of large sums, whatever the mean.
Moments moments_of(const GroupNormKernel& kernel, const float* x, size_t count) {
  Moments all = {0.0, 0.0};
  for (size_t begin = 0; begin < count; begin += kMomentsBlock) {
    const size_t size = std::min(kMomentsBlock, count - begin);
    const Moments block = kernel.moments(x + begin, size);
    const double share = double(size) / double(begin + size);
    const double apart = block.mean - all.mean;
    all.mean += apart * share;
    all.squares += block.squares + apart * apart * share * double(begin);
  }
  return all;
}

// Channel `channel` of image `image`, whose group has these moments.
Affine affine_of(const GroupNorm& norm, size_t image, size_t channel, double mean, double inverse_deviation) {
  const auto of = [channel](const float* values, double missing) { return values ? values[channel] : missing; };
  const float* const scale = norm.scale ? norm.scale + image * norm.scale_stride : nullptr;
  const float* const shift = norm.shift ? norm.shift + image * norm.shift_stride : nullptr;
  const double scaled = 1.0 + of(scale, 0.0);
  Affine affine;
  affine.centre = float(mean);
  const double factor = inverse_deviation * of(norm.gamma, 1.0) * scaled;
  affine.factor = float(factor);
  affine.offset = float((affine.centre - mean) * factor + of(norm.beta, 0.0) * scaled + of(shift, 0.0));
  return affine;
}

// Calls each(channel, what becomes of it) for the channels of one group of one image.
template <class Each>
void for_each_channel(const GroupNorm& norm, const GroupNormKernel& kernel, size_t image, size_t group,
                      const Each& each) {
  const size_t channels = norm.group_channels();
  const size_t begin = (image * norm.channels + group * channels) * norm.area;
  const double count = double(channels * norm.area);
  const Moments moments = moments_of(kernel, norm.input + begin, channels * norm.area);
  const double inverse_deviation = 1.0 / std::sqrt(moments.squares / count + norm.epsilon);
  for (size_t channel = group * channels; channel < (group + 1) * channels; ++channel) {
    each(channel, affine_of(norm, image, channel, moments.mean, inverse_deviation));
  }
}

int workers_of(const GroupNorm& norm, int threads) {
  const size_t values = norm.batch * norm.channels * norm.area;
  return int(std::min(size_t(std::max(1, threads)), (values + kThreadValues - 1) / kThreadValues));
}

}  // namespace

void run_group_norm(const GroupNorm& norm, Tier tier, int threads, const ParallelFor& parallel_for) {
  check(norm);
  if (norm.batch * norm.channels * norm.area == 0) return;
  const GroupNormKernel& kernel = find_kernel(tier);
  for_each_item(norm.batch * norm.groups, 0, workers_of(norm, threads), parallel_for, [&](size_t i, void*) {
    const size_t image = i / norm.groups;
    for_each_channel(norm, kernel, image, i % norm.groups, [&](size_t channel, const Affine& affine) {
      const size_t map = (image * norm.channels + channel) * norm.area;
      kernel.apply(norm.input + map, norm.area, affine, norm.activation, norm.output + map);
    });
  });
}

void run_group_norm_to_codes(const GroupNorm& norm, Codes codes, uint8_t* output, Tier tier,
                             const ConvTacticInt8& tactic, int threads, const ParallelFor& parallel_for) {
  check(norm);
  if (norm.batch * norm.channels * norm.area == 0) return;
  const GroupNormKernel& kernel = find_kernel(tier);
  std::vector<Affine> affines(norm.batch * norm.channels);
  for_each_item(norm.batch * norm.groups, 0, workers_of(norm, threads), parallel_for, [&](size_t i, void*) {
    const size_t image = i / norm.groups;
    for_each_channel(norm, kernel, image, i % norm.groups,
                     [&](size_t channel, const Affine& affine) { affines[image * norm.channels + channel] = affine; });
  });
  const MapsToCodes maps = {norm.input, norm.area, int(norm.channels), affines.data(), norm.activation, codes, output};
  code_images(maps, norm.batch, tactic, threads, parallel_for);
}

}  // namespace sparse_engine
