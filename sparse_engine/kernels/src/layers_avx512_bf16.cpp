// AVX512-BF16, products in R-lanes with all that surrounds them: a register holds 32 k of a token, as they lie in
// memory, and sixteen output rows lie in the lanes.
//
//     one token, rounded:             | x0 x1 x2 x3 x4 x5 ... x31 |
//     what rows n, n + 1, ... keep:   | 0 3 | 1 2 | 0 1 | ...         indices, 64 bytes
//     chosen by one vpermw:           | x0 x3 | x1 x2 | x0 x1 | ...
//     vdpbf16ps with their weights:   sum of row n | sum of row n + 1 | ...
//
// Two panels of sixteen rows and eight tokens are sixteen sums in registers, as many as the latency of vdpbf16ps wants;
// the tokens' registers stay put for the eight steps of 32 k. Each sum is taken in the order of k, alone: it does not
// depend on how many tokens there are.
//
// Bound: a Zen 5 permutes on two of its four ports and multiplies on two, one of which is the same: 32 instructions of
// a step in 10.7 cycles, 1.5 times the dense peak: 744 Gop/s a core, of which the loop alone, weights out of L2, does
// 96 %. Dense weights take no permutation: a pair of k of a token is put into all lanes by the load, which is free.
#include "epilogue.h"
#include "layer_norm_avx512.h"
#include "layers_bf16.h"
#include "packing.h"
#include "vector_avx512.h"

namespace sparse_engine {
namespace {

using V = Avx512;

constexpr int kTokens = 8;  // whose sums are in registers
constexpr int kPanels = 2;
constexpr int kRows = V::kLanes * kPanels;
constexpr int kRegister = 32;     // k of a token in one
constexpr int kLine = 64;         // bytes
constexpr int kGroupBytes = 256;  // of a pair of panels
// k that a visit of an octet takes: 16 KiB of weights, which stay in L1 for all the tokens of a block.
constexpr int kBlockDepth = 256;
static_assert(kRows == kRegisterPanelRows, "packing lays two panels side by side");

SPARSE_ENGINE_INLINE __m512 add_pairs(__m512 sum, __m512i weights, __m512i x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
}

template <int Tokens>
SPARSE_ENGINE_INLINE void add_group(__m512 (&sum)[kPanels][Tokens], const __m512i (&x)[Tokens], const uint8_t* group) {
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; ++p) {
    const __m512i indices = _mm512_load_si512(group + 2 * p * kLine);
    const __m512i weights = _mm512_load_si512(group + (2 * p + 1) * kLine);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      sum[p][t] = add_pairs(sum[p][t], weights, _mm512_permutexvar_epi16(indices, x[t]));
    }
  }
}

// Lines that are fetched into L2 meanwhile: the weights of a network are more than the caches hold. A few at a time,
// for all at once would keep what the loop itself misses in L1 waiting.
struct Ahead {
  const uint8_t* line;
  size_t lines;  // a register of k

  SPARSE_ENGINE_INLINE void fetch() {
    for (size_t i = 0; i < lines; ++i, line += kLine) _mm_prefetch(line, _MM_HINT_T1);
  }
};

template <int Tokens>
SPARSE_ENGINE_INLINE void add_up_sparse(__m512 (&sum)[kPanels][Tokens], const uint8_t* group, const uint8_t* x,
                                        size_t stride, int depth, Ahead ahead) {
  constexpr int kSteps = kRegister / 4;
  __m512i token[Tokens];
  int k = 0;
  for (; k + kRegister <= depth; k += kRegister, group += kSteps * kGroupBytes) {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) token[t] = _mm512_loadu_si512(x + t * stride + k * 2);
    ahead.fetch();
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) add_group<Tokens>(sum, token, group + s * kGroupBytes);
  }
  if (k == depth) return;
  const __mmask32 there = (__mmask32(1) << (depth - k)) - 1;
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) token[t] = _mm512_maskz_loadu_epi16(there, x + t * stride + k * 2);
  for (; k < depth; k += 4, group += kGroupBytes) add_group<Tokens>(sum, token, group);
}

template <int Tokens>
SPARSE_ENGINE_INLINE void add_up_dense(__m512 (&sum)[kPanels][Tokens], const uint8_t* step, const uint8_t* x,
                                       size_t stride, int depth, Ahead ahead) {
  for (int k = 0; k < depth; k += 2, step += kPanels * kLine) {
    if (k % kRegister == 0) ahead.fetch();
    const __m512i weights[kPanels] = {_mm512_load_si512(step), _mm512_load_si512(step + kLine)};
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      int pair;
      __builtin_memcpy(&pair, x + t * stride + k * 2, sizeof pair);
      const __m512i all = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) sum[p][t] = add_pairs(sum[p][t], weights[p], all);
    }
  }
}

// Adds the products of a block of the depth to the sums of some tokens and two panels, [token][kRows]; or begins them.
template <bool Dense, int Tokens = kTokens>
__attribute__((noinline)) void add_up(const uint8_t* panels, const uint8_t* x, size_t stride, int depth, int tokens,
                                      bool first, Ahead ahead, float* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return add_up<Dense, Tokens - 1>(panels, x, stride, depth, tokens, first, ahead, sums);
  }
  __m512 sum[kPanels][Tokens];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) sum[p][t] = first ? V::zero() : V::load(sums + t * kRows + p * V::kLanes);
  }
  Dense ? add_up_dense<Tokens>(sum, panels, x, stride, depth, ahead)
        : add_up_sparse<Tokens>(sum, panels, x, stride, depth, ahead);
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) V::store(sums + t * kRows + p * V::kLanes, sum[p][t]);
  }
}

template <Activation A, bool Halves>
SPARSE_ENGINE_INLINE __m512 activate_sum(__m512 x) {
  if constexpr (A == Activation::kGelu && Halves) return coarse_gelu<V>(x);
  return activate<V, Operand::kBfloat16, A>(x);
}

// What the sums of some tokens and up to kRows rows become, and where they go.
template <Activation A, bool Halves>
SPARSE_ENGINE_INLINE void finish(const ProductBf16& product, const float* sums, size_t first, int tokens, int row,
                                 int rows) {
  const __mmask16 there[kPanels] = {V::first(rows < V::kLanes ? rows : V::kLanes),
                                    V::first(rows < V::kLanes ? 0 : rows - V::kLanes)};
  const float* const residual = product.epilogue.residual;
  void* const output = product.output;
  const size_t stride = product.rows;
  __m512 bias[kPanels];
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; ++p) {
    const float* const from = product.epilogue.bias;
    bias[p] = from ? _mm512_maskz_loadu_ps(there[p], from + row + p * V::kLanes) : V::zero();
  }
  for (int t = 0; t < tokens; ++t, sums += kRows) {
    const size_t index = (first + t) * stride + row;
    __m512 y[kPanels];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      y[p] = activate_sum<A, Halves>(V::load(sums + p * V::kLanes) + bias[p]);
      if (residual) y[p] = y[p] + _mm512_maskz_loadu_ps(there[p], residual + index + p * V::kLanes);
    }
    if constexpr (Halves) {
      const __mmask32 both = there[0] | __mmask32(there[1]) << 16;
      _mm512_mask_storeu_epi16(static_cast<uint16_t*>(output) + index, both, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
    } else {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        _mm512_mask_storeu_ps(static_cast<float*>(output) + index + p * V::kLanes, there[p], y[p]);
      }
    }
  }
}

// The lines that some tokens will read and write beside the next rows: too far apart for the hardware to see that they
// follow one another.
template <bool Halves>
SPARSE_ENGINE_INLINE void fetch_rows(const ProductBf16& product, size_t token, int tokens, int row) {
  const float* const residual = product.epilogue.residual;
  const size_t stride = product.rows;
  for (int t = 0; t < tokens; ++t) {
    const size_t index = (token + t) * stride + row;
    if (residual) {
      _mm_prefetch(residual + index, _MM_HINT_T0);
      _mm_prefetch(residual + index + V::kLanes, _MM_HINT_T0);
    }
    if constexpr (Halves) {
      __builtin_prefetch(static_cast<const uint16_t*>(product.output) + index, 1, 3);
    } else {
      __builtin_prefetch(static_cast<const float*>(product.output) + index, 1, 3);
      __builtin_prefetch(static_cast<const float*>(product.output) + index + V::kLanes, 1, 3);
    }
  }
}

template <Activation A, bool Halves, bool Dense>
__attribute__((noinline)) void run_rows(const ProductBf16& product, const uint8_t* x, size_t stride, size_t first,
                                        size_t tokens, int row_begin, int row_end) {
  alignas(64) float sums[kMostTokensBf16 * kRows];
  const int depth = product.depth;
  const size_t panel_bytes = size_t(depth) / 4 * kGroupBytes, octets = (tokens + kTokens - 1) / kTokens;
  const size_t blocks = size_t(depth + kBlockDepth - 1) / kBlockDepth, visits = octets * blocks;  // of a panel
  // Lines of a register of k, so that all visits together fetch a pair of panels; short blocks fetch a little less.
  const size_t registers = visits * (size_t(depth < kBlockDepth ? depth : kBlockDepth) + kRegister - 1) / kRegister;
  const size_t lines = (panel_bytes / kLine + registers - 1) / registers;
  for (int row = row_begin; row < row_end; row += kRows) {
    const uint8_t* const panels = static_cast<const uint8_t*>(product.packed) + row / kRows * panel_bytes;
    const bool more = row + kRows < row_end;
    const uint8_t* const next = more ? panels + panel_bytes : static_cast<const uint8_t*>(product.next);
    const int left = row_end - row;
    size_t visit = 0;
    for (int k = 0; k < depth; k += kBlockDepth) {
      const bool last = depth - k <= kBlockDepth;
      const uint8_t* const block = panels + size_t(k) / 4 * kGroupBytes;
      for (size_t i = 0; i < octets; ++i, ++visit) {
        const size_t begin = tokens * i / octets;  // near equal: few tokens would not fill the pipeline
        const int count = int(tokens * (i + 1) / octets - begin);
        if (more && last) fetch_rows<Halves>(product, first + begin, count, row + kRows);
        const Ahead ahead = {next + panel_bytes / kLine * visit / visits * kLine, next ? lines : 0};
        float* const octet = sums + begin * kRows;
        add_up<Dense>(block, x + begin * stride + 2 * size_t(k), stride, last ? depth - k : kBlockDepth, count, k == 0,
                      ahead, octet);
        if (last) finish<A, Halves>(product, octet, first + begin, count, row, left < kRows ? left : kRows);
      }
    }
  }
}

void run(const ProductBf16& product, const uint8_t* x, size_t stride, size_t first, size_t tokens, int row_begin,
         int row_end) {
  with_activation(product.epilogue.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    const bool halves = product.epilogue.element == Element::kBfloat16;
    const auto run_form =
        halves ? (product.dense ? run_rows<kActivation, true, true> : run_rows<kActivation, true, false>)
               : (product.dense ? run_rows<kActivation, false, true> : run_rows<kActivation, false, false>);
    run_form(product, x, stride, first, tokens, row_begin, row_end);
  });
}

// Writes change(numbers, where they stand, how to load what stands there elsewhere), rounded.
template <class Change>
SPARSE_ENGINE_INLINE void write_rounded(const float* x, int depth, uint8_t* out, const Change& change) {
  const auto all = [](const float* p) __attribute__((always_inline)) { return V::load_unaligned(p); };
  int k = 0;
  for (; k + kRegister <= depth; k += kRegister) {
    const __m512 low = change(all(x + k), k, all), high = change(all(x + k + V::kLanes), k + V::kLanes, all);
    _mm512_storeu_si512(out + 2 * k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  for (; k < depth; k += V::kLanes) {
    const __mmask16 there = V::first(depth - k < V::kLanes ? depth - k : V::kLanes);
    const auto some = [=](const float* p) __attribute__((always_inline)) { return _mm512_maskz_loadu_ps(there, p); };
    _mm256_mask_storeu_epi16(out + 2 * k, there, (__m256i)_mm512_cvtneps_pbh(change(some(x + k), k, some)));
  }
}

void round_tokens(const float* x, size_t stride, size_t tokens, int depth, const LayerNorm* norm, uint8_t* out,
                  size_t out_stride) {
  constexpr size_t kTogether = 4;  // tokens whose sums, which wait for one another, are taken together
  for (size_t token = 0; token < tokens; token += kTogether) {
    const size_t count = tokens - token < kTogether ? tokens - token : kTogether;
    Moments moments[kTogether];
    for (size_t i = 0; norm && i < count; ++i) moments[i] = Moments(x + (token + i) * stride, depth, norm->epsilon);
    for (size_t i = 0; i < count; ++i) {
      const float* const numbers = x + (token + i) * stride;
      uint8_t* const written = out + (token + i) * out_stride;
      if (!norm) {
        write_rounded(numbers, depth, written, [](__m512 y, int, auto) { return y; });
        continue;
      }
      const __m512 middle = V::set(moments[i].mean), slope = V::set(moments[i].slope);
      const float* const gamma = norm->gamma;
      const float* const beta = norm->beta;
      write_rounded(numbers, depth, written, [=](__m512 y, int k, auto load) {
        y = (y - middle) * slope;
        if (gamma) y = y * load(gamma + k);
        return beta ? y + load(beta + k) : y;
      });
    }
  }
}

}  // namespace

constexpr TacticBf16 kAvx512Bf16Layers = {Tier::kAvx512Bf16, kRows, round_tokens, run};

}  // namespace sparse_engine
