// AVX512-VNNI and AVX512-VBMI, 8-bit products: Intel since Ice Lake (2019), AMD since Zen 4 (2022).
//
// Sixteen output rows lie in the lanes, and a register holds 64 k of one token, as they lie in memory. A step is a
// permutation of the whole register, by which each lane takes the four codes that its row keeps of two groups, and a
// multiply-add of them:
//
//     one token's codes:              | x0 x1 x2 x3 x4 x5 ... x63 |
//     what rows n, n + 1, ... keep:   | 0 3 5 6 | 1 2 4 7 | ...     indices, 64 bytes
//     chosen by one vpermb:           | x0 x3 x5 x6 | x1 x2 x4 x7 | ...
//     vpdpbusd with their weights:    sum of row n | sum of row n + 1 | ...
//
// Eight steps are 64 k of sixteen rows, where a dense product issues sixteen multiply-adds. Indices and weights are
// loaded once for eight tokens, whose registers stay put for the eight steps. X is read and Y written as they lie.
//
// Bound: a Zen 5 permutes on two of its four ports and multiplies on two, one of which is the same: sixteen
// instructions of eight tokens in 5.3 cycles, 1.5 times the dense peak.
#include "codes_avx512.h"
#include "epilogue.h"
#include "int8.h"
#include "peak.h"
#include "vector_avx512.h"

namespace sparse_engine {
namespace {

using V = Avx512;

constexpr int kRows = V::kLanes;
constexpr int kTokens = 8;        // whose sums are in registers
constexpr int kRegister = 64;     // k of a token in one
constexpr int kSteps = 8;         // of a register
constexpr int kStepBytes = 128;   // indices, then weights
constexpr int kDensePanels = 2;   // of a dense product, whose sums are in registers together
static_assert(kRows == kRowPaddingInt8, "sums are started sixteen at a time");

SPARSE_ENGINE_INLINE int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }
SPARSE_ENGINE_INLINE int steps_of(int depth) { return divide_up(depth, kRegister / kSteps); }

size_t panel_bytes_of(int depth, bool dense) {
  return dense ? size_t(depth) * kRows : size_t(steps_of(depth)) * kStepBytes;
}

size_t packed_bytes(int rows, int depth, bool dense) {
  const int panels = divide_up(rows, kRows);
  return (dense ? divide_up(panels, kDensePanels) * kDensePanels : panels) * panel_bytes_of(depth, dense);
}

// A panel of sixteen rows after the other: per step of eight k the indices of each row's four codes in their register,
// then the weights. What is missing is weight 0 of index 0.
void pack_sparse(const WeightsInt8& weights, uint8_t* out) {
  const size_t panel_bytes = panel_bytes_of(weights.depth, false);
  for (int row = 0; row < weights.rows; ++row) {
    uint8_t* const lane = out + row / kRows * panel_bytes + row % kRows * 4;
    for (int group = 0; group < weights.groups(); ++group) {
      const size_t index = size_t(row) * weights.groups() + group;
      const int position = weights.positions[index];
      uint8_t* const two = lane + size_t(group / 2) * kStepBytes + group % 2 * 2;
      const int first = group * 4 % kRegister;
      two[0] = static_cast<uint8_t>(first + (position & 3));
      two[1] = static_cast<uint8_t>(first + (position >> 2));
      __builtin_memcpy(two + kRegister, weights.values + 2 * index, 2);
    }
  }
}

// A panel after the other: per four k the weights of its sixteen rows.
void pack_dense(const WeightsInt8& weights, uint8_t* out) {
  const size_t panel_bytes = panel_bytes_of(weights.depth, true);
  for (int row = 0; row < weights.rows; ++row) {
    uint8_t* const lane = out + row / kRows * panel_bytes + row % kRows * 4;
    for (int group = 0; group < weights.groups(); ++group) {
      __builtin_memcpy(lane + size_t(group) * kRegister, weights.values + size_t(row) * weights.depth + group * 4, 4);
    }
  }
}

void pack(const WeightsInt8& weights, void* packed) {
  __builtin_memset(packed, 0, packed_bytes(weights.rows, weights.depth, weights.dense()));
  (weights.dense() ? pack_dense : pack_sparse)(weights, static_cast<uint8_t*>(packed));
}

// Few tokens leave the multiply-adds waiting for one another: their sums are taken in several parts.
constexpr int chains_of(int tokens) { return tokens == 1 ? 4 : tokens <= 3 ? 2 : 1; }

template <int Tokens, int Chain>
SPARSE_ENGINE_INLINE void add_step(__m512i (&sum)[chains_of(Tokens)][Tokens], const __m512i (&x)[Tokens],
                                   const uint8_t* step) {
  const __m512i indices = _mm512_load_si512(step), weights = _mm512_load_si512(step + kRegister);
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
    sum[Chain][t] = _mm512_dpbusd_epi32(sum[Chain][t], _mm512_permutexvar_epi8(indices, x[t]), weights);
  }
}

// sums[token][row] of one panel.
template <int Tokens>
__attribute__((noinline)) void add_up_sparse(const uint8_t* panel, const uint8_t* x, size_t stride, int depth,
                                             const int32_t* starts, int32_t* sums) {
  constexpr int kChains = chains_of(Tokens);
  __m512i sum[kChains][Tokens];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) sum[c][t] = c ? _mm512_setzero_si512() : _mm512_loadu_si512(starts);
  }
  int k = 0;
  for (; k + kRegister <= depth; k += kRegister, panel += kSteps * kStepBytes) {
    __m512i token[Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) token[t] = _mm512_loadu_si512(x + t * stride + k);
#pragma GCC unroll 2
    for (int s = 0; s < kSteps; s += 4) {
      add_step<Tokens, 0>(sum, token, panel + s * kStepBytes);
      add_step<Tokens, 1 % kChains>(sum, token, panel + (s + 1) * kStepBytes);
      add_step<Tokens, 2 % kChains>(sum, token, panel + (s + 2) * kStepBytes);
      add_step<Tokens, 3 % kChains>(sum, token, panel + (s + 3) * kStepBytes);
    }
  }
  if (k < depth) {
    const __mmask64 left = (__mmask64(1) << (depth - k)) - 1;
    __m512i token[Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) token[t] = _mm512_maskz_loadu_epi8(left, x + t * stride + k);
    for (int s = 0; s < steps_of(depth - k); ++s) add_step<Tokens, 0>(sum, token, panel + s * kStepBytes);
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c) sum[0][t] = _mm512_add_epi32(sum[0][t], sum[c][t]);
    _mm512_store_si512(sums + t * kRows, sum[0][t]);
  }
}

// Dense: four codes of a token, repeated in all lanes by the load. sums[panel][kTokens][row].
template <int Tokens>
__attribute__((noinline)) void add_up_dense(const uint8_t* panel, size_t panel_bytes, const uint8_t* x, size_t stride,
                                            int depth, const int32_t* starts, int32_t* sums) {
  __m512i sum[kDensePanels][Tokens];
#pragma GCC unroll 2
  for (int p = 0; p < kDensePanels; ++p) {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) sum[p][t] = _mm512_loadu_si512(starts + p * kRows);
  }
  for (int k = 0; k < depth; k += 4, panel += kRegister) {
    __m512i weights[kDensePanels];
#pragma GCC unroll 2
    for (int p = 0; p < kDensePanels; ++p) weights[p] = _mm512_load_si512(panel + p * panel_bytes);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      int four;
      __builtin_memcpy(&four, x + t * stride + k, sizeof four);
      const __m512i token = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int p = 0; p < kDensePanels; ++p) sum[p][t] = _mm512_dpbusd_epi32(sum[p][t], token, weights[p]);
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < kDensePanels; ++p) {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) _mm512_store_si512(sums + (p * kTokens + t) * kRows, sum[p][t]);
  }
}

// The kernel that is as wide as there are tokens, 1 to 8.
template <int Tokens = kTokens>
SPARSE_ENGINE_INLINE void add_up(const ProductInt8& product, int row, const uint8_t* x, size_t stride, int tokens,
                                 int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return add_up<Tokens - 1>(product, row, x, stride, tokens, sums);
  }
  const size_t panel_bytes = panel_bytes_of(product.depth, product.dense);
  const uint8_t* const panel = static_cast<const uint8_t*>(product.packed) + row / kRows * panel_bytes;
  if (product.dense) {
    add_up_dense<Tokens>(panel, panel_bytes, x, stride, product.depth, product.starts + row, sums);
  } else {
    add_up_sparse<Tokens>(panel, x, stride, product.depth, product.starts + row, sums);
  }
}

// What a store needs beside the sums, kept out of memory that the stores might alias.
template <Element E>
struct Output {
  static constexpr Operand kFit = E == Element::kFloat32 ? Operand::kFloat32 : Operand::kBfloat16;

  explicit Output(const ProductInt8& product)
      : data(product.output), to_codes(product.epilogue.codes) {}

  SPARSE_ENGINE_INLINE void store(size_t index, __m512 y, int count) const {
    const __mmask16 there = V::first(count);
    if constexpr (E == Element::kFloat32) {
      _mm512_mask_storeu_ps(static_cast<float*>(data) + index, there, y);
    } else if constexpr (E == Element::kBfloat16) {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + index, there, to_bfloat16(y));
    } else {
      _mm_mask_storeu_epi8(static_cast<uint8_t*>(data) + index, there, to_codes(y));
    }
  }

  void* data;
  CodesOf to_codes;
};

template <Activation A, Element E>
SPARSE_ENGINE_INLINE void finish(const ProductInt8& product, size_t token, int tokens, int row, int count,
                                 const int32_t* sums) {
  const Output<E> output(product);
  const __m512 scales = V::load_unaligned(product.scales + row);
  const __m512 bias = product.epilogue.bias ? V::load_first(product.epilogue.bias + row, count) : V::zero();
  const float* const residual = product.epilogue.residual;
  size_t index = token * product.rows + row;
  const size_t stride = product.rows;
  for (int t = 0; t < tokens; ++t, index += stride) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + t * kRows));
    __m512 y = activate<V, Output<E>::kFit, A>(V::multiply_add(sum, scales, bias));
    if (residual) y = y + V::load_first(residual + index, count);
    output.store(index, y, count);
  }
}

template <Activation A, Element E>
__attribute__((noinline)) void run_rows(const ProductInt8& product, const uint8_t* x, size_t stride, size_t first,
                                        size_t tokens, int row_begin, int row_end) {
  alignas(64) int32_t sums[kDensePanels * kTokens * kRows];
  const int panels = product.dense ? kDensePanels : 1;
  const size_t octets = (tokens + kTokens - 1) / kTokens;
  for (int row = row_begin; row < row_end; row += panels * kRows) {
    for (size_t i = 0; i < octets; ++i) {
      const size_t begin = tokens * i / octets;  // near equal: a single token would not fill the pipeline
      const int count = int(tokens * (i + 1) / octets - begin);
      add_up(product, row, x + begin * stride, stride, count, sums);
      for (int p = 0; p < panels; ++p) {
        const int left = row_end - row - p * kRows;
        if (left <= 0) break;
        finish<A, E>(product, first + begin, count, row + p * kRows, left < kRows ? left : kRows,
                     sums + p * kTokens * kRows);
      }
    }
  }
}

void run(const ProductInt8& product, const uint8_t* x, size_t stride, size_t first, size_t tokens, int row_begin,
         int row_end) {
  with_activation(product.epilogue.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    const auto run_element = product.epilogue.element == Element::kFloat32 ? run_rows<kActivation, Element::kFloat32>
                             : product.epilogue.element == Element::kBfloat16
                                 ? run_rows<kActivation, Element::kBfloat16>
                                 : run_rows<kActivation, Element::kCode>;
    run_element(product, x, stride, first, tokens, row_begin, row_end);
  });
}

// The sum over a token of function(sixteen of its numbers, how many), in four parts.
template <class Function>
SPARSE_ENGINE_INLINE float sum_over(const float* x, int depth, const Function& function) {
  __m512 parts[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int k = 0;
  for (; k + 4 * V::kLanes <= depth; k += 4 * V::kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      parts[i] = parts[i] + function(V::load_unaligned(x + k + i * V::kLanes), __mmask16(0xffff));
    }
  }
  for (; k < depth; k += V::kLanes) {
    const int count = depth - k < V::kLanes ? depth - k : V::kLanes;
    parts[0] = parts[0] + function(V::load_first(x + k, count), V::first(count));
  }
  return _mm512_reduce_add_ps((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// Codes of change(numbers, where they stand, how many of them).
template <class Change>
SPARSE_ENGINE_INLINE void write_codes(const float* x, int depth, Codes codes, uint8_t* out, const Change& change) {
  const CodesOf to_codes(codes);
  for (int k = 0; k < depth; k += V::kLanes) {
    const int count = depth - k < V::kLanes ? depth - k : V::kLanes;
    const __m512 y = change(V::load_first(x + k, count), k, count);
    _mm_mask_storeu_epi8(out + k, V::first(count), to_codes(y));
  }
}

void quantise(const float* x, size_t stride, size_t tokens, int depth, const LayerNorm* norm, Codes codes, uint8_t* out,
              size_t out_stride) {
  for (size_t token = 0; token < tokens; ++token, x += stride, out += out_stride) {
    if (!norm) {
      write_codes(x, depth, codes, out, [](__m512 y, int, int) { return y; });
      continue;
    }
    const float mean = sum_over(x, depth, [](__m512 y, __mmask16) { return y; }) / float(depth);
    const __m512 middle = V::set(mean);
    const float squares = sum_over(x, depth, [&](__m512 y, __mmask16 there) {
      const __m512 distance = _mm512_maskz_sub_ps(there, y, middle);
      return distance * distance;
    });
    const __m512 slope = V::set(1.0f / __builtin_sqrtf(squares / float(depth) + norm->epsilon));
    const float* const gamma = norm->gamma;
    const float* const beta = norm->beta;
    write_codes(x, depth, codes, out, [&](__m512 y, int k, int count) {
      y = (y - middle) * slope;
      if (gamma) y = y * V::load_first(gamma + k, count);
      return beta ? y + V::load_first(beta + k, count) : y;
    });
  }
}

struct PeakFormat {
  using V = Avx512;
  static SPARSE_ENGINE_INLINE __m512 multiply_add(__m512 sum, __m512 weight, __m512 x) {
    return (__m512)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
  }
};

}  // namespace

constexpr TacticInt8 kAvx512VnniInt8 = {Tier::kAvx512Vnni, kDensePanels * kRows, packed_bytes, pack, quantise, run};
constexpr PeakLoop kAvx512VnniPeak = peak_loop<PeakFormat>(4);

}  // namespace sparse_engine
