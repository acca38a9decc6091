// NEON: four floats in a register, on every 64-bit Arm processor.
//
// T-lanes: two rows of eight vectors of sums are 16 of the 32 registers; with twelve, GCC spills some. A multiply-add
// takes its weight out of a lane of another register, so a broadcast costs nothing; loads are never operands, so rows
// that share a line save an instruction.
//
// Tested under QEMU, which says nothing of speed: whether these kernels are faster than the runtime's dense ones is
// found out where an engine is loaded, as for every tier.
#include "conv_lanes.h"
#include "conv_n_lanes.h"
#include "n_lanes.h"
#include "peak.h"
#include "t_lanes.h"
#include "vector_neon.h"

namespace sparse_engine {

constexpr Tactic kNeonTokens = tokens_in_lanes<Float32Streams<Neon, 8>>(Tier::kNeon);
constexpr Tactic kNeonRows = rows_in_lanes<Float32Panels<Neon, 8, 2>>(Tier::kNeon);
constexpr ConvTactic kNeonConv = conv_in_lanes<Float32Streams<Neon, 8>>();
constexpr ConvTactic kNeonConvRows = conv_rows_in_lanes<Float32Panels<Neon, 8, 2>>();
constexpr PeakLoop kNeonPeak = peak_loop<Float32Streams<Neon, 8>>(1);

}  // namespace sparse_engine
