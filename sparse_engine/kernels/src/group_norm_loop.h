// Group normalisation on the threads of a runtime.
#pragma once

#include "conv_int8.h"
#include "group_norm.h"
#include "product24.h"

namespace sparse_engine {

// Computes `norm` on a tier that this machine has, with at most `threads` threads. The bits of an image depend neither
// on how many nor on the other images. Safe to call from several threads at once. Throws Error(kInvalidInput) for
// groups that do not divide the channels, an epsilon below zero, and an activation that is neither kNone nor kSilu.
void run_group_norm(const GroupNorm& norm, Tier tier, int threads, const ParallelFor& parallel_for);

// The same as codes [batch, area, channels], which `tactic` writes: what a convolution in 8 bits is given. Floats are
// not written, and `norm` has no output.
void run_group_norm_to_codes(const GroupNorm& norm, Codes codes, uint8_t* output, Tier tier,
                             const ConvTacticInt8& tactic, int threads, const ParallelFor& parallel_for);

}  // namespace sparse_engine
