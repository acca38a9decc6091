// The multiply-add of 8-bit products, of AVX512-VNNI. Included by instruction-set files only (see vector_avx512.h).
#pragma once

#include <immintrin.h>

#include "matmul24.h"

namespace sparse_engine {
namespace {

// sum += four products in each lane, of codes 0..255 with codes -128..127. Not the intrinsic, of which GCC 12 copies
// most of two dozen sums in every step, and spills some: attention took half as long again.
SPARSE_ENGINE_INLINE void add_products(__m512i& sum, __m512i codes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
}

}  // namespace
}  // namespace sparse_engine
