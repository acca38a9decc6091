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
#include "layer_norm_avx512.h"
#include "peak.h"
#include "vector_avx512.h"
#include "vnni_avx512.h"

namespace sparse_engine {
namespace {

using V = Avx512;

constexpr int kRows = V::kLanes;
constexpr int kTokens = 8;       // whose sums are in registers
constexpr int kRegister = 64;    // k of a token in one
constexpr int kSteps = 8;        // of a register
constexpr int kStepBytes = 128;  // indices, then weights
constexpr int kDensePanels = 2;  // of a dense product, whose sums are in registers together
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
    add_products(sum[Chain][t], _mm512_permutexvar_epi8(indices, x[t]), weights);
  }
}

// Calls finish(panel, token, sums of its sixteen rows) for each token of one panel.
template <int Tokens, class Finish>
SPARSE_ENGINE_INLINE void add_up_sparse(const uint8_t* panel, const uint8_t* x, size_t stride, int depth,
                                        const int32_t* starts, const Finish& finish) {
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
    finish(0, t, sum[0][t]);
  }
}

// The same of kDensePanels of dense weights: four codes of a token are repeated in all lanes by the load.
template <int Tokens, class Finish>
SPARSE_ENGINE_INLINE void add_up_dense(const uint8_t* panel, const uint8_t* x, size_t stride, int depth,
                                       const int32_t* starts, const Finish& finish) {
  const size_t panel_bytes = panel_bytes_of(depth, true);
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
      float four;  // as a float, or it would be loaded into a general register first
      __builtin_memcpy(&four, x + t * stride + k, sizeof four);
      const __m512i token = _mm512_castps_si512(V::set(four));
#pragma GCC unroll 2
      for (int p = 0; p < kDensePanels; ++p) add_products(sum[p][t], token, weights[p]);
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < kDensePanels; ++p) {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) finish(p, t, sum[p][t]);
  }
}

// The kernel that is as wide as there are tokens, 1 to 7, into sums[panel][kTokens][row].
template <bool Dense, int Tokens = kTokens - 1>
__attribute__((noinline)) void add_up_few(const uint8_t* panel, const uint8_t* x, size_t stride, int depth,
                                          const int32_t* starts, int tokens, int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return add_up_few<Dense, Tokens - 1>(panel, x, stride, depth, starts, tokens, sums);
  }
  const auto store = [=](int p, int t, __m512i sum)
                         __attribute__((always_inline)) { _mm512_store_si512(sums + (p * kTokens + t) * kRows, sum); };
  if constexpr (Dense) {
    add_up_dense<Tokens>(panel, x, stride, depth, starts, store);
  } else {
    add_up_sparse<Tokens>(panel, x, stride, depth, starts, store);
  }
}

// What an element becomes: an Element, where fine codes are those whose step is not far above the error of a GELU that
// is fitted for codes.
enum class Form { kFloat32, kBfloat16, kCode, kFineCode };
constexpr float kFinestStep = 1e-3f;

Form form_of(const EpilogueInt8& epilogue) {
  if (epilogue.element == Element::kFloat32) return Form::kFloat32;
  if (epilogue.element == Element::kBfloat16) return Form::kBfloat16;
  return epilogue.codes.scale < kFinestStep ? Form::kFineCode : Form::kCode;
}

// One panel's part of a product: what its sums become, and where they go.
template <Activation A, Form F>
class Finish {
 public:
  SPARSE_ENGINE_INLINE Finish(const ProductInt8& product, size_t token, int row, int count)
      : scales_(V::load_unaligned(product.scales + row)),
        bias_(product.epilogue.bias ? V::load_first(product.epilogue.bias + row, count) : V::zero()),
        to_codes_(product.epilogue.codes),
        residual_(product.epilogue.residual),
        output_(product.output),
        stride_(product.rows),
        first_(token * stride_ + row),
        whole_(count == kRows),
        there_(V::first(count)) {}

  SPARSE_ENGINE_INLINE void operator()(int token, __m512i sum) const {
    const size_t index = first_ + token * stride_;
    __m512 y = activate_sum(V::multiply_add(_mm512_cvtepi32_ps(sum), scales_, bias_));
    if (residual_) y = y + _mm512_maskz_loadu_ps(there_, residual_ + index);
    if constexpr (F == Form::kFloat32) {
      float* const out = static_cast<float*>(output_) + index;
      whole_ ? _mm512_storeu_ps(out, y) : _mm512_mask_storeu_ps(out, there_, y);
    } else if constexpr (F == Form::kBfloat16) {
      uint16_t* const out = static_cast<uint16_t*>(output_) + index;
      const __m256i halves = to_bfloat16(y);
      whole_ ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves)
             : _mm256_mask_storeu_epi16(out, there_, halves);
    } else {
      uint8_t* const out = static_cast<uint8_t*>(output_) + index;
      const __m128i codes = to_codes_(y);
      whole_ ? _mm_storeu_si128(reinterpret_cast<__m128i*>(out), codes) : _mm_mask_storeu_epi8(out, there_, codes);
    }
  }

 private:
  static SPARSE_ENGINE_INLINE __m512 activate_sum(__m512 x) {
    if constexpr (A == Activation::kGelu && F == Form::kCode) return coarse_gelu<V>(x);
    constexpr bool kCoarse = F == Form::kBfloat16 || F == Form::kCode;
    return activate<V, kCoarse ? Operand::kBfloat16 : Operand::kFloat32, A>(x);
  }

  __m512 scales_, bias_;
  CodesOf to_codes_;
  const float* residual_;
  void* output_;
  size_t stride_, first_;
  bool whole_;
  __mmask16 there_;
};

// Part `i` of `parts` of the next panel, on its way to L1 where two of them fit there, else to L2. The weights of a
// network are more than the caches hold, and a panel is used by one octet of tokens after the other.
SPARSE_ENGINE_INLINE void fetch_ahead(const uint8_t* panel, size_t bytes, size_t i, size_t parts) {
  constexpr size_t kSmall = 16 * 1024;
  const uint8_t* const end = panel + bytes * (i + 1) / parts;
  for (const uint8_t* line = panel + bytes * i / parts; line < end; line += 64) {
    bytes <= kSmall ? _mm_prefetch(line, _MM_HINT_T0) : _mm_prefetch(line, _MM_HINT_T1);
  }
}

// What an octet of tokens will read and write beside the next panel: one line of a row each, too far apart for the
// hardware to see that they follow one another.
template <Form F>
SPARSE_ENGINE_INLINE void fetch_rows(const ProductInt8& product, size_t token, int tokens, int row) {
  constexpr size_t kBytes = F == Form::kFloat32 ? 4 : F == Form::kBfloat16 ? 2 : 1;
  const size_t stride = product.rows;
  for (int t = 0; t < tokens; ++t) {
    const size_t index = (token + t) * stride + row;
    if (product.epilogue.residual) _mm_prefetch(product.epilogue.residual + index, _MM_HINT_T0);
    __builtin_prefetch(static_cast<const char*>(product.output) + index * kBytes, 1, 3);
  }
}

template <Activation A, Form F, bool Dense>
__attribute__((noinline)) void run_rows(const ProductInt8& product, const uint8_t* x, size_t stride, size_t first,
                                        size_t tokens, int row_begin, int row_end) {
  constexpr int kPanels = Dense ? kDensePanels : 1;
  const int depth = product.depth;
  const size_t octets = (tokens + kTokens - 1) / kTokens;
  for (int row = row_begin; row < row_end; row += kPanels * kRows) {
    const uint8_t* const panel =
        static_cast<const uint8_t*>(product.packed) + row / kRows * panel_bytes_of(depth, Dense);
    const int32_t* const starts = product.starts + row;
    const int panels = row_end - row > kRows ? kPanels : 1;  // the second may be missing
    const size_t panel_bytes = kPanels * panel_bytes_of(depth, Dense);
    const bool more = row + kPanels * kRows < row_end;
    for (size_t i = 0; i < octets; ++i) {
      if (more) fetch_ahead(panel + panel_bytes, panel_bytes, i, octets);
      const size_t begin = tokens * i / octets;  // near equal: a single token would not fill the pipeline
      const int count = int(tokens * (i + 1) / octets - begin);
      const uint8_t* const codes = x + begin * stride;
      if (more) fetch_rows<F>(product, first + begin, count, row + kPanels * kRows);
      const auto finish_of = [&](int p) __attribute__((always_inline)) {
        const int left = row_end - row - p * kRows;
        return Finish<A, F>(product, first + begin, row + p * kRows, left < kRows ? left : kRows);
      };
      if (!Dense && count == kTokens) {
        const auto finish = finish_of(0);
        add_up_sparse<kTokens>(panel, codes, stride, depth, starts,
                               [&](int, int t, __m512i sum) __attribute__((always_inline)) { finish(t, sum); });
        continue;
      }
      alignas(64) int32_t sums[kPanels * kTokens * kRows];
      if (count == kTokens) {
        add_up_dense<kTokens>(panel, codes, stride, depth, starts,
                              [&](int p, int t, __m512i sum) __attribute__((always_inline)) {
                                _mm512_store_si512(sums + (p * kTokens + t) * kRows, sum);
                              });
      } else {
        add_up_few<Dense>(panel, codes, stride, depth, starts, count, sums);
      }
      for (int p = 0; p < panels; ++p) {
        const auto finish = finish_of(p);
        for (int t = 0; t < count; ++t) finish(t, _mm512_load_si512(sums + (p * kTokens + t) * kRows));
      }
    }
  }
}

template <Activation A, bool Dense>
SPARSE_ENGINE_INLINE auto rows_of(Form form) {
  switch (form) {
    case Form::kFloat32:
      return run_rows<A, Form::kFloat32, Dense>;
    case Form::kBfloat16:
      return run_rows<A, Form::kBfloat16, Dense>;
    case Form::kCode:
      return run_rows<A, Form::kCode, Dense>;
    case Form::kFineCode:
      break;
  }
  return run_rows<A, Form::kFineCode, Dense>;
}

void run(const ProductInt8& product, const uint8_t* x, size_t stride, size_t first, size_t tokens, int row_begin,
         int row_end) {
  with_activation(product.epilogue.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    const Form form = form_of(product.epilogue);
    const auto run_form = product.dense ? rows_of<kActivation, true>(form) : rows_of<kActivation, false>(form);
    run_form(product, x, stride, first, tokens, row_begin, row_end);
  });
}

// Codes of change(numbers, where they stand, how to load what stands there elsewhere).
template <class Change>
SPARSE_ENGINE_INLINE void write_codes(const float* x, int depth, const CodesOf& to_codes, uint8_t* out,
                                      const Change& change) {
  const auto all = [](const float* p) __attribute__((always_inline)) { return V::load_unaligned(p); };
  int k = 0;
  for (; k + kRegister <= depth; k += kRegister) {
    __m512 y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[i] = change(all(x + k + i * V::kLanes), k + i * V::kLanes, all);
    _mm512_storeu_si512(out + k, to_codes(y));
  }
  for (; k < depth; k += V::kLanes) {
    const __mmask16 there = V::first(depth - k < V::kLanes ? depth - k : V::kLanes);
    const auto some = [=](const float* p) __attribute__((always_inline)) { return _mm512_maskz_loadu_ps(there, p); };
    _mm_mask_storeu_epi8(out + k, there, to_codes(change(some(x + k), k, some)));
  }
}

void quantise(const float* x, size_t stride, size_t tokens, int depth, const LayerNorm* norm, Codes codes, uint8_t* out,
              size_t out_stride) {
  constexpr size_t kTogether = 4;  // tokens whose sums, which wait for one another, are taken together
  const CodesOf to_codes(codes);
  for (size_t token = 0; token < tokens; token += kTogether) {
    const size_t count = tokens - token < kTogether ? tokens - token : kTogether;
    Moments moments[kTogether];
    for (size_t i = 0; norm && i < count; ++i) moments[i] = Moments(x + (token + i) * stride, depth, norm->epsilon);
    for (size_t i = 0; i < count; ++i) {
      const float* const numbers = x + (token + i) * stride;
      uint8_t* const written = out + (token + i) * out_stride;
      if (!norm) {
        write_codes(numbers, depth, to_codes, written, [](__m512 y, int, auto) { return y; });
        continue;
      }
      const __m512 middle = V::set(moments[i].mean), slope = V::set(moments[i].slope);
      const float* const gamma = norm->gamma;
      const float* const beta = norm->beta;
      if (gamma && beta) {
        write_codes(numbers, depth, to_codes, written, [=](__m512 y, int k, auto load) {
          return V::multiply_add((y - middle) * slope, load(gamma + k), load(beta + k));
        });
        continue;
      }
      write_codes(numbers, depth, to_codes, written, [=](__m512 y, int k, auto load) {
        y = (y - middle) * slope;
        if (gamma) y = y * load(gamma + k);
        return beta ? y + load(beta + k) : y;
      });
    }
  }
}

struct PeakFormat {
  using V = Avx512;
  static SPARSE_ENGINE_INLINE __m512 multiply_add(__m512 sum, __m512 weight, __m512 x) {
    return (__m512)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
  }
};

}  // namespace

constexpr TacticInt8 kAvx512VnniInt8 = {Tier::kAvx512Vnni, kDensePanels* kRows, packed_bytes, pack, quantise, run};
constexpr PeakLoop kAvx512VnniPeak = peak_loop<PeakFormat>(4);

}  // namespace sparse_engine
