// AVX2 + FMA, fp32: Intel since Haswell (2013), AMD since Zen (2017).
//
// Bound: two 256-bit loads and two 256-bit multiply-adds per cycle. Twelve of the sixteen registers hold sums
// (48 tokens x 2 rows), which covers the 2 ports x 4 cycles = 8 multiply-adds in flight; the others hold four
// weights and the one broadcast.
#include "conv_lanes.h"
#include "conv_n_lanes.h"
#include "n_lanes.h"
#include "peak.h"
#include "t_lanes.h"
#include "vector_avx2.h"

namespace sparse_engine {

constexpr Tactic kAvx2Tokens = tokens_in_lanes<Float32Streams<Avx2, 6>>(Tier::kAvx2);
constexpr Tactic kAvx2Rows = rows_in_lanes<Float32Panels<Avx2, 8, 1>>(Tier::kAvx2);
constexpr ConvTactic kAvx2Conv = conv_in_lanes<Float32Streams<Avx2, 6>>();
constexpr ConvTactic kAvx2ConvRows = conv_rows_in_lanes<Float32Panels<Avx2, 8, 1>>();
constexpr PeakLoop kAvx2Peak = peak_loop<Float32Streams<Avx2, 6>>(1);

}  // namespace sparse_engine
