// Attention on the threads of a runtime.
#pragma once

#include "attention.h"
#include "product24.h"

namespace sparse_engine {

// Computes `attention` on a tier that this machine has, with at most `threads` threads; the bits of the result
// do not depend on how many. Safe to call from several threads at once.
void run_attention(const Attention& attention, Tier tier, int threads, const ParallelFor& parallel_for);

}  // namespace sparse_engine
