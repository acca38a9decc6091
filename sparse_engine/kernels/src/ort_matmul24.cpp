#include "ort_matmul24.h"

#include <limits>

#include "dispatch.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

// The two operators differ in how their weights are given.
struct Sparse : SparseForm {
  static constexpr const char* kName = "MatMul24";
  enum Input : size_t { kX = 0, kValues = 1, kBias = 3, kResidual = 4, kInputCount = 5 };
};
struct Dense : DenseForm {
  static constexpr const char* kName = "MatMulBf16";
  enum Input : size_t { kX = 0, kValues = 1, kBias = 2, kResidual = 3, kInputCount = 4 };
};

// One node of one session.
template <class Form>
class Kernel : public Form {
 public:
  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        attributes_(api, info, Form::kDefaultCompute),
        product_(weights_input(api, info, int_attribute(api, info, "N"), int_attribute(api, info, "K"), Form::kValues,
                               Form::kIsSparse),
                 attributes_.tier, attributes_.lanes) {
    product_.page_out_weights();
  }

  static ElementType input_type(size_t index) {
    return Form::kIsSparse && index == Form::kValues + 1 ? kUint8 : kFloat;
  }
  static bool is_optional(size_t index) { return index >= Form::kBias; }
  static void infer_shape(const Api& api, ShapeInferContext* context) { infer_rows(api, context); }
  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    const Given given(api_, context, product_.depth(), product_.rows());
    Epilogue epilogue;
    epilogue.activation = attributes_.activation;
    epilogue.bias = bias_input(api_, context, Form::kBias, "bias", product_.rows());
    epilogue.residual = residual_input(api_, context, Form::kResidual, given.shape);
    float* const y = allocate_output(api_, context, given.shape);
    product_.run(given.x, given.tokens, y, epilogue, attributes_.threads, parallel_for(api_, context));
  }

 private:
  const Api api_;
  ProductAttributes attributes_;
  MatMul24 product_;
};

}  // namespace

ProductAttributes::ProductAttributes(const Api& api, const KernelInfo* info, const char* default_compute)
    : activation(parse_activation(string_attribute(api, info, "activation", "none"))),
      threads(threads_attribute(api, info)),
      tier(best_tier(parse_compute_is_bfloat16(string_attribute(api, info, "compute", default_compute)))),
      lanes(parse_lanes(string_attribute(api, info, "tactic", "t-lanes"))) {}

Given::Given(const Api& api, KernelContext* context, int depth, int rows) {
  const Tensor given = input(api, context, 0);
  x = given.floats();
  tokens = tokens_of(given.shape, depth);
  shape = given.shape;
  shape.back() = rows;
}

Weights24 weights_input(const Api& api, const KernelInfo* info, int64_t rows, int64_t depth, size_t index,
                        bool is_sparse) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (rows < 1 || depth < 4 || depth % 4 != 0 || rows > kMost || depth > kMost) {
    fail("attributes N = " + std::to_string(rows) + ", K = " + std::to_string(depth) +
         ", expected N >= 1 and K a positive multiple of 4");
  }
  const char* const name = is_sparse ? "values" : "weight";
  const Tensor values = constant_input(api, info, index, name);
  expect_shape(name, values.shape, {rows, is_sparse ? depth / 2 : depth});
  if (!is_sparse) return {int(rows), int(depth), values.floats(), nullptr};
  const Tensor positions = constant_input(api, info, index + 1, "positions");
  expect_shape("positions", positions.shape, {rows, depth / 4});
  return {int(rows), int(depth), values.floats(), static_cast<const uint8_t*>(positions.data)};
}

size_t tokens_of(const Shape& shape, int depth) {
  if (shape.empty() || shape.back() != depth) {
    fail("X has shape " + to_string(shape) + ", expected [..., K] with K = " + std::to_string(depth));
  }
  size_t tokens = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) tokens *= size_t(shape[i]);
  return tokens;
}

const float* bias_input(const Api& api, KernelContext* context, size_t index, const char* name, int rows) {
  const auto bias = optional_input(api, context, index);
  if (!bias) return nullptr;
  expect_shape(name, bias->shape, {rows});
  return bias->floats();
}

const float* residual_input(const Api& api, KernelContext* context, size_t index, const Shape& shape) {
  const auto residual = optional_input(api, context, index);
  if (!residual) return nullptr;
  expect_shape("residual", residual->shape, shape);
  return residual->floats();
}

void infer_rows(const Api& api, ShapeInferContext* context) {
  infer_last_dimension(api, context, [&](int64_t) { return int_attribute(api, context, "N"); });
}

Operator matmul24(FunctionTable table) { return operator_of<Kernel<Sparse>>(table); }
Operator matmul_bf16(FunctionTable table) { return operator_of<Kernel<Dense>>(table); }

}  // namespace sparse_engine::ort
