// AVX-512: 8 rows x 3 vectors of sums are 24 of the 32 registers.
#include "attention_float32.h"
#include "vector_avx512.h"

namespace sparse_engine {

constexpr AttentionKernel kAvx512Attention = queries_in_lanes<Float32Attention<Avx512, 8, 3>>();

}  // namespace sparse_engine
