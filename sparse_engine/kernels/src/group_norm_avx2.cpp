// AVX2 + FMA.
#include "group_norm_lanes.h"
#include "vector_avx2.h"

namespace sparse_engine {

constexpr GroupNormKernel kAvx2GroupNorm = places_in_lanes<Avx2>();

}  // namespace sparse_engine
