// What happens to a vector of sums before it is stored: bias, activation, residual.
//
// Bound: about twenty arithmetic instructions per vector for a GELU, against depth / 2 multiply-adds for the
// sum itself. Included by instruction-set files only (see vector_avx512.h); V is Avx2 or Avx512.
#pragma once

#include "exponential.h"
#include "matmul24.h"
#include "packing.h"

namespace sparse_engine {
namespace {

// What a GELU is fitted with: as exact as the products that it follows, and no more.
template <Operand>
struct GeluFit;
template <>
struct GeluFit<Operand::kFloat32> {  // 6e-8
  static constexpr float kSlope = 0.296984848f;
  static constexpr float kCoefficients[] = {0.118375801f,   0.120310836f, 0.0943258777f, 0.143874809f,
                                            -0.0824316666f, 0.238284811f, -0.170208141f, 0.0374676436f};
  static constexpr int kTerms = 8, kExp2Degree = 5;
  static constexpr bool kRefine = true;
};
template <>
struct GeluFit<Operand::kBfloat16> {  // 1.2e-4 with the reciprocal's and the exponential's
  static constexpr float kSlope = 0.25f;
  static constexpr float kCoefficients[] = {0.10177427f, 0.07722369f, 0.18941041f, -0.11425978f, 0.24586322f};
  static constexpr int kTerms = 5, kExp2Degree = 3;
  static constexpr bool kRefine = false;
};
template <>
struct GeluFit<Operand::kDenseBfloat16> : GeluFit<Operand::kBfloat16> {};

// x Phi(x), where Phi(-|x|) = e^(-x^2/2) P(t), t = 1 / (1 + c |x|). P is a weighted minimax fit to
// erfcx(|x| / sqrt 2) / 2 over |x| < 9.9, made for this file, in relative error, so the far negative tail keeps
// its digits, which a fit of erf would cancel away.
template <class V, Operand O>
SPARSE_ENGINE_INLINE typename V::Vector gelu(typename V::Vector x) {
  using Fit = GeluFit<O>;
  const auto t = V::template reciprocal<Fit::kRefine>(V::multiply_add(V::abs(x), V::set(Fit::kSlope), V::set(1.0f)));
  auto p = V::set(Fit::kCoefficients[Fit::kTerms - 1]);
#pragma GCC unroll 8
  for (int i = Fit::kTerms - 2; i >= 0; --i) p = V::multiply_add(p, t, V::set(Fit::kCoefficients[i]));
  const auto tail = p * t * exp2_negative<V, Fit::kExp2Degree>(x * x * V::set(-0.5f * 1.44269504f));
  return x * V::select_negative(x, tail, V::set(1.0f) - tail);
}

// x Phi(x) within 2e-4, for what is then rounded to fewer bits: Phi(x) = 1/2 + x P(x^2), |x| clamped to 4, where P is a
// minimax fit with Phi(4) = 1.
template <class V>
SPARSE_ENGINE_INLINE typename V::Vector coarse_gelu(typename V::Vector x) {
  constexpr float kCoefficients[] = {0.397870272f,    -0.0645544156f,   0.00876369141f, -0.0008121875f,
                                     4.77638896e-05f, -1.58882722e-06f, 2.25882089e-08f};
  const auto near = V::min(V::max(x, V::set(-4.0f)), V::set(4.0f));
  const auto square = near * near;
  auto p = V::set(kCoefficients[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) p = V::multiply_add(p, square, V::set(kCoefficients[i]));
  return x * V::multiply_add(p, near, V::set(0.5f));
}

// x / (1 + e^(-u)): SiLU with u = x; the tanh form of GELU with u = 2 sqrt(2/pi) (x + 0.044715 x^3).
template <class V>
SPARSE_ENGINE_INLINE typename V::Vector times_sigmoid(typename V::Vector x, typename V::Vector u) {
  return x / (V::set(1.0f) + exponential<V>(V::zero() - u));
}

template <class V, Operand O, Activation A>
SPARSE_ENGINE_INLINE typename V::Vector activate(typename V::Vector x) {
  if constexpr (A == Activation::kGelu) return gelu<V, O>(x);
  if constexpr (A == Activation::kSilu) return times_sigmoid<V>(x, x);
  if constexpr (A == Activation::kGeluTanh) {
    const auto slope = V::multiply_add(x * x, V::set(0.0713548163f), V::set(1.59576912f));
    return times_sigmoid<V>(x, x * slope);
  }
  return x;
}

// Stores `count` sums of adjacent rows of one token. `index` is the first one's place in the output.
template <class V, Operand O, Activation A>
SPARSE_ENGINE_INLINE void store_rows(const Product& product, size_t index, typename V::Vector sums,
                                     typename V::Vector bias, int count) {
  auto y = activate<V, O, A>(sums + bias);
  const float* const residual = product.epilogue.residual;
  if (residual) y = y + V::load_first(residual + index, count);
  V::store_first(product.output + index, y, count);
}

template <class V>
SPARSE_ENGINE_INLINE typename V::Vector load_bias(const Product& product, int row, int count) {
  const float* const bias = product.epilogue.bias;
  return bias ? V::load_first(bias + row, count) : V::zero();
}

template <Activation A>
struct ActivationConstant {
  static constexpr Activation value = A;
};

// Calls function(ActivationConstant<activation>{}): the choice is made once, outside the loops.
template <class Function>
SPARSE_ENGINE_INLINE void with_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::kNone:
      return function(ActivationConstant<Activation::kNone>{});
    case Activation::kGelu:
      return function(ActivationConstant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return function(ActivationConstant<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return function(ActivationConstant<Activation::kSilu>{});
  }
}

}  // namespace
}  // namespace sparse_engine
