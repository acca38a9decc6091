// NEON: 4 rows x 5 vectors of sums are 20 of the 32 registers; five lines and a weight are six more.
#include "attention_float32.h"
#include "vector_neon.h"

namespace sparse_engine {

constexpr AttentionKernel kNeonAttention = queries_in_lanes<Float32Attention<Neon, 4, 5>>();

}  // namespace sparse_engine
