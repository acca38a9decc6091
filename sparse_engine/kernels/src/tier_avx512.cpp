// AVX-512 (F, BW, DQ, VL), fp32: Intel since Skylake-X (2017), AMD since Zen 4 (2022).
//
// Bound: one 512-bit load per cycle on Zen 4, where a multiply-add takes both 256-bit halves of the unit, so
// six sums (96 tokens x 1 row) cover its latency of four cycles. Cores with two 512-bit ports load two
// vectors per cycle, and want eight in flight; the next row's multiply-adds, which do not depend on this
// row's, fill in.
#include "conv_lanes.h"
#include "conv_n_lanes.h"
#include "n_lanes.h"
#include "peak.h"
#include "t_lanes.h"
#include "vector_avx512.h"

namespace sparse_engine {

constexpr Tactic kAvx512Tokens = tokens_in_lanes<Float32Streams<Avx512, 6>>(Tier::kAvx512);
constexpr Tactic kAvx512Rows = rows_in_lanes<Float32Panels<Avx512, 8, 2>>(Tier::kAvx512);
constexpr ConvTactic kAvx512Conv = conv_in_lanes<Float32Streams<Avx512, 6>>();
constexpr ConvTactic kAvx512ConvRows = conv_rows_in_lanes<Float32Panels<Avx512, 8, 2>>();
constexpr PeakLoop kAvx512Peak = peak_loop<Float32Streams<Avx512, 6>>(1);

}  // namespace sparse_engine
