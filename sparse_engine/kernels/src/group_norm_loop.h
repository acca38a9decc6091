// Group normalisation on the threads of a runtime.
#pragma once

#include "group_norm.h"
#include "product24.h"

namespace sparse_engine {

// Computes `norm` on a tier that this machine has, with at most `threads` threads. The bits of an image depend neither
// on how many nor on the other images. Safe to call from several threads at once. Throws Error(kInvalidInput) for
// groups that do not divide the channels, an epsilon below zero, and an activation that is neither kNone nor kSilu.
void run_group_norm(const GroupNorm& norm, Tier tier, int threads, const ParallelFor& parallel_for);

}  // namespace sparse_engine
