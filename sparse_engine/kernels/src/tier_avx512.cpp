// AVX-512 (F, BW, DQ, VL), fp32: Intel since Skylake-X (2017), AMD since Zen 4 (2022).
//
// Bound: one 512-bit load per cycle on Zen 4, where a multiply-add takes both 256-bit halves of the unit, so
// six sums (96 tokens x 1 row) cover its latency of four cycles. Cores with two 512-bit ports load two
// vectors per cycle, and want eight in flight; the next row's multiply-adds, which do not depend on this
// row's, fill in.
#include "conv_lanes.h"
#include "conv_r_lanes.h"
#include "n_lanes.h"
#include "peak.h"
#include "r_lanes.h"
#include "t_lanes.h"
#include "vector_avx512.h"

namespace sparse_engine {
namespace {

// R-lanes: sixteen floats of a token in a register.
struct Float32Registers {
  using V = Avx512;
  static constexpr Operand kOperand = Operand::kFloat32;
  using Register = __m512;
  using Indices = __m512i;

  static SPARSE_ENGINE_INLINE Register load(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static SPARSE_ENGINE_INLINE Indices load_indices(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static SPARSE_ENGINE_INLINE __m512 pick_and_add(__m512 sum, Register weights, Indices indices, Register x) {
    return _mm512_fmadd_ps(weights, _mm512_permutexvar_ps(indices, x), sum);
  }

  static void convert_token(const float* x, int depth, uint8_t* out) {
    for (int k = 0; k < depth; k += V::kLanes, out += 64) {
      _mm512_storeu_ps(out, V::load_first(x + k, smaller(V::kLanes, depth - k)));
    }
  }

  // `count` neighbouring pixels, whose channels are `plane` floats apart, `stride` bytes apart in `out`.
  static void convert_pixels(const float* x, size_t plane, int channels, int count, uint8_t* out, size_t stride) {
    for (int channel = 0; channel < channels; channel += V::kLanes, out += 64) {
      __m512 square[V::kLanes];
      for (int i = 0; i < V::kLanes; ++i) {
        square[i] = channel + i < channels ? V::load_first(x + size_t(channel + i) * plane, count) : V::zero();
      }
      V::transpose(square);
      for (int i = 0; i < count; ++i) _mm512_storeu_ps(out + i * stride, square[i]);
    }
  }
};

}  // namespace

constexpr Tactic kAvx512Tokens = tokens_in_lanes<Float32Streams<Avx512, 6>>(Tier::kAvx512);
constexpr Tactic kAvx512Rows = rows_in_lanes<Float32Panels<Avx512, 8, 2>>(Tier::kAvx512);
constexpr ConvTactic kAvx512Conv = conv_in_lanes<Float32Streams<Avx512, 6>>(kAvx512Tokens);
constexpr Tactic kAvx512Registers = registers_in_lanes<Float32Registers>(Tier::kAvx512);
constexpr ConvTactic kAvx512ConvRegisters = conv_in_registers<Float32Registers>(kAvx512Registers);
constexpr PeakLoop kAvx512Peak = peak_loop<Float32Streams<Avx512, 6>>(1);

}  // namespace sparse_engine
