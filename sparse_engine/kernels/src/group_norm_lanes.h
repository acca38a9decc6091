// Group normalisation with the places of a map in the lanes.
//
// Bound: a group is read twice for its statistics, from L1 the second time, and once more, from L2 where it fits, to be
// normalised. Three instructions a vector beside the loads; with SiLU some thirty, which are then most of the time.
//
// Included by instruction-set files only (see vector_avx512.h).
#pragma once

#include "epilogue.h"
#include "group_norm.h"

namespace sparse_engine {
namespace {

template <class V>
struct GroupNormLanes {
  using Vector = typename V::Vector;
  static constexpr int kSums = 4;  // independent ones hide the latency of an addition
  static constexpr size_t kStep = size_t(kSums) * V::kLanes;

  static Moments moments(const float* x, size_t count) {
    const float centre = float(mean(x, count));
    Sums distances, squares;
    const Vector centres = V::set(centre);
    for_each_vector(x, count, [&](int sum, Vector value, int lanes) __attribute__((always_inline)) {
      const Vector distance = value - (lanes == V::kLanes ? centres : first_lanes(centre, lanes));
      distances.add(sum, distance);
      squares.sum[sum] = V::multiply_add(distance, distance, squares.sum[sum]);
    });
    // The rounding of the centre is the mean of the distances from it.
    const double rest = distances.total();
    return {centre + rest / double(count), squares.total() - rest * rest / double(count)};
  }

  static void apply(const float* x, size_t count, const Affine& affine, Activation activation, float* y) {
    if (activation == Activation::kSilu) {
      apply_with<Activation::kSilu>(x, count, affine, y);
    } else {
      apply_with<Activation::kNone>(x, count, affine, y);
    }
  }

 private:
  struct Sums {
    Vector sum[kSums] = {V::zero(), V::zero(), V::zero(), V::zero()};

    SPARSE_ENGINE_INLINE void add(int index, Vector value) { sum[index] = sum[index] + value; }
    double total() const {
      alignas(64) float lanes[kStep];
      for (int i = 0; i < kSums; ++i) V::store(lanes + i * V::kLanes, sum[i]);
      double total = 0.0;
      for (const float lane : lanes) total += lane;
      return total;
    }
  };

  static double mean(const float* x, size_t count) {
    Sums sums;
    for_each_vector(x, count, [&](int sum, Vector value, int) __attribute__((always_inline)) { sums.add(sum, value); });
    return sums.total() / double(count);
  }

  // function(which of the sums, vector, how many of its lanes count); lanes beyond those are zero.
  template <class Function>
  static SPARSE_ENGINE_INLINE void for_each_vector(const float* x, size_t count, const Function& function) {
    size_t i = 0;
    for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
      for (int sum = 0; sum < kSums; ++sum) function(sum, V::load_unaligned(x + i + sum * V::kLanes), V::kLanes);
    }
    for (; i + V::kLanes <= count; i += V::kLanes) function(0, V::load_unaligned(x + i), V::kLanes);
    if (const int left = int(count - i)) function(0, V::load_first(x + i, left), left);
  }

  static Vector first_lanes(float value, int count) {
    float lanes[V::kLanes];
    for (float& lane : lanes) lane = value;
    return V::load_first(lanes, count);
  }

  template <Activation A>
  static void apply_with(const float* x, size_t count, const Affine& affine, float* y) {
    const Vector centre = V::set(affine.centre), factor = V::set(affine.factor), offset = V::set(affine.offset);
    const auto normalise = [&](Vector value) __attribute__((always_inline)) {
      return activate<V, Operand::kFloat32, A>(V::multiply_add(value - centre, factor, offset));
    };
    size_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes) {
      V::store_first(y + i, normalise(V::load_unaligned(x + i)), V::kLanes);
    }
    if (const int left = int(count - i)) V::store_first(y + i, normalise(V::load_first(x + i, left)), left);
  }
};

template <class V>
constexpr GroupNormKernel places_in_lanes() {
  return {GroupNormLanes<V>::moments, GroupNormLanes<V>::apply};
}

}  // namespace
}  // namespace sparse_engine
