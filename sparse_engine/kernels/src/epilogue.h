// What happens to a vector of sums before it is stored: bias, activation, residual.
//
// Bound: about twenty arithmetic instructions per vector for a GELU, against depth / 2 multiply-adds for the
// sum itself. Included by instruction-set files only (see vector_avx512.h); V is Avx2 or Avx512.
#pragma once

#include "matmul24.h"

namespace sparse_engine {
namespace {

// e^x within 2e-7 relative, for x clamped to [-87, 88]: 2^n e^r, |r| <= ln(2) / 2, ln(2) in two parts so that
// r loses no bits (Cody and Waite), e^r by its Taylor series.
template <class V>
SPARSE_ENGINE_INLINE typename V::Vector exponential(typename V::Vector x) {
  x = V::min(V::max(x, V::set(-87.0f)), V::set(88.0f));
  const auto n = V::round(x * V::set(1.44269504f));
  auto r = V::multiply_add(n, V::set(-0.693359375f), x);
  r = V::multiply_add(n, V::set(2.12194440e-4f), r);
  auto p = V::set(1.0f / 720);
  p = V::multiply_add(p, r, V::set(1.0f / 120));
  p = V::multiply_add(p, r, V::set(1.0f / 24));
  p = V::multiply_add(p, r, V::set(1.0f / 6));
  p = V::multiply_add(p, r, V::set(0.5f));
  p = V::multiply_add(p, r, V::set(1.0f));
  p = V::multiply_add(p, r, V::set(1.0f));
  return V::scale(p, n);
}

// x Phi(x), where Phi(-|x|) = e^(-x^2/2) P(t), t = 1 / (1 + c |x|). P is a weighted least-squares fit to
// erfcx(|x| / sqrt 2) / 2 over |x| < 9.9, made for this file; its relative error is below 6e-8, so the far
// negative tail keeps its digits, which a fit of erf would cancel away.
template <class V>
SPARSE_ENGINE_INLINE typename V::Vector gelu(typename V::Vector x) {
  const auto t = V::set(1.0f) / V::multiply_add(V::abs(x), V::set(0.296984848f), V::set(1.0f));
  auto p = V::set(0.0374676436f);
  p = V::multiply_add(p, t, V::set(-0.170208141f));
  p = V::multiply_add(p, t, V::set(0.238284811f));
  p = V::multiply_add(p, t, V::set(-0.0824316666f));
  p = V::multiply_add(p, t, V::set(0.143874809f));
  p = V::multiply_add(p, t, V::set(0.0943258777f));
  p = V::multiply_add(p, t, V::set(0.120310836f));
  p = V::multiply_add(p, t, V::set(0.118375801f));
  const auto tail = p * t * exponential<V>(x * x * V::set(-0.5f));
  return x * V::select_negative(x, tail, V::set(1.0f) - tail);
}

// x / (1 + e^(-u)): SiLU with u = x; the tanh form of GELU with u = 2 sqrt(2/pi) (x + 0.044715 x^3).
template <class V>
SPARSE_ENGINE_INLINE typename V::Vector times_sigmoid(typename V::Vector x, typename V::Vector u) {
  return x / (V::set(1.0f) + exponential<V>(V::zero() - u));
}

template <class V, Activation A>
SPARSE_ENGINE_INLINE typename V::Vector activate(typename V::Vector x) {
  if constexpr (A == Activation::kGelu) return gelu<V>(x);
  if constexpr (A == Activation::kSilu) return times_sigmoid<V>(x, x);
  if constexpr (A == Activation::kGeluTanh) {
    const auto slope = V::multiply_add(x * x, V::set(0.0713548163f), V::set(1.59576912f));
    return times_sigmoid<V>(x, x * slope);
  }
  return x;
}

// Stores `count` sums of adjacent rows of one token. `index` is the first one's place in the output.
template <class V, Activation A>
SPARSE_ENGINE_INLINE void store_rows(const Product& product, size_t index, typename V::Vector sums,
                                     typename V::Vector bias, int count) {
  auto y = activate<V, A>(sums + bias);
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
