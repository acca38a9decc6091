#include "ort_int8.h"

#include <limits>

#include "dispatch.h"
#include "ort_matmul24.h"
#include "ort_support.h"
#include "product_int8.h"

namespace sparse_engine::ort {
namespace {

enum Input : size_t {
  kX,
  kX2,
  kCodes,
  kFirst,
  kFirstBias = 6,
  kSecond,
  kSecondBias = 10,
  kResidual,
  kGamma,
  kBeta,
  kFront,
  kFrontBias = 17,
  kFrontResidual,
  kInputCount
};

// A layer of canonical weights [rows, depth] from input `index` on, which are packed.
LayerInt8 layer_input(const Api& api, const KernelInfo* info, int64_t rows, int64_t depth, size_t index, Codes codes,
                      Tier tier) {
  const Int8Input given = int8_weights_input(api, info, rows, depth, index);
  LayerInt8 layer(given.weights, given.scales, codes, tier);
  given.page_out();
  return layer;
}

// One node of one session.
class Node {
 public:
  static constexpr const char* kName = "LayersInt8";
  static constexpr size_t kInputCount = Input::kInputCount;

  Node(const Api& api, const KernelInfo* info)
      : api_(api),
        activation_(parse_activation(string_attribute(api, info, "activation", "none"))),
        element_(element_attribute(api, info)),
        codes_(codes_attribute(api, info, "y")),
        epsilon_(float_attribute(api, info, "epsilon")),
        threads_(threads_attribute(api, info)),
        first_(layer_input(api, info, int_attribute(api, info, "H"), int_attribute(api, info, "K"), kFirst,
                           codes_attribute(api, info, "x"), best_int8_tier())) {
    if (!float_attribute(api, info, "h_scale")) return;
    second_.emplace(layer_input(api, info, int_attribute(api, info, "N"), first_.rows(), kSecond,
                                codes_attribute(api, info, "h"), best_int8_tier()));
    if (!float_attribute(api, info, "f_scale")) return;
    front_.emplace(layer_input(api, info, first_.depth(), int_attribute(api, info, "F"), kFront,
                               codes_attribute(api, info, "f"), best_int8_tier()));
  }

  static ElementType input_type(size_t index) {
    if (index == kFirst || index == kSecond || index == kFront) return kInt8;
    const bool positions = index == kFirst + 1 || index == kSecond + 1 || index == kFront + 1;
    return index == kCodes || positions ? kUint8 : kFloat;
  }
  static bool is_optional(size_t index) { return index != kFirst && index != kFirst + 2; }
  static void infer_shape(const Api& api, ShapeInferContext* context) {
    infer_shape_from_either(api, context, kX, kCodes, [&](Shape& shape, std::vector<const char*>& names) {
      shape.back() = int_attribute(api, context, "N");
      names.back() = "";
    });
  }
  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    LayerNorm norm;
    Shape shape;
    const InputInt8 input = this->input(context, &norm, &shape);
    const size_t tokens = tokens_of(shape, entry().depth());
    shape.back() = last().rows();
    EpilogueInt8 epilogue = {nullptr, residual_input(api_, context, kResidual, shape), Activation::kNone, element_,
                             codes_};
    void* const output = allocate_output(api_, context, shape, element_);
    const float* const first_bias = bias_input(api_, context, kFirstBias, "bias1", first_.rows());
    if (second_) {
      epilogue.bias = bias_input(api_, context, kSecondBias, "bias2", second_->rows());
      EpilogueInt8 hidden;
      hidden.bias = first_bias;
      hidden.activation = activation_;
      FrontInt8 front;
      if (front_) {
        front.layer = &*front_;
        front.epilogue.bias = bias_input(api_, context, kFrontBias, "bias0", front_->rows());
        front.epilogue.residual = residual_input(api_, context, kFrontResidual, shape);
      }
      LayerInt8::run_pair(front, first_, hidden, *second_, input, tokens, output, epilogue, threads_,
                          parallel_for(api_, context));
    } else {
      epilogue.bias = first_bias;
      epilogue.activation = activation_;
      first_.run(input, tokens, output, epilogue, threads_, parallel_for(api_, context));
    }
  }

 private:
  const LayerInt8& last() const { return second_ ? *second_ : first_; }
  const LayerInt8& entry() const { return front_ ? *front_ : first_; }

  // What the layers are given; `shape` is [..., K].
  InputInt8 input(KernelContext* context, LayerNorm* norm, Shape* shape) const {
    InputInt8 input;
    const auto codes = optional_input(api_, context, kCodes);
    if (codes) {
      input.codes = static_cast<const uint8_t*>(codes->data);
      *shape = codes->shape;
    } else {
      const Tensor x = ort::input(api_, context, kX);
      *shape = x.shape;
      if (shape->empty()) fail("X has no dimensions, expected [..., K]");
      input.parts[0] = x.floats();
      input.depths[0] = int(shape->back());
      if (const auto more = optional_input(api_, context, kX2)) {
        Shape expected = x.shape;
        expected.back() = entry().depth() - input.depths[0];
        expect_shape("X2", more->shape, expected);
        input.parts[1] = more->floats();
        input.depths[1] = int(expected.back());
        shape->back() = entry().depth();
      }
    }
    if (epsilon_) {
      *norm = {bias_input(api_, context, kGamma, "gamma", first_.depth()),
               bias_input(api_, context, kBeta, "beta", first_.depth()), *epsilon_};
      input.norm = norm;
    }
    return input;
  }

  const Api api_;
  Activation activation_;
  Element element_;
  Codes codes_;
  std::optional<float> epsilon_;
  int threads_;
  LayerInt8 first_;
  std::optional<LayerInt8> second_, front_;
};

}  // namespace

Int8Input int8_weights_input(const Api& api, const KernelInfo* info, int64_t rows, int64_t depth, size_t index) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (rows < 1 || depth < 4 || depth % 4 != 0 || rows > kMost || depth > kMostDepthInt8) {
    fail("a layer of N = " + std::to_string(rows) + ", K = " + std::to_string(depth) +
         ", expected N >= 1 and K a positive multiple of 4, at most " + std::to_string(kMostDepthInt8));
  }
  const Tensor values = constant_input(api, info, index, "values");
  const bool dense = values.shape == Shape{rows, depth};
  if (!dense) expect_shape("values", values.shape, {rows, depth / 2});
  WeightsInt8 weights = {int(rows), int(depth), static_cast<const int8_t*>(values.data), nullptr};
  if (!dense) {
    const Tensor positions = constant_input(api, info, index + 1, "positions");
    expect_shape("positions", positions.shape, {rows, depth / 4});
    weights.positions = static_cast<const uint8_t*>(positions.data);
  }
  const Tensor scales = constant_input(api, info, index + 2, "scales");
  expect_shape("scales", scales.shape, {rows});
  return {weights, scales.floats()};
}

void Int8Input::page_out() const {
  const size_t kept = size_t(weights.depth) / (weights.dense() ? 1 : 2);
  sparse_engine::page_out(weights.values, size_t(weights.rows) * kept);
}

Operator layers_int8(FunctionTable table) { return operator_of_elements<Node>(table); }

}  // namespace sparse_engine::ort
