// NEON.
#include "group_norm_lanes.h"
#include "vector_neon.h"

namespace sparse_engine {

constexpr GroupNormKernel kNeonGroupNorm = places_in_lanes<Neon>();

}  // namespace sparse_engine
