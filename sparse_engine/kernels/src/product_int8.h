// Layers in 8 bits: weights packed for this machine, ready to be multiplied by any number of threads.
#pragma once

#include <vector>

#include "buffer.h"
#include "int8.h"
#include "work_queue.h"

namespace sparse_engine {

// What a layer is given: codes, or floats that it rounds to its own codes first.
struct InputInt8 {
  const uint8_t* codes = nullptr;              // [tokens, depth]
  const float* parts[2] = {nullptr, nullptr};  // else [tokens, depths[i]] each, side by side; the second may be null
  int depths[2] = {0, 0};
  const LayerNorm* norm = nullptr;  // of one part; null: none
};

// What layers and convolutions in 8 bits share. Throws Error(kInvalidInput) for weights that are not canonical, too
// deep, or scales that are not above 0.
void check_int8(const WeightsInt8& weights, const float* scales, Codes input);

// Of each row: what its sums start at, of codes less `offset`, and what they are multiplied with.
void fill_starts_and_scales(const WeightsInt8& weights, const float* scales, Codes input, int offset, int32_t* starts,
                            float* products);

class LayerInt8;

// A layer before a pair, whose output, of floats, is what the pair is given and what is added to its own: the form
// x' = x + front(a), y = x' + second(first(norm(x'))) of a transformer. Nobody else reads x'.
struct FrontInt8 {
  const LayerInt8* layer = nullptr;  // null: none
  EpilogueInt8 epilogue;             // bias, activation and residual
};

class LayerInt8 {
 public:
  // The weights are packed now, and may then be freed. scales [rows]: of each row's weights. Throws Error:
  // kInvalidInput for weights that are not canonical, too deep, or scales that are not above 0; kUnsupported for a
  // missing tier.
  LayerInt8(const WeightsInt8& weights, const float* scales, Codes input, Tier tier);

  // output[tokens, rows], of the epilogue's element. Safe to call from several threads at once; the result does not
  // depend on `threads`.
  void run(const InputInt8& input, size_t tokens, void* output, const EpilogueInt8& epilogue, int threads,
           const ParallelFor& parallel_for) const;

  // second(first(input)): to the bit what two calls give, but what lies between them, the second layer's codes, stays
  // in the caches. Of `hidden`, bias and activation are taken. With a front, `input` is that one's but for the norm,
  // and the epilogue's residual its output. Throws Error(kInvalidInput) for layers that do not follow one another.
  static void run_pair(const FrontInt8& front, const LayerInt8& first, const EpilogueInt8& hidden,
                       const LayerInt8& second, const InputInt8& input, size_t tokens, void* output,
                       const EpilogueInt8& epilogue, int threads, const ParallelFor& parallel_for);

  int rows() const { return rows_; }
  int depth() const { return depth_; }
  Tier tier() const { return tactic_->tier; }
  Codes input_codes() const { return input_; }
  size_t packed_bytes() const { return packed_.size(); }

 private:
  struct PairScratch;
  static void check_order(const LayerInt8& first, const LayerInt8& second);
  ProductInt8 product(void* output, const EpilogueInt8& epilogue) const;
  size_t codes_stride() const;
  const uint8_t* codes_of(const InputInt8& input, size_t begin, size_t tokens, uint8_t* scratch, size_t* stride) const;

  int rows_, depth_;
  bool dense_;
  Codes input_;
  const TacticInt8* tactic_;
  Buffer packed_;
  std::vector<int32_t> starts_;
  std::vector<float> scales_;
};

}  // namespace sparse_engine
