// AVX-512.
#include "group_norm_lanes.h"
#include "vector_avx512.h"

namespace sparse_engine {

constexpr GroupNormKernel kAvx512GroupNorm = places_in_lanes<Avx512>();

}  // namespace sparse_engine
