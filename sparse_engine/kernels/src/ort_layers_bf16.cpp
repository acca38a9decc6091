#include "ort_layers_bf16.h"

#include "dispatch.h"
#include "layers_bf16.h"
#include "ort_matmul24.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

enum Input : size_t {
  kX,
  kX2,
  kHalves,
  kFirst,
  kFirstBias = 5,
  kSecond,
  kSecondBias = 8,
  kResidual,
  kGamma,
  kBeta,
  kFront,
  kFrontBias = 14,
  kFrontResidual,
  kInputCount
};

// A layer of canonical weights [rows, depth] from input `index` on, 2:4 unless they are that shape, which are packed.
LayerBf16 layer_input(const Api& api, const KernelInfo* info, int64_t rows, int64_t depth, size_t index) {
  const bool is_sparse = constant_input(api, info, index, "values").shape != Shape{rows, depth};
  const Weights24 weights = weights_input(api, info, rows, depth, index, is_sparse);
  LayerBf16 layer(weights);
  page_out(weights.values, size_t(rows) * depth / (is_sparse ? 2 : 1) * sizeof(float));
  return layer;
}

// One node of one session.
class Node {
 public:
  static constexpr const char* kName = "LayersBf16";
  static constexpr size_t kInputCount = Input::kInputCount;

  Node(const Api& api, const KernelInfo* info)
      : api_(api),
        activation_(parse_activation(string_attribute(api, info, "activation", "none"))),
        element_(element_attribute(api, info)),
        epsilon_(float_attribute(api, info, "epsilon")),
        threads_(threads_attribute(api, info)),
        first_(layer_input(api, info, int_attribute(api, info, "H"), int_attribute(api, info, "K"), kFirst)) {
    const int64_t layers = int_attribute(api, info, "layers", 1);
    if (layers < 1 || layers > 3) fail("attribute layers = " + std::to_string(layers) + ", expected 1, 2 or 3");
    if (element_ == Element::kCode) fail("attribute output = 2, expected 0 or 1");
    if (layers > 1) second_.emplace(layer_input(api, info, int_attribute(api, info, "N"), first_.rows(), kSecond));
    if (layers > 2) front_.emplace(layer_input(api, info, first_.depth(), int_attribute(api, info, "F"), kFront));
  }

  static ElementType input_type(size_t index) {
    if (index == kHalves) return kBfloat16;
    return index == kFirst + 1 || index == kSecond + 1 || index == kFront + 1 ? kUint8 : kFloat;
  }
  static bool is_optional(size_t index) { return index != kFirst; }
  static void infer_shape(const Api& api, ShapeInferContext* context) {
    infer_shape_from_either(api, context, kX, kHalves, [&](Shape& shape, std::vector<const char*>& names) {
      shape.back() = int_attribute(api, context, "N");
      names.back() = "";
    });
  }
  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    LayerNorm norm;
    Shape shape;
    const InputBf16 input = this->input(context, &norm, &shape);
    const size_t tokens = tokens_of(shape, entry().depth());
    shape.back() = last().rows();
    EpilogueBf16 epilogue = {nullptr, residual_input(api_, context, kResidual, shape), Activation::kNone, element_};
    const float* const first_bias = bias_input(api_, context, kFirstBias, "bias1", first_.rows());
    if (!second_) {
      epilogue.bias = first_bias;
      epilogue.activation = activation_;
      void* const output = allocate_output(api_, context, shape, element_);
      first_.run(input, tokens, output, epilogue, threads_, parallel_for(api_, context));
      return;
    }
    epilogue.bias = bias_input(api_, context, kSecondBias, "bias2", second_->rows());
    EpilogueBf16 hidden;
    hidden.bias = first_bias;
    hidden.activation = activation_;
    FrontBf16 front;
    if (front_) {
      front.layer = &*front_;
      front.epilogue.bias = bias_input(api_, context, kFrontBias, "bias0", front_->rows());
      front.epilogue.residual = residual_input(api_, context, kFrontResidual, shape);
    }
    void* const output = allocate_output(api_, context, shape, element_);
    LayerBf16::run_pair(front, first_, hidden, *second_, input, tokens, output, epilogue, threads_,
                        parallel_for(api_, context));
  }

 private:
  const LayerBf16& last() const { return second_ ? *second_ : first_; }
  const LayerBf16& entry() const { return front_ ? *front_ : first_; }

  // What the layers are given; `shape` is [..., K].
  InputBf16 input(KernelContext* context, LayerNorm* norm, Shape* shape) const {
    InputBf16 input;
    if (const auto halves = optional_input(api_, context, kHalves)) {
      input.halves = static_cast<const uint16_t*>(halves->data);
      *shape = halves->shape;
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
  std::optional<float> epsilon_;
  int threads_;
  LayerBf16 first_;
  std::optional<LayerBf16> second_, front_;
};

}  // namespace

Operator layers_bf16(FunctionTable table) {
  Operator op = operator_of_elements<Node>(table);
  op.GetOutputTypeCount = [](const CustomOp*) { return size_t(2); };  // no codes
  return op;
}

}  // namespace sparse_engine::ort
