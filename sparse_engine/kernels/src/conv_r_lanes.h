// R-lanes: a convolution with output channels in the lanes, where a whole register of a pixel's channels is permuted at
// once.
//
//     a register of one pixel:          | c0 c1 c2 c3 ... c31 |
//     the pair that each row keeps:     | 0,2  1,3  0,1 ...   |
//     chosen by one permutation:        | c0 c2 c1 c3 c0 c1.. |   * pairs of weights of the rows -> sums
//
// A step is one permutation and one multiply-add. Its indices and weights are loaded once for eight pixels, whose
// registers stay put for the eight steps of a register and for two panels of sixteen rows. A block of the depth is so
// many registers that the streams of two panels stay in L1 while all pixels of the tile go past them. Where a tap of a
// pixel lies is a table of addresses, in which a border is a pixel of zeros: strides, paddings and enlarged inputs are
// in the table alone.
//
// Bound: as many permutations as multiply-adds. A Zen 5 issues two 512-bit ones of each per cycle: 744 Gop/s from L1,
// where its dense products have 510. Products of a matrix have the form too (layers_avx512_bf16.cpp).
//
// Included by instruction-set files only. A Format says how operands lie and are multiplied: as conv_pixels.h, and
//   Register, load(p), pick_and_add(sum, weights, indices, x), the indices in a Register too
#pragma once

#include "conv_pixels.h"
#include "packing.h"

namespace sparse_engine {
namespace {

template <class Format>
struct ConvInRegisters {
  using V = typename Format::V;
  using Vector = typename V::Vector;
  using Seen = PixelsSeen<Format>;
  static constexpr int kOctet = 8;  // pixels whose sums are in registers
  static constexpr int kRegisterBytes = V::kLanes * 4;
  static constexpr int kFullSteps = V::kLanes / 2;  // of a register that is full

  // Where each tap of each pixel of the tile is read: [taps][kPixelTile].
  using Places = const uint8_t* const*;

  static size_t packed_bytes(int rows, int depth, int taps) {
    return register_bytes(rows, {taps, depth / taps, V::kLanes});
  }
  static void pack(const Weights24& weights, int taps, void* packed) {
    pack_registers(weights, {taps, weights.depth / taps, V::kLanes}, packed);
  }

  static size_t places_bytes(const Convolution& conv) {
    return size_t(conv.window.taps()) * kPixelTile * sizeof(uint8_t*);
  }
  static size_t scratch_bytes(const Convolution& conv, int block_rows) {
    // The sums of all rows, and those of one panel turned, of which the last row may be read a vector beyond its end.
    const size_t rows = size_t(block_rows + V::kLanes - 1) / V::kLanes * V::kLanes;
    return Seen::pixels_bytes(conv) + places_bytes(conv) +
           ((rows + V::kLanes) * kPixelTile + V::kLanes) * sizeof(float);
  }

  static void run(const Convolution& conv, const Block& block, void* scratch) {
    for (size_t token = block.token_begin; token < block.token_end; token += kPixelTile) {
      const size_t left = block.token_end - token;
      run_tile(conv, block, token, left < size_t(kPixelTile) ? int(left) : kPixelTile, static_cast<uint8_t*>(scratch));
    }
  }

 private:
  static void run_tile(const Convolution& conv, const Block& block, size_t token, int tokens, uint8_t* scratch) {
    const uint8_t** const places = reinterpret_cast<const uint8_t**>(scratch + Seen::pixels_bytes(conv));
    float* const turned = reinterpret_cast<float*>(scratch + Seen::pixels_bytes(conv) + places_bytes(conv));
    float* const sums = turned + size_t(V::kLanes) * kPixelTile + V::kLanes;
    Segment segments[kPixelTile];
    const int count = cut_into_segments(conv, token, tokens, Seen::in_rows(conv), segments);
    const size_t entries = size_t(conv.window.taps()) * kPixelTile;
    for (size_t i = 0; i < entries; ++i) places[i] = scratch;  // the pixel of zeros, beyond the tile's pixels too
    Seen::see(conv, segments, count, scratch, [=](int t, int tap, const uint8_t* pixel) __attribute__((always_inline)) {
      places[size_t(tap) * kPixelTile + t] = pixel;
    });
    multiply(conv, block, places, tokens, sums, [&](int row, const float* panel) {
      const int left = block.row_end - row;
      Seen::turn(panel, 1, tokens, turned);
      store_rows_of_pixels<V, Format::kOperand>(conv, segments, count, row, left < V::kLanes ? left : V::kLanes, turned,
                                                kPixelTile);
    });
  }

  // All rows of a block of output rows for one tile. finish(row, sums) is called for each panel of V::kLanes rows: sums
  // [pixel][V::kLanes].
  template <class Finish>
  static SPARSE_ENGINE_INLINE void multiply(const Convolution& conv, const Block& rows, Places places, int tokens,
                                            float* sums, const Finish& finish) {
    const RegisterWalk walk = {conv.window.taps(), conv.channels, V::kLanes};
    const uint8_t* block = static_cast<const uint8_t*>(conv.product.packed);
    const int panels = (conv.product.rows + V::kLanes - 1) / V::kLanes;
    for (int begin = 0; begin < walk.registers(); begin += kBlockRegisters) {
      const bool last = begin + kBlockRegisters >= walk.registers();
      const int end = last ? walk.registers() : begin + kBlockRegisters;
      const size_t bytes = walk.bytes(begin, end);
      for (int row = rows.row_begin; row < rows.row_end;) {
        float* const panel_sums = sums + size_t(row - rows.row_begin) * kPixelTile;
        const uint8_t* const stream = block + size_t(row / V::kLanes) * bytes;
        const int together = row + V::kLanes < rows.row_end ? 2 : 1;
        for (int t = 0; t < tokens; t += kOctet) {
          const auto run = together == 2 ? accumulate<2> : accumulate<1>;
          run(walk, begin, end, stream, bytes, places + t, panel_sums + size_t(t) * V::kLanes, begin == 0);
        }
        for (int panel = 0; panel < together; ++panel, row += V::kLanes) {
          if (last) finish(row, panel_sums + size_t(panel) * V::kLanes * kPixelTile);
        }
      }
      block += bytes * panels;
    }
  }

  // One step of a register that has `Steps` of them, or, where that is 0, `steps`.
  template <int Panels, int Steps>
  static SPARSE_ENGINE_INLINE void add_step(Vector (&sum)[Panels][kOctet], const typename Format::Register (&x)[kOctet],
                                            const uint8_t* stream, size_t bytes, int step, int steps) {
    typename Format::Register weight[Panels], chosen[Panels];
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) {
      weight[p] = Format::load(stream + p * bytes + size_t(step) * kRegisterBytes);
      chosen[p] = Format::load(stream + p * bytes + size_t((Steps ? Steps : steps) + step) * kRegisterBytes);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kOctet; ++t) {
#pragma GCC unroll 2
      for (int p = 0; p < Panels; ++p) sum[p][t] = Format::pick_and_add(sum[p][t], weight[p], chosen[p], x[t]);
    }
  }

  // Eight pixels of some panels, whose streams are `bytes` apart. Pixels beyond the tile's see zeros, and are not
  // stored.
  template <int Panels>
  static __attribute__((noinline)) void accumulate(const RegisterWalk walk, int begin, int end, const uint8_t* stream,
                                                   size_t bytes, Places places, float* sums, bool first) {
    Vector sum[Panels][kOctet];
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 8
      for (int t = 0; t < kOctet; ++t) {
        sum[p][t] = first ? V::zero() : V::load(sums + size_t(p * kPixelTile + t) * V::kLanes);
      }
    }
    const int per_tap = walk.per_tap();
    int place = begin % per_tap;
    Places at = places + size_t(begin / per_tap) * kPixelTile;
    for (int index = begin; index < end; ++index) {
      typename Format::Register x[kOctet];
#pragma GCC unroll 8
      for (int t = 0; t < kOctet; ++t) x[t] = Format::load(at[t] + size_t(place) * kRegisterBytes);
      const int steps = walk.steps(place);
      if (steps == kFullSteps) {
#pragma GCC unroll 8
        for (int step = 0; step < kFullSteps; ++step) add_step<Panels, kFullSteps>(sum, x, stream, bytes, step, 0);
      } else {
        for (int step = 0; step < steps; ++step) add_step<Panels, 0>(sum, x, stream, bytes, step, steps);
      }
      stream += size_t(steps) * walk.step_bytes();
      if (++place == per_tap) {
        place = 0;
        at += kPixelTile;
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 8
      for (int t = 0; t < kOctet; ++t) V::store(sums + size_t(p * kPixelTile + t) * V::kLanes, sum[p][t]);
    }
  }
};

template <class Format>
constexpr ConvTactic conv_in_registers() {
  using Kernel = ConvInRegisters<Format>;
  return {{Kernel::kOctet, kPixelTile, 2 * Format::V::kLanes, kPixelsStreamCost},
          Kernel::packed_bytes,
          Kernel::pack,
          Kernel::scratch_bytes,
          Kernel::run};
}

}  // namespace
}  // namespace sparse_engine
