// AVX2 and AVX-VNNI, 8-bit products: Intel since Alder Lake (2021), whose desktop processors have no AVX-512, and AMD
// since Zen 5 (2024).
//
// The form of tier_avx512_vnni.cpp at half the width: eight output rows in the lanes of a vector, two vectors a panel.
// A shuffle picks within 128 bits, so sixteen k of a token are repeated in both halves, and two steps take what rows
// keep of them. Four tokens' sums of a panel are eight of sixteen registers; indices and weights of a step serve all
// four.
//
// Bound: as many shuffles as multiply-adds.
#include "epilogue.h"
#include "int8.h"
#include "vector_avx2.h"

namespace sparse_engine {
namespace {

using V = Avx2;

constexpr int kVectors = 2;
constexpr int kRows = kVectors * V::kLanes;
constexpr int kTokens = 4;     // whose sums are in registers
constexpr int kPart = 16;      // k of a token in 128 bits
constexpr int kStepDepth = 8;  // k of a step
constexpr int kVectorBytes = 32;
constexpr int kStepBytes = kVectors * 2 * kVectorBytes;  // of each vector indices, then weights
constexpr int kDenseStepBytes = kVectors * kVectorBytes;
static_assert(kRows == kRowPaddingInt8, "sums are started sixteen at a time");

SPARSE_ENGINE_INLINE int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

size_t panel_bytes_of(int depth, bool dense) {
  return dense ? size_t(depth / 4) * kDenseStepBytes : size_t(divide_up(depth, kStepDepth)) * kStepBytes;
}

size_t packed_bytes(int rows, int depth, bool dense) { return divide_up(rows, kRows) * panel_bytes_of(depth, dense); }

void pack(const WeightsInt8& weights, void* packed) {
  const bool dense = weights.dense();
  const size_t panel_bytes = panel_bytes_of(weights.depth, dense);
  uint8_t* const out = static_cast<uint8_t*>(packed);
  __builtin_memset(out, 0, packed_bytes(weights.rows, weights.depth, dense));
  for (int row = 0; row < weights.rows; ++row) {
    const int vector = row % kRows / V::kLanes, lane = row % V::kLanes * 4;
    uint8_t* const panel = out + row / kRows * panel_bytes;
    for (int group = 0; group < weights.groups(); ++group) {
      const size_t index = size_t(row) * weights.groups() + group;
      if (dense) {
        uint8_t* const four = panel + size_t(group) * kDenseStepBytes + vector * kVectorBytes + lane;
        __builtin_memcpy(four, weights.values + 4 * index, 4);
        continue;
      }
      const int position = weights.positions[index], first = group * 4 % kPart;
      uint8_t* const two = panel + size_t(group / 2) * kStepBytes + vector * 2 * kVectorBytes + lane + group % 2 * 2;
      two[0] = static_cast<uint8_t>(first + (position & 3));
      two[1] = static_cast<uint8_t>(first + (position >> 2));
      __builtin_memcpy(two + kVectorBytes, weights.values + 2 * index, 2);
    }
  }
}

SPARSE_ENGINE_INLINE void add_products(__m256i& sum, __m256i codes, __m256i weights) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(weights));
}

SPARSE_ENGINE_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Sixteen k of a token in both halves; those beyond `left` are zero.
SPARSE_ENGINE_INLINE __m256i load_part(const uint8_t* x, int left) {
  if (left >= kPart) return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  alignas(16) uint8_t part[kPart] = {};
  for (int i = 0; i < left; i += 4) __builtin_memcpy(part + i, x + i, 4);
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(part)));
}

// sums[token][row] of one panel.
template <int Tokens>
__attribute__((noinline)) void add_up_sparse(const uint8_t* panel, const uint8_t* x, size_t stride, int depth,
                                             const int32_t* starts, int32_t* sums) {
  __m256i sum[Tokens][kVectors];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[t][v] = load(starts + v * V::kLanes);
  }
  for (int k = 0; k < depth; k += kPart) {
    __m256i part[Tokens];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) part[t] = load_part(x + t * stride + k, depth - k);
    const int steps = depth - k > kStepDepth ? 2 : 1;
    for (int s = 0; s < steps; ++s, panel += kStepBytes) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const __m256i indices = load(panel + v * 2 * kVectorBytes);
        const __m256i weights = load(panel + v * 2 * kVectorBytes + kVectorBytes);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) add_products(sum[t][v], _mm256_shuffle_epi8(part[t], indices), weights);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + t * kRows + v * V::kLanes), sum[t][v]);
    }
  }
}

template <int Tokens>
__attribute__((noinline)) void add_up_dense(const uint8_t* panel, const uint8_t* x, size_t stride, int depth,
                                            const int32_t* starts, int32_t* sums) {
  __m256i sum[Tokens][kVectors];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[t][v] = load(starts + v * V::kLanes);
  }
  for (int k = 0; k < depth; k += 4, panel += kDenseStepBytes) {
    const __m256i weights[kVectors] = {load(panel), load(panel + kVectorBytes)};
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      float four;  // as a float, or it would be loaded into a general register first
      __builtin_memcpy(&four, x + t * stride + k, sizeof four);
      const __m256i token = _mm256_castps_si256(V::set(four));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) add_products(sum[t][v], token, weights[v]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + t * kRows + v * V::kLanes), sum[t][v]);
    }
  }
}

// The kernel that is as wide as there are tokens, 1 to 4.
template <int Tokens = kTokens>
void add_up(const ProductInt8& product, int row, const uint8_t* x, size_t stride, int tokens, int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return add_up<Tokens - 1>(product, row, x, stride, tokens, sums);
  }
  const size_t panel_bytes = panel_bytes_of(product.depth, product.dense);
  const uint8_t* const panel = static_cast<const uint8_t*>(product.packed) + row / kRows * panel_bytes;
  (product.dense ? add_up_dense<Tokens> : add_up_sparse<Tokens>)(panel, x, stride, product.depth, product.starts + row,
                                                                 sums);
}

// The codes of floats: round(value / scale) + zero, within 0 and 255, in 64 bits. NaN becomes 0.
class CodesOf {
 public:
  explicit SPARSE_ENGINE_INLINE CodesOf(Codes codes)
      : inverse_(V::set(1.0f / codes.scale)), zero_(V::set(float(codes.zero))) {}

  SPARSE_ENGINE_INLINE __m128i operator()(__m256 x) const {
    const __m256 code = V::multiply_add(x, inverse_, zero_);
    // In this order: the second operand is what NaN becomes.
    const __m256i codes = _mm256_cvtps_epi32(V::min(V::max(code, V::zero()), V::set(255.0f)));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    return _mm_packus_epi16(words, words);
  }

 private:
  __m256 inverse_, zero_;
};

// Rounded to nearest even.
SPARSE_ENGINE_INLINE __m128i to_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i halves = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

template <Activation A>
SPARSE_ENGINE_INLINE void finish(const ProductInt8& product, size_t token, int tokens, int row, int count,
                                 const int32_t* sums, int sum_stride) {
  const EpilogueInt8& epilogue = product.epilogue;
  const CodesOf to_codes(epilogue.codes);
  const __m256 scales = V::load_unaligned(product.scales + row);
  const __m256 bias = epilogue.bias ? V::load_first(epilogue.bias + row, count) : V::zero();
  for (int t = 0; t < tokens; ++t) {
    const size_t index = (token + t) * product.rows + row;
    const __m256 sum = _mm256_cvtepi32_ps(load(sums + t * sum_stride));
    __m256 y = activate<V, Operand::kFloat32, A>(V::multiply_add(sum, scales, bias));
    if (epilogue.residual) y = y + V::load_first(epilogue.residual + index, count);
    if (epilogue.element == Element::kFloat32) {
      V::store_first(static_cast<float*>(product.output) + index, y, count);
      continue;
    }
    alignas(16) uint8_t narrow[16];
    const bool halves = epilogue.element == Element::kBfloat16;
    _mm_store_si128(reinterpret_cast<__m128i*>(narrow), halves ? to_bfloat16(y) : to_codes(y));
    const size_t bytes = halves ? 2 : 1;
    uint8_t* const out = static_cast<uint8_t*>(product.output) + index * bytes;
    if (count == V::kLanes) {
      halves ? __builtin_memcpy(out, narrow, 16) : __builtin_memcpy(out, narrow, 8);
    } else {
      for (size_t i = 0; i < count * bytes; ++i) out[i] = narrow[i];
    }
  }
}

void run(const ProductInt8& product, const uint8_t* x, size_t stride, size_t first, size_t tokens, int row_begin,
         int row_end) {
  const size_t parts = (tokens + kTokens - 1) / kTokens;
  with_activation(product.epilogue.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    for (int row = row_begin; row < row_end; row += kRows) {
      for (size_t i = 0; i < parts; ++i) {
        const size_t begin = tokens * i / parts;
        const int count = int(tokens * (i + 1) / parts - begin);
        alignas(32) int32_t sums[kTokens * kRows];
        add_up(product, row, x + begin * stride, stride, count, sums);
        for (int v = 0; v < kVectors && row + v * V::kLanes < row_end; ++v) {
          const int left = row_end - row - v * V::kLanes;
          finish<kActivation>(product, first + begin, count, row + v * V::kLanes, left < V::kLanes ? left : V::kLanes,
                              sums + v * V::kLanes, kRows);
        }
      }
    }
  });
}

SPARSE_ENGINE_INLINE float add_lanes(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

void quantise(const float* x, size_t stride, size_t tokens, int depth, const LayerNorm* norm, Codes codes, uint8_t* out,
              size_t out_stride) {
  const CodesOf to_codes(codes);
  for (size_t token = 0; token < tokens; ++token, x += stride, out += out_stride) {
    __m256 middle = V::zero(), slope = V::set(1.0f);
    if (norm) {
      __m256 sum = V::zero(), squares = V::zero();
      for (int k = 0; k < depth; k += V::kLanes) {
        sum = sum + V::load_first(x + k, depth - k < V::kLanes ? depth - k : V::kLanes);
      }
      middle = V::set(add_lanes(sum) / float(depth));
      for (int k = 0; k < depth; k += V::kLanes) {
        const int count = depth - k < V::kLanes ? depth - k : V::kLanes;
        __m256 distance = V::load_first(x + k, count) - middle;
        if (count < V::kLanes) distance = _mm256_and_ps(distance, _mm256_castsi256_ps(V::first(count)));
        squares = V::multiply_add(distance, distance, squares);
      }
      slope = V::set(1.0f / __builtin_sqrtf(add_lanes(squares) / float(depth) + norm->epsilon));
    }
    for (int k = 0; k < depth; k += V::kLanes) {
      const int count = depth - k < V::kLanes ? depth - k : V::kLanes;
      __m256 y = (V::load_first(x + k, count) - middle) * slope;
      if (norm && norm->gamma) y = y * V::load_first(norm->gamma + k, count);
      if (norm && norm->beta) y = y + V::load_first(norm->beta + k, count);
      alignas(16) uint8_t narrow[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(narrow), to_codes(y));
      for (int i = 0; i < count; i += 4) __builtin_memcpy(out + k + i, narrow + i, 4);  // a depth is whole groups
    }
  }
}

}  // namespace

constexpr TacticInt8 kAvxVnniInt8 = {Tier::kAvxVnni, kRows, packed_bytes, pack, quantise, run};

}  // namespace sparse_engine
