// Powers of two and of e, for activations and for the softmax.
//
// Bound: arithmetic only, a dozen instructions for a vector. Included by instruction-set files only (see
// vector_avx512.h); V is Avx2 or Avx512.
#pragma once

#include "matmul24.h"

namespace sparse_engine {
namespace {

// Coefficients of the minimax polynomial for 2^r, |r| <= 1/2, in relative error (Remez' exchange).
template <int Degree>
struct Exp2Polynomial;
template <>
struct Exp2Polynomial<3> {  // 8e-5
  static constexpr float kCoefficients[] = {0.999928057f, 0.693260968f, 0.242611125f, 0.0551716685f};
};
template <>
struct Exp2Polynomial<5> {  // 1.6e-7
  static constexpr float kCoefficients[] = {1.00000012f,   0.693146944f,   0.240221202f,
                                            0.0555071309f, 0.00967554096f, 0.00132764725f};
};

// 2^x for x <= 0; what is below 2^-126 becomes 2^-126, NaN stays NaN.
template <class V, int Degree>
SPARSE_ENGINE_INLINE typename V::Vector exp2_negative(typename V::Vector x) {
  constexpr auto& c = Exp2Polynomial<Degree>::kCoefficients;
  x = V::max(V::set(-126.0f), x);  // in this order: the second operand is the result where one is NaN
  const auto n = V::round(x);
  const auto r = x - n;
  auto p = V::set(c[Degree]);
#pragma GCC unroll 8
  for (int i = Degree - 1; i >= 0; --i) p = V::multiply_add(p, r, V::set(c[i]));
  return V::scale(p, n);
}

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

}  // namespace
}  // namespace sparse_engine
