// AVX2 + FMA: 4 rows x 3 vectors of sums are 12 of the 16 registers; three lines and a weight fill the others.
#include "attention_float32.h"
#include "vector_avx2.h"

namespace sparse_engine {

constexpr AttentionKernel kAvx2Attention = queries_in_lanes<Float32Attention<Avx2, 4, 3>>();

}  // namespace sparse_engine
